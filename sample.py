"""Prompts to pictures, with as many steps as you like (Sec. 3.4).

    python sample.py --checkpoint runs/laptop --prompt "a photo of a red circle" --steps 2
    python sample.py --checkpoint runs/laptop --prompt "a photo of a ring" --prompt "a photo of a cross" --steps 1 2 4 8
    python sample.py --checkpoint runs/mine --prompts prompts.txt --shape 24x40 --out-dir pictures/

How it samples, unless flags say otherwise, stands in the checkpoint's config.json: train.py writes eta = 1 and
s_k = t_{k+1} there (flow matching has s_k = t_k), and the recipe's guidance and t_max. One prompt at one step count
gives that picture; more give a labelled sheet, prompts in rows and steps in columns. Each PNG tells in its text how it
was made (exiftool, or Image.open(path).text). The same seed gives the same picture, whatever else is sampled with it,
up to rounding: matrix products of another batch size may differ in the last digit, which occasionally changes a value
by one of its 256 steps.
"""

import argparse
import contextlib
import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin

import data
import encoders
import files
import losses
import model
import objectives
import sampler
from engine import checkpoint, errors, machine
from engine.checkpoint import CheckpointError
from rng import normal

STEP_COUNTS = (1, 2, 4, 8, 50)  # of picture grids and tables
SHEET = 2**28  # most pixels of a sheet, 0.8 GB
S_RULES = {"next": 0.0, "same": 1.0}  # names for s_k = t_{k+1} and s_k = t_k (S.3.1)


