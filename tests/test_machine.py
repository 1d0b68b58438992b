"""The operation count against torch's own counter, the machine's choices."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model
from engine import errors, machine


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
    assert 2 * model.forward_flops(size, rows * cols, text) == counter.get_total_flops()


def test_the_design_figures():
    """1.29 and 3.42 TFLOP a forward pass of the 2B model at 256^2 and 512^2 pixels, with 256 text tokens."""
    assert model.forward_flops(model.SIZES["2b"], 256, 256) / 1e12 == pytest.approx(1.29, abs=0.01)
    assert model.forward_flops(model.SIZES["2b"], 1024, 256) / 1e12 == pytest.approx(3.42, abs=0.01)


def test_devices():
    assert machine.pick_device("cpu") == torch.device("cpu")
    assert machine.pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("abacus", "cuda:99"):
        with pytest.raises(errors.UserError, match=name):
            machine.pick_device(name)


@pytest.mark.parametrize(
    "small, large, expected",
    [
        ((1, 1), (1, 2), torch.bfloat16),
        ((1, 1), (1, 1.2), torch.float32),
        ((3, 1), (1, 4), torch.bfloat16),
        ((100, 1), None, torch.float32),
    ],
)
def test_the_faster_precision_is_picked(small, large, expected, monkeypatch):
    """bf16 where its large product is clearly faster; a type without instructions is seen by a small product alone."""
    times = {256: small, 768: large}

    def seconds(device, dtype, side=768, repeats=5):
        return times[side][dtype is torch.float32]

    monkeypatch.setattr(machine, "matmul_seconds", seconds)
    assert machine.pick_precision(torch.device("cpu")) is expected


def test_kept_memory_changes_no_result():
    a = torch.randn(64, 64)
    before = a @ a
    machine.keep_freed_memory()
    assert torch.equal(before, a @ a)
