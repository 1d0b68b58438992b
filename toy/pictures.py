"""What does the objective ask for on pictures? Perfect evaluators on a finite set of rendered pictures, no network.

    python toy/pictures.py                # the quick map, 10 to 30 minutes of one core: pictures.json and .png
    python toy/pictures.py --full         # all shares of wrong captions, more rounds; a day of one core or more
    python toy/pictures.py --scale 0.5    # pictures at another scale than encoders.PIXEL_SCALE, in runs/pictures

It stands between 2-D (ideal.py) and a trained network. Some three thousand pictures are the whole data set, so
posterior means are exact: E[x0 | x_t, c] is a softmax over the pictures, two matrix products. With a share X of wrong
captions

    q(picture | c) = (1 - X) on the pictures of c, in equal parts, + X on all pictures

At each step of the sampler the predictions x0_hat move towards their target for some rounds (ideal.follow), and
sampler.py continues from there. experiments/scorer.py judges the pictures. Guidance and the rule for s_k are chosen per
objective and step count, on other noise than the scores. A map that was stopped goes on by the same command.

Delta's budget: over snr = ((1-t) / t)^2 the integral of E||G_null - G_c||^2 is 2 I(c; picture) (I-MMSE; Guo, Shamai and
Verdu 2005), so the information in the captions bounds Delta. It is printed for each world, with the s below which half
of it lies. Keep at least 100 pictures per prompt. With fewer, the posterior mean is one picture nearly everywhere, and
every objective seems to solve the task.
"""

import argparse
import itertools
import math
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

if (
    __name__ == "__main__"
):  # started as a file: modules are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import data
import encoders
import losses
import sampler
from engine import checkpoint, errors, machine
from engine.randomness import rng
from experiments import scorer
from toy.ideal import GOALS, follow

ROOT = Path(__file__).resolve().parents[1]
SIDE, MU = 16, losses.mu_of_length(16)  # pixels; the laptop model's shift
KINDS = {  # how much the prompts leave open
    "colors": ("colors",),  # the shape and its colour are told
    "single_object": ("single_object",),  # the shape is told
    "one, two, several": (
        "single_object",
        "two_object",
        "counting",
    ),  # shapes and numbers; neither colours nor places
}
OBJECTIVES = {
    "flow matching": GOALS["flow matching"],
    "control, Delta = 0": GOALS["Eq. 19, Delta = 0"],
    "classifier only": GOALS["Eq. 19, classifier only"],
    "k = 0.9": GOALS["Eq. 19, k = 0.9"],
    "k = 0": GOALS["Eq. 19, k = 0"],
    "Eq. 18": GOALS["Eq. 18, classifier only"],
}
SETTINGS = [dict(guidance=w, s_rule=r) for w, r in itertools.product((1.0, 2.0), (0.0, 0.5))]
FEWEST = 100  # pictures a prompt


class Size(NamedTuple):
    """How much is computed."""

    shares: tuple[float, ...]  # of wrong captions
    pictures: int  # in the data set, at least; and FEWEST a prompt
    judged: int  # pictures that a score is made of, about
    rounds: int  # of following the target
    steps: tuple[int, ...] = (1, 2, 4, 8)
    seeds: tuple[int, ...] = (0, 1, 2)


QUICK = Size((0.0, 0.3), 3000, 48, 12)
FULL = Size((0.0, 0.15, 0.3, 0.45), 8192, 200, 40)