@dataclass
class Loaded:
    """A trained model with all that sampling needs."""

    network: model.Denoiser
    config: dict
    text: encoders.TextEncoder
    autoencoder: encoders.Pixels | encoders.KLAutoencoder

    @property
    def unit(self) -> int:
        """What the sides of a picture are multiples of, in pixels."""
        return self.autoencoder.factor * self.network.patch

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels: the commonest shape of its training's last stage, at that stage's largest side."""
        side = self.config["side"]
        return tuple(self.config.get("buckets", [[side, side]])[0][:2])


def load(folder: Path, device: torch.device, precision: torch.dtype | None = None) -> Loaded:
    """The EMA model of a run, ready to sample. Raises UserError with one clear line.

    precision None takes fp32 on the CPU and what the run was trained in elsewhere.
    """
    config = checkpoint.read_config(folder)
    if precision is None:
        precision = torch.float32 if device.type == "cpu" else getattr(torch, config["precision"])
    try:
        sampler.check_choices(*(config[name] for name in ("s_rule", "eta", "guidance", "t_max")))
        with torch.device("meta"):  # no memory is taken before the weights' file is seen to hold this model
            network = model.Denoiser(**config["model"], precision=precision)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a model ({error})") from error
    checkpoint.load_weights(folder / "model.safetensors", network)
    text = encoders.text_encoder(config["text_encoder"], config["txt_len"], device)
    autoencoder = encoders.autoencoder(config["autoencoder"], device)
    loaded = Loaded(network.to(device).eval().requires_grad_(False), config, text, autoencoder)
    if any(side % loaded.unit for side in (config["side"], *loaded.shape)):
        raise CheckpointError(f"{folder / 'config.json'}: its sides are no multiples of {loaded.unit}")
    return loaded


class Stopped(Exception):
    """Sampling was asked to stop before it was done."""


def choose(loaded: Loaded, shape, *, guidance=None, eta=None, s_rule=None, space=None, t_max=None) -> dict:
    """How pictures of `shape` are sampled: what is asked for, else (None) what config.json says; arguments of the model's
    own sampler.

    Raises UserError for what the model has not learned: flow matching anything but s_k = t_k; an objective with a
    sampler of its own any choice but guidance.
    """
    config, name = loaded.config, loaded.config["objective"]
    objective = objectives.OBJECTIVES[name]
    guidance = config["guidance"] if guidance is None else guidance
    if not objective.walks_as_the_paper:
        if (eta, s_rule, space, t_max) != (None,) * 4:
            raise errors.UserError(
                f"{name} has its own sampler, without --eta, --s-rule, --space and --t-max"
            )
        return {"guidance": guidance}
    if objective.s_rules == (1.0,):
        if s_rule not in (None, 1):
            raise errors.UserError(f"a {name} model has never seen s < t: it is sampled with --s-rule same")
        s_rule = 1.0
    return {
        "guidance": guidance,
        "eta": config["eta"] if eta is None else eta,
        "s_rule": config["s_rule"] if s_rule is None else s_rule,
        "space": space or config["guidance_space"],
        "t_max": config["t_max"] if t_max is None else t_max,
        "mu": mu_of(loaded, shape),
    }


def mu_of(loaded: Loaded, shape: tuple[int, int]) -> float:
    """The shift of the time grid (s.12) for pictures of `shape`, from the number of their tokens."""
    if shape == (loaded.config["side"],) * 2:
        return loaded.config["mu"]
    return losses.mu_of_length(shape[0] * shape[1] // loaded.unit**2)


def generate(
    loaded: Loaded, prompts: list[str], keys, *, shapes=None, batch_size=64, **how
) -> list[np.ndarray]:
    """One uint8 picture [H, W, 3] per prompt. The noise of picture i depends on the seed, keys[i] (a tuple of integers)
    and its shape alone, never on the batch.

    shapes are (height, width) in pixels, by default those of `loaded`; `how` is that of `draw_batch`.
    """
    shapes, pictures = shapes or [loaded.shape] * len(prompts), {}
    for shape in dict.fromkeys(shapes):
        same = [i for i, other in enumerate(shapes) if other == shape]
        for first in range(0, len(same), batch_size):
            some = same[first : first + batch_size]
            batch = [prompts[i] for i in some], [keys[i] for i in some]
            pictures |= zip(some, draw_batch(loaded, *batch, shape, **how))
    return [pictures[i] for i in range(len(prompts))]


def draw_batch(
    loaded: Loaded, prompts, keys, shape, *, seed=0, steps=2, negative="", stop=lambda: False, **choices
) -> list[np.ndarray]:
    """Pictures of one shape. `negative` is the prompt of the branch that guidance leads away from; `choices` are those
    of `choose`. `stop` is asked after every evaluation; when it answers true, Stopped is raised."""
    choices = choose(loaded, shape, **choices)
    latent = (loaded.autoencoder.channels, *(side // loaded.autoencoder.factor for side in shape))
    device = next(loaded.network.parameters()).device
    null = tuple(a.expand(len(prompts), *a.shape[1:]) for a in loaded.text([negative]))

    def draw_noise(k: int) -> torch.Tensor:
        return normal(seed, "sampling", [(k + 1, *key) for key in keys], latent).to(device)

    trajectory = objectives.OBJECTIVES[loaded.config["objective"]].trajectory
    given = loaded.network, draw_noise(-1), loaded.text(prompts), null
    walk = trajectory(*given, steps=steps, draw_noise=draw_noise, **choices)
    for _, x, *_ in walk:
        if stop():
            raise Stopped
    return data.to_pictures(loaded.autoencoder.decode(x))


def sheet(rows: list, counts: Sequence[int], captions: list[str], scale: int = 0) -> Image.Image:
    """Captions in rows, step counts in columns; pixels enlarged `scale` times; 0 makes pictures about 96 wide."""
    labels = [f"{n} step{'s' if n > 1 else ''}" for n in counts]
    return data.label_grid(rows, labels, captions, scale or max(1, 96 // rows[0][0].shape[1]))


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------
def fraction_or_name(names: dict):
    """An argparse type: a number in [0, 1] or one of `names`."""

    def parse(text: str):
        with contextlib.suppress(ValueError):
            value = names[text] if text in names else float(text)
            if text in names or 0 <= value <= 1:
                return value
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1 or one of {', '.join(names)}")

    return parse


def shape_of(text: str) -> tuple[int, int]:
    """An argparse type: "192x336" -> (192, 336)."""
    if match := re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text):
        return int(match[1]), int(match[2])
    raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 192x336")


def sampling_flags(parser: argparse.ArgumentParser) -> None:
    """How to sample; what is left open (None) is the checkpoint's own choice (`choose`)."""
    a = parser.add_argument_group("how (default: as the checkpoint says)").add_argument
    eta, rule = fraction_or_name({"renoise": "renoise"}), fraction_or_name(S_RULES)
    a("--guidance", metavar="X", type=float, help="scale of energy-preserving guidance; 1 is off")
    a("--eta", metavar="X", type=eta, help='0 deterministic .. 1 ancestral, or "renoise"')
    a("--s-rule", metavar="X", type=rule, help='second time: "next" (t_k+1), "same" (t_k) or a fraction')
    a("--space", choices=("v", "x0"), help="what keeps its norm under guidance: velocity or prediction")
    a("--t-max", metavar="X", type=float, help="the network is asked at no later time")
    a("--device", metavar="NAME", default="auto", help="cuda, mps, cpu (default: the best there is)")


