"""Muon beside Adam: what each moves, and a run with it that is stopped and goes on."""

import shutil

import pytest
import torch
from programs import QUICK, TINY, last, refused, run, same

import model
import train
from engine import optimizers


def test_muon_moves_the_blocks_matrices_with_equal_singular_values_and_adam_the_rest():
    torch.manual_seed(0)
    network = model.Denoiser(**model.SIZES["laptop"])
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network.precision = torch.bfloat16  # that of the network, or an iteration takes five times as long
    assert optimizers.build("muon", network, 1e-2, (0.9, 0.99)).parts[0].precision == torch.bfloat16
    network.precision = torch.float32
    optimizer = optimizers.build("muon", network, 1e-2, (0.9, 0.99))
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    kept = sum(x.numel() for state in optimizer.state.values() for x in state.values() if x.dim())
    assert kept == optimizers.moments("muon", network) < optimizers.moments("adam", network)
    for name, p in network.named_parameters():
        change = p.detach() - before[name]
        if p.dim() == 2 and "_blocks." in name:
            values = torch.linalg.svdvals(change)[: int(0.9 * min(p.shape))]  # a random square has tiny ones
            assert values.max() < 2 * values.min(), name  # Newton and Schulz: 0.7 .. 1.2
            assert change.square().mean().sqrt() == pytest.approx(0.2e-2, rel=0.25), name
        else:
            assert torch.allclose(change.abs(), torch.tensor(1e-2), rtol=0.02), name  # Adam's first: the sign


def test_a_run_with_muon_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(model.SIZES, "laptop", TINY)
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    run(monkeypatch, train, "--steps", 4, "--optimizer", "muon", "--out", straight, *QUICK, "--save-every", 2)
    shutil.copytree(straight, halves)
    shutil.rmtree(last(halves))
    run(monkeypatch, train, "--resume", "--out", halves, "--device", "cpu")
    assert same(straight, halves)
    words = ["--resume", "--out", halves, "--optimizer", "adam", "--steps", 5]
    assert "--optimizer muon" in refused(monkeypatch, capsys, train, *words)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_muon_is_torchs(precision):
    """To the last bit in bf16, which torch's takes everywhere; in fp32 as far from it as bf16 rounds."""
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 24), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
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