# ------------------------------------------------------------------------------------------------------------
# A world: pictures, captions, exact posterior means
# ------------------------------------------------------------------------------------------------------------
class World:
    """A finite set of captioned pictures. c is a prompt's number, C the null prompt.

    x [N, D] fp32, the pictures as the network would see them; prompts, their metadata; share, of wrong captions.
    """

    def __init__(self, kind: str, share: float, pictures: int, scale: float, seed: int = 0):
        source, found = data.Shapes(SIDE, "shapes"), {}
        wanted = {m["prompt"] for m in train_prompts(KINDS[kind])}
        each = max(FEWEST, math.ceil(pictures / len(wanted)))
        for g in itertools.count():  # the same number of pictures for every prompt
            scene = source.scene(g, seed)
            prompt = scene.metadata["prompt"]
            if prompt in wanted and len(own := found.setdefault(prompt, [])) < each:
                own.append(scene)
            if len(found) == len(wanted) and all(len(own) == each for own in found.values()):
                break
        names = sorted(found)
        self.kind, self.share, self.each, self.C = kind, share, each, len(names)
        self.prompts = [found[name][0].metadata for name in names]
        rendered = [data.render(scene, SIDE) for name in names for scene in found[name]]
        self.shift = encoders.PIXEL_SHIFT
        self.scale = scale
        self.x = ((data.to_tensor(rendered) - self.shift) * scale).flatten(1)
        own = torch.arange(self.C).repeat_interleave(each)
        N = len(self.x)
        weights = torch.full((self.C + 1, N), share / N)
        weights[own, torch.arange(N)] += (1 - share) / each
        weights[self.C] = 1 / N
        self.log_weights = weights.log()

    def posterior(self, x_t: Tensor, t: float, c: Tensor) -> Tensor:
        """q(picture | x_t, c), [B, N], at one time t > 0."""
        near = ((1 - t) * x_t @ self.x.T - (1 - t) ** 2 / 2 * self.x.square().sum(1)) / t**2
        return (near + self.log_weights[c]).softmax(1)

    def mean(self, x_t: Tensor, t: float, c: Tensor) -> Tensor:
        """E[x0 | x_t, c], [B, D]; x_t itself at t = 0."""
        return self.posterior(x_t, t, c) @ self.x if t > 0 else x_t

    def pictures(self, x: Tensor) -> list[np.ndarray]:
        return data.to_pictures((x / self.scale + self.shift).view(-1, 3, SIDE, SIDE))

    def information(self) -> float:
        """I(c; picture) in nats: all prompts are equally likely, and so are the pictures of one."""
        own = 1 - self.share + self.share / self.C
        other = self.share / self.C
        left = -own * math.log(own) - (self.C - 1) * (other * math.log(other) if other else 0.0)
        return math.log(self.C) - left


def train_prompts(tags: tuple[str, ...]) -> list[dict]:
    """Metadata of the training prompts of these tags, each once."""
    from experiments import evaluate  # here, because it is only needed for their list

    return [m for m in evaluate.prompts("train") if m["tag"] in tags]


# ------------------------------------------------------------------------------------------------------------
# Delta's budget: the integral of E||G_null - G_c||^2 over snr, and where in s it lies
# ------------------------------------------------------------------------------------------------------------
def budget(world: World, seed: int, samples: int = 300, points: int = 60) -> tuple[float, float]:
    """(the integral, the s below which half of it lies), by the trapezoidal rule in log snr on fresh noisy data."""
    g = rng(seed, "toy pictures budget")
    c = torch.from_numpy(g.integers(0, world.C, samples))
    picked = torch.multinomial(world.log_weights[c].exp(), 1, generator=torch.Generator().manual_seed(seed))[
        :, 0
    ]
    x0, null = world.x[picked], torch.full_like(c, world.C)
    log_snr = np.linspace(math.log(1e-5), math.log(1e4), points)
    times, height = 1 / (1 + np.exp(log_snr / 2)), []
    for s in times:
        eps = torch.from_numpy(g.standard_normal(x0.shape, dtype=np.float32))
        x_s = (1 - s) * x0 + s * eps
        gap = world.mean(x_s, s, null) - world.mean(x_s, s, c)
        height.append(
            float(gap.square().sum(1).mean()) * math.exp(log_snr[len(height)])
        )  # d snr = snr d log snr
    pieces = (np.array(height[1:]) + np.array(height[:-1])) / 2 * np.diff(log_snr)
    from_small_s = np.cumsum(pieces[::-1])
    half = int(np.searchsorted(from_small_s, from_small_s[-1] / 2))
    return float(pieces.sum()), float(times[::-1][half])


