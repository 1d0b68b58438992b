"""What a run leaves on disk, and how it is read back. Weights are safetensors; nothing is unpickled but tensors.

    RUN/config.json                     everything needed to rebuild the model and its encoders
    RUN/model.safetensors               the EMA weights: what sample.py loads
    RUN/state/step_00002000/            one complete training state (--resume)
        network.safetensors  ema.safetensors  adam.pt  state.json
    RUN/metrics.jsonl  RUN/grids/       what happened on the way

Every file or folder is written beside its final name and then renamed, so what has the final name is complete.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import errors


class CheckpointError(errors.UserError):
    """A checkpoint cannot be used; the message says which file and what to do."""


def write_json(path: Path, value) -> None:
    """Write `value` to `path` in one piece: beside it first, then renamed."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path):
    """The value in a JSON file. Raises CheckpointError when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is {path.parent} the folder of a run?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the checkpoint is damaged") from error


def save_weights(path: Path, module: nn.Module) -> None:
    """The state dict of a module as safetensors, written in one piece."""
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in module.state_dict().items()}, partial)
    os.replace(partial, path)


def load_weights(path: Path, module: nn.Module) -> None:
    """Load safetensors into a module, every tensor of the same name and shape. Raises CheckpointError otherwise."""
    try:
        state = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is {path.parent} the folder of a run?") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error})") from error
    own = module.state_dict()
    wrong = [n for n in own if n not in state or state[n].shape != own[n].shape] + [n for n in state if n not in own]
    if wrong:
        raise CheckpointError(f"{path} holds a model of another shape than its config.json says: {len(wrong)} tensors "
                              f"differ, first {wrong[0]!r}")  # fmt: skip
    module.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# The training state
# ---------------------------------------------------------------------------------------------------------------------
def save_state(run: Path, step: int, network: nn.Module, ema: nn.Module, adam: dict, state: dict, keep: int = 2) -> Path:
    """Write RUN/state/step_N in one piece and then remove all but the newest `keep` states. Returns the folder."""
    folder = run / "state" / f"step_{step:08d}"
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_weights(partial / "network.safetensors", network)
    save_weights(partial / "ema.safetensors", ema)
    torch.save(adam, partial / "adam.pt")
    write_json(partial / "state.json", state)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    for old in complete_states(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def complete_states(run: Path) -> list[Path]:
    """The complete training states of a run, oldest first."""
    return sorted(p for p in (run / "state").glob("step_*") if p.suffix != ".partial")


def load_state(folder: Path, network: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Load one training state into network, ema and optimizer; returns what was in state.json."""
    load_weights(folder / "network.safetensors", network)
    load_weights(folder / "ema.safetensors", ema)
    try:
        adam = torch.load(folder / "adam.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{folder / 'adam.pt'} cannot be read ({error})") from error
    optimizer.load_state_dict(adam)
    return read_json(folder / "state.json")
