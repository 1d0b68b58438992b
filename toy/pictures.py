"""What does the objective ask for on pictures? Perfect evaluators on a finite set of rendered pictures, no network.

    python -m toy.pictures                   # single and several shapes; 10 to 30 minutes of one core
    python -m toy.pictures --world scenes    # all six kinds of prompt (data.SETS); a quarter of an hour

It stands between 2-D (ideal.py) and a trained network. Some thousand pictures are the whole data set, so posterior
means are exact: E[x0 | x_t, c] is a softmax over the pictures. With a share X of wrong captions

    q(picture | c) = (1 - X) on the pictures of c, in equal parts, + X on all pictures

At each step of the sampler the predictions x0_hat move towards their target for some rounds (ideal.settle), and
sampler.py continues from there. experiments/scorer.py judges the pictures. Guidance and the rule for s_k are chosen per
objective and step count, on other noise than the scores. A map that was stopped goes on by the same command.

Delta's budget: over snr = ((1-t) / t)^2 the integral of E||G_null - G_c||^2 is 2 I(c; picture) (I-MMSE; Guo, Shamai and
Verdu 2005), so the information in the captions bounds Delta. Keep at least 100 pictures per prompt. With fewer, the
posterior mean is one picture nearly everywhere, and every objective seems to solve the task.
"""

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import encoders
import losses
import sampler
from engine import checkpoint, errors, machine
from experiments import evaluate, scorer
from rng import rng
from toy import figures, kept
from toy.ideal import GOALS, settle

OBJECTIVES = {
    "flow matching": GOALS["flow matching"],
    "control, Delta = 0": GOALS["Eq. 19, Delta = 0"],
    "classifier only": GOALS["Eq. 19, classifier only"],
    "k = 0.9": GOALS["Eq. 19, k = 0.9"],
    "k = 0": GOALS["Eq. 19, k = 0"],
    "Eq. 18": GOALS["Eq. 18, classifier only"],
}
COMPARED = ("flow matching", "control, Delta = 0", "classifier only", "k = 0.9")  # with trained networks


class Map(NamedTuple):
    """What is asked of one of data.SETS, and how much is computed."""

    side: int  # pixels
    worlds: dict[str, tuple[str, ...]]  # whose prompts share a world: its name -> their tags
    shares: tuple[float, ...]  # of wrong captions
    pictures: int = 3000  # in a world, at least; and FEWEST a prompt
    prompts: int | None = None  # of a tag, at most
    judged: int = 48  # pictures that a score is made of, about, and one a prompt
    by_tag: bool = False  # a score for each tag
    objectives: tuple[str, ...] = tuple(OBJECTIVES)

    def groups(self, kind: str) -> tuple[str, ...]:
        """What of a world has a score of its own."""
        return self.worlds[kind] if self.by_tag else (kind,)


MAPS = {
    "shapes": Map(
        side=16,
        worlds={  # how much the prompts leave open
            "colors": ("colors",),  # they name the shape and its colour
            "single_object": ("single_object",),  # the shape
            "one, two, several": ("single_object", "two_object", "counting"),  # shapes and numbers
        },
        shares=(0.0, 0.3),
    ),
    "scenes": Map(
        side=24,
        worlds={"scenes": data.TAGS},
        shares=(0.0, 0.3),
        prompts=12,
        judged=72,
        by_tag=True,
        objectives=COMPARED,
    ),
}
SETTINGS = [dict(guidance=w, s_rule=r) for w, r in itertools.product((1.0, 2.0), (0.0, 0.5))]
FEWEST = 100  # pictures a prompt
ROUNDS, STEPS, SEEDS = 12, (1, 2, 4, 8), (0, 1, 2)


