"""What may stand in config.json and state.json, and how large a number may be: read here before anything
relies on it.

    config = limits.config(folder)                   # what sampling needs; for sample.py and all that score pictures
    state = limits.state(folder)                     # of a training state, for train.py --resume
    limits.flags(path, arguments, parser)            # the flags in config.json that --resume goes on with

These files may have been edited, damaged, or written by another version. Each of the functions raises CheckpointError,
one line with the file, the name, and what was expected. RANGES serves train.py's own flags too: a number that becomes
memory has a bound, so that a slip of the keyboard ends in a line and not in a machine without memory.
"""

import argparse
from pathlib import Path

import objectives
from engine import checkpoint, errors
from engine.checkpoint import CheckpointError

# The whole numbers among train.py's flags: the least and the most.
RANGES = {
    "steps": (1, 10**9),
    "batch_size": (2, 2**20),
    "micro_batch": (2, 2**20),
    "side": (1, 2**13),
    "txt_len": (1, 2**12),
    "log_every": (1, 10**9),
    "keep": (1, 10**6),
    "workers": (1, 1024),
    "seed": (0, 2**63 - 1),
    "recompute": (0, 10**6),
    "grid_every": (0, 10**9),
    "save_every": (0, 10**9),
    "milestone_every": (0, 10**9),
    "imm_k": (1, 20),
}
# The entries of model.SIZES. Whether they describe the weights beside them is seen before memory is taken for them.
MODEL = {
    "width": (1, 2**15),
    "heads": (1, 2**10),
    "double": (0, 2**8),
    "single": (0, 2**8),
    "channels": (1, 2**10),
    "patch": (1, 2**6),
    "txt_dim": (1, 2**16),
    "vec_dim": (1, 2**16),
}


def number(low: float, high: float):
    """Whether a value is a number from low to high."""
    return lambda value: (
        isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    )


def whole(low: int, high: int):
    """Whether a value is a whole number from low to high."""
    return lambda value: isinstance(value, int) and number(low, high)(value)


def entry(low: int, high: int) -> tuple:
    """What a message says of such a number, and the check itself."""
    return f"a whole number from {low} to {high}", whole(low, high)


def text(value) -> bool:
    return isinstance(value, str)


def three_axes(value) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(whole(0, 2**15), value))


# What sampling reads of config.json, and what it must be; engine/arguments.py writes it.
CONFIG = {
    "model": ("an object", lambda value: isinstance(value, dict)),
    "precision": ("float32 or bfloat16", lambda value: value in ("float32", "bfloat16")),
    "objective": (
        " or ".join(objectives.OBJECTIVES),
        lambda value: text(value) and value in objectives.OBJECTIVES,
    ),
    "side": entry(*RANGES["side"]),
    "mu": ("a number", number(-10, 10)),
    "text_encoder": ("a name", text),
    "txt_len": entry(*RANGES["txt_len"]),
    "autoencoder": ("a name", text),
    "guidance": ("from 0 to 100", number(0, 100)),
    "eta": ('from 0 to 1, or "renoise"', lambda value: value == "renoise" or number(0, 1)(value)),
    "s_rule": ("from 0 to 1", number(0, 1)),
    "guidance_space": ("v or x0", lambda value: value in ("v", "x0")),
}


def shapes(value) -> bool:
    """[[height, width, share], ...]"""
    rows = value if isinstance(value, list) else []
    sides = [side for row in rows if isinstance(row, list) and len(row) == 3 for side in row[:2]]
    return bool(rows) and len(sides) == 2 * len(rows) and all(map(whole(1, 2**13), sides))


CONFIG_LATER = {"buckets": ("lists of height, width and share", shapes)}
MODEL_CONFIG = {name: entry(*bounds) for name, bounds in MODEL.items()}
MODEL_CONFIG["axes"] = ("three whole numbers, for t, y and x", three_axes)
FACTOR = {"time_factor": ("a number from 0 up", number(0, 10**6))}  # may be missing: FLUX's
# What a resumed run reads of state.json, and what may be missing in that of an older version.
STATE = {
    "step": entry(0, 10**9),
    "seed": entry(*RANGES["seed"]),
    "elapsed": ("a number of seconds", number(0, 10**12)),
}
STATE_LATER = {
    "steps": entry(*RANGES["steps"]),
    "nonfinite": entry(0, 10**9),
    "data": ("an object of texts", lambda value: isinstance(value, dict) and all(map(text, value.values()))),
}


def check(path: Path, found: dict, needed: dict, optional: dict | None = None, prefix: str = "") -> None:
    """Raise CheckpointError unless `found` has what is needed, and each value is right."""
    missing = [prefix + name for name in needed if name not in found]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}: it is damaged, or another program's")
    for name, (what, right) in (needed | (optional or {})).items():
        if name in found and not right(found[name]):
            raise CheckpointError(f"{path}: {prefix}{name} must be {what}, not {shown(found[name])}")


def shown(value) -> str:
    """A value as a message shows it, cut where it is long."""
    return errors.shortened(repr(value))


# ------------------------------------------------------------------------------------------------------------
# The files
# ------------------------------------------------------------------------------------------------------------
def config(folder: Path) -> dict:
    """What config.json says of a model, checked. Raises CheckpointError."""
    path = folder / "config.json"
    found = checkpoint.read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not that of a model")
    check(path, found, CONFIG, CONFIG_LATER)
    check(path, found["model"], MODEL_CONFIG, FACTOR, "model.")
    if unknown := [name for name in found["model"] if name not in MODEL_CONFIG | FACTOR]:
        raise CheckpointError(
            f"{path} does not describe a model of this version: it has no {shown(unknown[0])}"
        )
    return found


def state(folder: Path) -> dict:
    """What state.json of a training state says, checked. Raises CheckpointError."""
    path = folder / "state.json"
    found = checkpoint.read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not that of a training state")
    check(path, found, STATE, STATE_LATER)
    if found["step"] != checkpoint.step_of(folder):
        raise CheckpointError(
            f"{path} is that of iteration {found['step']}, which its folder's name contradicts"
        )
    return found


def flags(path: Path, arguments: dict, parser: argparse.ArgumentParser) -> None:
    """Raise CheckpointError unless the parser could have given these arguments; what is missing has its default."""
    known = {action.dest: action for action in parser._actions}
    for name, value in arguments.items():
        if name not in known:
            raise CheckpointError(
                f"{path}: this version has no argument {shown(name)}; go on with the one that began the run"
            )
        action = known[name]
        if value is None and action.default is None:
            continue
        if action.nargs == "+":
            right = isinstance(value, list) and value and all(map(text, value))
        elif action.nargs == 0:  # --zero, --no-zero
            right = isinstance(value, bool)
        else:
            kinds = {int: (int,), float: (int, float)}.get(action.type, (str,))
            right = isinstance(value, kinds) and not isinstance(value, bool)
        if not right or (action.choices and value not in action.choices):
            raise CheckpointError(f"{path}: the argument {name} cannot be {shown(value)}")
