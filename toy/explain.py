"""Four figures that explain the method, drawn by calling losses.py and sampler.py, so that they follow the code.

    python -m toy.explain                 # a few seconds; four PNGs in toy/results

explain_step.png      one training step: tensors, networks, stop-gradients under their names in losses.SelfE
explain_times.png     the distribution of (t, s) as tau rises from 0 to 1 (s.11-s.13)
explain_mix.png       the share of x_self in the target, lambda / (1 + lambda), over (t, s) (Eq. 17-18)
explain_grids.png     the times that a sampler of 1, 2 and 4 steps tells the network (Eq. 22, s.12)
"""

from pathlib import Path

import numpy as np
import torch

import losses
import sampler
from engine import errors
from rng import rng
from toy import kept
from toy.figures import COLOURS, GREY, plt, save

BLUE, ORANGE, GREEN, RED = COLOURS[:4]
CENTRED = {"ha": "center", "va": "center"}
BELOW = {"ha": "center", "va": "top", "fontsize": 9}
MU = losses.mu_of_length(16)  # the shift of s.12 for the 16 tokens of a laptop picture

# The passes of one training step, in the order of losses.SelfE: (network, its arguments, whether it learns).
PASSES = (
    ("network", ("x_t", "t", "s", "c"), True),
    ("ema", ("x_s_hat", "s", "s", "c"), False),
    ("network", ("x_s_hat", "s", "s", "null"), False),
)

BANDS = {
    7.75: ("1 Predict", "every sample: noise a picture, predict it back"),
    5.60: (
        "2 Judge",
        "only samples with s < t: noise the prediction to level s, ask with the prompt and without",
    ),
    3.10: (
        "3 Learn",
        "s < t: the target is the corrected prediction, mixed with the data, at the data's norm",
    ),
}
# The height, then what stands in each column: a tensor, a pass, or a function of losses.py and its equation. A dot is an
# empty place; primes distinguish what is drawn repeatedly.
GRID = """
7.05  x0        add_noise/1       x_t         .                   pass0  G/6             x0_hat
6.30  eps
4.90  .         .                 .           .                   pass1  G'/6            G_c
4.40  x0_hat'   add_noise'/8      x_s_hat     .                   .      .               .         self_evaluation/s.6  Delta
3.90  .         .                 .           .                   pass2  G''/6           G_null
2.20  Delta'    pseudo_target/14  x_self      implicit_target/18  x_tar  renormalise/19  x_renorm
1.30  x0_hat''  .                 lam/17      .                   x0'    .               x0_hat"   target_loss/20       loss
0.50  .         .                 .           .                   .      .               x0''      data_loss/7
"""
# From > to; => carries the gradient, || stops it.
CHAINS = """
x0 > add_noise/1 > x_t > pass0 => G/6 => x0_hat
eps > add_noise/1
x0_hat' || add_noise'/8 > x_s_hat > pass1 > G'/6 > G_c > self_evaluation/s.6 > Delta
x_s_hat > pass2 > G''/6 > G_null > self_evaluation/s.6
Delta' > pseudo_target/14 > x_self > implicit_target/18 > x_tar > renormalise/19 > x_renorm > target_loss/20 => loss
x0_hat'' || pseudo_target/14
lam/17 > implicit_target/18
x0' > implicit_target/18
x0' > renormalise/19
x0_hat" => target_loss/20
x0'' > data_loss/7 > loss
"""


def node(axis, name: str, x: float, y: float):
    """A tensor in a round box, a function without one over its equation, or a pass in a box with corners."""
    name, _, equation = name.partition("/")
    text, size, colour = name.rstrip("'\""), 11, ORANGE if name.startswith(("x0_hat", "loss")) else GREY
    box = {"facecolor": "none", "linewidth": 1.6, "boxstyle": "round,pad=0.5"}
    if equation:
        italic = getattr(losses, text).__name__.replace("_", "\\_")
        text, size = f"$\\it{{{italic}}}$\nEq. {equation}", 9
        box |= {"boxstyle": "square,pad=0.3", "linewidth": 0}
    elif name.startswith("pass"):
        network, arguments, learns = PASSES[int(name[4:])]
        text, colour = f"{network}\nV({', '.join(arguments)})", GREEN if network == "ema" else BLUE
        colour = ORANGE if learns else colour
        box |= {"boxstyle": "square,pad=0.5"}
    return axis.text(x, y, text, fontsize=size, color=colour, bbox=box | {"edgecolor": colour}, **CENTRED)


