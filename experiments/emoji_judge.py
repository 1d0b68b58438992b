"""A judge without a network: which emoji a picture shows, and whether it shows it clearly.

    python -m experiments.emoji_judge   # is it sound? Shares in results/emoji/judge.json, a page of verdicts

All originals are known, so a picture is compared with every one of them, moved by up to a pixel. The distance
is the root mean square over its values, of 255. The nearest original says concept and maker. It is shown
clearly when it is nearer by RATIO than every original of another concept, and than those of the other makers.
So a blend of two fails, and so does a pale or empty picture, which is about as far from one as from others.

A picture is right when it clearly shows an original that the prompt fits. An exact prompt fits one, a label
three, "a bird" every bird (emoji.Emoji.carriers). Open prompts ask besides how many different ones appear.
"""

import argparse
import hashlib
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import data
import emoji
from engine import checkpoint, errors, machine
from experiments import evaluate
from rng import rng

RATIO = 0.75  # a mixture of two originals passes where the main one has a share of at least 4/7


class Near(NamedTuple):
    """An original, and how far a picture is from it: the root mean square of the differences, of 255."""

    concept: int
    maker: int
    distance: float


class Verdict(NamedTuple):
    """The nearest original, the nearest of its concept by another maker, the nearest of another concept."""

    nearest: Near
    other_maker: Near
    other_concept: Near

    @property
    def pair(self) -> tuple[int, int]:
        return self.nearest.concept, self.nearest.maker

    @property
    def clear_concept(self) -> bool:
        return self.nearest.distance <= RATIO * self.other_concept.distance

    @property
    def clear(self) -> bool:
        return self.clear_concept and self.nearest.distance <= RATIO * self.other_maker.distance

    def right(self, fits) -> bool:
        """Whether the picture clearly shows one of some (concept, maker) pairs."""
        return self.clear and self.pair in fits


class Judge:
    """The originals of an emoji.Emoji, moved by up to emoji.SHIFT pixels, to compare its pictures with."""

    def __init__(self, source: emoji.Emoji):
        moves = range(-emoji.SHIFT, emoji.SHIFT + 1)
        moved = [
            emoji.shifted(picture, down, right)
            for picture in source.pictures.reshape(-1, source.side, source.side, 3)
            for down in moves
            for right in moves
        ]
        self.source, self.moves = source, len(moves) ** 2
        # [concepts * makers * moves, D]
        self.originals = torch.from_numpy(np.stack(moved)).float().flatten(1)
        self.squared = self.originals.square().sum(1)

    def distances(self, pictures: list[np.ndarray]) -> Tensor:
        """[B, concepts, makers]: how far each picture is from each original, wherever that is moved to."""
        x = torch.from_numpy(np.stack(pictures)).float().flatten(1)
        squared = x.square().sum(1, keepdim=True) - 2 * x @ self.originals.T + self.squared
        moved = (squared.clamp_min(0) / x.shape[1]).sqrt()
        return moved.view(len(x), -1, len(emoji.MAKERS), self.moves).amin(3)

    def __call__(self, pictures: list[np.ndarray]) -> list[Verdict]:
        """What pictures, uint8 [side, side, 3], show."""
        return [verdict for i in range(0, len(pictures), 64) for verdict in self.some(pictures[i : i + 64])]

    def some(self, pictures: list[np.ndarray]) -> list[Verdict]:
        verdicts = []
        for distance in self.distances(pictures).numpy():
            concept, maker = np.unravel_index(distance.argmin(), distance.shape)
            makers, concepts = distance.copy(), distance.copy()
            makers[np.arange(len(distance)) != concept] = np.inf
            makers[concept, maker] = np.inf
            concepts[concept] = np.inf
            nearest = [np.unravel_index(d.argmin(), d.shape) for d in (distance, makers, concepts)]
            verdicts.append(Verdict(*(Near(int(c), int(m), float(distance[c, m])) for c, m in nearest)))
        return verdicts

    def name(self, near: Near) -> str:
        return self.source.captions(near.concept, near.maker)[0].text

    def says(self, verdict: Verdict) -> str:
        """A verdict in words."""
        distances = ", ".join(f"{near.distance:.0f}" for near in verdict)
        if verdict.clear:
            return f"{self.name(verdict.nearest)} ({distances})"
        other = verdict.other_maker if verdict.clear_concept else verdict.other_concept
        return f"unclear: {self.name(verdict.nearest)} or {self.name(other)} ({distances})"


