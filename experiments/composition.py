"""Concept and maker known apart: what do models draw for the pairs that training never shows?

    python -m experiments.composition runs/emoji-few/flow_matching-2 runs/emoji-named/flow_matching-2

Training shows a 3D fox and a flat one, and many soft animals; the prompt is "a soft fox". How that maker really drew
it nobody can know, so the judge of pixels (emoji_judge) has little to say. Two things are asked apart:

    concept   the picture clearly shows the concept, in whichever drawing (emoji_judge)
    maker     its colours are those of the maker that was asked for (Palette)

Writes composition.json, and composition.png to look at. Guidance is chosen on validation prompts, for both at once.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

import data
import emoji
import sample
from engine import checkpoint, errors, machine
from experiments import emoji_judge, emoji_table, evaluate, tables
from rng import rng

LEVELS = 8  # of a colour channel, in a palette
NOISE = 8  # standard deviation, of 255: about what models leave
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
PICTURES = 280  # for a score; a quarter of it to choose guidance
SHOWN = 6  # prompts on the sheet


class Palette:
    """Whose colours a picture has: ridge regression on the roots of the shares of 512 colours.

    It learns from the pictures of training, as they are and under noise. Calling it with uint8 pictures
    [N, side, side, 3] gives the number of a maker for each.
    """

    def __init__(self, source: emoji.Emoji):
        shown = np.stack([source.pictures[pair] for pair in source.pairs])
        noisy = shown + NOISE * rng(0, "palette").standard_normal(shown.shape)
        colours = self.colours(np.concatenate([shown, noisy.clip(0, 255).astype(np.uint8)]))
        makers = one_hot(torch.tensor([maker for _, maker in source.pairs] * 2)).float()
        ridge = torch.eye(colours.shape[1])
        self.weights = torch.linalg.solve(colours.T @ colours + ridge, colours.T @ makers)

    def colours(self, pictures: np.ndarray) -> Tensor:
        """[N, LEVELS^3]"""
        r, g, b = np.moveaxis(pictures.astype(np.int64) * LEVELS // 256, 3, 0).reshape(3, len(pictures), -1)
        numbers = (r * LEVELS + g) * LEVELS + b
        counts = np.stack([np.bincount(row, minlength=LEVELS**3) for row in numbers])
        return torch.from_numpy(counts / numbers.shape[1]).float().sqrt()

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        return (self.colours(pictures) @ self.weights).argmax(1).numpy()


class Pairs:
    """The held-out pairs of a source, and what pictures of them are worth."""

    def __init__(self, source: emoji.Emoji):
        self.source, self.judge, self.palette = source, emoji_judge.Judge(source), Palette(source)
        self.pairs = {source.captions(*pair)[0].text: pair for pair in source.held_out_pairs}

    def scores(self, texts: list[str], pictures: list[np.ndarray]) -> dict:
        """Of pictures, as many of each prompt in turn: the shares with the concept, the maker, both (with its 95%
        interval), and of those that are clearly the held-out original, pixel by pixel."""
        wanted = np.repeat([self.pairs[text] for text in texts], len(pictures) // len(texts), axis=0)
        verdicts = self.judge(pictures)
        concept = np.array([v.clear_concept and v.pair[0] == pair[0] for v, pair in zip(verdicts, wanted)])
        original = np.array([v.right({tuple(pair)}) for v, pair in zip(verdicts, wanted)])
        maker = self.palette(np.stack(pictures)) == wanted[:, 1]
        both = concept & maker
        low, high = evaluate.wilson(int(both.sum()), len(both))
        shares = {"concept": concept, "maker": maker, "both": both, "original": original}
        return {name: float(hits.mean()) for name, hits in shares.items()} | {"low": low, "high": high}

    def references(self) -> dict[str, dict]:
        """The scores of the originals themselves, and of another maker's."""
        originals = [self.source.pictures[pair] for pair in self.pairs.values()]
        others = [self.source.pictures[c, (m + 1) % len(emoji.MAKERS)] for c, m in self.pairs.values()]
        made = {"the original": originals, "another maker's": others}
        return {name: self.scores(list(self.pairs), pictures) for name, pictures in made.items()}


