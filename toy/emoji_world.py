"""What the objective asks for on emoji: perfect evaluators, by kind of prompt. No network.

    python -m toy.emoji_world               # toy/results/emoji_world.json; half an hour of one core
    python -m toy.emoji_world --scale 0.5   # pictures at another scale than encoders.PIXEL_SCALE

The pictures of training, unmoved, are the whole data set, so posterior means are exact:

    q(picture | c)  in proportion to the probability that the picture carries c (emoji.Emoji.carriers)
    q(picture)      the same for all, for the null prompt

The rest is toy/pictures.py's: at each step of the sampler the predictions follow their target for some
rounds. experiments/emoji_judge.py judges, on the test prompts of the trained table; guidance and the rule for
s_k are chosen on validation prompts, in one grid for all objectives (flow matching stays at s_k = t_k).
Held-out pairs are not asked: a finite set of pictures has nothing to compose.

A warning. So few pictures in so many dimensions are easy to tell apart: from t = 0.6 on the posterior is one
picture, and what comes of a blend at t = 1 is the picture nearest to it, clear but often the same. A network
is not that sharp. A smaller --scale keeps blends alive for longer.

Delta's budget: for a prompt c the integral of E||G_null - G_c||^2 over snr is twice the divergence of
q(picture | c) from q(picture). Its mean over the prompts of a kind is told, in nats.
"""

import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import emoji
import encoders
from engine import checkpoint, errors, machine
from experiments import emoji_judge
from rng import rng
from toy import pictures

ROOT = Path(__file__).resolve().parents[1]
SIDE = 32
OBJECTIVES = ("flow matching", "control, Delta = 0", "classifier only", "k = 0.9")
STEPS, SEEDS, ROUNDS = (1, 2, 4, 8), (0, 1), 12
PROMPTS, IMAGES = 35, 4  # of a kind at most; pictures of each, with each seed


class World(pictures.World):
    """The emoji of training, with some prompts: c is a prompt's number, C the null prompt."""

    def __init__(self, source: emoji.Emoji, texts: list[str], scale: float = encoders.PIXEL_SCALE):
        self.source, self.texts, self.C = source, texts, len(texts)
        self.shift, self.scale = encoders.PIXEL_SHIFT, scale
        shown = [source.pictures[pair] for pair in source.pairs]
        self.x = ((data.to_tensor(shown) - self.shift) * self.scale).flatten(1)
        carriers = source.carriers(source.pairs)
        shares = [[carriers[text].get(pair, 0.0) for pair in source.pairs] for text in texts]
        weights = torch.tensor([*shares, [1.0] * len(shown)])
        self.log_weights = (weights / weights.sum(1, keepdim=True)).log()

    def pictures(self, x: Tensor) -> list[np.ndarray]:
        return data.to_pictures((x / self.scale + self.shift).view(-1, 3, self.source.side, self.source.side))

    def information(self) -> float:
        """The mean over the prompts of the divergence of q(picture | c) from q(picture), in nats."""
        told = self.log_weights[: self.C]
        return float(
            torch.where(told.isfinite(), told.exp() * (told - self.log_weights[self.C]), 0.0).sum(1).mean()
        )


def draw(world: World, judge: emoji_judge.Judge, label: str, n: int, settings: dict, key: tuple) -> dict:
    """Scores (emoji_judge.summary) of one objective at n steps on a world's prompts; key names the noise."""
    c = torch.arange(world.C).repeat_interleave(IMAGES)
    g = rng(key[0], "toy emoji", *key[1:], n)
    verdicts = judge(pictures.samples(world, pictures.OBJECTIVES[label], ROUNDS, c, n, settings, g))
    of_prompt = [verdicts[i : i + IMAGES] for i in range(0, len(verdicts), IMAGES)]
    return emoji_judge.summary(world.source, world.texts, of_prompt)


def measure(worlds: dict[str, World], judge: emoji_judge.Judge, label: str) -> list[dict]:
    """The records of one objective and kind of prompt: settings for each step count, scores for each seed."""
    records = []
    tries = [s for s in pictures.SETTINGS if label != "flow matching" or s["s_rule"] == 0.0]
    for n in STEPS:
        scores = [
            draw(worlds["validation"], judge, label, n, settings, (0, 1))["score"] for settings in tries
        ]
        settings = tries[int(np.argmax(scores))]
        for seed in SEEDS:
            scores = draw(worlds["test"], judge, label, n, settings, (seed, 2))
            records.append({"objective": label, "steps": n, "seed": seed, "settings": settings} | scores)
    return records


def measured(part: Path, *what) -> dict:
    """`measure`, or what an earlier try has left of it."""
    if not part.exists():
        began = time.perf_counter()
        records = measure(*what)
        checkpoint.write_json(part, {"records": records, "seconds": round(time.perf_counter() - began, 1)})
    return checkpoint.read_json(part)


def main() -> None:
    parser = errors.Parser("toy/emoji_world.py", __doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=encoders.PIXEL_SCALE, help="of the pictures")
    args = parser.parse_args()
    parser.check_ranges(args, scale=(0.05, 20))
    torch.set_num_threads(1)
    run(args.scale)


def run(scale: float) -> None:
    """Measure every kind of prompt and objective; print a table for each kind; write the JSON file."""
    name = "emoji_world" if scale == encoders.PIXEL_SCALE else f"emoji_world-scale-{scale:g}"
    parts, kinds, seconds = ROOT / "toy" / "results" / f"{name}-parts", {}, 0.0
    settings = {"scale": scale, "side": SIDE, "rounds": ROUNDS, "prompts": PROMPTS, "images": IMAGES}
    checkpoint.keep_settings(parts, settings, "delete it")
    source = emoji.Emoji(SIDE)
    judge = emoji_judge.Judge(source)
    for kind in emoji.KINDS:
        worlds = {
            split: World(source, emoji_judge.asked(source, kind, split, PROMPTS), scale)
            for split in ("validation", "test")
        }
        integral, half = pictures.budget(worlds["test"], 0)
        information = worlds["test"].information()
        kinds[kind] = {"information": information, "delta_budget": integral, "half_at": half, "records": []}
        print(
            f"\n{kind}: Delta's budget {integral:.2f} (twice what the prompts tell: {2 * information:.2f}),"
        )
        print(
            f"half of it at s > {half:.2f}\n{'right, variety':20s}" + "".join(f"{n:>9d} steps" for n in STEPS)
        )
        for i, label in enumerate(OBJECTIVES):
            part = measured(parts / f"{kind}-{i}.json", worlds, judge, label)
            kinds[kind]["records"] += part["records"]
            seconds += part["seconds"]
            print(f"{label:20s}" + "".join(f"{cell(part['records'], n):>15s}" for n in STEPS), flush=True)
    made_by = machine.provenance(torch.device("cpu")) | {"seconds": round(seconds, 1)}
    checkpoint.write_json(parts.with_name(f"{name}.json"), made_by | settings | {"kinds": kinds})
    shutil.rmtree(parts)


def cell(records: list[dict], n: int) -> str:
    """The means over seeds of the share of right pictures, and of their variety."""
    own = [r for r in records if r["steps"] == n]
    variety = [r["variety"] for r in own if r["variety"] is not None]
    return f"{np.mean([r['right'] for r in own]):.2f}" + (f" {np.mean(variety):.2f}" if variety else "    -")


if __name__ == "__main__":
    errors.run(main, "stopped; the same command goes on")
