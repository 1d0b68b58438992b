"""The objectives of peers/ in the loop: times, derivatives, cost, resuming, sampling, bad input.

Their fixed points and whole steps, times included, are lines of toy/identities.py, run by tests/test_toy.py.
"""

import shutil

import numpy as np
import programs
import pytest
import torch
from programs import TINY, last, run, same
from ranks import TINY as TINY_TRAIN
from ranks import train as processes
from safetensors.torch import load_file

import model
import objectives
import sample
import train
from engine import arguments, errors, machine
from engine.processes import Ranks
from peers import imm, meanflow, shortcut, tim

QUICK = ["--batch-size", 8, *programs.QUICK[2:]]
NAMES = ("shortcut", "meanflow", "improved_meanflow", "tim")


def test_other_numbers_of_steps_are_told_a_learned_length():
    def lengths(n):
        seen = []
        V = lambda x, t, s: seen.append((t - s)[0].item()) or 0 * x  # noqa: E731
        ends = [t for t, _ in shortcut.trajectory(V, torch.zeros(1, 2), (), steps=n)]
        assert len(seen) == n and np.allclose(ends, np.arange(n - 1, -1, -1) / n)
        left = np.arange(n, 0, -1) / n  # of the way; the last of more than M steps have less than 1/M
        assert np.allclose(seen, np.minimum(seen[0], left), rtol=0, atol=1e-6)
        return seen[0]

    learned = [1, 1 / 2, 1 / 4, 1 / 4, 1 / 64, 1 / 128, 1 / 128]
    assert [lengths(n) for n in (1, 2, 3, 4, 50, 128, 500)] == pytest.approx(learned)


def network(factor: float) -> model.Denoiser:
    """The laptop model with weights unlike those of the start, where its output is zero."""
    torch.manual_seed(0)
    made = model.Denoiser(**model.SIZES["laptop"], time_factor=factor)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.02 * torch.randn_like(p)
    return made.requires_grad_(False)


def some_inputs(n: int) -> tuple:
    g = torch.Generator().manual_seed(1)
    x, v = torch.randn(n, 3, 16, 16, generator=g), torch.randn(n, 3, 16, 16, generator=g)
    t, r = torch.linspace(0.3, 0.9, n), torch.linspace(0.1, 0.5, n)
    return x, v, t, r, (torch.randn(n, 6, 256, generator=g), torch.randn(n, 256, generator=g))


@pytest.mark.parametrize(
    "factor, precision, close",
    [(1.0, torch.float32, True), (1000.0, torch.float32, False), (1.0, torch.bfloat16, False)],
)
def test_the_finite_difference_needs_slow_time_features_and_fp32(factor, precision, close):
    """On the transformer, against the exact derivative. With FLUX's 1000 t in the features, or in bf16, it is noise."""
    V, (x, v, t, r, c) = network(factor), some_inputs(4)
    exact = meanflow.path_derivative(V, x, v, t, r, c)
    V.precision = precision
    off = (tim.path_difference(V, x, v, t, r, c) - exact).norm() / exact.norm()
    assert off < 0.01 if close else off > 0.2
    assert all(objectives.OBJECTIVES[name].time_factor == 1 for name in NAMES)


def test_auto_takes_fp32_for_finite_differences(monkeypatch):
    monkeypatch.setattr(machine, "pick_precision", lambda device: torch.bfloat16)
    names = ("self_e", "shortcut", "tim", "meanflow", "improved_meanflow", "meanflow --derivative forward")
    found = []
    for name in names:
        args = arguments.parse(["--objective", *name.split()])
        if arguments.precision_of(args, torch.device("cpu"), Ranks()) == torch.float32:
            found.append(name)
    assert found == ["tim", "meanflow", "improved_meanflow"]


@pytest.mark.parametrize("name", [*NAMES, "imm"])
def test_each_trains_resumes_and_samples(name, tmp_path, monkeypatch):
    monkeypatch.setitem(model.SIZES, "laptop", TINY)
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    guided = ["--train-guidance", 2] if name != "imm" else []
    words = ["--objective", name, *guided, "--steps", 4, "--out", straight, *QUICK, "--save-every", 2]
    run(monkeypatch, train, *words)
    shutil.copytree(straight, parts)
    shutil.rmtree(last(parts))  # as if stopped after two iterations
    run(monkeypatch, train, "--resume", "--out", parts, "--device", "cpu")
    assert same(straight, parts)

    loaded, seen = sample.load(straight, torch.device("cpu")), []
    assert loaded.config["guidance"] == 1 or name == "imm"  # it is in the target of training already
    loaded.network.register_forward_pre_hook(lambda m, x: seen.append((x[1][0].item(), x[2][0].item())))
    sample.generate(loaded, ["x"], [(0,)], steps=2, guidance=1.0)
    start = imm.T_MAX if name == "imm" else 1
    assert np.allclose(seen, [(start, start / 2), (start / 2, 0)])  # the network is told where the step leads
    with pytest.raises(errors.UserError, match="--eta"):
        sample.generate(loaded, ["x"], [(0,)], steps=2, eta=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_and_the_compiler_change_nothing(name, tmp_path):
    """Gradients are reduced although evaluations run inside the step; compiled blocks give the same to rounding."""
    flags = ["--objective", name, "--steps", 3, "--batch-size", 16, "--train-guidance", 2]
    flags += "--grid-every 0 --device cpu --precision fp32".split()
    soon = TINY_TRAIN.replace("errors.run", "train.EAGER_STEPS = 1\nerrors.run")
    processes(1, "--out", tmp_path / "one", *flags, "--no-compile")
    processes(2, "--out", tmp_path / "two", *flags, "--no-compile")
    processes(1, "--out", tmp_path / "compiled", *flags, "--compile", script=soon)
    one, *others = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two", "compiled"))
    for other in others:  # Adam moved them by 1e-2
        assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-4
