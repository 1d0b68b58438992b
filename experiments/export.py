"""Pictures for GenEval's public scorer, of any checkpoint (Sec. 4).

    python -m experiments.export --checkpoint runs/mine --prompts evaluation_metadata.jsonl --steps 2 --out pictures/

Writes 00000/metadata.jsonl, 00000/samples/0000.png, ..., as the scorer reads them. Stopped, the same command goes on.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import files
import sample
from engine import checkpoint, errors, machine


def read_prompts(path: Path) -> list[dict]:
    """The lines of a prompt file of GenEval's format: JSON objects with at least a "prompt". Raises UserError."""
    if not path.is_file():
        raise errors.UserError(f"no such prompt file: {path}")
    found, lines = [], files.read_text(path).split("\n")  # JSON may hold the other ends of lines
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                metadata = json.loads(line)
                found.append(metadata | {"prompt": files.well_formed(metadata["prompt"])})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                problem = f'{path}, line {number} is no JSON object with a "prompt"'
                raise errors.UserError(f"{problem}, as evaluation_metadata.jsonl has") from error
    if not found:
        raise errors.UserError(f"{path} is empty")
    return found


def export(folder: Path, asked: list[dict], images: int, batch_size: int, draw: Callable) -> int:
    """Write the pictures that are not there yet; returns how many were made.

    draw([(prompt, image), ...]) gives uint8 pictures that depend on these two numbers alone.
    """
    jobs = []
    for i, metadata in enumerate(asked):
        samples = folder / f"{i:05}" / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        with checkpoint.in_one_piece(samples.parent / "metadata.jsonl") as partial:
            partial.write_text(json.dumps(metadata), encoding="utf-8")
        jobs += [(i, j) for j in range(images) if not (samples / f"{j:04}.png").exists()]
    with tqdm(total=len(jobs), unit=" pictures", disable=None) as bar:
        for start in range(0, len(jobs), batch_size):
            part = jobs[start : start + batch_size]
            for (i, j), picture in zip(part, draw(part), strict=True):
                with checkpoint.in_one_piece(folder / f"{i:05}" / "samples" / f"{j:04}.png") as partial:
                    Image.fromarray(picture).save(partial, format="PNG")
            bar.update(len(part))
    return len(jobs)


def parse_arguments() -> argparse.Namespace:
    parser = errors.Parser("-m experiments.export", "Write a model's pictures for GenEval's public scorer.")
    a = parser.add_argument_group("what").add_argument
    metadata = "GenEval's evaluation_metadata.jsonl, or like it"
    folder = "of the pictures, one for each step count"
    a("--checkpoint", metavar="DIR", type=errors.model, required=True, help="folder of a run")
    a("--prompts", metavar="FILE", type=Path, required=True, help=metadata)
    a("--out", metavar="DIR", type=Path, required=True, help=folder)
    a("--steps", metavar="N", type=int, default=2, help="evaluations of the network")
    a("--images", metavar="N", type=int, default=4, help="pictures per prompt")
    a("--shape", metavar="HxW", type=sample.shape_of, help="in pixels (default: the commonest of training)")
    a("--seed", metavar="N", type=int, default=0, help="of the noise")
    a("--batch-size", metavar="N", type=int, default=8, help="pictures at once")
    sample.sampling_flags(parser)
    args = parser.parse_args()
    sizes = {"steps": (1, 10**6), "images": (1, 10**4), "batch_size": (1, 2**16)}
    parser.check_ranges(args, **sizes, seed=(0, 2**63 - 1), guidance=(0, 100), t_max=(0.01, 1))
    return args


def main() -> None:
    args = parse_arguments()
    machine.keep_freed_memory()
    asked = read_prompts(args.prompts)
    loaded = sample.load(args.checkpoint, machine.pick_device(args.device))
    choices = sample.choices_of(args)
    if args.out.exists() and any(args.out.iterdir()) and not (args.out / "settings.json").exists():
        raise errors.UserError(f"{args.out} is not empty, and holds no export: choose another --out")
    read = {"prompts": args.prompts, "weights": args.checkpoint / "model.safetensors"}
    settings = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in read.items()}
    settings |= {"steps": args.steps, "seed": args.seed, "precision": str(loaded.network.precision)}
    shape = args.shape or loaded.shape
    settings |= sample.choose(loaded, shape, **choices) | {"shape": list(shape)}
    checkpoint.keep_settings(args.out, settings, "choose another --out")

    def draw(jobs):
        texts = [asked[i]["prompt"] for i, _ in jobs]
        how = {"shapes": [shape] * len(jobs), "seed": args.seed, "steps": args.steps}
        return sample.generate(loaded, texts, jobs, **how, **choices)

    made = export(args.out, asked, args.images, args.batch_size, draw)
    print(f"wrote {args.out}: {made} new pictures, {len(asked) * args.images} in all, for GenEval's scorer")


if __name__ == "__main__":
    errors.run(main, "stopped; the same command goes on")
