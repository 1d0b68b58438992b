"""A page on which Self-E is understood by moving things: toy/explore.html, one file, works by double click.

    python -m toy.explore                              # writes the page from its sources, in toy/explore/
    python -m toy.explore --pictures SELF_E [FLOW]     # ... with other models: two folders of train.py
    python -m toy.explore --networks                   # ... with the plane's nine networks trained anew (minutes)

Networks and models stay those that are in the page, unless new ones are asked for. So the same sources give the
same bytes.
"""

import base64
import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import emoji
import encoders
import sample
from engine import checkpoint, errors, feed, machine
from toy import studies
from toy.mixture import LAYOUTS, Mixture
from toy.training import STEPS, Member

ROOT = Path(__file__).resolve().parents[1]
FOLDER, PAGE = ROOT / "toy" / "explore", ROOT / "toy" / "explore.html"
SEED, CPU = 0, torch.device("cpu")
ROOM = 4_300_000  # of the pictures' weights in it
LEVELS = (127, 90, 64, 45, 32, 26, 22, 19)  # how finely weights may be rounded
OBJECTIVES = ("flow matching", "control Delta = 0", "Self-E")  # of the study `objectives`
READ = 3000  # training samples, from which words and captions are taken

# Prompts that are offered for emoji, and what counts as right: first those that leave something open, then exact ones,
# then what no caption has. Of other data, the first captions.
EMOJI = {
    "a bird": "Any bird, by any of the three makers.",
    "a fruit": "Any fruit, by any of the three makers.",
    "marine life": "A fish, a whale, an octopus and more, by any of the three makers.",
    "an octopus": "One thing, by any of the three makers.",
    "a 3D octopus": "One picture.",
    "a flat pineapple": "One picture.",
    "a soft parrot": "One picture.",
    "a bird in a tree": "No training picture shows that.",
    "": "Without a prompt, anything that training shows is right.",
}


# ------------------------------------------------------------------------------------------------------------
# What the page holds beside its sources
# ------------------------------------------------------------------------------------------------------------
def levels_of(name: str, value: Tensor, finest: int) -> int:
    """How many steps a row of weights has on each side of 0. What enters and leaves the network is most sensitive to
    rounding, its MLPs are least; a vector keeps every number in half precision."""
    if value.dim() == 1:
        return 1
    return 127 if "_in" in name or "final" in name else max(1, round(finest * (0.4 if "mlp" in name else 1)))


def pack(state: dict[str, Tensor], finest: int = 127) -> tuple[dict, dict[str, Tensor]]:
    """Weights in few bytes for unpack of toynet.js, and the state that they stand for: of each row a scale in half
    precision, and its weights as whole multiples of it."""
    shapes, parts, rounded = {}, [], {}
    for name, value in state.items():
        levels, rows = levels_of(name, value, finest), value.detach().float()
        rows = rows.view(-1, 1) if value.dim() == 1 else rows.flatten(0, -2)
        scale = (rows.abs().amax(1, keepdim=True) / levels).half()
        units = (rows / scale.float().clamp_min(1e-8)).round().clamp(-127, 127)
        shapes[name], rounded[name] = list(rows.shape), (scale.float() * units).view_as(value)
        parts += [scale.numpy().tobytes(), units.to(torch.int8).numpy().tobytes()]
    numbers = gzip.compress(b"".join(parts), compresslevel=9, mtime=0)
    return {"shapes": shapes, "numbers": base64.b64encode(numbers).decode("ascii")}, rounded


def layouts() -> dict:
    """The layouts of toy/mixture.py in numbers."""
    mixtures = {name: Mixture(**layout, dtype=torch.float64) for name, layout in LAYOUTS.items()}
    return {
        name: {"means": q.means.tolist(), "weights": q.weights.tolist(), "std": round(q.std[0, 0].item(), 6)}
        for name, q in mixtures.items()
    }


def networks() -> dict:
    """The plane's networks, trained now, and where they come from."""
    weights = {layout: {} for layout in LAYOUTS}
    settings = {label: studies.STUDIES["objectives"].settings[label] for label in OBJECTIVES}
    for label, (training, _) in settings.items():
        for layout in LAYOUTS:
            print(f"{label}, {layout} ...", flush=True)
            net = studies.trained(Member(layout, SEED), STEPS, training)
            weights[layout][label] = pack(net.state_dict())[0]
    made_by = machine.provenance(CPU) | {
        "command": "python -m toy.explore --networks",
        "seed": SEED,
        "steps": STEPS,
    }
    return {
        "provenance": made_by,
        "sampling": {label: sampling for label, (_, sampling) in settings.items()},
        "weights": weights,
    }


