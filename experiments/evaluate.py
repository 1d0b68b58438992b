"""GenEval in miniature: exact scores for the built-in shapes, per step count (Sec. 4, Tables 1 and 2).

    python -m experiments.evaluate --checkpoint runs/laptop --steps 1 2 4 8 50   # Table 1's columns, 95% intervals
    python -m experiments.evaluate --checkpoint runs/laptop --split validation --steps 2 --guidance 1.5 --eta 1

scorer.py judges the pictures, for the six kinds of prompt that GenEval has; diversity.py says how varied the right ones
are. Other models are scored by GenEval's own scorer, on pictures that export.py writes.
"""

import argparse
import functools
import hashlib
import itertools
import time
from pathlib import Path

from tqdm import tqdm

import data
import sample
from engine import checkpoint, errors, machine
from experiments import diversity
from experiments.scorer import SIDES, judge

SPLITS = ("train", "validation", "test", "pairs", "fixed")
FEWEST = 2  # a tag with fewer prompts of its own in a split asks training prompts too, with noise of its own


@functools.cache
def all_prompts(world: data.World = data.SETS["shapes"]) -> tuple[dict, ...]:
    """The metadata of every prompt that a world asks, in an order fixed by their hashes within each tag.

    The prompts of the position tag name no colours, as in GenEval, or both.
    """
    ask, found = data.prompt_metadata, []
    for shape in world.shapes:
        found.append(ask("single_object", [shape], [None]))
        found += [ask("colors", [shape], [color]) for color in world.colors]
        counted = [None, *world.colors] if world.counted_colors else [None]
        for count, color in itertools.product(data.COUNTS, counted):
            found.append(ask("counting", [shape], [color], count))
    for pair in map(list, itertools.permutations(world.shapes, 2)):
        found.append(ask("two_object", pair, [None, None]))
        for colors in itertools.permutations(world.colors, 2):
            found.append(ask("color_attr", pair, list(colors)))
        for colors in [(None, None), *itertools.product(world.colors, repeat=2)]:
            found += [ask("position", pair, list(colors), relation=relation) for relation in data.RELATIONS]
    found = [metadata for metadata in found if metadata["tag"] in world.tags]
    return tuple(sorted(found, key=lambda m: (m["tag"], hashlib.sha256(m["prompt"].encode()).digest())))


def split_of(metadata: dict) -> str:
    """ "pairs" for a prompt that asks for a colour-shape pair never rendered in training, else data.split_of."""
    pairs = {(item.get("color"), item["class"]) for item in metadata["include"]}
    return "pairs" if pairs & data.HELD_OUT_PAIRS else data.split_of(metadata["prompt"])


def world_of(config: dict) -> data.World:
    """The world that a model was trained on, from its config.json. Raises UserError for other data."""
    name = (config.get("data") or ["nothing"])[0]
    if name not in data.SETS:
        way_out = "export the pictures (experiments.export) for GenEval's own scorer"
        raise errors.UserError(f"only models of the built-in shapes are scored, not of {name}: {way_out}")
    return data.SETS[name]


def prompts(split: str, per_tag: int | None = None, world: data.World = data.SETS["shapes"]) -> list[dict]:
    """The metadata of a split's prompts, one of SPLITS, tag after tag, always the same.

    "train", "validation" and "test" ask GenEval's six kinds of prompt, those of the position tag without colours. A tag
    that has fewer than two prompts of its own in the split (data.split_of gives all one-object prompts to training)
    asks training prompts too. "pairs" asks for what was held out of every training picture, in the tags that can:
    colors, position (with colours), color_attr and, where numbers come with colours, counting. "fixed" are 64: the 41
    single_object and colors prompts of training, cycling.

    per_tag: so many of each tag, cycling if there are fewer; None gives every prompt once.
    """
    if split == "fixed":
        simple = prompts("train", None, data.SETS["one-shape"])
        return list(itertools.islice(itertools.cycle(simple), 64))
    chosen = []
    for tag in world.tags:
        of_tag = [m for m in all_prompts(world) if m["tag"] == tag]
        if split != "pairs" and tag == "position":
            of_tag = [m for m in of_tag if not any("color" in item for item in m["include"])]
        listed = [m for m in of_tag if split_of(m) == split]
        if split != "pairs" and len(listed) < FEWEST:
            listed += [m for m in of_tag if split_of(m) == "train"]
        chosen += listed if per_tag is None else itertools.islice(itertools.cycle(listed), per_tag)
    return chosen


