"""A judge without a network: which emoji a picture shows, and whether it shows it clearly.

    python -m experiments.emoji_judge   # is it sound? Shares in results/emoji/judge.json, a page of verdicts

All originals are known, so a picture is compared with every one of them, moved by up to a pixel. The distance
is the root mean square over its values, of 255. The nearest original says concept and maker. It is shown
clearly when it is nearer by RATIO than every original of another concept, and than those of the other makers.
So a blend of two fails, and so does a pale or empty picture, which is about as far from one as from others.

A picture is right when it clearly shows an original that the prompt fits. An exact prompt fits one, a label
three, "a bird" every bird (emoji.Emoji.carriers). Open prompts ask besides how many different ones appear.
"""

import hashlib
from pathlib import Path
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
        parts = [self.distances(pictures[i : i + 64]) for i in range(0, len(pictures), 64)]
        return [self.verdict(distance) for distance in torch.cat(parts).numpy()]

    def verdict(self, distance: np.ndarray) -> Verdict:
        """Of a picture's distances [concepts, makers]."""

        def nearest(distance: np.ndarray) -> Near:
            concept, maker = np.unravel_index(distance.argmin(), distance.shape)
            return Near(int(concept), int(maker), float(distance[concept, maker]))

        first = nearest(distance)
        same_concept = np.arange(len(distance))[:, None] == first.concept
        same = same_concept & (np.arange(distance.shape[1]) == first.maker)
        others = np.where(same_concept & ~same, distance, np.inf), np.where(same_concept, np.inf, distance)
        return Verdict(first, *map(nearest, others))

    def name(self, near: Near) -> str:
        return self.source.captions(near.concept, near.maker)[0].text


def predicted_in(name: str) -> Path:
    """The file of what perfect evaluators draw of one of emoji.SETS (toy/emoji_world.py): emoji_world-few.json."""
    results = Path(__file__).resolve().parents[1] / "toy" / "results"
    return results / f"emoji_world{name.removeprefix('emoji')}.json"


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
    chosen = [text for text in lots if (lots[text] % 10 < 3) == (split == "validation")]
    return sorted(chosen, key=lots.get)[:most]


def summary(source: emoji.Emoji, texts: list[str], verdicts: list[list[Verdict]]) -> dict:
    """Scores of the verdicts on each prompt's pictures:

    right      the share of right pictures, with its 95% interval (low, high)
    concept    the share that clearly shows a concept that the prompt fits, by any maker, or blended from them
    variety    different originals among a prompt's right pictures, as a share of what draws of the data show
    score      right times variety, by which settings are chosen: wrong pictures and repeats both lower it
    distance   the median distance to the nearest original, of 255
    """
    fits, data_shows = source.carriers(source.pairs + source.held_out_pairs), source.carriers(source.pairs)
    everything = [verdict for some in verdicts for verdict in some]
    right, concept, shown, expected = 0, 0, 0, 0.0
    for text, some in zip(texts, verdicts):
        good = [v.pair for v in some if v.right(fits[text])]
        concepts = {pair[0] for pair in fits[text]}
        right += len(good)
        concept += sum(v.clear_concept and v.pair[0] in concepts for v in some)
        different, drawn = variety(good, data_shows.get(text, fits[text]))
        shown, expected = shown + different, expected + drawn
    total, varied = len(everything), shown / expected if expected else None
    low, high = evaluate.wilson(right, total)
    return {
        "score": right / total * (varied or 0.0),
        "right": right / total,
        "low": low,
        "high": high,
        "concept": concept / total,
        "variety": varied,
        "distance": float(np.median([verdict.nearest.distance for verdict in everything])),
        "total": total,
    }


def variety(shown: list[tuple[int, int]], carriers: dict[tuple[int, int], float]) -> tuple[int, float]:
    """How many different originals a prompt's right pictures show, and as many draws of the data would."""
    share = np.array(list(carriers.values())) / sum(carriers.values())
    return len(set(shown)), float((1 - (1 - share) ** len(shown)).sum())


NOISE = 20  # standard deviation, of 255