def pictures(*folders: Path) -> dict:
    """The models of the pictures, Self-E's and flow matching's, as finely rounded as ROOM allows; what that changes."""
    models = dict(zip(("self_e", "flow"), (sample.load(folder, CPU) for folder in folders)))
    for finest in LEVELS:
        packed = {name: pack(model.network.state_dict(), finest) for name, model in models.items()}
        if sum(len(weights["numbers"]) for weights, _ in packed.values()) <= ROOM:
            break
    else:
        raise errors.UserError("these models are too large for the page; try Self-E's alone")
    config = models["self_e"].config
    source = feed.open_side(tuple(config["data"]), config["side"], 1, 1, feed.Reading())
    captions = [source.sample(g).caption for g in range(READ)]
    off = []
    for name, model in models.items():
        before = draw(model, captions[:12])
        model.network.load_state_dict(packed[name][1])
        off.append(np.abs(draw(model, captions[:12]) - before))
    copied = ("model", "side", "mu", "txt_len", "guidance", "guidance_space", "eta", "s_rule", "t_max")
    return {
        "note": f"The pictures' weights are rounded, most rows to {2 * finest + 1} values. Over 12 training captions in "
        f"1, 2, 4 and 8 steps, a value of a picture moves by {np.mean(off):.1f} of 255 in the mean, "
        f"by at most {np.max(off)}. {emoji.CREDIT if config['data'][0] in emoji.SETS else ''}",
        "folder": os.path.relpath(folders[0].resolve(), ROOT),
        "prompts": offered(config["data"][0], captions),
        "vocabulary": sorted({word for caption in captions for word in encoders.split_words(caption)}),
        "models": {
            name: {"config": {key: model.config[key] for key in copied}, "weights": packed[name][0]}
            for name, model in models.items()
        },
    }


def offered(name: str, captions: list[str]) -> list[dict]:
    """The prompts of the page, and what counts as right."""
    known = EMOJI if name in emoji.SETS else dict.fromkeys([*dict.fromkeys(captions)][:8], "")
    return [{"prompt": prompt, "right": right} for prompt, right in known.items()]


def draw(model: sample.Loaded, prompts: list[str]) -> np.ndarray:
    """The page's pictures of some prompts: [steps, prompt, height, width, 3]."""
    keys = [(0,)] * len(prompts)
    return np.array([sample.generate(model, prompts, keys, steps=steps) for steps in (1, 2, 4, 8)], dtype=int)


# ------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------
def embedded(page: Path) -> dict:
    """The data block of a page that was written before. Raises UserError for a file that is no such page."""
    found = re.search(
        r'<script type="application/json" id="world">(.*?)</script>', page.read_text("utf-8", "replace"), re.S
    )
    try:
        return json.loads(found[1])
    except (TypeError, ValueError) as error:
        raise errors.UserError(
            f"{page} is not a page of this program: remove it, or choose another --out"
        ) from error


def build(page: Path, **changes: dict) -> None:
    """Write the page: the template with sources and data in place. `changes` replace parts of the data."""
    kept = embedded(page if page.exists() else PAGE)
    world = {"layouts": layouts()}
    world |= {name: changes.get(name) or kept[name] for name in ("networks", "pictures")}

    def fill(mark: re.Match) -> str:
        return json.dumps(world) if mark[1] == "world" else (FOLDER / mark[1]).read_text("utf-8").rstrip()

    text = re.sub(r"\{\{([\w.]+)\}\}", fill, (FOLDER / "template.html").read_text("utf-8"))
    with checkpoint.in_one_piece(page) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
    print(f"{page}: {len(text.encode()):,} bytes; open it in a browser")


def main() -> None:
    parser = errors.Parser("-m toy.explore", __doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=errors.file_to_write, default=PAGE, help="the page (default: toy/explore.html)"
    )
    parser.add_argument("--networks", action="store_true", help="train the plane's networks anew (minutes)")
    parser.add_argument(
        "--pictures",
        type=errors.model,
        nargs="+",
        metavar="FOLDER",
        help="models: Self-E's, then flow matching's",
    )
    args = parser.parse_args()
    if len(args.pictures or []) > 2:
        parser.error("--pictures takes one folder or two: Self-E's, then flow matching's")
    if args.out.exists():
        embedded(args.out)  # or it would be lost
    torch.set_num_threads(1)
    changes = {"networks": networks()} if args.networks else {}
    changes |= {"pictures": pictures(*args.pictures)} if args.pictures else {}
    build(args.out, **changes)


if __name__ == "__main__":
    errors.run(main)
