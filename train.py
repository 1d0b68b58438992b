"""Train Self-E: the one loop, from a laptop's CPU to many GPUs (Sec. 3.3, S.2).

    python train.py                                            # the laptop model on the built-in shapes, on this machine
    python train.py --data pictures/ --out runs/mine           # your own folder of captioned pictures
    python train.py --objective flow_matching --out runs/fm    # the baseline of Table 2
    python train.py --resume --out runs/mine                   # go on where a run stopped
    python train.py --size 2b --data tars/ --dry-run           # the plan, its memory and its price; nothing is trained
    torchrun --nproc-per-node 8 train.py --size 2b --data tars/ --out runs/2b      # the paper's model

What it prints: the plan, then one line with loss, images/s and time left, and at the end the command that samples.
What it writes: checkpoint.py and monitor.py say; besides, grids/step_*.png: the data's first prompts, each from one noise,
in rows, 1, 2, 4, 8, 50 steps in columns. What is trained for how long at which rate is in recipe.py, where the data comes from in feed.py.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import baselines
import data
import encoders
import losses
import model
import recipe
import sample
from engine import cache, checkpoint, errors, machine, monitor, optimizers
from engine.feed import Feed

# ---------------------------------------------------------------------------------------------------------------------
# The objectives of Table 2
# ---------------------------------------------------------------------------------------------------------------------
class Objective(NamedTuple):
    """What the loop must know of an objective; recipe.FORWARDS knows what it costs, sample.py how its models are sampled."""

    build: Callable  # (network, ema, args) -> a module called like losses.SelfE
    draw: Callable  # the random numbers of a micro-batch, like losses.draw
    group: int  # micro-batches are multiples of it


def self_e(network, ema, args) -> losses.SelfE:
    null_branch = {"online": network, "ema": ema}[args.null_branch]
    return losses.SelfE(network, ema, target=args.target, delta_scale=args.delta_scale, unconditional=null_branch)


OBJECTIVES = {
    "self_e": Objective(self_e, functools.partial(losses.draw, p_equal=0.5), 2),
    "flow_matching": Objective(self_e, functools.partial(losses.draw, p_equal=1.0), 2),  # Self-E that never meets s < t
    "imm": Objective(lambda network, ema, args: baselines.IMM(network), baselines.draw, baselines.M),
}

EAGER_STEPS = 20  # iterations before torch.compile comes in, and the first picture grid
STEP_COUNTS = (1, 2, 4, 8, 50)  # the columns of the picture grids
SAVE_SECONDS = 1800  # between states, unless --save-every says otherwise
PATIENCE = 5  # iterations in a row without a finite gradient before the run stops


# ---------------------------------------------------------------------------------------------------------------------
# Stopping: Ctrl-C and SIGTERM finish the iteration, save, and say how to go on
# ---------------------------------------------------------------------------------------------------------------------
class StopSignal:
    """Becomes true at the first SIGINT or SIGTERM. A second Ctrl-C ends the process as usual.

    A further SIGTERM does not, because launchers and schedulers may send one after the other, and it would cut the saving
    short; they have SIGKILL for what takes too long.
    """

    def __init__(self):
        self.name = ""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def hold(self, on: bool) -> None:
        """Block SIGINT in this thread, so that programs started meanwhile inherit the block: a terminal sends Ctrl-C to the
        C++ compiler as well, which would end in its traceback. Any iteration may compile: one with pictures of a new size,
        the first with the auxiliary term. This process still notices the signal and stops after the iteration."""
        if hasattr(signal, "pthread_sigmask"):  # not on Windows
            signal.pthread_sigmask(signal.SIG_BLOCK if on else signal.SIG_UNBLOCK, {signal.SIGINT})

    def __bool__(self) -> bool:
        return self.name != ""


# ---------------------------------------------------------------------------------------------------------------------
# Pictures on the way
# ---------------------------------------------------------------------------------------------------------------------
def grid_prompts(source, n: int = 8) -> list[str]:
    """The prompts of the picture grids: the first captions of the data, no two alike. With buckets they follow from the batch
    size too, so a run resumed in another stage draws others."""
    captions = [source.sample(g, 0).caption for g in range(n)]
    if len(set(captions)) < n:
        captions += [source.sample(g, 0).caption for g in range(n, 8 * n)]
    return list(dict.fromkeys(captions))[:n]


def draw_grid(loaded: sample.Loaded, prompts: list[str], stop: Callable[[], bool]) -> Image.Image:
    """The sheet of pictures: prompts in rows, step counts in columns, one noise per row. Raises sample.Stopped."""
    keys = [(i,) for i in range(len(prompts))]
    columns = [sample.generate(loaded, prompts, keys, steps=n, stop=stop) for n in STEP_COUNTS]
    rows = [list(row) for row in zip(*columns)]
    return sample.sheet(rows, STEP_COUNTS, prompts)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------
def parse_arguments(argv=None) -> argparse.Namespace:
    """The flags; with --resume, those not given are taken from the run that goes on."""
    parser = errors.Parser("train.py", "Train Self-E. What has no default here has it in recipe.py, by --size.")
    a = parser.add_argument_group("the run").add_argument
    a("--size", default="laptop", choices=list(model.SIZES), help="model and recipe (default: laptop)")
    a("--data", metavar="DIR", nargs="+", help="one-shape, shapes, a folder of captioned pictures or of tar shards, or caches")
    a("--wrong-captions", metavar="X", type=float, default=0.0, help="share of samples with the caption of another; 0 is off (default: 0)")
    a("--out", metavar="DIR", default="runs/laptop", help="folder of the run (default: runs/laptop)")
    a("--init", metavar="DIR", help="begin with the weights of another run or checkpoint (default: random ones)")
    a("--resume", action="store_true", help="go on from the last state in --out, with its flags")
    a("--dry-run", action="store_true", help="print the plan, memory and price of the run and end")
    a("--index", metavar="DIR", help="folder of the index of tar shards (default: beside the tars)")
    a("--seed", metavar="N", type=int, default=0, help="of everything random (default: 0)")
    a = parser.add_argument_group("the recipe").add_argument
    a("--steps", metavar="N", type=int, help="iterations")
    a("--batch-size", metavar="N", type=int, help="pictures an iteration, over all processes and in all stages")
    a("--lr", metavar="X", type=float, help="peak learning rate")
    a("--optimizer", default="adam", choices=optimizers.OPTIMIZERS, help="adam (default, S.2), or muon for the blocks' matrices")
    a("--side", metavar="N", type=int, help="side of the pictures in pixels, in all stages")
    a("--text", metavar="SPEC", help="frozen text encoder, see encoders.py")
    a("--txt-len", metavar="N", type=int, help="tokens that a caption is cut or padded to")
    a("--autoencoder", metavar="SPEC", help="frozen auto-encoder, see encoders.py")
    a = parser.add_argument_group("the objective (Sec. 3.3, Table 2)").add_argument
    a("--objective", default="self_e", choices=list(OBJECTIVES), help="default: self_e")
    a("--target", default="renorm", choices=("renorm", "tar", "sum"), help="Eq. 20, Eq. 18 or Eq. 16 (default: renorm)")
    a("--delta-scale", metavar="X", type=float, default=1.0, help="times the self-evaluation; 0 is the control (default: 1)")
    a("--null-branch", default="online", choices=("online", "ema"), help="which network sees the null prompt: the trained one (default, S.2) or ema")
    a("--aux-from", metavar="X", type=float, help="share of the run after which the auxiliary term joins; 1 is never")
    a = parser.add_argument_group("the machine").add_argument
    a("--device", metavar="NAME", default="auto", help="cuda, mps, cpu (default: the best there is)")
    a("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="inside the network (default: the faster)")
    a("--compile", action=argparse.BooleanOptionalAction, help="torch.compile each block (default: where it works and pays)")
    a("--micro-batch", metavar="N", type=int, help="pictures a process computes at once, at the first stage's side")
    a("--recompute", metavar="N", type=int, default=0, help="blocks that recompute their activations, to save memory (default: 0)")
    a("--zero", action=argparse.BooleanOptionalAction, default=False, help="spread Adam's moments over the processes (ZeRO-1)")
    a("--workers", metavar="N", type=int, default=1, help="threads that read data ahead (default: 1)")
    a = parser.add_argument_group("what is written").add_argument
    a("--log-every", metavar="N", type=int, default=20, help="iterations between lines of metrics.jsonl (default: 20)")
    a("--grid-every", metavar="N", type=int, help="iterations between picture grids; 0 is off (default: ten a run, and an early one)")
    a("--save-every", metavar="N", type=int, help="iterations between states; 0 is only at the end (default: five a run, and every half hour)")
    a("--keep", metavar="N", type=int, default=2, help="newest states to keep (default: 2)")
    a("--milestone-every", metavar="N", type=int, default=0, help="keep states at multiples of N for good; 0 is off (default: 0)")
    args = parser.parse_args(argv)
    if args.resume:
        path = Path(args.out) / "config.json"
        config = checkpoint.read_json(path)
        if not isinstance(config, dict) or not isinstance(config.get("arguments"), dict):
            raise checkpoint.CheckpointError(f"{path} is not that of a run that train.py began")
        parser.set_defaults(**config["arguments"])
        args = parser.parse_args(argv)
        begun = parser.parse_args(["--resume"])  # the run's own flags
        for name in ("size", "objective", "target", "delta_scale", "null_branch", "text", "txt_len", "autoencoder", "wrong_captions", "optimizer"):
            now, then = (getattr(plan_of(a) if name in ("text", "txt_len", "autoencoder") else a, name) for a in (args, begun))
            if now != then:
                parser.error(f"{args.out} was begun with --{name.replace('_', '-')} {then}; for another begin a new run")
    for name in ("steps", "batch_size", "micro_batch", "side", "txt_len", "log_every", "keep", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("seed", "recompute", "grid_every", "save_every", "milestone_every"):
        if getattr(args, name) is not None and getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    for name in ("batch_size", "micro_batch"):
        if getattr(args, name) is not None and getattr(args, name) % 2:
            parser.error(f"--{name.replace('_', '-')} must be even: every second sample has s < t (s.13)")
    if args.seed >= 2**63:
        parser.error("--seed must be less than 2^63")
    if args.lr is not None and not 0 < args.lr < 1:
        parser.error("--lr must lie between 0 and 1")
    if args.zero and args.optimizer == "muon":
        parser.error("--zero spreads the moments of Adam; it does not go with --optimizer muon")
    if not 0 <= args.wrong_captions <= 1:
        parser.error("--wrong-captions is a share of the samples, between 0 and 1")
    if not 0 <= args.delta_scale < float("inf"):
        parser.error("--delta-scale must be a number from 0 up")
    if args.aux_from is not None and not 0 <= args.aux_from <= 1:
        parser.error("--aux-from is a share of the run, between 0 and 1")
    chosen = args.target, args.delta_scale, args.null_branch, 1 if args.aux_from is None else args.aux_from
    if args.objective != "self_e" and chosen != ("renorm", 1, "online", 1):
        parser.error(f"--target, --delta-scale, --null-branch and --aux-from are choices of Self-E; {args.objective} has none of them")
    if not args.out:
        parser.error("--out must name the folder of the run")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The plan, printed
# ---------------------------------------------------------------------------------------------------------------------
def print_plan(args, plan: recipe.Recipe, sizes: dict, factor: int, world: int, start: int) -> None:
    """The recipe as this run will follow it."""
    print(f"{args.size}: {model.count_parameters(sizes) / 1e6:,.2f} M parameters, {args.objective}, seed {args.seed}, data {' '.join(plan.data) or 'not given'}; "
          f"iterations {start:,} to {plan.steps:,}")  # fmt: skip
    for line in recipe.describe(sizes, plan, args.objective, factor, world):
        print("  " + line)


def dry_run(args, plan: recipe.Recipe, world: int, start: int) -> None:
    """What a run will be, hold and cost, from its arguments alone: no encoder is loaded and nothing is written."""
    sizes, factor = model.SIZES[args.size], plan.factor()
    print_plan(args, plan, sizes, factor, world, start)
    parameters = model.count_parameters(sizes)
    state = recipe.state_bytes(parameters, world, args.zero)
    print(f"memory of each process: {sum(state.values()) / 2**30:.2f} GiB of state ("
          + ", ".join(f"{name} {b / 2**30:.2f}" for name, b in state.items()) + "), and activations (engine/benchmark.py measures them)"
          + ("; T5-XXL, CLIP and the VAE take 9.3 GiB more, with a cache on the first process only" if plan.text == "flux" else ""))  # fmt: skip
    print(f"each saved state: {4 * 4 * parameters / 2**30:.2f} GiB on disk; {args.keep} are kept"
          + (f", and one every {args.milestone_every:,} iterations" if args.milestone_every else ""))  # fmt: skip
    for name in plan.data:
        if name not in data.SETS and not Path(name).is_dir():
            raise data.DataError(f"no such folder: {name}")
        tars, cached = sorted(Path(name).glob("*.tar")), list(Path(name).glob("*x*_*.safetensors"))
        if tars:
            print(f"{name}: {len(tars)} shards, {sum(tar.stat().st_size for tar in tars) / 2**30:.2f} GiB; python engine/shards.py report {name} says more")
        elif cached:
            print(f"{name}: {len(cached)} cached shards, {sum(file.stat().st_size for file in cached) / 2**30:.2f} GiB")
    for line in recipe.price(sizes, plan, args.objective, factor, start):
        print(line)


# ---------------------------------------------------------------------------------------------------------------------
# What a run needs
# ---------------------------------------------------------------------------------------------------------------------
def plan_of(args) -> recipe.Recipe:
    """The recipe of --size with what the flags change."""
    fields = ("steps", "batch_size", "lr", "side", "text", "txt_len", "autoencoder", "micro_batch", "wrong_captions")
    changes = {name: getattr(args, name) for name in fields} | {"group": OBJECTIVES[args.objective].group}
    aux_from = args.aux_from if args.objective == "self_e" else 1.0  # the others have no auxiliary term
    return recipe.make(args.size, data=args.data and tuple(args.data), aux_from=aux_from, **changes)


def open_encoders(args, plan: recipe.Recipe, device: torch.device, chief: bool):
    """(text encoder, auto-encoder, the entries of model.SIZES that they settle, factor); both None where a cache serves."""
    cached = all(map(cache.is_cache, plan.data))
    text = autoencoder = None
    if not cached or (chief and args.grid_every != 0):  # with a cache they only draw pictures
        text = encoders.text_encoder(plan.text, plan.txt_len, device)
        autoencoder = encoders.autoencoder(plan.autoencoder, device)
    if cached:
        return text, autoencoder, *cache.cached_sizes(Path(plan.data[0]))
    sizes = {"channels": autoencoder.channels, "txt_dim": text.d_txt, "vec_dim": text.d_vec}
    return text, autoencoder, sizes, autoencoder.factor


def gather(world: int, what) -> list:
    """`what` of every process, in the order of their ranks; all must call it together."""
    everyone = [what] * world
    if world > 1:
        dist.all_gather_object(everyone, what)
    return everyone


def agree(world: int, what: dict) -> None:
    """Raise UserError unless all processes say the same: one that resumed elsewhere would drift apart unnoticed."""
    everyone = gather(world, what)
    for rank, other in enumerate(everyone):
        for name in what:
            if other[name] != everyone[0][name]:
                raise errors.UserError(f"process {rank} has {name} {other[name]}, process 0 has {everyone[0][name]}: do all of them see "
                                       "the same --out and --data, and the same code?")  # fmt: skip


@contextlib.contextmanager
def chief_first(world: int, chief: bool):
    """The first process goes through the block before all others: it makes the index of tar shards, they find it made."""
    if world > 1 and not chief:
        dist.barrier()
    yield
    if world > 1 and chief:
        dist.barrier()


def pick_precision(args, run: Path, device: torch.device, world: int) -> torch.dtype:
    """What --precision says; "auto" is measured once, by the first process, and kept when the run is resumed."""
    if args.precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    if args.resume:
        return getattr(torch, checkpoint.read_json(run / "config.json")["precision"])
    chosen = [machine.pick_precision(device)]
    if world > 1:
        dist.broadcast_object_list(chosen, src=0)
    return chosen[0]


def begin_from(folder: Path, network: model.Denoiser, plan: recipe.Recipe) -> None:
    """Load the EMA weights of another run into a new network. Raises UserError when they belong to another model or encoder."""
    config = checkpoint.read_json(folder / "config.json")
    for name in ("text_encoder", "autoencoder"):
        own = encoders.canonical(plan.text if name == "text_encoder" else plan.autoencoder)
        if not isinstance(config, dict) or config.get(name) != own:
            raise errors.UserError(f"--init {folder}: it was trained with another {name} than {own}; begin without --init, or choose that one")
    checkpoint.load_weights(folder / "model.safetensors", network)


def check_resume(run: Path, state: dict, args, plan: recipe.Recipe, feed: Feed) -> None:
    """Raise UserError when what the sequence of samples follows from is not what it was."""
    if state["seed"] != args.seed:
        raise errors.UserError(f"{run} was begun with --seed {state['seed']}; another seed would be another sequence of samples")
    if state["step"] > plan.steps:
        raise errors.UserError(f"{run} is at iteration {state['step']} already, past --steps {plan.steps}")
    if len(plan.stages) > 1 and state.get("steps", plan.steps) != plan.steps:
        raise errors.UserError(f"{run} was begun with --steps {state['steps']}; other steps would move its stages")
    for number, now in feed.fingerprints().items():
        if "data" in state and state["data"].get(number) != now:
            raise errors.UserError(f"{run} was begun with other data, another --side or another --batch-size: the samples would not be the next ones. "
                                   "Restore them, or begin a new run")  # fmt: skip


def compile_blocks(args, networks: list[model.Denoiser], buckets: int, device: torch.device) -> str:
    """torch.compile the blocks of the networks where it works and pays; returns what was done, in words."""
    if args.compile is False:
        return "eager (--no-compile)"
    if args.compile is None and device.type == "cpu" and buckets > 4:
        return f"eager ({buckets} picture sizes: compiling would take longer than it saves)"
    works, why_not = machine.compile_works(device)
    if not works:
        return f"eager ({why_not})"
    machine.allow_shapes(8 * buckets)  # with and without gradient, whole and half batches
    torch._dynamo.config.optimize_ddp = False  # or DDP cuts each block at its 25 MiB buckets; blocks overlap well enough
    for network in networks:
        network.compile_blocks()
    return "compiled, which takes a minute or two the first time"


def rehearse(objective, network: torch.nn.Module, adam, plan: recipe.Recipe, feed: Feed, sizes: dict, zero: bool) -> None:
    """The forward and backward pass of every stage to come, at its largest pictures and with the auxiliary term if it has it.

    Before the first iteration of a run on a GPU: what does not fit into its memory fails now, not after days. Nothing is
    learned from it. Raises UserError with what to do.
    """
    begins, moments = plan.begins(), None
    if not getattr(adam, "optim", adam).state:  # those of a new run come with its first update; hold their place
        parameters = sum(p.numel() for p in network.parameters())
        moments = torch.empty(2 * parameters // (feed.world if zero else 1), device=feed.device)
    for number in feed.sources:
        stage, aux = plan.stages[number], plan.aux(begins[number + 1] - 1)
        for side in stage.sides:
            B = plan.micro_batch_of(stage, side, feed.world)
            shape = (sizes["channels"], side // feed.factor, side // feed.factor)
            x0 = torch.zeros(B, *shape, device=feed.device)
            c = torch.zeros(B, plan.txt_len, sizes["txt_dim"], device=feed.device), torch.zeros(B, sizes["vec_dim"], device=feed.device)
            draws = feed.draw(0, 0, list(range(B)), shape, device=feed.device)
            try:
                objective(x0, c, c, c, torch.zeros(B, dtype=torch.bool, device=feed.device), draws, 1.0, aux)[0].backward()
            except torch.OutOfMemoryError as error:
                raise errors.UserError(f"{B} pictures of {side} x {side}{' with the auxiliary term' if aux else ''} do not fit into the "
                                       f"device's memory: a smaller --micro-batch, --recompute N or --zero ({str(error).splitlines()[0]})") from error  # fmt: skip
            network.zero_grad(set_to_none=True)
    del moments


def config_of(args, plan: recipe.Recipe, sizes: dict, precision: torch.dtype, device: torch.device) -> dict:
    """What config.json says of a run, but for the size of its pictures."""
    return {
        "format": 1, "size": args.size, "model": sizes, "objective": args.objective, "target": args.target,
        "delta_scale": args.delta_scale, "null_branch": args.null_branch, "aux_from": plan.aux_from, "text_encoder": encoders.canonical(plan.text),
        "txt_len": plan.txt_len, "autoencoder": encoders.canonical(plan.autoencoder), "data": list(plan.data), "wrong_captions": plan.wrong_captions,
        "s_rule": 1.0 if args.objective == "flow_matching" else 0.0, "eta": 1.0,  # S.3.1
        "guidance": plan.guidance, "guidance_space": "v",
        "steps": plan.steps, "batch_size": plan.stages[0].batch_size, "lr": plan.lr, "seed": args.seed, "optimizer": args.optimizer,
        "precision": str(precision).removeprefix("torch."), "machine": machine.describe(device),
        "command": " ".join(["python train.py", *sys.argv[1:]]),
        "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device", "dry_run")},
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# One iteration in its parts: the gradient, what all processes decide together, the update, the state
# ---------------------------------------------------------------------------------------------------------------------
def accumulate(step_module, objective, stream, count: int, tau: float, aux: bool, patch: int, flops: Callable[[int], float],
               meter: monitor.Meter) -> tuple[torch.Tensor, list[str]]:  # fmt: skip
    """Leave the gradient of the mean loss over the stream's next `count` micro-batches in the network, over all processes.

    step_module is the objective, or DDP around it; flops says what a picture of so many tokens costs. Returns this process's mean
    loss and the names of its samples.
    """
    total, keys = 0.0, []
    for m in range(count):
        batch = next(stream)
        tokens = batch.x0.shape[2] * batch.x0.shape[3] // patch**2
        if isinstance(objective, losses.SelfE):
            objective.mu = losses.mu_of_length(tokens)  # s.12: by the size of these pictures
        # What DDP's no_sync() sets: gradients are reduced once an iteration. (Under static_graph no_sync would lose them.)
        step_module.require_backward_grad_sync = m == count - 1
        loss, stats = step_module(batch.x0, batch.c, batch.null, batch.fake, batch.is_null, batch.draws, tau, aux)
        (loss / count).backward()
        total = total + loss.detach() / count
        keys += batch.keys
        meter.add(stats, flops(tokens) * len(batch.keys))
    return total, keys


def anywhere(world: int, *flags: torch.Tensor) -> list[bool]:
    """Whether each flag is set on any process: all of them must skip, stop and save alike, so all must call it together."""
    told = torch.stack([flag.float() for flag in flags])
    if world > 1:
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in told.tolist()]


def update(adam: torch.optim.Optimizer, ema: torch.nn.Module, network: torch.nn.Module, rate: float, decay: float) -> None:
    """One step of Adam at a learning rate, and of the average, ema <- decay ema + (1 - decay) network, in place."""
    for group in adam.param_groups:
        group["lr"] = rate
    adam.step()
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(network.parameters()), 0)  # the 0 is not used


def save(run: Path, step: int, network, ema, adam, config: dict, state: dict, args, world: int, chief: bool) -> None:
    """The first process writes the state; nobody leaves before it is on the disk, because a launcher may end the others with
    the first that ends."""
    if args.zero and world > 1:
        adam.consolidate_state_dict(to=0)
    if chief:
        checkpoint.save_state(run, step, network, ema, adam.state_dict(), config, state, args.keep, args.milestone_every)
    if world > 1:
        dist.barrier()


def report_nonfinite(log, step: int, loss: float, norm: float, keys: list[str], world: int, in_a_row: int, run: Path) -> str:
    """Say which samples led to a loss or gradient that is not finite; why to stop, where that has happened too often in a row.

    The samples of the processes whose own loss is not finite, or of all where only the gradient is not.
    """
    everyone = gather(world, (math.isfinite(loss), keys))
    suspects = [key for finite, keys in everyone if not finite for key in keys] or [key for _, keys in everyone for key in keys]
    if log:
        log.write({"step": step + 1, "update_left_out": True, "grad_norm": str(norm), "keys": suspects})
        print(f"iteration {step + 1}: no finite gradient (loss {loss}, norm {norm}); its update is left out", file=sys.stderr)
    if in_a_row < PATIENCE:
        return ""
    return (f"no finite gradient in {in_a_row} iterations in a row, last with {', '.join(suspects[:8])}"
            f"{' ...' if len(suspects) > 8 else ''} (all are in {run / 'metrics.jsonl'}); the weights from before them are saved. "
            "--resume goes on behind them, with a lower --lr if need be; without these samples it would be a new run")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
def train(args, plan: recipe.Recipe, run: Path, device: torch.device, world: int, rank: int, closing: contextlib.ExitStack) -> None:
    """One process's part of a run, from its first iteration, or its last state, to its end.

    `closing` closes threads, files and the progress bar, after an error too.
    """
    chief = rank == 0
    states = checkpoint.complete_states(run) if args.resume else []
    start = checkpoint.step_of(states[-1]) if states else 0

    # Frozen encoders and data.
    text, autoencoder, own_sizes, factor = open_encoders(args, plan, device, chief)
    sizes = model.SIZES[args.size] | own_sizes
    with chief_first(world, chief):
        feed = Feed(plan, OBJECTIVES[args.objective].draw, args.seed, text, autoencoder, device, patch=sizes["patch"],
                    channels=sizes["channels"], factor=factor, world=world, rank=rank, start=start, workers=args.workers,
                    index=args.index)  # fmt: skip
    precision = pick_precision(args, run, device, world)
    flags = {"--" + k.replace("_", "-"): v for k, v in vars(args).items() if k not in ("data", "index", "workers", "device")}
    agree(world, {"iteration": start, "recipe": plan, "precision": precision, "data": feed.fingerprints()} | flags)

    # The network, its average, the objective that holds both, Adam.
    torch.manual_seed(args.seed)
    network = model.Denoiser(**sizes, precision=precision).to(device)
    network.recompute = args.recompute
    if args.init and not args.resume:
        begin_from(Path(args.init), network, plan)
    ema = copy.deepcopy(network).requires_grad_(False)
    objective = OBJECTIVES[args.objective].build(network, ema, args)
    adam = optimizers.build(args.optimizer, network, plan.lr, plan.betas, args.zero and world > 1)

    # The run's folder, and where a stopped run was.
    config = config_of(args, plan, sizes, precision, device)
    if chief:
        (run / "grids").mkdir(parents=True, exist_ok=True)
        closing.enter_context(checkpoint.locked(run))
    elapsed_before, nonfinite = 0.0, 0
    if args.resume:
        state = checkpoint.load_state(states[-1], network, ema, adam)
        check_resume(run, state, args, plan, feed)
        elapsed_before, nonfinite = state["elapsed"], state.get("nonfinite", 0)
    if chief:
        checkpoint.cut_metrics(run / "metrics.jsonl", start)
        if args.resume:
            checkpoint.publish(run, states[-1])  # a process killed while it saved may not have got so far
    if device.type == "cuda":
        rehearse(objective, network, adam, plan, feed, sizes, args.zero and world > 1)
    step_module = DistributedDataParallel(objective, gradient_as_bucket_view=True) if world > 1 else objective
    if chief:
        print_plan(args, plan, sizes, factor, world, start)
        print(f"  on {config['machine']}, in {config['precision']}", flush=True)

    # What watches it.
    stop = StopSignal()
    grid_every = args.grid_every if args.grid_every is not None else max(1, plan.steps // 10)
    save_every = args.save_every if args.save_every is not None else max(1, plan.steps // 5)
    prompts = grid_prompts(feed.source(start)) if chief else []
    meter, peak = monitor.Meter(device), machine.peak_flops(device, precision)
    log = monitor.Log(run, start) if chief else None
    bar = tqdm(total=plan.steps, initial=start, disable=not chief, unit="it", dynamic_ncols=True, smoothing=0.05,
               mininterval=0.5 if sys.stderr.isatty() else 30)  # a log file of days stays readable
    stream = feed.stream(start)
    for close in (stream.close, bar.close, *([log.close] if log else [])):
        closing.callback(close)
    began, step, stopping = time.perf_counter(), start, False
    in_a_row, failure, saved_at, skipped = 0, "", time.perf_counter(), feed.skipped()

    # Iterate. One iteration: the gradient of the global batch, an update, the average.
    while step < plan.steps and not stopping:
        if step == start or step in plan.begins():  # a new stage: checkpoints from now on make pictures of its size
            side = max(plan.stage(step).sides)
            config |= {"side": side, "mu": losses.mu_of_length(recipe.image_tokens(sizes, side, factor))}
            if chief:
                checkpoint.write_json(run / "config.json", config)
        stop.hold(True)
        # The first iterations run as they are: they end in a first picture grid before the compiler takes its minute or two.
        if step == max(start, EAGER_STEPS):
            how = compile_blocks(args, [network, ema], sum(len(source.buckets) for source in feed.sources.values()), device)
            if chief:
                bar.write(f"  from iteration {step} on {how}", file=sys.stderr)
        rate, tau, aux = plan.learning_rate(step), plan.tau(step), plan.aux(step)
        forwards = recipe.FORWARDS["aux" if aux else args.objective]
        loss, keys = accumulate(step_module, objective, stream, len(feed.indices(step)), tau, aux, sizes["patch"],
                                lambda tokens: forwards * model.forward_flops(sizes, tokens, plan.txt_len), meter)  # fmt: skip
        stop.hold(False)
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), plan.clip)

        # No update from a loss or gradient that is not finite, on any process.
        due = args.save_every is None and time.perf_counter() - saved_at > SAVE_SECONDS
        bad, stopping, due = anywhere(world, ~torch.isfinite(loss) | ~torch.isfinite(norm), *torch.tensor([bool(stop), due], device=device))
        if bad:
            nonfinite, in_a_row = nonfinite + 1, in_a_row + 1
            meter.drop()
            failure = report_nonfinite(log, step, loss.item(), norm.item(), keys, world, in_a_row, run)
            stopping = stopping or bool(failure)
        else:
            in_a_row = 0
            meter.keep(norm)
            update(adam, ema, network, rate, decay=min(plan.ema, (1 + step) / (10 + step)))
        adam.zero_grad(set_to_none=False)
        step += 1
        bar.update()

        # Tell, draw, save.
        if step % args.log_every == 0 or step == plan.steps:
            record = meter.record(world, peak, feed.waited)
            skipped = skipped.union(*gather(world, feed.skipped() - skipped))
            if chief and record:
                record["skipped"] = len(skipped)
                record["images_per_s"] = record["iterations_per_s"] * plan.stage(step - 1).batch_size
                log.write({"step": step, **record, "lr": rate, "tau": tau, "aux": aux, "nonfinite": nonfinite,
                           "elapsed": elapsed_before + time.perf_counter() - began})  # fmt: skip
                bar.set_postfix_str(f"loss {record['loss']:.4f}, {record['images_per_s']:.0f} images/s")
        early = step == min(EAGER_STEPS, plan.steps)
        if chief and grid_every and (step % grid_every == 0 or step == plan.steps or early) and not stopping:
            pause = time.perf_counter()
            try:
                with torch.compiler.set_stance("force_eager"):  # sampling's batch shapes are not worth compiling for
                    sheet = draw_grid(sample.Loaded(ema, config, text, autoencoder), prompts, lambda: bool(stop))
                sheet.save(run / "grids" / f"step_{step:06d}.png")
                log.grid(sheet, step)
            except sample.Stopped:
                pass  # the run is about to end; its grid can be drawn again
            meter.began += time.perf_counter() - pause
        stopping = stopping or (world == 1 and bool(stop))  # several processes agree on it in the next iteration
        if stopping or due or step == plan.steps or any(every and step % every == 0 for every in (save_every, args.milestone_every)):
            state = {"step": step, "elapsed": elapsed_before + time.perf_counter() - began, "seed": args.seed, "steps": plan.steps,
                     "data": feed.fingerprints(), "nonfinite": nonfinite}  # fmt: skip
            save(run, step, network, ema, adam, config, state, args, world, chief)
            saved_at = time.perf_counter()

    bar.close()
    if failure:
        raise errors.UserError(failure)
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else "python"
    if chief and step < plan.steps:
        print(f"stopped by {stop.name or 'a signal to another process'} after iteration {step}; the state is saved. To go on:\n"
              f"  {python} train.py --resume --out {shlex.quote(str(run))}")  # fmt: skip
    elif chief:
        shown = f'"{prompts[0]}"' if re.fullmatch(r"[\w ,.'-]*", prompts[0]) else shlex.quote(prompts[0])  # what the shell would read
        print(f"done: {run}. To make pictures:\n  {python} sample.py --checkpoint {shlex.quote(str(run))} --steps 1 2 4 8 50 --prompt {shown}")


def main() -> None:
    args = parse_arguments()
    machine.keep_freed_memory()
    plan, run = plan_of(args), Path(args.out)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    plan.check_division(world, args.micro_batch)
    states = checkpoint.complete_states(run)
    if args.resume and not states:
        raise checkpoint.CheckpointError(f"nothing to resume: {run / 'state'} holds no complete state")
    if not plan.data and not args.dry_run:
        raise errors.UserError(f"--size {args.size} needs --data: a folder of tar shards, or caches of them (LONG_RUN.md)")
    if args.dry_run:
        if rank == 0:
            dry_run(args, plan, world, checkpoint.step_of(states[-1]) if args.resume else 0)
        return
    if not args.resume and (states or (run / "model.safetensors").exists()):
        raise errors.UserError(f"{run} already holds a run; add --resume to go on, or choose another --out")
    device = machine.pick_device(args.device)
    if world > 1 and device.type == "mps":
        raise errors.UserError("several processes can not share an Apple GPU: one process, or --device cpu")
    with contextlib.ExitStack() as closing:
        if world > 1:
            # Saving the state and drawing pictures keep the other processes waiting; an hour is longer than either.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
            # Not after an error: the other processes may be waiting in a reduction, and so would this.
            closing.push(lambda kind, *_: None if kind else dist.destroy_process_group())
        train(args, plan, run, device, world, rank, closing)


if __name__ == "__main__":
    errors.run(main, "stopped; what was saved before is whole, and --resume goes on from it")
