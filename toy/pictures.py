"""What does the objective ask for on pictures? Perfect evaluators on a finite set of rendered pictures, no network.

    python -m toy.pictures                 # single and several shapes; 10 to 30 minutes of one core
    python -m toy.pictures --world scenes  # all six kinds of prompt (data.SETS); hours of one core
    python -m toy.pictures --scale 0.5     # pictures at another scale than encoders.PIXEL_SCALE

It stands between 2-D (ideal.py) and a trained network. Some thousand pictures are the whole data set, so posterior
means are exact: E[x0 | x_t, c] is a softmax over the pictures, two matrix products. With a share X of wrong captions

    q(picture | c) = (1 - X) on the pictures of c, in equal parts, + X on all pictures

At each step of the sampler the predictions x0_hat move towards their target for some rounds (ideal.follow), and
sampler.py continues from there. experiments/scorer.py judges the pictures. Guidance and the rule for s_k are chosen per
objective and step count, on other noise than the scores. A map that was stopped goes on by the same command.

Delta's budget: over snr = ((1-t) / t)^2 the integral of E||G_null - G_c||^2 is 2 I(c; picture) (I-MMSE; Guo, Shamai and
Verdu 2005), so the information in the captions bounds Delta. It is printed for each world, with the s below which half
of it lies. Keep at least 100 pictures per prompt. With fewer, the posterior mean is one picture nearly everywhere, and
every objective seems to solve the task.
"""

import itertools
import math
import time
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
from toy.ideal import GOALS, follow


class Map(NamedTuple):
    """What is asked of one of data.SETS, and how much is computed."""

    side: int  # pixels
    worlds: dict[str, tuple[str, ...]]  # whose prompts share a world: its name -> their tags
    shares: tuple[float, ...]  # of wrong captions
    pictures: int = 3000  # in a world, at least; and FEWEST a prompt
    prompts: int | None = None  # of a tag, at most
    judged: int = 48  # pictures that a score is made of, about, and one a prompt
    by_tag: bool = False  # a score for each tag


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
    "scenes": Map(24, {"scenes": data.TAGS}, (0.0, 0.15, 0.3), prompts=12, judged=72, by_tag=True),
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
ROUNDS, STEPS, SEEDS = 12, (1, 2, 4, 8), (0, 1, 2)


# ------------------------------------------------------------------------------------------------------------
# Worlds: pictures, captions, exact posterior means
# ------------------------------------------------------------------------------------------------------------
class World:
    """A finite set of captioned pictures. c is a prompt's number, C the null prompt.

    x [N, D] fp32, the pictures as the network would see them; log_weights [C + 1, N], log q(picture | c).
    """

    shift, mu = encoders.PIXEL_SHIFT, losses.mu_of_length(16)

    def __init__(self, pictures: list[np.ndarray], weights: Tensor, scale: float):
        self.side, self.scale, self.C = len(pictures[0]), scale, len(weights) - 1
        self.x = ((data.to_tensor(pictures) - self.shift) * scale).flatten(1)
        self.log_weights = weights.log()

    def posterior(self, x_t: Tensor, t: float, c: Tensor) -> Tensor:
        """q(picture | x_t, c), [B, N], at one time t > 0."""
        near = ((1 - t) * x_t @ self.x.T - (1 - t) ** 2 / 2 * self.x.square().sum(1)) / t**2
        return (near + self.log_weights[c]).softmax(1)

    def mean(self, x_t: Tensor, t: float, c: Tensor) -> Tensor:
        """E[x0 | x_t, c], [B, D]; x_t itself at t = 0."""
        return self.posterior(x_t, t, c) @ self.x if t > 0 else x_t

    def pictures(self, x: Tensor) -> list[np.ndarray]:
        return data.to_pictures((x / self.scale + self.shift).view(-1, 3, self.side, self.side))

    def information(self) -> float:
        """The mean over the prompts of the divergence of q(picture | c) from q(picture), in nats: I(c; picture)."""
        log_q = self.log_weights.double()
        terms = log_q[:-1].exp() * (log_q[:-1] - log_q[-1])
        return float(torch.where(log_q[:-1].isfinite(), terms, 0.0).sum(1).mean())


