"""GenEval in miniature: exact scores for the built-in shapes, per step count (Sec. 4, Tables 1 and 2).

    python experiments/evaluate.py --checkpoint runs/laptop --steps 1 2 4 8 50  # Table 1's columns, with 95% intervals
    python experiments/evaluate.py --checkpoint runs/laptop --split validation --steps 2 --guidance 1.5 --eta 1

    # pictures for GenEval's public scorer: of a checkpoint, and of any other system that diffusers can run
    python experiments/evaluate.py --checkpoint runs/mine --steps 2 --prompts evaluation_metadata.jsonl --export out/
    python experiments/evaluate.py --pipeline NAME --steps 4 --prompts evaluation_metadata.jsonl --export out/

scorer.py judges the pictures, for the six kinds of prompt that GenEval has. Other models are scored by GenEval's own
scorer, on pictures exported in the layout that it reads.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

if (
    __name__ == "__main__"
):  # started as a file: modules are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import data
import sample
from engine import checkpoint, errors, machine
from experiments.scorer import SIDES, Found, judge

# ============================================================================================================
# The prompts
# ============================================================================================================
SPLITS = ("train", "validation", "test", "pairs", "fixed")
FEWEST = 2  # a tag with fewer prompts of its own in a split asks training prompts too, with noise of its own


@functools.cache
def all_prompts(world: data.World = data.SETS["shapes"]) -> tuple[dict, ...]:
    """The metadata of every prompt that a world asks, in an order fixed by their hashes within each tag.

    The prompts of the position tag tell no colours, as in GenEval, or both.
    """
    found = []
    for shape in world.shapes:
        found.append(data.prompt_metadata("single_object", [shape], [None]))
        told = [None, *world.colors] if world.counted_colors else [None]
        found += [
            data.prompt_metadata("counting", [shape], [c], count) for count in data.COUNTS for c in told
        ]
        found += [data.prompt_metadata("colors", [shape], [color]) for color in world.colors]
    for pair in itertools.permutations(world.shapes, 2):
        found.append(data.prompt_metadata("two_object", list(pair), [None, None]))
        found += [
            data.prompt_metadata("color_attr", list(pair), list(colors))
            for colors in itertools.permutations(world.colors, 2)
        ]
        told = [(None, None), *itertools.product(world.colors, repeat=2)]
        found += [
            data.prompt_metadata("position", list(pair), list(colors), relation=relation)
            for colors in told
            for relation in data.RELATIONS
        ]
    found = [metadata for metadata in found if metadata["tag"] in world.tags]
    return tuple(sorted(found, key=lambda m: (m["tag"], hashlib.sha256(m["prompt"].encode()).digest())))


def split_of(metadata: dict) -> str:
    """ "pairs" for a prompt that asks for a colour-shape pair never rendered in training, else data.split_of."""
    pairs = {(item.get("color"), item["class"]) for item in metadata["include"]}
    return "pairs" if pairs & data.HELD_OUT_PAIRS else data.split_of(metadata["prompt"])


def world_of(config: dict) -> data.World:
    """The world that a model was trained on, from its config.json."""
    return data.SETS[config["data"][0]]


def prompts(split: str, per_tag: int | None = None, world: data.World = data.SETS["shapes"]) -> list[dict]:
    """The metadata of a split's prompts, tag after tag, always the same.

    "train", "validation" and "test" ask GenEval's six kinds of prompt, those of the position tag without colours. A tag
    that has fewer than two prompts of its own in the split (data.split_of gives all one-object prompts to training)
    asks training prompts too. "pairs" asks for what was held out of every training picture, in the tags that can:
    colors, position (with colours) and color_attr. "fixed" is `fixed_64`.

    per_tag: so many of each tag, cycling if there are fewer; None gives every prompt once. Raises UserError for an
    unknown split.
    """
    if split not in SPLITS:
        raise errors.UserError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    if split == "fixed":
        return fixed_64()
    chosen = []
    for tag in world.tags:
        of_tag = [m for m in all_prompts(world) if m["tag"] == tag]
        if split != "pairs" and tag == "position":
            of_tag = [m for m in of_tag if not any("color" in item for item in m["include"])]
        own = [m for m in of_tag if split_of(m) == split]
        if split != "pairs" and len(own) < FEWEST:
            own += [m for m in of_tag if split_of(m) == "train"]
        if own:
            chosen += own if per_tag is None else list(itertools.islice(itertools.cycle(own), per_tag))
    return chosen


def fixed_64() -> list[dict]:
    """The 64 fixed single_object and colors prompts of the README's goal: the 41 of training, cycling."""
    simple = prompts("train", None, data.SETS["one-shape"])
    return list(itertools.islice(itertools.cycle(simple), 64))