Z95 = 1.959963984540054  # the normal quantile of a two-sided 95%


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share; total >= 1."""
    p, z2 = right / total, Z95**2 / total
    centre, half = (p + z2 / 2) / (1 + z2), Z95 / (1 + z2) * (p * (1 - p) / total + z2 / (4 * total)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(shares: list[tuple[int, int]]) -> tuple[float, float, float]:
    """The unweighted mean of independent shares (right, total) and its 95% interval: (mean, low, high).

    Square-and-add (Newcombe; Zou and Donner): the distances from each share to its own Wilson limits are added as
    squares. It keeps a width where all is right or all wrong, which a bootstrap does not. The prompts are taken as
    given: the interval is about the noise of sampling, and a little too wide where prompts differ in difficulty.
    """
    rates = [right / total for right, total in shares]
    limits = [wilson(*share) for share in shares]
    mean = sum(rates) / len(rates)
    below = sum((p - low) ** 2 for p, (low, _) in zip(rates, limits)) ** 0.5 / len(rates)
    above = sum((high - p) ** 2 for p, (_, high) in zip(rates, limits)) ** 0.5 / len(rates)
    return mean, max(0.0, mean - below), min(1.0, mean + above)  # rounding may pass the ends


BATCH = 72  # pictures drawn at once


def measure(
    loaded: sample.Loaded, asked: list[dict], images: int, steps: int, *, seed=0, stream=0, **choices
) -> list[list[list[data.Object]]]:
    """The objects of every right picture among `images` of each prompt at one step count, one list per prompt.

    asked: metadata, as from `prompts`. choices: guidance, eta, s_rule, space of sample.generate. The noise of a picture
    is a function of (seed, stream, position of the prompt, number of the image), so models are compared on one noise.
    """
    jobs = list(itertools.product(range(len(asked)), range(images)))
    parts = [jobs[i : i + BATCH] for i in range(0, len(jobs), BATCH)]
    found: list[list[list[data.Object]]] = [[] for _ in asked]
    for part in tqdm(parts, desc=f"{steps} steps", leave=False, disable=None):
        texts, keys = [asked[i]["prompt"] for i, _ in part], [(stream, *job) for job in part]
        pictures = sample.generate(loaded, texts, keys, seed=seed, steps=steps, batch_size=BATCH, **choices)
        for (i, _), picture in zip(part, pictures):
            if objects := judge(picture, asked[i])[0]:
                found[i].append(objects)
    return found


def summary(asked: list[dict], found: list[list], images: int) -> dict:
    """Of what `measure` found, scores with 95% intervals: "overall" (unweighted mean of the tags), "tags", "prompts"
    ([right, total] each), and "unseen": the mean of the tags again, over the prompts that training never met."""
    tags, unseen, of_prompt = {}, {}, {}
    for metadata, right in zip(asked, map(len, found)):
        counted = [(tags, metadata["tag"]), (of_prompt, metadata["prompt"])]
        if split_of(metadata) != "train":
            counted.append((unseen, metadata["tag"]))
        for counts, key in counted:
            before, total = counts.get(key, (0, 0))
            counts[key] = before + right, total + images

    def entry(right: int, total: int) -> dict:
        low, high = wilson(right, total)
        return {"score": right / total, "low": low, "high": high, "right": right, "total": total}

    def mean_of(counts: dict) -> tuple[dict, dict]:
        mean = dict(zip(("score", "low", "high"), mean_interval(list(counts.values()))))
        return mean, {tag: entry(*share) for tag, share in counts.items()}

    overall, by_tag = mean_of(tags)
    scores = {"overall": overall, "tags": by_tag}
    if unseen:
        overall, by_tag = mean_of(unseen)
        scores["unseen"] = overall | {"tags": by_tag}
    return scores | {"prompts": of_prompt}


COLUMNS = {  # in the order of Table 1
    "single_object": "Single Object",
    "two_object": "Two Object",
    "color_attr": "Attribute Binding",
    "colors": "Colors",
    "counting": "Counting",
    "position": "Position",
}


def table(by_steps: dict[int, dict]) -> str:
    """Table 1's columns as text, one row per step count, and below it what holds for all pictures together."""
    tags = [tag for tag in COLUMNS if tag in next(iter(by_steps.values()))["tags"]]
    names = ["Overall", *(COLUMNS[tag] for tag in tags)]
    lines = ["Steps  " + "".join(f"{name:<20}" for name in names).rstrip()]

    def numbers(score):
        return f"{score['score']:.3f} [{score['low']:.3f} {score['high']:.3f}]"

    for steps, scores in by_steps.items():
        cells = [scores["overall"], *(scores["tags"][tag] for tag in tags)]
        lines.append(f"{steps:>5}  " + "".join(f"{numbers(cell):<20}" for cell in cells).rstrip())
        right, total = (sum(n) for n in zip(*scores["prompts"].values()))
        more = [f"{right} of {total} pictures right"]
        if "unseen" in scores:
            more.append(f"{numbers(scores['unseen'])} on prompts never seen in training")
        for kind, found in scores.get("diversity", {}).get("overall", {}).items():
            more.append(f"{found['effective']:.1f} effective {kind}, the data's {found['data']:.1f}")
        lines.append(f"{'':7}{'; '.join(more)}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = errors.Parser("-m experiments.evaluate", "Score a model of the built-in shapes per step count.")
    a = parser.add_argument_group("what").add_argument
    scenes, split = Path("checkpoints/scenes"), ["test", "pairs"]
    a("--checkpoint", metavar="DIR", type=errors.model, default=scenes, help="folder of a run")
    a("--split", nargs="+", metavar="SPLIT", choices=SPLITS, default=split, help=f"of {', '.join(SPLITS)}")
    a("--steps", metavar="N", type=int, nargs="+", default=list(sample.STEP_COUNTS), help="step counts")
    a("--per-tag", metavar="N", type=int, default=24, help="prompts of each tag, cycling")
    a("--images", metavar="N", type=int, default=4, help="pictures per prompt")
    a("--seed", metavar="N", type=int, default=0, help="of the noise")
    a("--out", metavar="FILE", type=errors.file_to_write, help="(default: evaluation.json in the checkpoint)")
    sample.sampling_flags(parser)
    args = parser.parse_args()
    numbers = {"images": (1, 10**4), "per_tag": (1, 10**6), "seed": (0, 2**63 - 1), "guidance": (0, 100)}
    parser.check_ranges(args, steps=(1, 10**6), t_max=(0.01, 1), **numbers)
    return args


def main() -> None:
    args = parse_arguments()
    machine.keep_freed_memory()
    device = machine.pick_device(args.device)
    loaded = sample.load(args.checkpoint, device)
    side, world, choices = loaded.config["side"], world_of(loaded.config), sample.choices_of(args)
    least, most = SIDES
    if not least <= side <= most:
        raise errors.UserError(f"pictures of {least} to {most} pixels a side can be judged, not of {side}")
    out = args.out or args.checkpoint / "evaluation.json"
    results = machine.provenance(device) | {"checkpoint": str(args.checkpoint), "seed": args.seed}
    results |= {"images": args.images, "per_tag": args.per_tag}
    results |= {"choices": sample.choose(loaded, loaded.shape, **choices), "splits": {}}
    began = time.perf_counter()
    for split in args.split:
        asked, by_steps = prompts(split, args.per_tag, world), {}
        stream, size = SPLITS.index(split), len(asked) * args.images
        for n in args.steps:
            found = measure(loaded, asked, args.images, n, seed=args.seed, stream=stream, **choices)
            by_steps[n] = summary(asked, found, args.images)
            by_steps[n]["diversity"] = diversity.measure(asked, found, side, world)
        results["splits"][split] = by_steps
        print(f"{split} prompts, {size} pictures a row, score [95% interval]\n{table(by_steps)}\n")
    results["seconds"] = round(time.perf_counter() - began, 1)
    checkpoint.write_json(out, results)
    print(f"wrote {out}")


if __name__ == "__main__":
    errors.run(main)
