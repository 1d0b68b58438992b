"""Muon beside Adam: what each moves, and a run with it that is stopped and goes
on; beginning with another run's weights."""

import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

import model
import train
from engine import checkpoint, errors, optimizers

QUICK = ["--batch-size", "4", "--device", "cpu", "--precision", "fp32", "--no-compile", "--grid-every", "0"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main()


def weights(run, name="network"):
    return load_file(checkpoint.complete_states(run)[-1] / f"{name}.safetensors")


def test_muon_moves_the_blocks_matrices_with_equal_singular_values_and_adam_the_rest():
    torch.manual_seed(0)
    network = model.Denoiser(**model.SIZES["laptop"])
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = optimizers.build("muon", network, 1e-2, (0.9, 0.99))
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    kept = sum(x.numel() for own in optimizer.state.values() for x in own.values() if x.dim())
    assert kept == optimizers.moments("muon", network) < optimizers.moments("adam", network)
    for name, p in network.named_parameters():
        change = p.detach() - before[name]
        if p.dim() == 2 and "_blocks." in name:
            values = torch.linalg.svdvals(change)[: int(0.9 * min(p.shape))]  # a random square has tiny ones
            assert values.max() < 2 * values.min(), name  # Newton and Schulz: 0.7 .. 1.2
            rms = change.square().mean().sqrt()
            assert rms == pytest.approx(0.2e-2, rel=0.25), name
        else:
            # Adam's first: the sign
            assert torch.allclose(change.abs(), torch.full_like(change, 1e-2), rtol=0.02), name


def test_a_run_with_muon_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setitem(
        model.SIZES, "laptop", model.SIZES["laptop"] | {"width": 32, "heads": 2, "axes": (4, 6, 6)}
    )
    run(monkeypatch, "--steps", 4, "--optimizer", "muon", "--out", tmp_path / "whole", *QUICK)
    run(
        monkeypatch,
        "--steps",
        4,
        "--optimizer",
        "muon",
        "--out",
        tmp_path / "halves",
        *QUICK,
        "--save-every",
        2,
    )
    for state in checkpoint.complete_states(tmp_path / "halves")[1:]:
        for file in state.iterdir():
            file.unlink()
        state.rmdir()
    run(monkeypatch, "--resume", "--out", tmp_path / "halves", "--device", "cpu")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(errors.UserError, match="--optimizer muon"):
        run(monkeypatch, "--resume", "--out", tmp_path / "halves", "--optimizer", "adam", "--steps", 5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_muon_is_torchs(precision):
    """To the last bit in bf16, which torch's takes everywhere; in fp32 as far from it as bf16 rounds."""
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 24), (16, 16)]
    ours, theirs = (
        [torch.nn.Parameter(p.clone()) for p in start] for start in [[torch.randn(s) for s in shapes]] * 2
    )
    mine = optimizers.Muon(ours, 1e-2, precision)
    torchs = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for lr in (1e-2, 1e-2, 3e-3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.param_groups[0]["lr"] = torchs.param_groups[0]["lr"] = lr
        mine.step()
        torchs.step()
    for p, q in zip(ours, theirs):
        assert torch.equal(mine.state[p]["momentum_buffer"], torchs.state[q]["momentum_buffer"])
        assert torch.equal(p, q) if precision == torch.bfloat16 else torch.allclose(p, q, atol=1e-3)
        assert not torch.equal(p, q) or precision == torch.bfloat16


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3)])
def test_orthogonal_moves_each_singular_value_by_the_polynomial(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.square().sum().sqrt()
    a, b, c = optimizers.POLYNOMIAL
    for _ in range(optimizers.ROUNDS):
        values = a * values + b * values**3 + c * values**5
    before = matrix.clone()
    assert torch.allclose(optimizers.orthogonal(matrix[None], torch.float64)[0], u @ values.diag() @ v)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("precision, used", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_muon_works_in_the_networks_precision(precision, used, tmp_path, monkeypatch):
    """In bf16 on a processor without its instructions an iteration takes five times as long."""
    seen = set()
    real = optimizers.orthogonal
    monkeypatch.setattr(optimizers, "orthogonal", lambda m, p: seen.add(p) or real(m, p))
    run(
        monkeypatch,
        "--steps",
        1,
        "--optimizer",
        "muon",
        "--out",
        tmp_path / "run",
        *QUICK,
        "--precision",
        precision,
    )
    assert seen == {used}


def test_a_run_begins_with_anothers_average(tmp_path, monkeypatch):
    """With a learning rate of nearly nothing the new run stays where it began."""
    run(monkeypatch, "--steps", 3, "--out", tmp_path / "first", *QUICK)
    run(
        monkeypatch,
        "--steps",
        2,
        "--out",
        tmp_path / "second",
        "--init",
        tmp_path / "first",
        "--lr",
        1e-12,
        *QUICK,
        "--txt-len",
        9,
        "--seed",
        5,
        "--objective",
        "flow_matching",
    )
    first, second = weights(tmp_path / "first", "model"), weights(tmp_path / "second")
    assert all(torch.allclose(first[key], second[key], atol=1e-4) for key in first)
    assert any(
        not torch.equal(first[key], torch.zeros_like(first[key])) for key in first if key.startswith("final")
    )
    shutil.rmtree(tmp_path / "first")  # it is not read again
    run(monkeypatch, "--resume", "--steps", 3, "--out", tmp_path / "second", "--device", "cpu")


@pytest.mark.parametrize("change, said", [(["--init", "nowhere"], "nowhere"), ([], "another shape")])
def test_weights_that_do_not_fit_are_refused(change, said, tmp_path, monkeypatch):
    run(monkeypatch, "--steps", 1, "--out", tmp_path / "first", *QUICK)
    if not change:
        monkeypatch.setitem(model.SIZES, "laptop", model.SIZES["laptop"] | {"single": 1})
    with pytest.raises(errors.UserError, match=said):
        run(
            monkeypatch,
            "--steps",
            1,
            "--out",
            tmp_path / "second",
            "--init",
            tmp_path / "first",
            *QUICK,
            *change,
        )
    assert not checkpoint.complete_states(tmp_path / "second")