# ============================================================================================================
# Intervals
# ============================================================================================================
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


# ============================================================================================================
# Scores of a model
# ============================================================================================================
BATCH = 72  # pictures drawn at once


def measure(
    loaded: sample.Loaded,
    asked: list[dict],
    images: int,
    steps: int,
    *,
    seed: int = 0,
    stream: int = 0,
    bar: tqdm | None = None,
    **choices,
) -> list[list[list[Found]]]:
    """The objects of every right picture among `images` of each prompt at one step count, one list per prompt.

    asked: metadata, as from `prompts`. choices: guidance, eta, s_rule, space of sample.generate. The noise of a picture
    is a function of (seed, stream, position of the prompt, number of the image), so models are compared on one noise.
    """
    jobs = itertools.product(range(len(asked)), range(images))
    found: list[list[list[Found]]] = [[] for _ in asked]
    while part := list(itertools.islice(jobs, BATCH)):
        texts, keys = [asked[i]["prompt"] for i, _ in part], [(stream, *job) for job in part]
        pictures = sample.generate(loaded, texts, keys, seed=seed, steps=steps, batch_size=BATCH, **choices)
        for (i, _), picture in zip(part, pictures):
            if objects := judge(picture, asked[i])[0]:
                found[i].append(objects)
        if bar is not None:
            bar.update(len(part))
    return found


def summary(asked: list[dict], found: list[list], images: int) -> dict:
    """Of what `measure` found, scores with 95% intervals: "overall" (unweighted mean of the tags), "tags", "prompts" ([right, total] each), and
    "unseen": the mean of the tags again, over the prompts that training never met."""
    tags, unseen, of_prompt = {}, {}, {}
    for metadata, n in zip(asked, map(len, found)):
        where = [(tags, metadata["tag"]), (of_prompt, metadata["prompt"])]
        if split_of(metadata) != "train":
            where.append((unseen, metadata["tag"]))
        for counts, key in where:
            r, total = counts.get(key, (0, 0))
            counts[key] = (r + n, total + images)

    def entry(share):
        low, high = wilson(*share)
        return {"score": share[0] / share[1], "low": low, "high": high, "right": share[0], "total": share[1]}

    def overall(counts):
        return dict(zip(("score", "low", "high"), mean_interval(list(counts.values()))))

    whole = {"overall": overall(tags), "tags": {tag: entry(share) for tag, share in tags.items()}}
    if unseen:
        whole["unseen"] = overall(unseen) | {"tags": {tag: entry(share) for tag, share in unseen.items()}}
    return whole | {"prompts": of_prompt}


TABLE_ORDER = ("single_object", "two_object", "color_attr", "colors", "counting", "position")  # as in Table 1
COLUMN_NAMES = {
    "single_object": "Single Object",
    "two_object": "Two Object",
    "color_attr": "Attribute Binding",
    "colors": "Colors",
    "counting": "Counting",
    "position": "Position",
}