def connect(axis, start, end, mark: str) -> None:
    """An arrow between two nodes, as CHAINS has it."""
    look = {"arrowstyle": "-|>", "color": GREY, "linewidth": 1.3, "shrinkA": 1, "shrinkB": 1}
    look |= {"patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch()}
    look |= {"color": ORANGE, "linewidth": 2.4} if mark == "=>" else {}
    a, b = np.array(start.get_position()), np.array(end.get_position())
    axis.annotate("", b, a, arrowprops=look)
    if mark == "||":
        angle = np.degrees(np.arctan2(*(b - a)[::-1]))
        look = {"color": RED, "fontsize": 15, "weight": "bold", **CENTRED}
        axis.text(*(0.55 * a + 0.45 * b), "||", rotation=angle, **look)


def training_step(path: Path) -> None:
    """Sec. 3, Fig. 2, as losses.SelfE does it, without the auxiliary term."""
    figure, axis = plt.subplots(figsize=(12.6, 7.2))
    axis.set(xlim=(0, 13.5), ylim=(0, 8.1), aspect="equal")
    axis.axis("off")
    nodes = {}
    for y, *names in map(str.split, GRID.strip().splitlines()):
        for column, name in enumerate(names):
            if name != ".":
                nodes[name] = node(axis, name, 0.6 + 1.5 * column, float(y))
    for words in map(str.split, CHAINS.strip().splitlines()):
        for start, mark, end in zip(words[::2], words[1::2], words[2::2]):
            connect(axis, nodes[start], nodes[end], mark)
    for y, (title, note) in BANDS.items():
        axis.text(0.05, y, title, fontsize=12, weight="bold", va="center")
        axis.text(1.55, y, note, fontsize=10, va="center")
        axis.plot([0.05, 13.4], [y + 0.27] * 2, color=GREY, linewidth=0.6, alpha=0.5)
    axis.text(12.6, 5.35, "= G_null - G_c:\n-Delta points to\nthe prompt's pictures", **BELOW)
    axis.text(12.6, 0.75, f"\u00d7 {losses.time_weight.__name__}(t)\n= 1 / t^2, Eq. 21", **BELOW)
    axis.text(9.1, 0.5, "s = t: the data alone", ha="right", va="center")
    meanings = {ORANGE: "carries the gradient", BLUE: "the same network, no gradient"}
    meanings |= {GREEN: "its moving average (EMA)", RED: "|| stop-gradient"}
    for i, (colour, meaning) in enumerate(meanings.items()):
        axis.text(11.0, 7.4 - 0.33 * i, meaning, color=colour, va="center")
    save(figure, path)


def time_pairs(path: Path, n: int = 3000) -> None:
    """Draws of losses.sample_times: half of the samples on the diagonal, the others below it, deeper as tau rises."""
    random, positions = rng(0, "toy explain"), losses.below_positions(list(range(n)))
    normal, uniform = random.standard_normal(n), random.random(n)
    z, u = (torch.from_numpy(numbers.astype(np.float32)) for numbers in (normal, uniform))
    titles = {0.0: "tau = 0: the first iteration", 0.5: "tau = 0.5", 1.0: "tau = 1: after its rise"}
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.9), sharey=True)
    for axis, (tau, title) in zip(axes, titles.items()):
        t, s = losses.sample_times(z, u, positions, MU, tau)
        axis.plot([0, 1], [0, 1 - tau], "--", color=RED, linewidth=1.2, label="lower limit of s, (1 - tau) t")
        label = "half: s uniform below t, self-evaluation"
        axis.plot(t[positions], s[positions], ".", markersize=2, color=ORANGE, label=label)
        axis.plot(t[s == t], s[s == t], ".", markersize=2, color=BLUE, label="half: s = t, the data alone")
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=title)
        axis.set_xlabel("t: how noisy the network's input is")
    axes[0].set_ylabel("s: at which noise level\nx0_hat is judged")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncol=3, markerscale=4)
    save(figure, path)