def draw(loaded: sample.Loaded, texts: list[str], split: str, pictures: int, **choices) -> list[np.ndarray]:
    """At least so many pictures, as many of each prompt; their noise follows from (split, prompt, image)."""
    return emoji_table.draw(loaded, texts, pictures, (50 + (split == "test"),), **choices)[0]


def measure(loaded: sample.Loaded, pairs: Pairs, steps: int) -> dict:
    """Scores on test prompts, at the guidance that is best on validation prompts."""
    texts = {
        split: emoji_judge.asked(pairs.source, "held-out", split, 10**6) for split in ("validation", "test")
    }
    few = texts["validation"][: PICTURES // 4]

    def both(guidance: float) -> float:
        drawn = draw(loaded, few, "validation", PICTURES // 4, steps=steps, guidance=guidance)
        return pairs.scores(few, drawn)["both"]

    best = max(GUIDANCE, key=both)
    asked = texts["test"][:PICTURES]
    drawn = draw(loaded, asked, "test", PICTURES, steps=steps, guidance=best)
    return {"guidance": best, "pictures": len(drawn)} | pairs.scores(asked, drawn)


def sheet(models: dict[str, tuple[sample.Loaded, Pairs, float]], steps: int):
    """The first test prompts of the smallest world: the originals of all makers, and what each model draws."""
    known = min((pairs for _, pairs, _ in models.values()), key=lambda pairs: len(pairs.pairs))
    texts = emoji_judge.asked(known.source, "held-out", "test", SHOWN)
    rows = [list(known.source.pictures[known.pairs[text][0]]) for text in texts]
    for loaded, _, guidance in models.values():
        drawn = draw(loaded, texts, "test", len(texts), steps=steps, guidance=guidance)
        for row, picture in zip(rows, drawn):
            row.append(picture)
    return data.label_grid(rows, [*emoji.MAKERS, *models], texts, 5)


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = errors.Parser("-m experiments.composition", "Held-out pairs: concept and maker apart.")
    a = parser.add_argument
    a("runs", metavar="RUN", type=Path, nargs="+", help="runs of train.py on emoji")
    a("--steps", metavar="N", type=int, default=4, help="of the sampler")
    a("--out", metavar="DIR", type=Path, default=Path("results/emoji"), help="where results go")
    args = parser.parse_args(argv)
    parser.check_ranges(args, steps=(1, 10**6))
    return args


def main() -> None:
    args = parse_arguments()
    device = machine.pick_device()
    result = machine.provenance(device) | {"steps": args.steps, "worlds": {}, "models": {}}
    worlds, models = {}, {}
    args.out.mkdir(parents=True, exist_ok=True)
    for run in args.runs:
        loaded = tables.load(run, device, compiled=False)
        source = emoji_table.source_of(loaded.config)
        if source.fingerprint not in worlds:
            worlds[source.fingerprint] = Pairs(source)
            result["worlds"][f"{source.name} {source.side}"] = worlds[source.fingerprint].references()
        pairs = worlds[source.fingerprint]
        found = measure(loaded, pairs, args.steps)
        training = {"train": loaded.config["command"], "training": loaded.config}
        result["models"][str(run)] = found | training
        label = f"{source.name.removeprefix('emoji-')}, {loaded.config['objective']} {loaded.config['seed']}"
        models[label] = loaded, pairs, found["guidance"]
        print(run, {name: round(value, 3) for name, value in found.items()}, flush=True)
    for name, references in result["worlds"].items():
        for what, scores in references.items():
            print(name, what, {key: round(value, 3) for key, value in scores.items()})
    checkpoint.write_json(args.out / "composition.json", result)
    with checkpoint.in_one_piece(args.out / "composition.png", shared=True) as partial:
        sheet(models, args.steps).save(partial, "png")


if __name__ == "__main__":
    errors.run(main)