def choices_of(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in ("guidance", "eta", "s_rule", "space", "t_max")}


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = errors.Parser("sample.py", "Make pictures from prompts.")
    a = parser.add_argument_group("what").add_argument
    emoji = Path("checkpoints/emoji")
    a("--checkpoint", metavar="DIR", type=errors.model, default=emoji, help="a run")
    a("--prompt", action="append", default=[], help="what to draw; may be given several times")
    a("--prompts", metavar="FILE", type=Path, help="a text file with one prompt per line")
    a("--images", metavar="N", type=int, default=1, help="pictures per prompt")
    a("--shape", metavar="HxW", type=shape_of, help="in pixels (default: the commonest of training)")
    a("--seed", metavar="N", type=int, default=0, help="same seed, same picture")
    a("--out", metavar="FILE", type=errors.file_to_write, default="samples.png", help="a PNG")
    a("--out-dir", metavar="DIR", type=Path, help="one PNG a picture, in this folder, instead of a sheet")
    a("--scale", metavar="N", type=int, default=0, help="enlarge pixels N times; 0 picks N")
    steps = "evaluations of the network; several give a sheet (default: 2; without prompts 1 2 4 8)"
    a("--steps", metavar="N", type=int, nargs="+", help=steps)
    a("--negative", metavar="PROMPT", default="", help="what guidance leads away from (default: no prompt)")
    sampling_flags(parser)
    args = parser.parse_args(argv)
    if not args.prompt and not args.prompts:
        # Included checkpoints have some
        args.prompts = args.checkpoint / "prompts.txt"
        args.steps = args.steps or [1, 2, 4, 8]
        if not args.prompts.is_file():
            parser.error("give at least one --prompt, or --prompts FILE")
    args.steps = args.steps or [2]
    if args.prompts:
        if not args.prompts.is_file():
            parser.error(f"no such prompt file: {args.prompts}")
        args.prompt += [line.strip() for line in files.read_text(args.prompts).splitlines() if line.strip()]
    if args.out.suffix.lower() != ".png":
        parser.error(f"--out must name a .png file, not {args.out}")
    if args.out_dir and args.out_dir.is_file():
        parser.error(f"--out-dir must name a folder, not {args.out_dir}")
    if not args.prompt:
        parser.error(f"{args.prompts} is empty")
    args.prompt = list(map(files.well_formed, args.prompt))  # the shell may hand over what is not UTF-8
    numbers = {"images": (1, 10**6), "scale": (0, 64), "seed": (0, 2**63 - 1)}
    parser.check_ranges(args, steps=(1, 10**6), guidance=(0, 100), t_max=(0.01, 1), **numbers)
    return args


def check_request(args: argparse.Namespace, loaded: Loaded, shape: tuple[int, int], scale: int) -> None:
    """Raise UserError for what this model does not make; say which prompts it does not read to their end."""
    height, width = shape
    if height % loaded.unit or width % loaded.unit:
        raise errors.UserError(f"--shape must be of multiples of {loaded.unit}, not {height}x{width}")
    if args.negative and choose(loaded, shape, guidance=args.guidance)["guidance"] == 1:
        raise errors.UserError("--negative is what guidance leads away from: give a --guidance other than 1")
    pixels = len(args.prompt) * args.images * len(args.steps) * height * width * scale**2
    if not args.out_dir and pixels > SHEET:
        size = f"a sheet of {pixels / 1e6:,.0f} million pixels is more than a viewer opens"
        raise errors.UserError(f"{size}: fewer prompts, --images or --steps, a smaller --scale, or --out-dir")
    for prompt in filter(loaded.text.cuts, [*args.prompt, args.negative]):
        cut = f"the end of this prompt is not read (--txt-len {loaded.text.txt_len})"
        print(f"{cut}: {files.printable(prompt[:80])}", file=sys.stderr)


def save(picture: Image.Image, path: Path, facts: dict) -> Path:
    """Write a PNG that tells how it was made. A file that is there stays: the new one gets a number."""
    free = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2))
    path = path if not path.exists() else next(other for other in free if not other.exists())
    info = PngImagePlugin.PngInfo()
    for name, value in facts.items():
        info.add_text(name, str(value))
    with checkpoint.in_one_piece(path) as partial:
        picture.save(partial, format="PNG", pnginfo=info)
    return path


def main() -> None:
    args = parse_arguments()
    machine.keep_freed_memory()
    loaded = load(args.checkpoint, machine.pick_device(args.device))
    shape = args.shape or loaded.shape
    scale = args.scale or max(1, 128 // min(shape))
    check_request(args, loaded, shape, scale)
    how = choices_of(args)
    facts = {"seed": args.seed, "checkpoint": args.checkpoint, "shape": f"{shape[0]}x{shape[1]}"}
    facts |= choose(loaded, shape, **how) | ({"negative": args.negative} if args.negative else {})
    # Picture i of every prompt starts from the same noise, at every step count, so that columns compare.
    prompts, keys = zip(*[(prompt, (i,)) for prompt in args.prompt for i in range(args.images)])
    how |= {"shapes": [shape] * len(prompts), "seed": args.seed, "negative": args.negative}
    columns = []
    for n in args.steps:
        pictures = generate(loaded, prompts, keys, steps=n, **how)
        if not args.out_dir:
            columns.append(pictures)
            continue
        args.out_dir.mkdir(parents=True, exist_ok=True)
        for i, (picture, prompt, key) in enumerate(zip(pictures, prompts, keys)):
            words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40]
            path = args.out_dir / f"{i:04}-{words}-{n}-steps-seed-{args.seed}.png"
            facts_of_one = {"prompt": prompt, "steps": n, "image": key[0]} | facts
            save(data.enlarged(picture, args.scale or 1), path, facts_of_one)
    steps, count = " ".join(map(str, args.steps)), len(prompts) * len(args.steps)
    place = args.out_dir
    if not place:
        picture = sheet([list(row) for row in zip(*columns)], args.steps, prompts, scale)
        if count == 1:
            picture = data.enlarged(columns[0][0], scale)
        place = save(picture, args.out, {"prompt": "\n".join(args.prompt), "steps": steps} | facts)
    print(f"wrote {count} picture{'s' if count > 1 else ''} in {place}, at {steps} steps")


if __name__ == "__main__":
    errors.run(main)