# ------------------------------------------------------------------------------------------------------------
# Worlds: pictures, captions, exact posterior means
# ------------------------------------------------------------------------------------------------------------
class World:
    """A finite set of captioned pictures. c is a prompt's number, C the null prompt.

    x [N, D] fp32, the pictures as the network would see them; log_weights [C + 1, N], log q(picture | c).
    """

    mu = losses.mu_of_length(16)

    def __init__(self, pictures: list[np.ndarray], weights: Tensor, scale: float):
        self.side, self.scale, self.C = len(pictures[0]), scale, len(weights) - 1
        self.x = (data.to_tensor(pictures) * scale).flatten(1)
        self.log_weights = weights.log()

    def posterior(self, x_t: Tensor, t: float, c: Tensor) -> Tensor:
        """q(picture | x_t, c), [B, N], at one time t > 0."""
        near = ((1 - t) * x_t @ self.x.T - (1 - t) ** 2 / 2 * self.x.square().sum(1)) / t**2
        return (near + self.log_weights[c]).softmax(1)

    def posterior_mean(self, x_t: Tensor, t: float, c: Tensor) -> Tensor:
        """E[x0 | x_t, c], [B, D]; x_t itself at t = 0."""
        return self.posterior(x_t, t, c) @ self.x if t > 0 else x_t

    def null(self, c: Tensor) -> Tensor:
        return torch.full_like(c, self.C)

    def pictures(self, x: Tensor) -> list[np.ndarray]:
        return data.to_pictures((x / self.scale).view(-1, 3, self.side, self.side))

    def information(self) -> float:
        """The mean over the prompts of the divergence of q(picture | c) from q(picture), in nats: I(c; picture)."""
        log_q = self.log_weights.double()
        terms = log_q[:-1].exp() * (log_q[:-1] - log_q[-1])
        return float(torch.where(log_q[:-1].isfinite(), terms, 0.0).sum(1).mean())