def specimens(judge: Judge, seed: int, n: int) -> dict[str, list[tuple[np.ndarray, str]]]:
    """Pictures that must pass or fail, n of each kind with what they are: kind -> (picture, words)."""
    g, source, made = rng(seed, "emoji specimens"), judge.source, []

    def blend(*pairs: tuple[int, int]) -> tuple[np.ndarray, str]:
        mean = np.mean([source.pictures[pair] for pair in pairs], 0).round().astype(np.uint8)
        return mean, " + ".join(source.captions(*pair)[0].text for pair in pairs)

    for _ in range(n):
        i, j = map(int, g.permutation(len(source.concepts))[:2])
        m, k = map(int, g.permutation(len(emoji.MAKERS))[:2])
        original, name = blend((i, m))
        moved = emoji.shifted(original, *g.integers(-emoji.SHIFT, emoji.SHIFT + 1, 2))
        noisy = moved + NOISE * g.standard_normal(moved.shape)
        twelve = [(int(c), m) for c in g.permutation(len(source.concepts))[:12]]
        grey = np.full_like(original, g.integers(256))
        kinds = {
            "originals, noise and shift": (noisy.clip(0, 255).round().astype(np.uint8), name),
            "means of two makers": blend((i, m), (i, k)),
            "means of two concepts": blend((i, m), (j, k)),
            "means of twelve concepts": (blend(*twelve)[0], "twelve concepts"),
            "one grey, white to black": (grey, f"grey {grey[0, 0, 0]}"),
            "noise": (g.integers(0, 256, grey.shape, dtype=np.uint8), "noise"),
        }
        made.append(kinds)
    return {kind: [one[kind] for one in made] for kind in kinds}


def passing(judge: Judge, made: dict[str, list[tuple[np.ndarray, str]]]) -> dict[str, float]:
    """Of `specimens` the share that passes, by kind; an original passes as what it is."""
    shares = {}
    for kind, some in made.items():
        verdicts = judge([picture for picture, _ in some])
        clear = [v.clear for v in verdicts]
        if kind.startswith("originals"):
            clear = [v.clear and judge.name(v.nearest) == words for v, (_, words) in zip(verdicts, some)]
        shares[kind] = float(np.mean(clear))
    return shares


def page(judge: Judge, made: dict[str, list[tuple[np.ndarray, str]]], rows: int = 5) -> Image.Image:
    """Verdicts to look at, one below the other: the picture, and the originals that decided."""
    some = [specimen for specimens in made.values() for specimen in specimens[:rows]]
    verdicts = judge([picture for picture, _ in some])
    pictures = [[p, *(judge.source.pictures[near[:2]] for near in v)] for (p, _), v in zip(some, verdicts)]
    captions = [
        f"{words} {'passes' if verdict.clear else 'fails'}: {', '.join(f'{near.distance:.0f}' for near in verdict)}"
        for (_, words), verdict in zip(some, verdicts)
    ]
    return data.label_grid(pictures, ["picture", "nearest", "other maker", "other concept"], captions, 4)


def main() -> None:
    parser = errors.Parser("-m experiments.emoji_judge", "Is the judge of emoji sound?")
    a, file = parser.add_argument, "results/emoji/judge.json"
    a("--data", choices=list(emoji.SETS), default="emoji", help="which")
    a("--side", type=int, default=32, help="of the pictures, in pixels")
    a("--seed", type=int, default=0, help="of the specimens")
    a("--out", type=errors.file_to_write, default=file, help="where to write the shares")
    args = parser.parse_args()
    parser.check_ranges(args, side=(8, emoji.TILE), seed=(0, 2**63 - 1))
    judge = Judge(emoji.Emoji(args.side, args.data))
    made, result = specimens(judge, args.seed, 1000), machine.provenance(torch.device("cpu"))
    result |= {"data": args.data, "side": args.side, "seed": args.seed, "ratio": RATIO, "noise": NOISE}
    result["pass"] = passing(judge, made)
    for kind, share in result["pass"].items():
        print(f"{kind:28s} {share:7.1%} pass")
    checkpoint.write_json(args.out, result)
    path = emoji.TILES.parent / "verdicts.png"  # beside the art, which it shows
    page(judge, made).save(path)
    print(f"wrote {args.out}, and {path} to look at")


if __name__ == "__main__":
    errors.run(main)