class Shapes(World):
    """Rendered shapes, the same number for each prompt. prompts, their metadata; share, of wrong captions."""

    def __init__(self, name: str, kind: str, share: float, scale: float, seed: int = 0):
        size, source = MAPS[name], data.Shapes(MAPS[name].side, name)
        prompts, wanted = evaluate.prompts("train", None, data.SETS[name]), []
        for tag in size.worlds[kind]:
            of_tag = [m["prompt"] for m in prompts if m["tag"] == tag]
            order = rng(0, "toy pictures prompts").permutation(len(of_tag))
            wanted += [of_tag[i] for i in order[: size.prompts]]
        self.each = max(FEWEST, math.ceil(size.pictures / len(wanted)))
        found = {prompt: [] for prompt in sorted(wanted)}
        for g in itertools.count():
            scene = source.scene(g, seed)
            of_prompt = found.get(scene.metadata["prompt"])
            if of_prompt is not None and len(of_prompt) < self.each:
                of_prompt.append(scene)
                if all(len(scenes) == self.each for scenes in found.values()):
                    break
        self.prompts = [scenes[0].metadata for scenes in found.values()]
        C = len(self.prompts)
        N = C * self.each
        weights = torch.full((C + 1, N), share / N)
        weights[torch.arange(C).repeat_interleave(self.each), torch.arange(N)] += (1 - share) / self.each
        weights[C] = 1 / N
        self.share, self.groups = share, {kind: list(range(C))}
        if size.by_tag:
            self.groups = {
                tag: [i for i, m in enumerate(self.prompts) if m["tag"] == tag] for tag in size.worlds[kind]
            }
        super().__init__(
            [data.render(scene, size.side) for s in found.values() for scene in s], weights, scale
        )
        self.mu = losses.mu_of_length((size.side // 4) ** 2)  # the laptop model's patches


# ------------------------------------------------------------------------------------------------------------
# Delta's budget: the integral of E||G_null - G_c||^2 over snr, and where in s it lies
# ------------------------------------------------------------------------------------------------------------
def budget(world: World, seed: int, samples: int = 300, points: int = 60) -> tuple[float, float]:
    """(the integral, the s below which half of it lies), by the trapezoidal rule in log snr on fresh noisy data."""
    g = rng(seed, "toy pictures budget")
    c = torch.from_numpy(g.integers(0, world.C, samples))
    generator = torch.Generator().manual_seed(seed)
    x0 = world.x[torch.multinomial(world.log_weights[c].exp(), 1, generator=generator)[:, 0]]
    log_snr, height = np.linspace(math.log(1e-5), math.log(1e4), points), []
    times = 1 / (1 + np.exp(log_snr / 2))
    for s in times:
        x_s = (1 - s) * x0 + s * torch.from_numpy(g.standard_normal(x0.shape, dtype=np.float32))
        gap = world.mean(x_s, s, torch.full_like(c, world.C)) - world.mean(x_s, s, c)
        height.append(float(gap.square().sum(1).mean()))
    height = np.array(height) * np.exp(log_snr)  # d snr = snr d log snr
    pieces = (height[1:] + height[:-1]) / 2 * np.diff(log_snr)
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
        posterior = self.world.posterior(x_t, float(t[0]), c)
        x0_hat, asked = posterior @ self.world.x, c < self.world.C
        if self.goal is not None and s[0] < t[0] and asked.any():
            x0_hat[asked] = self.followed(x0_hat[asked], posterior[asked], t[asked], s[asked], c[asked])
        return (x_t - x0_hat) / t[:, None]

    def followed(self, x0_hat: Tensor, posterior: Tensor, t: Tensor, s: Tensor, c: Tensor) -> Tensor:
        """The predictions after ideal.follow; posterior [B, N] over the pictures."""
        world, now, null = self.world, float(s[0]), torch.full_like(c, self.world.C)
        cumulated, others = posterior.cumsum(1), c[:, None] != c[None]

        def data() -> Tensor:
            u = torch.from_numpy(self.g.random(len(c), dtype=np.float32)) * cumulated[:, -1]
            picked = torch.searchsorted(cumulated, u[:, None])[:, 0].clamp_max(len(world.x) - 1)
            return world.x[picked]

        def noise() -> Tensor:
            return torch.from_numpy(self.g.standard_normal(x0_hat.shape, dtype=np.float32))

        def evaluate(x_s: Tensor, x0_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """G_null and G_c exactly; G_fake as if the predictions of a prompt were all that the model draws for it."""
            if now == 0:  # Eq. 6 at s = 0 is x itself for every prompt: there is nothing to evaluate
                return x_s, x_s, x_s
            distance2 = torch.cdist(x_s, (1 - now) * x0_hat).square() / (2 * now**2)
            G_fake = (-distance2).masked_fill(others, -torch.inf).softmax(1) @ x0_hat
            return world.mean(x_s, now, null), world.mean(x_s, now, c), G_fake

        return follow(x0_hat, t, s, self.goal, self.rounds, data, noise, evaluate)


def samples(
    world: World, goal: tuple | None, rounds: int, c: Tensor, n: int, settings: dict, g: np.random.Generator
) -> list[np.ndarray]:
    """Pictures for the prompts c [B] at n steps, by one objective's perfect network."""

    def normal(k: int = 0) -> Tensor:
        return torch.from_numpy(g.standard_normal((len(c), world.x.shape[1]), dtype=np.float32))

    V, noise, null = Perfect(world, goal, rounds, g), normal(), torch.full_like(c, world.C)
    choices = settings | {"s_rule": 1.0} if goal is None else settings  # flow matching knows s = t alone
    x = sampler.sample(V, noise, (c,), (null,), steps=n, mu=world.mu, eta=1.0, draw_noise=normal, **choices)
    return world.pictures(x)


# ------------------------------------------------------------------------------------------------------------
# The map
# ------------------------------------------------------------------------------------------------------------
def right(world: Shapes, label: str, judged: int, key: tuple[int, int], n: int, settings: dict) -> np.ndarray:
    """Whether pictures at n steps are right, [prompts, pictures of each]; key (seed, stream) names all noise."""
    each, g = max(1, round(judged / world.C)), rng(key[0], "toy pictures", key[1], n)
    c = torch.arange(world.C).repeat_interleave(each)
    pictures = samples(world, OBJECTIVES[label], ROUNDS, c, n, settings, g)
    scores = [scorer.score(picture, world.prompts[i]) for picture, i in zip(pictures, c.tolist())]
    return np.array(scores, dtype=float).reshape(world.C, each)


def measure(world: Shapes, label: str, judged: int, seed: int) -> list[dict]:
    """The records of one objective in one world: for each step count, seed and group of prompts a score."""
    records = []
    tries = [settings for settings in SETTINGS if label != "flow matching" or settings["s_rule"] == 0.0]
    for n in STEPS:
        chosen = [right(world, label, judged // 2, (seed, 1), n, settings).mean() for settings in tries]
        settings = tries[int(np.argmax(chosen))]
        for each in (seed + i for i in SEEDS):
            scores = right(world, label, judged, (each, 2), n, settings)
            for group, rows in world.groups.items():
                record = {"world": group, "wrong_captions": world.share, "objective": label, "steps": n}
                score = {"seed": each, "score": float(scores[rows].mean()), "settings": settings}
                records.append(record | score)
    return records


def run(name: str, size: Map, scale: float, seed: int, path: Path) -> dict:
    """Measure what PATH lacks, which is written after each objective; print a table for each group of prompts."""
    computed = {"shares": size.shares, "pictures": size.pictures, "judged": size.judged}
    computed |= {"rounds": ROUNDS, "steps": STEPS, "seeds": SEEDS}
    fresh = machine.provenance(torch.device("cpu")) | {"seconds": 0.0, "worlds": []}
    results = fresh | kept.opened(path, set=name, seed=seed, scale=scale, size=computed)
    for kind, share in itertools.product(size.worlds, size.shares):
        groups, here = size.worlds[kind] if size.by_tag else (kind,), {"world": kind, "wrong_captions": share}
        todo = [label for label in OBJECTIVES if not scores_of(results, groups[0], share, label)]
        world = Shapes(name, kind, share, scale, seed) if todo else None
        if len(todo) == len(OBJECTIVES):
            integral, half = budget(world, seed)
            about = here | {"prompts": world.C, "pictures_a_prompt": world.each}
            about |= {"information": world.information(), "delta_budget": integral, "half_at": half}
            results["worlds"].append(about)
        for label in todo:
            start = time.perf_counter()
            results["records"] += measure(world, label, size.judged, seed)
            results["seconds"] = round(results["seconds"] + time.perf_counter() - start, 1)
            checkpoint.write_json(path, results)
        about = next(about for about in results["worlds"] if here.items() <= about.items())
        print(
            f"\n{kind}, {share:.0%} of captions wrong; Delta's budget {about['delta_budget']:.2f}, ", end=""
        )
        print(f"half of it at s > {about['half_at']:.2f}; {about['pictures_a_prompt']} pictures a prompt")
        for group in groups:
            rows = {label: scores_of(results, group, share, label) for label in OBJECTIVES}
            print(kept.table(group, [f"N = {n}" for n in STEPS], rows), flush=True)
    return results


def scores_of(results: dict, group: str, share: float, label: str) -> list[list[float]]:
    """[steps, seeds], or nothing where it has not been measured."""
    key = {"world": group, "wrong_captions": share, "objective": label}
    found = [r for r in results["records"] if key.items() <= r.items()]
    return [[r["score"] for r in found if r["steps"] == n] for n in STEPS] if found else []


def main() -> None:
    parser = errors.Parser("-m toy.pictures", __doc__.split("\n")[0])
    parser.add_argument("--world", default="shapes", choices=list(MAPS), help="of data.SETS (shapes)")
    parser.add_argument("--shares", type=float, nargs="+", help="of wrong captions (the world's own)")
    parser.add_argument("--scale", type=float, default=encoders.PIXEL_SCALE, help="of the pictures (2)")
    parser.add_argument("--seed", type=int, default=0, help="the first of three (0)")
    parser.add_argument("--out", type=Path, help="folder (toy/results, or runs/toy-results with other flags)")
    args = parser.parse_args()
    parser.check_ranges(args, seed=(0, 2**53), scale=(0.05, 20), shares=(0, 1))
    size, name = MAPS[args.world], "pictures"
    out = kept.folder(args.out, usual=args.seed == 0 and not args.shares)
    size = size._replace(shares=tuple(args.shares)) if args.shares else size
    name += f"-{args.world}" if args.world != "shapes" else ""
    name += f"-scale-{args.scale:g}" if args.scale != encoders.PIXEL_SCALE else ""
    torch.set_num_threads(1)
    results = run(args.world, size, args.scale, args.seed, out / f"{name}.json")

    panels = {}
    for record in results["records"]:
        group, share, label = (record[key] for key in ("world", "wrong_captions", "objective"))
        lines = panels.setdefault(f"{group}, {share:.0%} wrong", {})
        lines[label] = STEPS, np.array(scores_of(results, group, share, label))
    columns = len(panels) // len(size.shares)
    choices = {"xlabel": "network evaluations", "ylabel": "right pictures", "xscale": "log", "xticks": STEPS}
    figures.curves(panels, out / f"{name}.png", columns, **choices)
    print(f"\n{name}.json and {name}.png in {out}; {results['seconds']:.0f} s")


if __name__ == "__main__":
    errors.run(main, "stopped; the same command goes on")
