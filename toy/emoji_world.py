"""What the objective asks for on emoji: perfect evaluators, by kind of prompt. No network.

    python -m toy.emoji_world                               # toy/results/emoji_world.json; 50 minutes of one core
    python -m toy.emoji_world --data emoji-few --side 24    # toy/results/emoji_world-few.json; minutes

The pictures of training, unmoved, are the whole data set, so posterior means are exact:

    q(picture | c)  in proportion to the probability that the picture carries c (emoji.Emoji.carriers)
    q(picture)      the same for all, for the null prompt

The rest is toy/pictures.py's: at each step of the sampler the predictions follow their target for some
rounds. experiments/emoji_judge.py judges, on the test prompts of the trained table; guidance and the rule for
s_k are chosen on validation prompts, in one grid for all objectives (flow matching stays at s_k = t_k).
Held-out pairs are not asked: a finite set of pictures has nothing to compose. A run that was stopped goes on by
the same command.

A warning. So few pictures in so many dimensions are easy to tell apart: from t = 0.6 on the posterior is one
picture, and what comes of a blend at t = 1 is the picture nearest to it, clear but often the same. A network
is not that sharp.

Delta's budget: for a prompt c the integral of E||G_null - G_c||^2 over snr is twice the divergence of
q(picture | c) from q(picture). Its mean over the prompts of a kind is printed, in nats.
"""

import time
from pathlib import Path

import numpy as np
import torch

import emoji
import encoders
from engine import checkpoint, errors, machine
from experiments import emoji_judge
from rng import rng
from toy import kept, pictures
from toy.pictures import ROUNDS, STEPS

SEEDS = (0, 1)
PROMPTS, IMAGES = 35, 4  # of a kind at most; pictures of each, with each seed


class World(pictures.World):
    """The emoji of training, with some prompts: c is a prompt's number, C the null prompt."""

    def __init__(self, source: emoji.Emoji, texts: list[str], scale: float = encoders.PIXEL_SCALE):
        carriers = source.carriers(source.pairs)
        shares = [[carriers[text].get(pair, 0.0) for pair in source.pairs] for text in texts]
        weights = torch.tensor([*shares, [1.0] * len(source.pairs)])
        shown = [source.pictures[pair] for pair in source.pairs]
        super().__init__(shown, weights / weights.sum(1, keepdim=True), scale)
        self.source, self.texts = source, texts


def draw(world: World, judge: emoji_judge.Judge, label: str, n: int, settings: dict, key: tuple) -> dict:
    """Scores (emoji_judge.summary) of one objective at n steps on a world's prompts; key (seed, stream) names the noise."""
    g = rng(key[0], "toy emoji", *key[1:], n)
    verdicts = judge(pictures.samples(world, label, IMAGES, n, settings, g))
    of_prompt = [verdicts[i : i + IMAGES] for i in range(0, len(verdicts), IMAGES)]
    return emoji_judge.summary(world.source, world.texts, of_prompt)


def run(source: emoji.Emoji, path: Path) -> None:
    """Measure what PATH lacks, which is written after each objective; print a table for each kind of prompt."""
    settings = {"scale": encoders.PIXEL_SCALE, "side": source.side}
    settings |= {"rounds": ROUNDS, "prompts": PROMPTS, "images": IMAGES, "steps": STEPS, "seeds": SEEDS}
    results = machine.provenance(torch.device("cpu")) | {"seconds": 0.0, "kinds": {}}
    results |= kept.opened(path, **settings)
    judge = emoji_judge.Judge(source)
    for kind in emoji.KINDS:
        validation, test = (
            World(source, emoji_judge.asked(source, kind, split, PROMPTS)) for split in ("validation", "test")
        )
        if kind not in results["kinds"]:
            results["kinds"][kind] = pictures.budget(test) | {"records": []}
        found = results["kinds"][kind]
        print(
            f"\n{kind}: Delta's budget {found['delta_budget']:.2f} (twice the prompts' information:", end=""
        )
        print(f" {2 * found['information']:.2f}), half of it at s > {found['half_at']:.2f}")
        for label in pictures.COMPARED:
            if label not in [record["objective"] for record in found["records"]]:
                start = time.perf_counter()
                found["records"] += pictures.measure(
                    label,
                    SEEDS,
                    lambda n, choice: draw(validation, judge, label, n, choice, (0, 1))["score"],
                    lambda n, choice, seed: [draw(test, judge, label, n, choice, (seed, 2))],
                )
                results["seconds"] = round(results["seconds"] + time.perf_counter() - start, 1)
                checkpoint.write_json(path, results)
        for measure in ("right", "variety"):
            rows = {label: scores(found["records"], label, measure) for label in pictures.COMPARED}
            print(kept.table(measure, [f"N = {n}" for n in STEPS], rows), flush=True)


def scores(records: list[dict], label: str, measure: str) -> list[list[float]]:
    """[steps, seeds]; NaN for the variety of nothing right."""
    found = [[r[measure] for r in records if (r["objective"], r["steps"]) == (label, n)] for n in STEPS]
    return [[np.nan if score is None else score for score in seeds] for seeds in found]


def main() -> None:
    parser = errors.Parser("-m toy.emoji_world", __doc__.split("\n")[0])
    parser.add_argument("--data", choices=emoji.SETS, default="emoji", help="which emoji")
    parser.add_argument("--side", type=int, default=32, help="of the pictures, in pixels")
    args = parser.parse_args()
    parser.check_ranges(args, side=(8, emoji.TILE))
    torch.set_num_threads(1)
    run(emoji.Emoji(args.side, args.data), emoji_judge.predicted_in(args.data))


if __name__ == "__main__":
    errors.run(main, "stopped; the same command goes on")
