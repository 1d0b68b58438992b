"""The price of a run: operations against torch's own counter, memory against what torch keeps."""

import copy
import re

import pytest
import torch
from programs import QUICK, last, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model
import recipe
import train
from engine import optimizers, price

BIG = model.SIZES["2b"]


@pytest.mark.parametrize(
    "double, single, rows, cols, text", [(2, 4, 8, 8, 16), (1, 0, 4, 10, 7), (0, 3, 5, 5, 9)]
)
def test_forward_flops_equal_torchs_counter(double, single, rows, cols, text):
    size = model.SIZES["laptop"] | {"double": double, "single": single}
    network = model.Denoiser(**size)
    x = torch.randn(2, size["channels"], rows * size["patch"], cols * size["patch"])
    txt, vec = torch.randn(2, text, size["txt_dim"]), torch.randn(2, size["vec_dim"])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(x, torch.rand(2), torch.zeros(2), txt, vec)
    assert 2 * price.forward_flops(size, rows * cols, text) == counter.get_total_flops()


def test_the_price_of_the_paper():
    """About 4.7e21 FLOP for the whole run, 1.29 and 3.42 TFLOP for a forward pass at 256^2 and 512^2 pixels."""
    assert price.forward_flops(BIG, 256, 256) / 1e12 == pytest.approx(1.29, abs=0.01)
    assert price.forward_flops(BIG, 1024, 256) / 1e12 == pytest.approx(3.42, abs=0.01)
    total = price.run_flops(BIG, recipe.RECIPES["2b"], "self_e", 8)
    assert total == pytest.approx(4.7e21, rel=0.05)
    rest = price.run_flops(BIG, recipe.RECIPES["2b"], "self_e", 8, start=600_000)
    mean = (price.forward_flops(BIG, 256, 256) + price.forward_flops(BIG, 1024, 256)) / 2
    assert rest == pytest.approx(110_000 * 768 * 5.5 * mean) and rest < total
    plain = price.run_flops(BIG, recipe.make("2b", aux_from=1.0), "flow_matching", 8)
    assert plain < 0.75 * total


def test_the_state_is_what_torch_keeps():
    """Counted on a small layer after a step of the run's own Adam, and as float32 throughout."""
    layer = torch.nn.Linear(30, 7)
    ema, adam = copy.deepcopy(layer), optimizers.build("adam", layer, 1e-3, (0.9, 0.95))
    layer(torch.ones(2, 30)).sum().backward()
    adam.step()

    def size(tensors) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    moments = [x for kept in adam.state.values() for x in kept.values() if x.dim()]  # not the count of steps
    kept = {"weights": size(layer.parameters()), "gradients": size(p.grad for p in layer.parameters())}
    kept |= {"optimizer": size(moments), "EMA": size(ema.parameters())}
    parameters = sum(p.numel() for p in layer.parameters())
    assert price.state_bytes(parameters, optimizers.moments("adam", layer), 1) == kept
    assert price.state_bytes(parameters, 2 * parameters, 4) == kept | {"optimizer": kept["optimizer"] / 4}


def test_dry_run_writes_nothing_and_names_what_the_run_will_cost(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, train, "--size", "2b", "--dry-run")
    printed = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    for wanted in ("2,247", "iterations 0 to 500,000", "500,000 to 710,000", "41.8", "64 GPUs", "H100-hours"):
        assert wanted in printed, wanted
    run(monkeypatch, train, "--dry-run", "--steps", 2)
    gib = float(re.search(r"each saved state: ([\d.]+) GiB", capsys.readouterr().out)[1])
    run(monkeypatch, train, *QUICK, "--steps", 1, "--out", "r")
    written = sum(file.stat().st_size for file in last(tmp_path / "r").iterdir()) / 2**30
    assert written == pytest.approx(gib, rel=0.3)