# ------------------------------------------------------------------------------------------------------------
# The objective on a sampler's path
# ------------------------------------------------------------------------------------------------------------
class Perfect:
    """A callable V(x_t, t, s, c) that predicts what a perfect network would learn from the objective.

    A null prompt learns the data alone, at every (t, s). goal None is flow matching.
    """

    def __init__(self, world: World, goal: tuple | None, rounds: int, g: np.random.Generator):
        self.world, self.goal, self.rounds, self.g = world, goal, rounds, g

    def __call__(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor) -> Tensor:
        now, told = c < self.world.C, float(s[0])
        posterior = self.world.posterior(x_t, float(t[0]), c)
        x0_hat = posterior @ self.world.x
        if self.goal is not None and told < float(t[0]) and now.any():
            answers = Answers(self, posterior[now], told, c[now])
            x0_hat[now] = follow(x0_hat[now], t[now], s[now], self.goal, self.rounds, answers)
        return (x_t - x0_hat) / t[:, None]


class Answers:
    """The world of ideal.follow: answers to some x_t, whose posterior over the pictures is known."""

    def __init__(self, perfect: Perfect, posterior: Tensor, s: float, c: Tensor):
        self.world, self.g, self.s, self.c = perfect.world, perfect.g, s, c
        self.cumulated = posterior.cumsum(1)

    def data(self) -> Tensor:
        u = torch.from_numpy(self.g.random(len(self.c), dtype=np.float32)) * self.cumulated[:, -1]
        picked = torch.searchsorted(self.cumulated, u[:, None])[:, 0].clamp_max(len(self.world.x) - 1)
        return self.world.x[picked]

    def noise(self) -> Tensor:
        return torch.from_numpy(
            self.g.standard_normal((len(self.c), self.world.x.shape[1]), dtype=np.float32)
        )

    def evaluate(self, x_s: Tensor, x0_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """G_null and G_c exactly; G_fake as if the answers of one prompt were all that the model draws for it."""
        if self.s == 0:  # Eq. 6 at s = 0 is x itself for every prompt: there is nothing to evaluate
            return x_s, x_s, x_s
        null = torch.full_like(self.c, self.world.C)
        distance2 = torch.cdist(x_s, (1 - self.s) * x0_hat).square() / (2 * self.s**2)
        others = self.c[:, None] != self.c[None]
        G_fake = (-distance2).masked_fill(others, -torch.inf).softmax(1) @ x0_hat
        return self.world.mean(x_s, self.s, null), self.world.mean(x_s, self.s, self.c), G_fake


def samples(
    world: World, goal: tuple | None, rounds: int, c: Tensor, n: int, settings: dict, g: np.random.Generator
) -> list[np.ndarray]:
    """Pictures for the prompts c [B] at n steps, by one objective's perfect network."""
    noise = torch.from_numpy(g.standard_normal((len(c), world.x.shape[1]), dtype=np.float32))
    s_rule = 1.0 if goal is None else settings["s_rule"]
    x = sampler.sample(
        Perfect(world, goal, rounds, g),
        noise,
        (c,),
        (torch.full_like(c, world.C),),
        steps=n,
        mu=MU,
        guidance=settings["guidance"],
        s_rule=s_rule,
        eta=1.0,
        draw_noise=lambda k: torch.from_numpy(g.standard_normal(noise.shape, dtype=np.float32)),
    )
    return world.pictures(x)


def draw(world: World, goal: tuple | None, size: Size, key: tuple[int, int], n: int, settings: dict) -> tuple:
    """(the share of right pictures, pictures) of one objective at n steps; key (seed, stream) names all noise."""
    g = rng(key[0], "toy pictures", key[1], n)
    c = torch.arange(world.C).repeat_interleave(max(1, round(size.judged / world.C)))
    pictures = samples(world, goal, size.rounds, c, n, settings, g)
    right = [scorer.score(picture, world.prompts[i]) for picture, i in zip(pictures, c.tolist())]
    return float(np.mean(right)), pictures


def measure(world: World, label: str, size: Size, seed: int) -> tuple[list[dict], list]:
    """The records of one objective in one world, and a picture for each step count."""
    goal, records, shown = OBJECTIVES[label], [], []
    tries = [s for s in SETTINGS if goal is not None or s["s_rule"] == 0.0]  # flow matching knows s = t alone
    for n in size.steps:
        half = size._replace(judged=size.judged // 2)
        chosen = [draw(world, goal, half, (seed, 1), n, settings)[0] for settings in tries]
        settings = tries[int(np.argmax(chosen))]
        for own in size.seeds:
            score, pictures = draw(world, goal, size, (seed + own, 2), n, settings)
            if own == size.seeds[0]:
                shown.append(pictures[0])
            records.append(
                {
                    "world": world.kind,
                    "wrong_captions": world.share,
                    "objective": label,
                    "steps": n,
                    "seed": seed + own,
                    "score": score,
                    "settings": settings,
                }
            )
    return records, shown


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------
def score_of(records: list[dict], kind: str, share: float, label: str, n: int) -> float:
    """The mean over seeds."""
    found = [
        r["score"]
        for r in records
        if (r["world"], r["wrong_captions"], r["objective"], r["steps"]) == (kind, share, label, n)
    ]
    return float(np.mean(found))


def draw_figure(records: list[dict], worlds: list[dict], path: Path) -> None:
    """A panel for each world: score against steps, a line per objective; the best of each step count has a ring."""
    from toy import figures

    kinds = list(dict.fromkeys(w["world"] for w in worlds))
    shares = sorted({w["wrong_captions"] for w in worlds})
    figure, axes = figures.plt.subplots(
        len(shares),
        len(kinds),
        figsize=(3.4 * len(kinds), 2.6 * len(shares) + 0.6),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for w in worlds:
        axis = axes[shares.index(w["wrong_captions"])][kinds.index(w["world"])]
        steps = sorted({r["steps"] for r in records})
        lines = {
            label: [score_of(records, w["world"], w["wrong_captions"], label, n) for n in steps]
            for label in OBJECTIVES
        }
        for i, (label, scores) in enumerate(lines.items()):
            axis.plot(range(len(steps)), scores, marker=".", color=figures.COLOURS[i], label=label)
        for j in range(len(steps)):
            best = max(lines, key=lambda label: lines[label][j])
            axis.plot(
                j,
                lines[best][j],
                "o",
                markersize=10,
                markerfacecolor="none",
                color=figures.COLOURS[list(lines).index(best)],
            )
        axis.set(xticks=range(len(steps)), xticklabels=steps, ylim=(-0.03, 1.06))
        axis.set_title(
            f"{w['world']}, {w['wrong_captions']:.0%} wrong\n"
            f"captions tell {w['information']:.2f} nats; half of it at s > {w['half_at']:.2f}",
            fontsize=8,
        )
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("network evaluations", fontsize=9)
    figure.supylabel("share of right pictures (ring: the best)", fontsize=9)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        fontsize=8,
        loc="outside lower center",
        ncols=6,
        frameon=False,
    )
    figures.save(figure, path)


def main() -> None:
    parser = errors.Parser("toy/pictures.py", __doc__.split("\n")[0])
    parser.add_argument(
        "--full", action="store_true", help="all shares of wrong captions, more pictures and rounds"
    )
    parser.add_argument(
        "--scale", type=float, default=encoders.PIXEL_SCALE, help="of the pictures (default: 2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first of three (default: 0)")
    parser.add_argument(
        "--out", type=Path, help="folder (default: toy/results; runs/pictures with another seed or scale)"
    )
    args = parser.parse_args()
    if args.seed < 0 or not 0.05 <= args.scale <= 20:
        parser.error("--seed must not be negative, --scale must lie between 0.05 and 20")
    usual = args.seed == 0 and args.scale == encoders.PIXEL_SCALE
    out = args.out or ROOT / ("toy/results" if usual else "runs/pictures")
    if out.exists() and not out.is_dir():
        parser.error(f"--out must be a folder; {out} is a file")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    run(args, out, FULL if args.full else QUICK)


def measured(part: Path, world: World, label: str, size: Size, seed: int) -> dict:
    """The records of one objective in one world and its pictures, from the file of an earlier try if there is one."""
    if not part.exists():
        began = time.perf_counter()
        records, shown = measure(world, label, size, seed)
        checkpoint.write_json(
            part,
            {
                "records": records,
                "shown": [picture.tolist() for picture in shown],
                "seconds": round(time.perf_counter() - began, 1),
            },
        )
    return checkpoint.read_json(part)


def run(args: argparse.Namespace, out: Path, size: Size) -> None:
    """Measure every world, print a table for each, write pictures.json, pictures.png and a sheet of samples.

    What is measured lies in OUT/pictures-parts until the map is whole. Raises UserError where that was begun with other
    settings.
    """
    name = "pictures-full" if size == FULL else "pictures"
    parts, records, worlds, sheets, seconds = out / f"{name}-parts", [], [], {}, 0.0
    settings = {"seed": args.seed, "scale": args.scale, "size": size._asdict()}
    checkpoint.keep_settings(parts, settings, "delete it")
    for number, (kind, share) in enumerate(itertools.product(KINDS, size.shares)):
        world = World(kind, share, size.pictures, args.scale, args.seed)
        integral, half = budget(world, args.seed)
        worlds.append(
            {
                "world": kind,
                "wrong_captions": share,
                "prompts": world.C,
                "pictures_a_prompt": world.each,
                "information": world.information(),
                "delta_budget": integral,
                "half_at": half,
            }
        )
        print(
            f"\n{kind}, {share:.0%} of captions wrong: {world.C} prompts of {world.each} pictures; Delta's budget "
            f"{integral:.2f} (twice the captions' information: {2 * world.information():.2f}), half of it at s > "
            f"{half:.2f}"
        )
        print(f"{'':20s}" + "".join(f"{f'N = {n}':>9s}" for n in size.steps))
        for i, label in enumerate(OBJECTIVES):
            part = measured(parts / f"{number}-{i}.json", world, label, size, args.seed)
            sheets[kind, share, label] = [np.array(picture, dtype=np.uint8) for picture in part["shown"]]
            records, seconds = records + part["records"], seconds + part["seconds"]
            print(
                f"{label:20s}"
                + "".join(f"{score_of(records, kind, share, label, n):9.2f}" for n in size.steps),
                flush=True,
            )
    made_by = machine.provenance(torch.device("cpu")) | {"seconds": round(seconds, 1)}
    checkpoint.write_json(out / f"{name}.json", made_by | settings | {"worlds": worlds, "records": records})
    draw_figure(records, worlds, out / f"{name}.png")
    last = size.shares[-1]
    for kind in KINDS:
        rows = [sheets[kind, last, label] for label in OBJECTIVES]
        columns = [f"{n} step{'s' * (n > 1)}" for n in size.steps]
        sheet = data.label_grid(rows, columns, list(OBJECTIVES), 5)
        sheet.save(out / f"{name}_samples_{kind.split(',')[0]}.png")
    shutil.rmtree(parts)
    print(f"\n{name}.json, {name}.png and sheets of samples in {out}; {seconds:.0f} s")


if __name__ == "__main__":
    errors.run(main, "stopped; the same command goes on")