# ------------------------------------------------------------------------------------------------------------
# Scores, by kind of prompt
# ------------------------------------------------------------------------------------------------------------
KINDS = (*emoji.KINDS, "held-out")  # the last: exact captions of the pairs that training never shows


def asked(source: emoji.Emoji, kind: str, split: str, most: int) -> list[str]:
    """At most so many prompts of a kind and split, in an order fixed by their hashes.

    split: "validation" is 3 prompts in 10, for the choice of settings; "test" is the others. Training shows
    both (but for kind "held-out"), with pictures of its own noise: what they ask of the network is memory.
    """
    if kind == "held-out":
        texts = {source.captions(*pair)[0].text for pair in source.held_out_pairs}
    else:
        texts = source.prompts(kind)
    lots = {text: int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") for text in texts}
    own = [text for text in lots if (lots[text] % 10 < 3) == (split == "validation")]
    return sorted(own, key=lots.get)[:most]


def summary(source: emoji.Emoji, texts: list[str], verdicts: list[list[Verdict]]) -> dict:
    """Scores of the verdicts on each prompt's pictures:

    right      the share of right pictures, with its 95% interval (low, high)
    concept    the share that clearly shows a concept that the prompt fits, by any maker, or blended from them
    variety    different originals among a prompt's right pictures, as a share of what draws of the data show
    score      right times variety, by which settings are chosen: wrong pictures and repeats both lower it
    distance   the median distance to the nearest original, of 255
    """
    fits, data_shows = source.carriers(source.pairs + source.held_out_pairs), source.carriers(source.pairs)
    right, concept, total, shown, expected = 0, 0, 0, 0, 0.0
    for text, some in zip(texts, verdicts):
        good = [v.pair for v in some if v.right(fits[text])]
        concepts = {pair[0] for pair in fits[text]}
        right, total = right + len(good), total + len(some)
        concept += sum(v.clear_concept and v.pair[0] in concepts for v in some)
        different, drawn = variety(good, data_shows.get(text, fits[text]))
        shown, expected = shown + different, expected + drawn
    low, high = evaluate.wilson(right, total)
    variety_of_all = shown / expected if expected else None
    return {
        "score": right / total * (variety_of_all or 0.0),
        "right": right / total,
        "low": low,
        "high": high,
        "concept": concept / total,
        "variety": variety_of_all,
        "distance": float(np.median([v.nearest.distance for some in verdicts for v in some])),
        "total": total,
    }


def variety(shown: list[tuple[int, int]], carriers: dict[tuple[int, int], float]) -> tuple[int, float]:
    """How many different originals a prompt's right pictures show, and as many draws of the data would."""
    share = np.array(list(carriers.values())) / sum(carriers.values())
    return len(set(shown)), float((1 - (1 - share) ** len(shown)).sum())


# ------------------------------------------------------------------------------------------------------------
# Is it sound?
# ------------------------------------------------------------------------------------------------------------
NOISE = 20  # standard deviation, of 255


def specimens(source: emoji.Emoji, seed: int, n: int) -> dict[str, list[tuple[np.ndarray, str]]]:
    """Pictures that must pass or fail, n of each kind with what they are: kind -> (picture, words)."""
    g = rng(seed, "emoji specimens")
    count, side = len(source.concepts), source.side
    made = {}

    def name(i, m):
        return source.captions(i, m)[0].text

    def blend(*pairs):
        mean = np.mean([source.pictures[pair] for pair in pairs], 0).round().astype(np.uint8)
        return mean, " + ".join(name(*pair) for pair in pairs)

    for _ in range(n):
        i, j = map(int, g.permutation(count)[:2])
        m, k = map(int, g.permutation(len(emoji.MAKERS))[:2])
        moved = emoji.shifted(source.pictures[i, m], *g.integers(-emoji.SHIFT, emoji.SHIFT + 1, 2))
        noisy = moved + NOISE * g.standard_normal(moved.shape)
        several = [(int(c), m) for c in g.permutation(count)[:12]]
        grey = np.full((side, side, 3), g.integers(256), dtype=np.uint8)
        for kind, specimen in {
            "originals, noise and shift": (noisy.clip(0, 255).round().astype(np.uint8), name(i, m)),
            "means of two makers": blend((i, m), (i, k)),
            "means of two concepts": blend((i, m), (j, k)),
            "means of twelve concepts": (blend(*several)[0], "twelve concepts"),
            "one grey, white to black": (grey, f"grey {grey[0, 0, 0]}"),
            "noise": (g.integers(0, 256, grey.shape, dtype=np.uint8), "noise"),
        }.items():
            made.setdefault(kind, []).append(specimen)
    return made


def page(judge: Judge, made: dict[str, list[tuple[np.ndarray, str]]], rows: int = 12) -> Image.Image:
    """Verdicts to look at, a column for each kind: the picture, and the originals that decided."""
    sheets = []
    for kind, some in made.items():
        verdicts = judge([picture for picture, _ in some[:rows]])
        pictures = [
            [picture, *(judge.source.pictures[near[:2]] for near in verdict)]
            for (picture, _), verdict in zip(some, verdicts)
        ]
        captions = [f"{words} -> {judge.says(v)}" for (_, words), v in zip(some, verdicts)]
        sheets.append(data.label_grid(pictures, [kind, "", "other maker", "other concept"], captions, 4))
    whole = Image.new("RGB", (sum(sheet.width for sheet in sheets), sheets[0].height), "white")
    for i, sheet in enumerate(sheets):
        whole.paste(sheet, (i * sheet.width, 0))
    return whole


def main() -> None:
    parser = errors.Parser("-m experiments.emoji_judge", "Is the judge of emoji sound?")
    parser.add_argument("--data", choices=list(emoji.SETS), default="emoji", help="which")
    parser.add_argument("--side", type=int, default=32, help="of the pictures, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the specimens")
    parser.add_argument(
        "--out",
        type=errors.file_to_write,
        default="results/emoji/judge.json",
        help="where to write the shares",
    )
    args = parser.parse_args()
    parser.check_ranges(args, side=(8, emoji.TILE), seed=(0, 2**63 - 1))
    run(args)


def run(args: argparse.Namespace) -> None:
    judge = Judge(emoji.Emoji(args.side, args.data))
    made, result = specimens(judge.source, args.seed, 1000), machine.provenance(torch.device("cpu"))
    result |= {
        "data": args.data,
        "side": args.side,
        "seed": args.seed,
        "ratio": RATIO,
        "noise": NOISE,
        "pass": {},
    }
    for kind, some in made.items():
        verdicts = judge([picture for picture, _ in some])
        if kind.startswith("originals"):
            right = [v.clear and judge.name(v.nearest) == words for v, (_, words) in zip(verdicts, some)]
        else:
            right = [v.clear for v in verdicts]
        result["pass"][kind] = float(np.mean(right))
        print(f"{kind:28s} {np.mean(right):7.1%} pass")
    checkpoint.write_json(args.out, result)
    path = emoji.TILES.parent / "verdicts.png"  # beside the art, which it shows
    page(judge, made).save(path)
    print(f"wrote {args.out}, and {path} to look at")


if __name__ == "__main__":
    errors.run(main)
