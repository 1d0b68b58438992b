"""The figures that explain the method are drawn, and the passes in the diagram are those that a training step makes."""

import sys
from pathlib import Path

import torch
from PIL import Image

import losses
from toy import explain

ROOT = Path(__file__).parent.parent


def test_the_figures_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["explain.py", "--out", str(tmp_path / "o")])
    explain.main()
    assert {path.name for path in (tmp_path / "o").iterdir()} == {f"{name}.png" for name in explain.FIGURES}
    for path in (tmp_path / "o").iterdir():
        picture = Image.open(path)
        assert min(picture.size) > 200 and len(picture.convert("RGBA").getcolors(1 << 20)) > 8, path.name
        assert (ROOT / "toy" / "results" / path.name).exists(), path.name


class Recorder(torch.nn.Module):
    """A network that keeps what it was asked, and whether it would learn from it."""

    def __init__(self, name: str, calls: list):
        super().__init__()
        self.name, self.calls = name, calls
        self.weight = torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, x, t, s, c):
        V = self.weight * x
        self.calls.append((self.name, x.detach(), t, s, c, V.requires_grad))
        return V


def test_the_diagram_shows_the_passes_of_a_training_step():
    calls, index = [], list(range(8))
    network, ema = Recorder("network", calls), Recorder("ema", calls).requires_grad_(False)
    x0, c, null = torch.randn(8, 2), torch.arange(8), torch.full((8,), 9)
    draws = losses.draw(0, 0, index, (2,))
    j = draws.below
    nowhere = torch.zeros(8, dtype=torch.bool)
    losses.SelfE(network, ema)(x0, (c,), (null,), None, nowhere, draws, tau=1.0, mu=0.0)
    t, s = losses.sample_times(draws.z, draws.u, j, 0.0, 1.0)
    x_t = losses.add_noise(x0, t, draws.eps)
    x_s_hat = losses.add_noise((x_t - t[:, None] * 0.1 * x_t)[j], s[j], draws.eps_s[j])
    meant = {"x_t": x_t, "t": t, "s": s, "c": c}, {"x_s_hat": x_s_hat, "s": s[j], "c": c[j], "null": null[j]}
    assert len(calls) == len(explain.PASSES)
    for (name, *given, learns), (drawn, arguments, gradient) in zip(calls, explain.PASSES):
        values = meant[0] if arguments[0] == "x_t" else meant[1]
        assert (name, learns) == (drawn, gradient)
        assert all(torch.allclose(a, values[b]) for a, b in zip(given, arguments, strict=True)), arguments