class Shapes(World):
    """Rendered shapes, the same number for each prompt. prompts, their metadata; groups, those of each score."""

    def __init__(self, name: str, kind: str, share: float):
        size, source = MAPS[name], data.Shapes(MAPS[name].side, name)
        prompts, wanted = evaluate.prompts("train", None, data.SETS[name]), []
        for tag in size.worlds[kind]:
            of_tag = [m["prompt"] for m in prompts if m["tag"] == tag]
            order = rng(0, "toy pictures prompts").permutation(len(of_tag))
            wanted += [of_tag[i] for i in order[: size.prompts]]
        self.each = max(FEWEST, math.ceil(size.pictures / len(wanted)))
        found = {prompt: [] for prompt in sorted(wanted)}
        draws = (source.scene(g, 0) for g in itertools.count())
        while any(len(scenes) < self.each for scenes in found.values()):
            scene = next(draws)
            scenes = found.get(scene.metadata["prompt"])
            if scenes is not None and len(scenes) < self.each:
                scenes.append(scene)
        self.prompts = [scenes[0].metadata for scenes in found.values()]
        tags = [m["tag"] if size.by_tag else kind for m in self.prompts]
        self.groups = {tag: [i for i, other in enumerate(tags) if other == tag] for tag in size.groups(kind)}
        C = len(found)
        weights = torch.block_diag(*[torch.full((self.each,), 1 / self.each)] * C)
        everything = torch.full((1, C * self.each), 1 / (C * self.each))
        weights = torch.cat([(1 - share) * weights + share * everything, everything])
        pictures = [data.render(scene, size.side) for scenes in found.values() for scene in scenes]
        super().__init__(pictures, weights, encoders.PIXEL_SCALE)
        self.mu = losses.mu_of_length((size.side // 4) ** 2)  # the laptop model's patches


# ------------------------------------------------------------------------------------------------------------
# Delta's budget: the integral of E||G_null - G_c||^2 over snr, and where in s it lies
# ------------------------------------------------------------------------------------------------------------
def budget(world: World, samples: int = 300, points: int = 60) -> dict:
    """delta_budget, the integral; half_at, the s below which half of it lies; and information, half of it exactly.

    By the trapezoidal rule in log snr on fresh noisy data.
    """
    g = rng(0, "toy pictures budget")
    c = torch.from_numpy(g.integers(0, world.C, samples))
    generator = torch.Generator().manual_seed(0)
    x0 = world.x[torch.multinomial(world.log_weights[c].exp(), 1, generator=generator)[:, 0]]
    log_snr, height = np.linspace(math.log(1e-5), math.log(1e4), points), []
    times = 1 / (1 + np.exp(log_snr / 2))
    for s in times:
        x_s = (1 - s) * x0 + s * torch.from_numpy(g.standard_normal(x0.shape, dtype=np.float32))
        gap = world.posterior_mean(x_s, s, world.null(c)) - world.posterior_mean(x_s, s, c)
        height.append(float(gap.square().sum(1).mean()))
    height = np.array(height) * np.exp(log_snr)  # d snr = snr d log snr
    pieces = (height[1:] + height[:-1]) / 2 * np.diff(log_snr)
    from_small_s = np.cumsum(pieces[::-1])
    half = int(np.searchsorted(from_small_s, from_small_s[-1] / 2))
    found = {"information": world.information(), "delta_budget": float(pieces.sum())}
    return found | {"half_at": float(times[::-1][half])}


# ------------------------------------------------------------------------------------------------------------
# The objective on a sampler's path
# ------------------------------------------------------------------------------------------------------------
def perfect(world: World, goal: tuple | None, rounds: int, g: np.random.Generator) -> Callable:
    """V(x_t, t, s, c) that predicts what a perfect network would learn from the objective (toy/ideal.py).

    A null prompt learns the data alone, at every (t, s). goal None is flow matching.
    """

    def V(x_t: Tensor, t: Tensor, s: Tensor, c: Tensor) -> Tensor:
        posterior, asked = world.posterior(x_t, float(t[0]), c), c < world.C
        x0_hat = posterior @ world.x
        if goal is not None and s[0] < t[0] and asked.any():
            cumulated = posterior[asked].cumsum(1)

            def data() -> Tensor:
                u = torch.from_numpy(g.random(len(cumulated), dtype=np.float32)) * cumulated[:, -1]
                picked = torch.searchsorted(cumulated, u[:, None])[:, 0].clamp_max(len(world.x) - 1)
                return world.x[picked]

            times = float(t[0]), float(s[0])
            x0_hat[asked] = settle(world, x0_hat[asked], *times, c[asked], goal, rounds, data, g)
        return (x_t - x0_hat) / t[:, None]

    return V


def samples(
    world: World, label: str, each: int, n: int, settings: dict, g: np.random.Generator
) -> list[np.ndarray]:
    """Pictures at n steps, `each` for every prompt in turn, by the perfect network of one of OBJECTIVES."""
    c = torch.arange(world.C).repeat_interleave(each)

    def normal(k: int = 0) -> Tensor:
        return torch.from_numpy(g.standard_normal((len(c), world.x.shape[1]), dtype=np.float32))

    V, noise = perfect(world, OBJECTIVES[label], ROUNDS, g), normal()
    choices = settings | {"s_rule": 1.0} if label == "flow matching" else settings  # it knows s = t alone
    given = {"steps": n, "mu": world.mu, "eta": 1.0, "draw_noise": normal}
    return world.pictures(sampler.sample(V, noise, (c,), (world.null(c),), **given, **choices))


# ------------------------------------------------------------------------------------------------------------
# The map
# ------------------------------------------------------------------------------------------------------------
def measure(label: str, seeds: tuple, validate: Callable, test: Callable) -> list[dict]:
    """The records of one objective, which toy/emoji_world.py makes in the same way.

    For each step count n the settings of the highest validate(n, settings); then, for each seed, what
    test(n, settings, seed) yields: the scores of each group of prompts.
    """
    records = []
    tries = [settings for settings in SETTINGS if label != "flow matching" or settings["s_rule"] == 0.0]
    for n in STEPS:
        settings = max(tries, key=lambda choice: validate(n, choice))
        for seed in seeds:
            head = {"objective": label, "steps": n, "seed": seed, "settings": settings}
            records += [head | scores for scores in test(n, settings, seed)]
    return records


def right(world: Shapes, label: str, each: int, n: int, settings: dict, key: tuple[int, int]) -> np.ndarray:
    """Whether pictures are right, [prompts, each]; key (seed, stream) names all noise."""
    pictures = samples(world, label, each, n, settings, rng(key[0], "toy pictures", key[1], n))
    asked = [prompt for prompt in world.prompts for _ in range(each)]
    return np.array([scorer.score(*pair) for pair in zip(pictures, asked)], dtype=float).reshape(-1, each)


def of_shapes(world: Shapes, label: str, share: float, judged: int) -> list[dict]:
    """The records of one objective in one world."""
    each, fewer = (max(1, round(count / world.C)) for count in (judged, judged // 2))

    def test(n: int, settings: dict, seed: int):
        scores = right(world, label, each, n, settings, (seed, 2))
        for group, rows in world.groups.items():
            yield {"world": group, "wrong_captions": share, "score": float(scores[rows].mean())}

    return measure(label, SEEDS, lambda n, choice: right(world, label, fewer, n, choice, (0, 1)).mean(), test)


def scores_of(results: dict, group: str, share: float) -> dict[str, list]:
    """{objective: [steps, seeds]} of what has been measured."""
    found = {}
    for r in results["records"]:
        if (r["world"], r["wrong_captions"]) == (group, share):
            rows = found.setdefault(r["objective"], [[] for _ in STEPS])
            rows[STEPS.index(r["steps"])].append(r["score"])
    return found


def run(name: str, size: Map, path: Path) -> dict:
    """Measure what PATH lacks, which is written after each objective; print a table for each group of prompts."""
    computed = {"shares": size.shares, "pictures": size.pictures, "judged": size.judged}
    computed |= {"rounds": ROUNDS, "steps": STEPS, "seeds": SEEDS}
    results = machine.provenance(torch.device("cpu")) | {"seconds": 0.0, "worlds": [], "records": []}
    results |= kept.opened(path, set=name, size=computed)
    for kind, share in itertools.product(size.worlds, size.shares):
        here = {"world": kind, "wrong_captions": share}
        done, world = scores_of(results, size.groups(kind)[0], share), None
        for label in [label for label in size.objectives if label not in done]:
            start = time.perf_counter()
            if world is None:
                world = Shapes(name, kind, share)
            if not any(here.items() <= about.items() for about in results["worlds"]):
                about = {"prompts": world.C, "pictures_a_prompt": world.each} | budget(world)
                results["worlds"].append(here | about)
            results["records"] += of_shapes(world, label, share, size.judged)
            results["seconds"] = round(results["seconds"] + time.perf_counter() - start, 1)
            checkpoint.write_json(path, results)
        about = next(about for about in results["worlds"] if here.items() <= about.items())
        print(
            f"\n{kind}, {share:.0%} of captions wrong; Delta's budget {about['delta_budget']:.2f},", end=" "
        )
        print(f"half of it at s > {about['half_at']:.2f}; {about['pictures_a_prompt']} pictures a prompt")
        for group in size.groups(kind):
            print(
                kept.table(group, [f"N = {n}" for n in STEPS], scores_of(results, group, share)), flush=True
            )
    return results


def main() -> None:
    parser = errors.Parser("-m toy.pictures", __doc__.split("\n")[0])
    parser.add_argument("--world", default="shapes", choices=list(MAPS), help="of data.SETS")
    parser.add_argument("--out", type=Path, help="folder (toy/results)")
    args = parser.parse_args()
    size, name = MAPS[args.world], "pictures" if args.world == "shapes" else f"pictures-{args.world}"
    out = kept.folder(args.out)
    torch.set_num_threads(1)
    results = run(args.world, size, out / f"{name}.json")

    panels = {
        f"{group}, {share:.0%} wrong": scores_of(results, group, share)
        for share, kind in itertools.product(size.shares, size.worlds)
        for group in size.groups(kind)
    }
    figures.curves(panels, STEPS, out / f"{name}.png", len(panels) // len(size.shares), "right pictures")
    print(f"\n{name}.json and {name}.png in {out}; {results['seconds']:.0f} s")


if __name__ == "__main__":
    errors.run(main, "stopped; the same command goes on")