def mixing_weight(path: Path, n: int = 201) -> None:
    """lambda / (1 + lambda) over the triangle s <= t."""
    grid = torch.linspace(0, 1, n, dtype=torch.float64)
    t, s = torch.meshgrid(grid, grid, indexing="xy")
    lam = losses.lam(t, s)
    mix = torch.where(s <= t, lam / (1 + lam), torch.nan)
    figure, axis = plt.subplots(figsize=(6, 4.5))
    shades = axis.contourf(t, s, mix, levels=np.linspace(0, 1, 11), cmap="viridis")
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="t", ylabel="s")
    axis.set_title("mix = lambda / (1 + lambda): share of x_self in x_tar")
    axis.text(0.45, 0.55, "s = t: mix = 0, the target is the data x0", rotation=45, **CENTRED)
    axis.text(0.36, 0.03, "s = 0: mix = t, but here Delta = 0", color="white", **CENTRED)
    axis.text(0.97, 0.45, "t = 1: mix = 1, x0 sets the norm alone", rotation=90, color="black", **CENTRED)
    figure.colorbar(shades, ax=axis, ticks=np.linspace(0, 1, 6), label="mix")
    save(figure, path)


def evaluated_times(steps: int, s_rule: float = 0.0) -> list[tuple[float, float]]:
    """(t_k, s_k) of each evaluation that sampler.trajectory makes."""
    seen = []

    def V(x, t, s):
        seen.append((float(t[0]), float(s[0])))
        return x

    sampler.sample(V, torch.zeros(1, 2), (), steps=steps, mu=MU, s_rule=s_rule, eta=0.0)
    return seen


def time_grids(path: Path, budgets: tuple = (4, 2, 1)) -> None:
    """One line per number of steps, from noise at the left to data at the right, with (t_k, s_k) of each evaluation."""
    figure, axis = plt.subplots(figsize=(10.5, 3.6))
    axis.set(xlim=(1.03, -0.03), ylim=(-0.6, len(budgets) - 0.2), yticks=[], xlabel="time")
    axis.set_xticks(np.linspace(1, 0, 11), ["1\nnoise", *(f"0.{i}" for i in range(9, 0, -1)), "0\ndata"])
    axis.spines[["left", "right", "top"]].set_visible(False)
    for row, steps in enumerate(budgets):
        axis.plot([1, 0], [row, row], color=GREY, linewidth=0.8)
        axis.plot(sampler.time_grid(steps, MU), [row] * (steps + 1), "|", color=GREY, markersize=9)
        axis.text(1.0, row + 0.52, f"N = {steps}", va="center", fontsize=12, weight="bold")
        for k, (t, s) in enumerate(evaluated_times(steps)):  # pairs, not moves: no arrows
            height = row + (0.32 if k % 2 else 0.16)  # or s_k would hide behind t_(k+1)
            axis.plot([t, s], [height] * 2, color=GREY, linewidth=1, linestyle=":", zorder=1)
            axis.plot(t, height, "o", color=BLUE, label="t_k: noise level of the input")
            axis.plot(s, height, "o", color=GREEN, markerfacecolor="white", label="s_k: the second time")
            axis.text((t + s) / 2, row - 0.09, f"t = {t:.2f}\ns = {s:.2f}", **BELOW)
    axis.legend(*(part[:2] for part in axis.get_legend_handles_labels()), loc="upper center", ncol=2)
    save(figure, path)


FIGURES = {
    "explain_step": training_step,
    "explain_times": time_pairs,
    "explain_mix": mixing_weight,
    "explain_grids": time_grids,
}


def main() -> None:
    parser = errors.Parser("-m toy.explain", __doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the PNGs (toy/results)")
    out = kept.folder(parser.parse_args().out)
    for name, draw in FIGURES.items():
        draw(out / f"{name}.png")
    print(f"{', '.join(name + '.png' for name in FIGURES)} in {out}")


if __name__ == "__main__":
    errors.run(main)
