"""Prompts to pictures, with as many steps as you like (Sec. 3.4).

    python sample.py --checkpoint runs/laptop --prompt "a photo of a red circle" --steps 2
    python sample.py --checkpoint runs/laptop --prompt "a photo of a ring" --prompt "a photo of a cross" --steps 1 2 4 8

One prompt at one step count gives that picture; more give a labelled sheet, prompts in rows and steps in columns. The
same seed gives the same picture, whatever else is sampled with it, up to rounding: matrix products of another batch
size may differ in the last digit, which occasionally changes a value by one of its 256 steps.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import encoders
import files
import model
import objectives
import sampler
from engine import checkpoint, errors, limits, machine
from engine.randomness import normal

STEP_COUNTS = (1, 2, 4, 8, 50)  # of picture grids and tables
SHEET = 2**28  # most pixels of a sheet, 0.8 GB
S_RULES = {"next": 0.0, "same": 1.0}  # names for s_k = t_{k+1} and s_k = t_k (S.3.1)


@dataclass
class Loaded:
    """A trained model with all that sampling needs."""

    network: model.Denoiser
    config: dict
    text: object
    autoencoder: object


def load(folder: Path, device: torch.device, precision: torch.dtype | None = None) -> Loaded:
    """The EMA model of a run, ready to sample. Raises UserError with one clear line.

    precision None takes fp32 on the CPU and what the run was trained in elsewhere.
    """
    if not folder.is_dir():
        raise checkpoint.CheckpointError(f"no such checkpoint folder: {folder}")
    config = limits.config(folder)
    if precision is None:
        precision = torch.float32 if device.type == "cpu" else getattr(torch, config["precision"])
    try:
        with torch.device("meta"):  # no memory is taken before the weights' file is seen to hold this model
            network = model.Denoiser(**config["model"], precision=precision)
    except ValueError as error:
        raise checkpoint.CheckpointError(
            f"{folder / 'config.json'} does not describe a model ({error})"
        ) from error
    checkpoint.load_weights(folder / "model.safetensors", network)
    text = encoders.text_encoder(config["text_encoder"], config["txt_len"], device)
    autoencoder = encoders.autoencoder(config["autoencoder"], device)
    multiple = autoencoder.factor * network.patch
    if config["side"] % multiple:
        raise checkpoint.CheckpointError(
            f"{folder / 'config.json'}: side must be a multiple of {multiple}, not {config['side']}"
        )
    return Loaded(network.to(device).eval().requires_grad_(False), config, text, autoencoder)


class Stopped(Exception):
    """Sampling was asked to stop before it was done."""


def choose(config: dict, *, guidance=None, eta=None, s_rule=None, space=None) -> dict:
    """How a model is sampled: what is asked for, else (None) what its config.json says; arguments of its own sampler.

    Raises UserError for what the model has not learned: flow matching anything but s_k = t_k; an objective with a
    sampler of its own any choice but guidance.
    """
    objective = objectives.OBJECTIVES[config["objective"]]
    asked = {"guidance": guidance, "eta": eta, "s_rule": s_rule, "space": space}
    own = {"guidance": "guidance", "eta": "eta", "s_rule": "s_rule", "space": "guidance_space"}
    chosen = {name: config[own[name]] if value is None else value for name, value in asked.items()}
    if objective.trajectory:
        if (eta, s_rule, space) != (None, None, None):
            raise errors.UserError(
                f"{config['objective']} has a sampler of its own: --eta, --s-rule and --space do "
                "not "
                "apply to it"
            )
        return {"guidance": chosen["guidance"]}
    if objective.s_rules == (1.0,):
        if s_rule not in (None, 1):
            raise errors.UserError(
                f"a {config['objective'].replace('_', '-')} model has never seen s < t; "
                "it is sampled with --s-rule same"
            )
        chosen["s_rule"] = 1.0
    return chosen | {"mu": config["mu"]}


def generate(
    loaded: Loaded,
    prompts: list[str],
    keys: list[tuple[int, ...]],
    *,
    seed: int = 0,
    steps: int = 2,
    batch_size: int = 64,
    stop: Callable[[], bool] = lambda: False,
    **choices,
) -> list[np.ndarray]:
    """One uint8 picture [H, W, 3] per prompt. The noise of picture i depends on (seed, keys[i]) alone, never on the
    batch.

    `choices` are those of `choose`. `stop` is asked after every evaluation; when it answers true, Stopped is raised.
    """
    config = loaded.config
    choices = choose(config, **choices)
    device = next(loaded.network.parameters()).device
    side = config["side"] // loaded.autoencoder.factor
    shape = (loaded.autoencoder.channels, side, side)
    pictures = []
    for first in range(0, len(prompts), batch_size):
        some = slice(first, first + batch_size)
        part = keys[some]
        cond = loaded.text(prompts[some])
        null = tuple(a.expand(len(part), *a.shape[1:]) for a in loaded.text([""]))

        def draw_noise(k, part=part):
            return normal(seed, "sampling", [(k + 1, *key) for key in part], shape).to(device)

        if own := objectives.OBJECTIVES[config["objective"]].trajectory:
            path = own(loaded.network, draw_noise(-1), cond, null, steps=steps, **choices)
        else:
            path = sampler.trajectory(
                loaded.network, draw_noise(-1), cond, null, steps=steps, draw_noise=draw_noise, **choices
            )
        for _, x, *_ in path:
            if stop():
                raise Stopped
        pictures += data.to_pictures(loaded.autoencoder.decode(x))
    return pictures


def sheet(
    rows: list[list[np.ndarray]], counts: Sequence[int], captions: list[str], scale: int = 0
) -> Image.Image:
    """Captions in rows, step counts in columns; pixels enlarged `scale` times,
    or (0) until a picture is 96 wide or so."""
    labels = [f"{n} step{'s' if n > 1 else ''}" for n in counts]
    return data.label_grid(rows, labels, captions, scale or max(1, 96 // rows[0][0].shape[1]))


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------
def fraction_or_name(names: dict):
    """An argparse type: a number in [0, 1] or one of `names`."""

    def parse(text: str):
        if text in names:
            return names[text]
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither a number from 0 to 1 nor one of {', '.join(names)}"
            )
        return value

    return parse


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = errors.Parser("sample.py", "Make pictures from prompts.")
    a = parser.add_argument_group("what").add_argument
    a(
        "--checkpoint",
        type=errors.name,
        default="checkpoints/laptop",
        help="folder of a run (default: checkpoints/laptop)",
    )
    a("--prompt", action="append", default=[], help="what to draw; may be given several times")
    a("--prompts", type=Path, help="a text file with one prompt per line")
    a("--images", type=int, default=1, help="pictures per prompt (default: 1)")
    a("--seed", type=int, default=0, help="same seed, same picture (default: 0)")
    a("--out", type=Path, default=Path("samples.png"), help="the PNG to write (default: samples.png)")
    a = parser.add_argument_group("how (what has no default here: the checkpoint's own)").add_argument
    a(
        "--steps",
        type=int,
        nargs="+",
        default=[2],
        help="evaluations of the network; several give a sheet (default: 2)",
    )
    a("--guidance", type=float, help="scale of energy-preserving guidance; 1 is off")
    a(
        "--eta",
        type=fraction_or_name({"renoise": "renoise"}),
        help='0 deterministic .. 1 ancestral, or "renoise"',
    )
    a(
        "--s-rule",
        type=fraction_or_name(S_RULES),
        help='second time: "next" (t_k+1), "same" (t_k) or a fraction between',
    )
    a(
        "--space",
        choices=("v", "x0"),
        help="what keeps its norm under guidance: velocity (v) or prediction (x0)",
    )
    a("--scale", type=int, default=0, help="enlarge pixels so many times; 0 picks it (default: 0)")
    a("--device", default="auto", help="cuda, mps, cpu (default: the best there is)")
    args = parser.parse_args(argv)
    if args.prompts:
        if not args.prompts.is_file():
            parser.error(f"no such prompt file: {args.prompts}")
        args.prompt += [line.strip() for line in files.read_text(args.prompts).splitlines() if line.strip()]
    if not args.prompt:
        parser.error("give at least one --prompt, or --prompts FILE")
    args.prompt = list(map(files.whole, args.prompt))  # the shell may hand over what is not UTF-8
    parser.check_ranges(
        args, steps=(1, 10**6), guidance=(0, 100), images=(1, 10**6), scale=(0, 64), seed=(0, 2**63 - 1)
    )
    return args


def main() -> None:
    args = parse_arguments()
    machine.keep_freed_memory()
    if not args.out.parent.is_dir() or args.out.is_dir() or args.out.suffix.lower() != ".png":
        raise errors.UserError(f"--out must name a .png file in a folder that exists, not {args.out}")
    if not os.access(args.out.parent, os.W_OK):  # now, not after all pictures are made
        raise errors.UserError(f"{args.out.parent} cannot be written to: choose another --out")
    loaded = load(Path(args.checkpoint), machine.pick_device(args.device))
    for prompt in filter(loaded.text.cuts, args.prompt):
        print(
            f"the end of this prompt is not read, as the model was trained with --txt-len {loaded.text.txt_len}: "
            f"{errors.shortened(prompt)}",
            file=sys.stderr,
        )
    side = loaded.config["side"]
    scale = args.scale or max(1, 128 // side)
    pixels = len(args.prompt) * args.images * len(args.steps) * (side * scale) ** 2
    if pixels > SHEET:  # now, not after all of them are made
        raise errors.UserError(
            f"a sheet of {pixels / 1e6:,.0f} million pixels is more than a viewer can open: fewer "
            f"prompts, --images or --steps, or a smaller --scale than {scale}"
        )
    prompts = [p for p in args.prompt for _ in range(args.images)]
    # Picture i of every prompt starts from the same noise, at every step count, so that columns compare.
    keys = [(i,) for _ in args.prompt for i in range(args.images)]
    columns = [
        generate(
            loaded,
            prompts,
            keys,
            seed=args.seed,
            steps=n,
            guidance=args.guidance,
            eta=args.eta,
            s_rule=args.s_rule,
            space=args.space,
        )
        for n in args.steps
    ]
    if len(columns) == len(prompts) == 1:
        picture = Image.fromarray(columns[0][0]).resize((side * scale,) * 2, Image.Resampling.NEAREST)
    else:
        picture = sheet([list(row) for row in zip(*columns)], args.steps, prompts, scale)
    with checkpoint.in_one_piece(args.out) as partial:
        picture.save(partial, format="PNG")
    several, each = (
        "s" if len(args.prompt) > 1 else "",
        f", {args.images} pictures each," if args.images > 1 else "",
    )
    print(f"wrote {args.out}: {len(args.prompt)} prompt{several}{each} at {args.steps} steps")


if __name__ == "__main__":
    errors.run(main)