def table(split: str, by_steps: dict[int, dict]) -> str:
    """Table 1's columns as text, one row per step count."""
    tags = [tag for tag in TABLE_ORDER if tag in next(iter(by_steps.values()))["tags"]]
    names = ["Overall", *(COLUMN_NAMES[tag] for tag in tags)]
    lines = ["Steps  " + "".join(f"{name:<20}" for name in names).rstrip()]
    for steps, scores in by_steps.items():
        cells = [scores["overall"], *(scores["tags"][tag] for tag in tags)]
        texts = [f"{c['score']:.3f} [{c['low']:.3f} {c['high']:.3f}]" for c in cells]
        lines.append(f"{steps:>5}  " + "".join(f"{text:<20}" for text in texts).rstrip())
        if split == "fixed":
            share = [sum(n) for n in zip(*scores["prompts"].values())]
            low, high = wilson(*share)
            lines.append(f"{'':7}{share[0] / share[1]:.3f} [{low:.3f} {high:.3f}] of all {share[1]} pictures")
        if split != "pairs" and "unseen" in scores:
            c, own = scores["unseen"], [t for t in TABLE_ORDER if t in scores["unseen"]["tags"]]
            names = ", ".join(f"{COLUMN_NAMES[tag]} {c['tags'][tag]['score']:.3f}" for tag in own)
            text = f"{c['score']:.3f} [{c['low']:.3f} {c['high']:.3f}]"
            lines.append(f"{'':7}{text} on prompts never seen in training: {names}")
    return "\n".join(lines)


def draw_figure(results: dict, path: Path) -> None:
    """Scores over step counts, one panel per split: overall with its interval, and each tag."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wide = 5 * len(results["splits"])
    figure, panels = plt.subplots(1, len(results["splits"]), figsize=(wide + 1.6, 4), squeeze=False)
    for panel, (split, by_steps) in zip(panels[0], results["splits"].items()):
        x = list(range(len(by_steps)))
        for i, tag in enumerate(TABLE_ORDER):
            if all(tag in scores["tags"] for scores in by_steps.values()):
                y = [scores["tags"][tag]["score"] for scores in by_steps.values()]
                panel.plot(x, y, marker=".", linewidth=1, color=f"C{i}", alpha=0.6, label=COLUMN_NAMES[tag])
        overall = [scores["overall"] for scores in by_steps.values()]
        spread = [[c["score"] - c["low"] for c in overall], [c["high"] - c["score"] for c in overall]]
        panel.errorbar(
            x, [c["score"] for c in overall], spread, color="black", marker="o", capsize=3, label="Overall"
        )
        panel.set(
            xticks=x,
            xticklabels=list(by_steps),
            ylim=(-0.02, 1.02),
            xlabel="steps",
            title=f"{split} prompts",
            ylabel="share of pictures that are right",
        )
        panel.grid(alpha=0.3)
    names = {label: line for panel in panels[0] for line, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(names.values(), names.keys(), fontsize=8, loc="center right")
    figure.tight_layout(rect=(0, 0, wide / (wide + 1.6), 1))
    with checkpoint.in_one_piece(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)


# ============================================================================================================
# Pictures for GenEval's public scorer
# ============================================================================================================
def read_prompt_file(path: Path) -> list[dict]:
    """The lines of a prompt file of GenEval's format: JSON objects with at least a "prompt". Raises UserError."""
    if not path.is_file():
        raise errors.UserError(f"no such prompt file: {path}")
    # JSON may hold the other characters that end lines
    lines = [line for line in data.read_text(path).split("\n") if line.strip()]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            metadata = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise errors.UserError(f"{path}, entry {number} is not JSON ({error})") from error
        if not isinstance(metadata, dict) or not isinstance(metadata.get("prompt"), str):
            raise errors.UserError(
                f'{path}, entry {number} has no "prompt"; GenEval\'s evaluation_metadata.jsonl has'
            )
        found.append(metadata | {"prompt": data.whole(metadata["prompt"])})
    if not found:
        raise errors.UserError(f"{path} is empty")
    return found


