"""What a run leaves on disk, and how it is read back. Weights are safetensors; nothing is unpickled but tensors.

    RUN/config.json                     everything needed to rebuild the model and its encoders
    RUN/model.safetensors               the EMA weights: what sample.py loads
    RUN/state/step_00002000/            one complete training state (--resume), itself a folder that sample.py can load
        config.json  model.safetensors (EMA)  network.safetensors  adam.pt  state.json
    RUN/metrics.jsonl  RUN/grids/       what happened on the way
    RUN/lock                            held while a process trains here

    python -m engine.checkpoint runs/laptop model/ --dtype fp16   # the part of a run worth giving away

Every file or folder is written beside its final name, brought to the disk and then renamed, so what has the final name
is complete: a run may be killed at any moment, a disk may fill up, and the last complete state is still there.
"""

import contextlib
import json
import os
import re
import reprlib
import shutil
import sys
import uuid
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from engine import errors
from objectives import OBJECTIVES


class CheckpointError(errors.UserError):
    """A checkpoint cannot be used or written; the message says which file and what to do."""


# ------------------------------------------------------------------------------------------------------------
# Files in one piece
# ------------------------------------------------------------------------------------------------------------
def to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a power cut after the rename finds all of it."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def in_one_piece(path: Path, shared: bool = False):
    """A path beside `path` to write a file to, renamed to it when the block ends well and removed when it does not.

    `shared` is for a file that several processes may write at the same time: each has its own partial file, and the
    last rename wins. Otherwise the name is fixed, and what a killed process left there is written over. Both begin with
    a dot: GenEval's scorer reads whatever begins like 0000.png.
    """
    unique = f".{uuid.uuid4().hex}" if shared else ""
    partial = path.with_name(f".{path.name}{unique}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a process that was killed; its mode may be another
        partial.touch()
        # As the user's umask has it; safetensors' files only their owner can read
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        to_disk(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:  # a full disk, of which neither names the file
        raise CheckpointError(f"{path} cannot be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value, shared: bool = False) -> None:
    """Write `value` to `path` in one piece; `shared` as for in_one_piece."""
    with in_one_piece(path, shared) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def keep_settings(folder: Path, settings: dict, otherwise: str) -> None:
    """Write FOLDER/settings.json, which several processes may do at the same time, so that work goes on with the same.

    Raises UserError where the folder was begun with other settings; `otherwise` says what to do but repeat them.
    """
    path, settings = folder / "settings.json", json.loads(json.dumps(settings))  # tuples become lists
    if path.exists() and read_json(path) != settings:
        raise errors.UserError(f"{path} has other settings: repeat them, or {otherwise}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings, shared=True)


def read_json(path: Path):
    """The value in a JSON file. Raises CheckpointError when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is {path.parent} the folder of a run?") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: it is not valid JSON ({error})") from error


# What sampling reads of config.json, and the kind of each entry, or its words; engine/arguments.py writes it.
CONFIG = {
    "model": dict,
    "precision": ("float32", "bfloat16"),
    "objective": tuple(OBJECTIVES),
    "side": int,
    "mu": float,
    "text_encoder": str,
    "txt_len": int,
    "autoencoder": str,
    "guidance": float,
    "eta": object,
    "s_rule": float,
    "guidance_space": ("v", "x0"),
}
STATE = {"step": int, "seed": int, "elapsed": float, "steps": int, "data": dict}  # of state.json


def read_checked(path: Path, kinds: dict) -> dict:
    """A JSON object that has these entries, each of its kind. Raises CheckpointError."""
    found = read_json(path)
    for name, kind in kinds.items():
        value = found.get(name) if isinstance(found, dict) else None
        types = (int, float) if kind is float else kind
        if value not in kind if isinstance(kind, tuple) else value is None or not isinstance(value, types):
            words = f", only {', '.join(kind)}" if isinstance(kind, tuple) else ""
            raise CheckpointError(
                f"{path}: {name} cannot be {reprlib.repr(value)}{words}: it is damaged, or another program's"
            )
    return found


def read_config(folder: Path) -> dict:
    """What config.json says of a model. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"no such checkpoint folder: {folder}")
    # Models of before there was t_max are sampled as they were
    return {"t_max": 1.0} | read_checked(folder / "config.json", CONFIG)


# ------------------------------------------------------------------------------------------------------------
# Weights
# ------------------------------------------------------------------------------------------------------------
def save_weights(path: Path, module: nn.Module) -> None:
    """The state dict of a module as safetensors, written in one piece."""
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in module.state_dict().items()}
    with in_one_piece(path) as partial:
        save_file(weights, partial)


def read_weights(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, as `dtype`. Raises CheckpointError when it is missing, damaged, or holds what
    is no finite number of that type."""
    try:
        weights = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is {path.parent} the folder of a run?") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error})") from error
    for name, tensor in weights.items():
        # A copy: what is read is a mapping of the file, which may change under a network that lives long
        weights[name] = tensor.to(dtype, copy=True)
        if not tensor.is_floating_point() or not weights[name].isfinite().all():
            raise CheckpointError(f"{path}: {name!r} holds what is no finite number of {dtype}")
    return weights


def load_weights(path: Path, module: nn.Module) -> None:
    """Load safetensors into a module, every tensor of the same name and shape, finite, whatever the precision.

    A module on the meta device, which has no memory yet, takes that of the tensors read. Raises CheckpointError.
    """
    try:
        module.load_state_dict(read_weights(path), assign=next(module.parameters()).is_meta)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()[:200]
        raise CheckpointError(f"{path} holds another model than its config.json says ({first})") from error


# ------------------------------------------------------------------------------------------------------------
# The folder of a run
# ------------------------------------------------------------------------------------------------------------
def complete_states(run: Path) -> list[Path]:
    """The complete training states of a run, oldest first."""
    named = [path for path in (run / "state").glob("step_*") if re.fullmatch("step_[0-9]{8,}", path.name)]
    return sorted(named, key=step_of)  # not by name: 100,000,000 has a digit more


def step_of(state: Path) -> int:
    """The iterations behind a state, from its folder's name."""
    return int(state.name.removeprefix("step_"))


def check_folder(run: Path, resume: bool) -> None:
    """Raise CheckpointError unless a run can lie in the folder: asked at once, not after the data is read."""
    there = next(path for path in (run, *run.absolute().parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        raise CheckpointError(f"{run} cannot be a folder: {there} is a file; choose another --out")
    for path in (there, run / "state"):
        if path.exists() and not os.access(path, os.W_OK | os.X_OK):
            raise CheckpointError(f"{path} cannot be written by this user: choose another --out")
    states = complete_states(run)
    if resume and not states:
        raise CheckpointError(f"nothing to resume: {run / 'state'} holds no complete state")
    if not resume and states:
        raise CheckpointError(f"{run} already holds a run; add --resume to go on, or choose another --out")
    if not resume and (run / "model.safetensors").exists():
        raise CheckpointError(
            f"{run} already holds a model, without a state to resume: choose another --out, with --init {run} to "
            "begin with its weights"
        )


@contextlib.contextmanager
def taken(run: Path, resume: bool, states: list[Path]):
    """The folder is this run's alone while the block lasts. Raises CheckpointError where it is another's.

    The lock goes with the process, however it ends. Windows and some network file systems have none.
    """
    (run / "grids").mkdir(parents=True, exist_ok=True)
    with open(run / "lock", "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process is training in {run}: wait for it, or choose another --out"
            ) from error
        except (ImportError, OSError) as error:
            print(f"{run} cannot be locked ({error}): see that nothing else trains there", file=sys.stderr)
        check_folder(run, resume)  # again: reading the data may have taken long
        if resume and complete_states(run) != states:
            raise CheckpointError(f"another process has trained in {run} meanwhile: start again")
        yield


def publish(run: Path, state: Path) -> None:
    """Make the model of a state that of the run: RUN/model.safetensors and RUN/config.json."""
    write_json(run / "config.json", read_json(state / "config.json"))
    with in_one_piece(run / "model.safetensors") as copy:
        copy.unlink(missing_ok=True)
        try:
            os.link(state / "model.safetensors", copy)  # the same bytes under two names
        except OSError:  # a file system without hard links
            shutil.copyfile(state / "model.safetensors", copy)


def set_back(run: Path, states: list[Path]) -> None:
    """Let a run's folder say what it said at its last state; a process killed while it saved may not have got so far.

    metrics.jsonl forgets later iterations, which a resumed run will report again, and half a line of a killed process.
    """
    step, metrics, kept = step_of(states[-1]) if states else 0, run / "metrics.jsonl", []
    for line in metrics.read_bytes().splitlines() if metrics.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
    with in_one_piece(metrics) as partial:
        partial.write_bytes(b"".join(kept))
    if states:
        publish(run, states[-1])


# ------------------------------------------------------------------------------------------------------------
# The training state
# ------------------------------------------------------------------------------------------------------------
def save_state(run: Path, network, ema, optimizer, config: dict, state: dict, args) -> Path:
    """Write RUN/state/step_N, RUN/model.safetensors and RUN/config.json, then remove older states. Returns the state's
    folder.

    config and state go into the JSON files of these names. The newest `args.keep` states stay, and for good those whose
    iteration is a multiple of args.milestone_every (0: none). Raises CheckpointError when it cannot be written, or when
    the weights are not finite; what was complete before is untouched then.
    """
    step = state["step"]
    folder = run / "state" / f"step_{step:08d}"
    partial = folder.with_name(folder.name + ".partial")
    try:
        if not all(p.isfinite().all() for p in (*network.parameters(), *ema.parameters())):
            raise CheckpointError("its weights are not finite: a lower --lr may help")
        for left in (run / "state").glob("*.partial"):  # of a process that was killed while it saved
            shutil.rmtree(left, ignore_errors=True)
        if not folder.exists():  # a state of this iteration that is complete already is the same state
            partial.mkdir(parents=True)
            save_weights(partial / "model.safetensors", ema)
            save_weights(partial / "network.safetensors", network)
            torch.save(optimizer.state_dict(), partial / "adam.pt")
            to_disk(partial / "adam.pt")
            write_json(partial / "config.json", config)
            write_json(partial / "state.json", state)
            to_disk(partial)
            os.replace(partial, folder)
            to_disk(folder.parent)
        publish(run, folder)
    except (OSError, CheckpointError, RuntimeError) as error:  # torch tells of a full disk by a RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        last = [state.name for state in complete_states(run)][-1:]
        way_on = f"the last complete state is {last[0]}, --resume goes on from it" if last else "start again"
        raise CheckpointError(
            f"cannot save iteration {step} in {run} ({str(error).splitlines()[0]}); {way_on}; make room if the disk is full"
        ) from error
    for old in complete_states(run)[: -args.keep]:
        if not args.milestone_every or step_of(old) % args.milestone_every:
            gone = old.with_name(old.name + ".partial")  # half-deleted, it must not pass for a complete one
            with contextlib.suppress(OSError):  # as on NFS while it is read; a later save sweeps it
                os.replace(old, gone)
                shutil.rmtree(gone)
    return folder


def another_model(theirs: dict, ours: dict) -> str:
    """Where two networks' entries of model.SIZES differ, in words."""
    differ = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
    pairs = [f"{name} {theirs.get(name)}, not {ours.get(name)}" for name in differ]
    return f"another model ({', '.join(pairs)})"


def load_init(folder: Path, network: nn.Module, sizes: dict, codec) -> None:
    """Load another run's moving average into a new network of `sizes`. Raises CheckpointError for one of another model or
    encoder."""
    config = read_config(folder)
    if config["model"] != sizes:
        raise CheckpointError(
            f"--init {folder} is {another_model(config['model'], sizes)}: choose its --size, and an --objective with its "
            "time_factor, or leave out --init"
        )
    for name, encoder in {"text_encoder": codec.text, "autoencoder": codec.autoencoder}.items():
        if encoder and config[name] != encoder.name:
            raise CheckpointError(
                f"--init {folder} was trained with the {name} {config[name]}, not {encoder.name}: choose that, or leave out "
                "--init"
            )
    load_weights(folder / "model.safetensors", network)


def load_state(states: list[Path], network: nn.Module, ema: nn.Module, optimizer, continuity: dict) -> dict:
    """Load the newest training state into network, ema and optimizer; returns what its state.json says.

    `continuity` is what it must say of the sequence of samples. Learning rate, betas and the like stay those of the
    recipe, whatever adam.pt says. Raises CheckpointError; for a damaged state with what to do: older ones are not taken
    unasked.
    """
    folder = states[-1]
    run = folder.parents[1]
    try:
        state = read_checked(folder / "state.json", STATE)
        begun = read_config(folder) | state
        others = {"data": "other data", "model": another_model(begun["model"], continuity["model"])}
        for name, now in continuity.items():
            if begun[name] != now:
                what = others.get(name, f"--{name} {begun[name]}")
                raise errors.UserError(  # no damage, for which an older state would be better
                    f"{run} was begun with {what}: restore that, or begin a new run with these weights (--init {run} "
                    "--out NEW)"
                )
        load_weights(folder / "network.safetensors", network)
        load_weights(folder / "model.safetensors", ema)
        load_optimizer(folder / "adam.pt", optimizer, next(network.parameters()).is_cuda)
    except (CheckpointError, OSError) as error:
        older = f"delete {folder} to go on from {states[-2].name}" if states[1:] else "there is no older one"
        raise CheckpointError(f"{error}; {older}") from error
    return state


def load_optimizer(path: Path, optimizer, on_gpu: bool) -> None:
    """Load adam.pt into the optimizer. Raises CheckpointError."""
    try:
        with warnings.catch_warnings():  # of a file that torch did not write
            warnings.simplefilter("ignore")
            # On a CPU the moments would stay the mapping of a file that is going to be deleted
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=on_gpu)
        optimizer.load_state_dict(checked(saved, optimizer))
    except Exception as error:  # a damaged file makes torch's reader raise almost anything
        if errors.out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(f"{path} is not the optimizer's state of this model ({reason})") from error
    # ZeRO-1 leaves Adam's count on the CPU, where the fused update does not look for it (pytorch issue 124133)
    for p, kept in getattr(optimizer, "optim", optimizer).state.items():
        if "step" in kept:  # Muon keeps none
            kept["step"] = kept["step"].to(p.device)
    if hasattr(optimizer, "optim"):
        optimizer.state.clear()  # a second copy of the moments, which ZeRO-1 makes on loading and never reads


# What the optimizers keep of each parameter: tensors of its shape, and Adam's count of its steps
KEPT = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"})


def checked(saved: dict, optimizer) -> dict:
    """A saved optimizer state that fits the optimizer's parameters, with the optimizer's own settings.

    Adam's fused update reads whatever lies behind a tensor that is too small, so each must have the shape and type of
    its parameter. Raises ValueError, or what a saved state of another form makes Python raise.
    """
    if hasattr(optimizer, "parts"):  # Muon and Adam
        pairs = zip(saved["parts"], optimizer.parts, strict=True)
        return {"parts": [checked(part, its_optimizer) for part, its_optimizer in pairs]}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if len(set(numbers)) != len(parameters) or set(saved["state"]) not in (set(), set(numbers)):
        raise ValueError("not one entry for each parameter")
    for number, p in zip(numbers, parameters) if saved["state"] else ():  # empty before the first update
        entry = saved["state"][number]
        if set(entry) not in KEPT:
            raise ValueError(f"parameter {number} has {', '.join(map(str, entry))}")
        for name, tensor in entry.items():
            shape = () if name == "step" else p.shape
            if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.isfinite().all():
                raise ValueError(f"{name} of parameter {number} is not {list(shape)} finite float32 numbers")
            if name in ("step", "exp_avg_sq") and (tensor < 0).any():
                raise ValueError(f"{name} of parameter {number} is negative")
    groups = zip(optimizer.param_groups, saved["param_groups"], strict=True)
    groups = [ours | {"params": theirs["params"]} for ours, theirs in groups]
    return {"state": saved["state"], "param_groups": groups}


# ------------------------------------------------------------------------------------------------------------
# Giving a model away
# ------------------------------------------------------------------------------------------------------------
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Copy what sample.py needs of a run or state, its weights as `dtype`.

    fp16 halves the file and keeps 11 bits of every weight; the model still computes in what sample.py chooses. Raises
    CheckpointError when `source` holds no model, and when `out` holds one.
    """
    config, weights = read_config(source), read_weights(source / "model.safetensors", dtype)
    if (out / "model.safetensors").exists() or (out / "state").exists():
        raise CheckpointError(f"{out} holds a model already: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config)
    with in_one_piece(out / "model.safetensors") as partial:  # the last: with it the folder is a model
        save_file(weights, partial)


def main() -> None:
    what = "Copy a model out of a run: weights and config."
    parser = errors.Parser("-m engine.checkpoint RUN OUT", what)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run, or one of its states")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the weights")
    args = parser.parse_args()
    export(args.run, args.out, DTYPES[args.dtype])
    print(f"wrote {args.out}: {(args.out / 'model.safetensors').stat().st_size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    errors.run(main)
