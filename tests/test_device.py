"""The accelerator against the CPU: one code path, the same numbers. Needs CUDA or MPS; without one these are skipped.

On a machine with a GPU run the whole suite: train.py, sample.py and the rest pick the device themselves.
"""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import losses
import model
import sampler
from engine import checkpoint

ROOT = Path(__file__).parent.parent
NAME = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
pytestmark = pytest.mark.skipif(NAME == "cpu", reason="this machine has no CUDA or MPS device")
only_cuda = pytest.mark.skipif(NAME != "cuda", reason="of CUDA alone")
SIZE = dict(
    width=64, heads=2, double=2, single=2, axes=(8, 12, 12), channels=3, patch=4, txt_dim=16, vec_dim=8
)


def network(precision=torch.float32) -> model.Denoiser:
    """Weights away from zero, drawn on the CPU."""
    torch.manual_seed(0)
    made = model.Denoiser(**SIZE, precision=precision)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return made


def gradient(device: str, precision=torch.float32, compiled=False, recompute=0, aux=True) -> torch.Tensor:
    """All gradients of one Self-E step, as one vector on the CPU."""
    V = network(precision).to(device)
    ema, V.recompute = copy.deepcopy(V).requires_grad_(False), recompute
    if compiled:
        V.compile_blocks()
        ema.compile_blocks()
    g, B, shape = torch.Generator().manual_seed(1), 8, (3, 16, 24)
    x0 = torch.randn(B, *shape, generator=g)
    c, null, fake = ((torch.randn(B, 5, 16, generator=g), torch.randn(B, 8, generator=g)) for _ in range(3))
    x0, c, null, fake = x0.to(device), *(tuple(x.to(device) for x in pair) for pair in (c, null, fake))
    is_null = torch.zeros(B, dtype=torch.bool, device=device)
    draws = losses.draw(0, 0, list(range(B)), shape, device=device)
    losses.SelfE(V, ema)(x0, c, null, fake, is_null, draws, 0.7, 0.4, aux)[0].backward()
    return torch.cat([p.grad.flatten().cpu() for p in V.parameters()])


@pytest.fixture(scope="module")
def exact():
    return gradient("cpu")


@pytest.mark.parametrize(
    "choices, close",
    [
        (dict(), 1e-4),
        (dict(recompute=3), 1e-4),
        (dict(precision=torch.bfloat16), 0.05),
        pytest.param(dict(compiled=True), 1e-4, marks=only_cuda),
        pytest.param(dict(compiled=True, precision=torch.bfloat16, recompute=2), 0.05, marks=only_cuda),
    ],
)
def test_a_step_has_the_gradients_of_the_cpu(exact, choices, close):
    other = gradient(NAME, **choices)
    torch._dynamo.reset()
    assert ((other - exact).norm() / exact.norm()).item() < close


@pytest.mark.parametrize("steps, guidance, eta", [(1, 1.0, 1.0), (4, 3.0, 1.0), (4, 1.5, 0.0)])
def test_sampling_gives_the_pictures_of_the_cpu(steps, guidance, eta):
    g = torch.Generator().manual_seed(2)
    x1, shape = torch.randn(4, 3, 16, 16, generator=g), (4, 5, 16)
    c, null = ((torch.randn(shape, generator=g), torch.randn(4, 8, generator=g)) for _ in range(2))
    noise = [torch.randn(4, 3, 16, 16, generator=g) for _ in range(steps)]

    def made(device):
        V = network().to(device).requires_grad_(False)
        there = [tuple(x.to(device) for x in pair) for pair in (c, null)]
        how = dict(steps=steps, guidance=guidance, eta=eta, draw_noise=lambda k: noise[k].to(device))
        return sampler.sample(V, x1.to(device), *there, **how).cpu()

    torch.testing.assert_close(made(NAME), made("cpu"), atol=1e-3, rtol=1e-3)


def call(*words, code: int = 0, **environment) -> subprocess.CompletedProcess:
    command, options = [sys.executable, *map(str, words)], dict(capture_output=True, text=True, timeout=300)
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, **options)
    assert done.returncode == code, done.stderr[-2000:]
    return done


@pytest.mark.parametrize("flags", [(), pytest.param(("--compile",), marks=only_cuda)])
def test_it_trains_stops_resumes_and_samples_there(tmp_path, flags):
    """30 and 30 iterations end near 60 in one piece: sums on a GPU may be taken in another order."""
    flags = ["--device", NAME, "--batch-size", 8, "--grid-every", 0, *flags]
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    call("train.py", *flags, "--steps", 60, "--out", straight)
    call("train.py", *flags, "--steps", 60, "--out", halves, "--save-every", 30)
    shutil.rmtree(halves / "state" / "step_00000060")
    call("train.py", "--resume", "--out", halves, "--device", NAME)
    a, b = (checkpoint.read_json(folder / "config.json") for folder in (straight, halves))
    assert a["precision"] == b["precision"] and a["steps"] == b["steps"] == 60
    weights = [load_file(folder / "model.safetensors") for folder in (straight, halves)]
    first, second = (torch.cat([w[key].float().flatten() for key in weights[0]]) for w in weights)
    assert (first - second).norm() < 0.02 * first.norm()
    picture = ["--prompt", "a photo of a red circle", "--device", NAME, "--out", tmp_path / "x.png"]
    call("sample.py", "--checkpoint", straight, *picture)
    assert (tmp_path / "x.png").stat().st_size > 100


@only_cuda
def test_what_does_not_fit_is_one_line_before_the_first_iteration(tmp_path):
    flags = "--device cuda --batch-size 16384 --side 64 --steps 10 --no-compile --grid-every 0 --out".split()
    done = call("train.py", *flags, tmp_path / "r", code=2)
    assert "do not fit into the device's memory: a smaller --micro-batch" in done.stderr
    assert done.stderr.count("\n") == 1