def export(
    folder: Path,
    asked: list[dict],
    images: int,
    settings: dict,
    draw: Callable[[list[tuple[int, int]]], list[Image.Image]],
    batch_size: int,
) -> int:
    """Write pictures where GenEval's scorer reads them: 00000/metadata.jsonl, 00000/samples/0000.png, ...

    draw([(prompt, image), ...]) makes pictures that depend on these two numbers alone. Files that are there are kept,
    so a stopped export goes on where it was. `settings` is stored as settings.json; going on with others is refused.
    Returns how many pictures were made. Raises UserError when the folder cannot be used.
    """
    if (folder / "settings.json").exists():
        if checkpoint.read_json(folder / "settings.json") != settings:
            raise errors.UserError(
                f"{folder} holds pictures of other settings (settings.json); choose another folder"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise errors.UserError(
            f"{folder} is not empty and holds no export to go on with; choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(folder / "settings.json", settings)
    for i, metadata in enumerate(asked):
        (folder / f"{i:05}" / "samples").mkdir(parents=True, exist_ok=True)
        put(
            folder / f"{i:05}" / "metadata.jsonl",
            lambda p, m=metadata: p.write_text(json.dumps(m), encoding="utf-8"),
        )

    def place(i, j):
        return folder / f"{i:05}" / "samples" / f"{j:04}.png"

    jobs = [(i, j) for i in range(len(asked)) for j in range(images) if not place(i, j).exists()]
    whole = len(asked) * images
    with tqdm(total=whole, initial=whole - len(jobs), unit=" pictures", disable=None) as bar:
        for first in range(0, len(jobs), batch_size):
            part = jobs[first : first + batch_size]
            for job, picture in zip(part, draw(part), strict=True):
                put(place(*job), lambda p, x=picture: x.save(p, format="PNG"))
                bar.update()
    return len(jobs)


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file in one piece. The name until then begins with a dot: GenEval reads whatever begins like 0000.png."""
    partial = path.with_name("." + path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def open_pipeline(name: str, device: torch.device):
    """A diffusers text-to-image pipeline by its Hugging Face name or folder. Raises UserError when there is none."""
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise errors.UserError("--pipeline needs diffusers: pip install diffusers") from error
    dtype = torch.float32 if device.type == "cpu" else machine.pick_precision(device)
    try:
        with (
            warnings.catch_warnings()
        ):  # the argument's name differs between versions; newer ones take this, and warn
            warnings.simplefilter("ignore", FutureWarning)
            pipeline = DiffusionPipeline.from_pretrained(name, torch_dtype=dtype)
    except Exception as error:  # diffusers, transformers and safetensors have errors of many kinds
        raise errors.UserError(
            f"cannot load the pipeline {name!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def draw_with_pipeline(
    pipeline, asked: list[dict], seed: int, steps: int, guidance: float | None, side: int | None
):
    """The `draw` of `export` for a pipeline: one seeded generator per picture; None leaves a choice to the pipeline."""
    options = {"guidance_scale": guidance, "height": side, "width": side}
    options = {name: value for name, value in options.items() if value is not None}

    def draw(jobs):
        texts = [asked[i]["prompt"] for i, _ in jobs]
        seeds = [
            int.from_bytes(hashlib.sha256(f"{seed} {i} {j}".encode()).digest()[:7], "little") for i, j in jobs
        ]
        generators = [
            torch.Generator("cpu").manual_seed(s) for s in seeds
        ]  # on the CPU: the same on every device
        try:
            return pipeline(texts, num_inference_steps=steps, generator=generators, **options).images
        except (
            ValueError,
            TypeError,
        ) as error:  # a side that it cannot draw, an option that it does not have
            raise errors.UserError(
                f"the pipeline refuses {options or 'its own options'}: {' '.join(str(error).split())[:300]}"
            ) from error

    return draw


# ============================================================================================================
# The command
# ============================================================================================================
def parse_arguments(argv=None) -> argparse.Namespace:
    parser = errors.Parser(
        "experiments/evaluate.py", "Score a model per step count, or write its pictures for GenEval's scorer."
    )
    a = parser.add_argument_group("what").add_argument
    a(
        "--checkpoint",
        metavar="DIR",
        type=Path,
        default=Path("checkpoints/laptop"),
        help="folder of a run (default: checkpoints/laptop)",
    )
    a(
        "--split",
        nargs="+",
        metavar="SPLIT",
        choices=SPLITS,
        default=["test", "pairs"],
        help=f"which prompts: {', '.join(SPLITS)} (64 of one object) (default: test pairs)",
    )
    a("--per-tag", metavar="N", type=int, default=24, help="prompts of each tag, cycling (default: 24)")
    a("--images", metavar="N", type=int, default=4, help="pictures per prompt (default: 4)")
    a("--seed", metavar="N", type=int, default=0, help="of the noise (default: 0)")
    a(
        "--out",
        metavar="FILE",
        type=Path,
        help="the JSON to write, a figure beside it (default: evaluation.json in the checkpoint)",
    )
    a = parser.add_argument_group("how (what has no default here: the checkpoint's own)").add_argument
    a(
        "--steps",
        metavar="N",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 50],
        help="evaluations of the network (default: 1 2 4 8 50)",
    )
    a("--guidance", type=float, help="scale of guidance; 1 is off")
    a(
        "--eta",
        type=sample.fraction_or_name({"renoise": "renoise"}),
        help='0 deterministic .. 1 ancestral; "renoise"',
    )
    a(
        "--s-rule",
        type=sample.fraction_or_name(sample.S_RULES),
        help='"next" (t_k+1), "same" (t_k), or between: 0..1',
    )
    a(
        "--space",
        choices=("v", "x0"),
        help="what keeps its norm under guidance: velocity (v) or prediction (x0)",
    )
    a("--device", default="auto", help="cuda, mps, cpu (default: the best there is)")
    a = parser.add_argument_group("pictures for GenEval's scorer instead of scores").add_argument
    a(
        "--export",
        metavar="DIR",
        type=Path,
        help="folder for 00000/samples/0000.png ...; goes on where it stopped",
    )
    a(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="a file of GenEval's format, one JSON object with a prompt per line",
    )
    a(
        "--pipeline",
        metavar="NAME",
        type=errors.name,
        help="a diffusers text-to-image pipeline, by name or folder, not --checkpoint",
    )
    a(
        "--side",
        metavar="N",
        type=int,
        help="side of the pipeline's pictures in pixels (default: the pipeline's)",
    )
    a("--batch-size", metavar="N", type=int, default=8, help="pictures at once in an export (default: 8)")
    args = parser.parse_args(argv)
    parser.check_ranges(
        args,
        steps=(1, 10**6),
        images=(1, 10**4),
        per_tag=(1, 10**6),
        batch_size=(1, 2**16),
        seed=(0, 2**63 - 1),
        guidance=(0, 100),
        side=(1, 2**13),
    )
    if (args.export is None) != (args.prompts is None):
        parser.error("--export and --prompts go together")
    if args.export is None and (args.pipeline or args.side):
        parser.error("--pipeline and --side need --export: GenEval's own scorer judges photographs")
    if args.export is not None and len(args.steps) != 1:
        parser.error("--export takes one step count: give --steps N, and a folder for each N")
    if args.side is not None and not args.pipeline:
        parser.error("--side needs --pipeline")
    if args.pipeline and any(value is not None for value in (args.eta, args.s_rule, args.space)):
        parser.error("--eta, --s-rule and --space are choices of our sampler; a pipeline has its own")
    args.steps = list(dict.fromkeys(args.steps))
    args.split = list(dict.fromkeys(args.split))
    return args


def choices_of(args: argparse.Namespace) -> dict:
    """What the arguments say of how to sample; what they leave open (None) is the checkpoint's own choice."""
    return {name: getattr(args, name) for name in ("guidance", "eta", "s_rule", "space")}


def run_export(args: argparse.Namespace, device: torch.device) -> None:
    asked = read_prompt_file(args.prompts)
    steps = args.steps[0]
    settings = {
        "prompts": hashlib.sha256(args.prompts.read_bytes()).hexdigest(),
        "steps": steps,
        "seed": args.seed,
    }
    if args.pipeline:
        pipeline = open_pipeline(args.pipeline, device)
        draw = draw_with_pipeline(pipeline, asked, args.seed, steps, args.guidance, args.side)
        settings |= {
            "pipeline": args.pipeline,
            "guidance": args.guidance,
            "side": args.side,
            "precision": str(pipeline.dtype),
        }
    else:
        loaded = sample.load(args.checkpoint, device)
        choices = choices_of(args)
        weights = hashlib.sha256((args.checkpoint / "model.safetensors").read_bytes()).hexdigest()
        settings |= sample.choose(loaded.config, **choices) | {
            "weights": weights,
            "precision": str(loaded.network.precision),
        }

        def draw(jobs):
            pictures = sample.generate(
                loaded, [asked[i]["prompt"] for i, _ in jobs], jobs, seed=args.seed, steps=steps, **choices
            )
            return [Image.fromarray(picture) for picture in pictures]

    made = export(args.export, asked, args.images, settings, draw, args.batch_size)
    print(
        f"wrote {args.export}: {made} new pictures, {len(asked) * args.images} in all, for GenEval's scorer"
    )


def run_scores(args: argparse.Namespace, device: torch.device) -> None:
    out = args.out or args.checkpoint / "evaluation.json"
    if out.suffix != ".json" or not (out.parent.is_dir() or out.parent == args.checkpoint):
        raise errors.UserError(f"--out must name a .json file in a folder that exists, not {out}")
    for path in (out, out.with_suffix(".png")):  # now, not after an hour of sampling
        if path.is_dir() or (path.parent.is_dir() and not os.access(path.parent, os.W_OK)):
            raise errors.UserError(
                f"cannot write {path}: it is a folder, or in one that cannot be written; choose another --out"
            )
    loaded = sample.load(args.checkpoint, device)
    if loaded.config.get("data") not in [[name] for name in data.SETS]:
        raise errors.UserError(
            f"{args.checkpoint} was trained on {loaded.config.get('data')}; only the built-in "
            "shapes "
            "have exact scores. For other models: --export, and GenEval's own scorer"
        )
    least, most = SIDES
    if not least <= loaded.config["side"] <= most:
        raise errors.UserError(
            f"{args.checkpoint} makes pictures of {loaded.config['side']} pixels a side; {least} to "
            f"{most} can be judged"
        )
    choices = choices_of(args)
    results = machine.provenance(device) | {
        "checkpoint": str(args.checkpoint),
        "seed": args.seed,
        "images": args.images,
        "per_tag": args.per_tag,
        "splits": {},
        "choices": sample.choose(loaded.config, **choices),
    }
    began = time.perf_counter()
    asked = {split: prompts(split, args.per_tag, world_of(loaded.config)) for split in args.split}
    total = sum(len(a) for a in asked.values()) * args.images * len(args.steps)
    with tqdm(total=total, unit=" pictures", disable=None) as bar:
        for split in args.split:
            results["splits"][split] = {}
            for steps in args.steps:
                found = measure(
                    loaded,
                    asked[split],
                    args.images,
                    steps,
                    seed=args.seed,
                    stream=SPLITS.index(split),
                    bar=bar,
                    **choices,
                )
                results["splits"][split][steps] = summary(asked[split], found, args.images)
    results["seconds"] = round(time.perf_counter() - began, 1)
    for split in args.split:
        pictures = len(asked[split]) * args.images
        print(f"\n{split} prompts, {pictures} pictures a row, score [95% interval]")
        print(table(split, results["splits"][split]))
    draw_figure(results, out.with_suffix(".png"))
    checkpoint.write_json(out, results)
    print(f"\nwrote {out} and {out.with_suffix('.png')}")


def main() -> None:
    args = parse_arguments()
    machine.keep_freed_memory()
    device = machine.pick_device(args.device)
    if args.export is not None:
        run_export(args, device)
    else:
        run_scores(args, device)


if __name__ == "__main__":
    errors.run(main)
