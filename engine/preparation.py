"""A run made ready: everything between the flags of train.py and its first iteration.

    run = preparation.prepare(args, plan, folder, device, ranks, closing)
    run.network, run.ema, run.objective, run.adam             # what learns
    run.stream                                                # the micro-batches from iteration run.start on
    run.compile(), run.save(step)                             # on the way

Frozen encoders, data, precision, what processes agree on, resuming, the rehearsal on a GPU.
"""

import argparse
import contextlib
import copy
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import encoders
import losses
import model
import objectives
import recipe
from engine import arguments, checkpoint, errors, limits, machine, optimizers
from engine import plan as printed
from engine.feed import Batch, Codec, Feed, Reading
from engine.processes import Ranks, StopSignal
from objectives import OBJECTIVES
from scale import cache


@dataclass
class Run:
    """One process's part of a run."""

    args: argparse.Namespace
    plan: recipe.Recipe
    folder: Path
    ranks: Ranks
    codec: Codec  # the frozen encoders and the device
    sizes: dict  # the entries of model.SIZES, as the encoders settle them
    feed: Feed
    network: model.Denoiser  # trained
    ema: model.Denoiser  # its moving average
    objective: torch.nn.Module  # holds both; called like losses.SelfE
    adam: torch.optim.Optimizer
    config: dict  # what config.json says
    start: int  # the first iteration
    step_module: torch.nn.Module = None  # the objective, or DDP around it
    stream: Iterator[Batch] = None
    stop: StopSignal = None
    elapsed_before: float = 0.0  # seconds, before the last stop
    nonfinite: int = 0  # updates left out so far
    began: float = 0.0
    saved_at: float = 0.0

    @property
    def device(self) -> torch.device:
        return self.codec.device

    @property
    def grid_every(self) -> int:
        """Iterations between picture grids; 0 is never."""
        return max(1, self.plan.steps // 10) if self.args.grid_every is None else self.args.grid_every

    @property
    def save_every(self) -> int:
        """Iterations between states; 0 is only at the end."""
        return max(1, self.plan.steps // 5) if self.args.save_every is None else self.args.save_every

    def elapsed(self) -> float:
        return self.elapsed_before + time.perf_counter() - self.began

    def begin_stage(self, step: int) -> None:
        """Checkpoints make pictures of the resolution of the stage that iteration `step` begins, if it does."""
        if step == self.start or step in self.plan.begins():
            side = max(self.plan.stage(step).sides)
            tokens = recipe.image_tokens(self.sizes, side, self.codec.factor)
            buckets = [[*sides, share] for sides, share in self.feed.buckets(step).items()]
            self.config |= {"side": side, "mu": losses.mu_of_length(tokens), "buckets": buckets}
            if self.ranks.is_first:
                checkpoint.write_json(self.folder / "config.json", self.config)

    def compile(self) -> str:
        """torch.compile the blocks of both networks where it works and pays; returns what was done, in words."""
        buckets = sum(len(source.buckets) for source in self.feed.sources.values())
        if self.args.compile is False:
            return "eager (--no-compile)"
        if self.args.compile is None and self.device.type == "cpu" and buckets > 4:
            return f"eager ({buckets} picture sizes: compiling would take longer than it saves)"
        works, why_not = machine.compile_works(self.device)
        if not works:
            return f"eager ({why_not})"
        machine.allow_shapes(8 * buckets)  # with and without gradient, whole and half batches
        torch._dynamo.config.optimize_ddp = False  # or DDP cuts each block at its 25 MiB buckets
        self.network.compile_blocks()
        self.ema.compile_blocks()
        return "compiled, which takes a minute or two the first time"

    def save(self, step: int) -> None:
        """Rank 0 writes the state; nobody leaves before it is on the disk, because a launcher may end the others with
        the first that ends."""
        if self.args.zero and self.ranks.world > 1:
            self.adam.consolidate_state_dict(to=0)
        if self.ranks.is_first:
            state = {
                "step": step,
                "elapsed": self.elapsed(),
                "seed": self.args.seed,
                "steps": self.plan.steps,
                "data": self.feed.fingerprints(),
                "nonfinite": self.nonfinite,
            }
            checkpoint.save_state(
                self.folder,
                step,
                (self.network, self.ema),
                self.adam.state_dict(),
                {"config": self.config, "state": state},
                self.args.keep,
                self.args.milestone_every,
            )
        self.ranks.barrier()
        self.saved_at = time.perf_counter()

    def command(self, program: str) -> str:
        """How to call a program on this run's folder, to be pasted into a shell."""
        inside = Path(sys.executable).is_relative_to(Path.cwd())
        python = os.path.relpath(sys.executable) if inside else "python"
        folder = str(self.folder)
        return f"{python} {program} {shlex.quote('./' + folder if folder.startswith('-') else folder)}"


# ------------------------------------------------------------------------------------------------------------
# Making one ready
# ------------------------------------------------------------------------------------------------------------
def prepare(
    args: argparse.Namespace,
    plan: recipe.Recipe,
    folder: Path,
    device: torch.device,
    ranks: Ranks,
    closing: contextlib.ExitStack,
) -> Run:
    """Everything that a run needs. `closing` closes threads and files, after an error too. Raises UserError."""
    states = checkpoint.complete_states(folder) if args.resume else []
    start = checkpoint.step_of(states[-1]) if states else 0
    codec, sizes = open_encoders(
        plan, arguments.sizes_of(args), device, ranks.is_first and args.grid_every != 0
    )
    with ranks.first_alone():
        feed = Feed(
            plan,
            OBJECTIVES[args.objective].draw,
            args.seed,
            codec,
            ranks,
            start,
            Reading(args.workers, args.index, args.caption_key),
        )
    precision = pick_precision(args, folder, device, ranks)
    flags = {
        "--" + k.replace("_", "-"): v
        for k, v in vars(args).items()
        if k not in ("data", "index", "workers", "device")
    }
    ranks.agree(
        {"iteration": start, "recipe": plan, "precision": precision, "data": feed.fingerprints()} | flags
    )

    torch.manual_seed(args.seed)
    network = model.Denoiser(**sizes, precision=precision).to(device)
    network.recompute = args.recompute
    if args.init and not args.resume:
        begin_from(Path(args.init), network, plan)
    ema = copy.deepcopy(network).requires_grad_(False)
    run = Run(
        args,
        plan,
        folder,
        ranks,
        codec,
        sizes,
        feed,
        network,
        ema,
        OBJECTIVES[args.objective].build(network, ema, args),
        optimizers.build(plan.optimizer, network, plan.lr, plan.betas, args.zero and ranks.world > 1),
        arguments.config_of(args, plan, sizes, precision, device),
        start,
    )
    take_place(run, states, closing)
    if device.type == "cuda":
        rehearse(run)
    run.step_module = run.objective
    if ranks.world > 1:
        run.step_module = DistributedDataParallel(run.objective, gradient_as_bucket_view=True)
    if ranks.is_first:
        printed.tell(args, plan, sizes, codec.factor, ranks.world, start)
        for line in feed.tell():
            print("  " + line)
        print(f"  on {run.config['machine']}, in {run.config['precision']}", flush=True)
    run.stop = StopSignal()
    run.stream = feed.stream(start)
    closing.callback(run.stream.close)
    run.began = run.saved_at = time.perf_counter()
    return run


def open_encoders(plan: recipe.Recipe, size: dict, device: torch.device, draws: bool) -> tuple[Codec, dict]:
    """The frozen encoders, and the entries of model.SIZES as they settle them.

    Where caches serve, the encoders are None unless this process draws pictures.
    """
    cached = all(map(cache.is_cache, plan.data))
    text = autoencoder = None
    if not cached or draws:
        text = encoders.text_encoder(plan.text, plan.txt_len, device)
        autoencoder = encoders.autoencoder(plan.autoencoder, device)
    if cached:
        own, factor = cache.cached_sizes(Path(plan.data[0]))
    else:
        own = {"channels": autoencoder.channels, "txt_dim": text.d_txt, "vec_dim": text.d_vec}
        factor = autoencoder.factor
    sizes = size | own
    return Codec(text, autoencoder, device, sizes["patch"], sizes["channels"], factor), sizes


def pick_precision(args: argparse.Namespace, folder: Path, device: torch.device, ranks: Ranks) -> torch.dtype:
    """What --precision says; "auto" is measured once, by rank 0, and kept when the run is resumed.

    It is fp32 where the objective takes a finite difference, which bf16 would drown in rounding.
    """
    if args.precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    if args.resume:
        return getattr(torch, limits.config(folder)["precision"])
    if objectives.OBJECTIVES[args.objective].derives and args.derivative == "difference":
        return torch.float32
    return ranks.choose(lambda: machine.pick_precision(device))


def begin_from(folder: Path, network: model.Denoiser, plan: recipe.Recipe) -> None:
    """Load another run's moving average into a new network. Raises UserError for one of another model or encoder."""
    config = limits.config(folder)
    for name, spec in (("text_encoder", plan.text), ("autoencoder", plan.autoencoder)):
        own = encoders.canonical(spec)
        if config[name] != own:
            raise errors.UserError(
                f"--init {folder}: it was trained with another {name} than {own}: "
                "begin without --init, or choose that one"
            )
    # What the shapes of weights do not show: how heads see places, and the scale of times (objectives.py).
    axes, factor = config["model"]["axes"], config["model"].get("time_factor", 1000)
    if (tuple(axes), factor) != (network.axes, network.time_factor):
        raise errors.UserError(
            f"--init {folder}: it was trained with axes {axes} and time factor {factor:g}, and this "
            f"model has {list(network.axes)} and {network.time_factor:g}: begin without --init, or "
            "with a run of the same kind of objective"
        )
    checkpoint.load_weights(folder / "model.safetensors", network)


def take_place(run: Run, states: list[Path], closing: contextlib.ExitStack) -> None:
    """The run's folder, nobody else's while it trains, and the place where a stopped run was."""
    if run.ranks.is_first:
        (run.folder / "grids").mkdir(parents=True, exist_ok=True)
        closing.enter_context(checkpoint.locked(run.folder))
        found = checkpoint.complete_states(run.folder)  # again: reading the data may have taken long
        if found != states or not run.args.resume and (run.folder / "model.safetensors").exists():
            raise errors.UserError(
                f"another process has trained in {run.folder} meanwhile: choose another --out"
            )
    if run.args.resume:
        load_last(run, states)
    if run.ranks.is_first:
        checkpoint.cut_metrics(run.folder / "metrics.jsonl", run.start)
        if run.args.resume:
            checkpoint.publish(
                run.folder, states[-1]
            )  # a process killed while it saved may not have got so far


def load_last(run: Run, states: list[Path]) -> None:
    """The newest state. Raises CheckpointError for a damaged one, with what to do: older ones are not taken unasked."""
    try:
        state = limits.state(states[-1])
        check_resume(run, state)
        checkpoint.load_state(states[-1], run.network, run.ema, run.adam)
    except (checkpoint.CheckpointError, OSError) as error:
        older = (
            f"delete {states[-1]} to go on from {states[-2].name}"
            if len(states) > 1
            else "there is no older one"
        )
        raise checkpoint.CheckpointError(f"{error}; {older}") from error
    run.elapsed_before, run.nonfinite = state["elapsed"], state.get("nonfinite", 0)


def check_resume(run: Run, state: dict) -> None:
    """Raise UserError when what the sequence of samples follows from is not what it was."""
    folder, plan = run.folder, run.plan
    if state["seed"] != run.args.seed:
        raise errors.UserError(
            f"{folder} was begun with --seed {state['seed']}; "
            "another seed would be another sequence of samples"
        )
    if state["step"] > plan.steps:
        raise errors.UserError(f"{folder} is at iteration {state['step']} already, past --steps {plan.steps}")
    if len(plan.stages) > 1 and state.get("steps", plan.steps) != plan.steps:
        raise errors.UserError(
            f"{folder} was begun with --steps {state['steps']}; other steps would move its stages"
        )
    for number, now in run.feed.fingerprints().items():
        if "data" in state and state["data"].get(number) != now:
            raise errors.UserError(
                f"{folder} was begun with other data, another --side or another --batch-size: the "
                "samples would not be the next ones. Restore them, or begin a new run"
            )


def rehearse(run: Run) -> None:
    """The forward and backward pass of every stage to come, at its largest pictures, with the auxiliary term if it has
    it.

    Before the first iteration of a run on a GPU: what does not fit into its memory fails now, not after days. Nothing
    is learned from it. Raises UserError with what to do.
    """
    plan, feed, network = run.plan, run.feed, run.network
    zero = run.args.zero and run.ranks.world > 1
    begins, moments = plan.begins(), None
    # Those of a new run come with its first update; hold their place
    if not getattr(run.adam, "optim", run.adam).state:
        numbers = optimizers.moments(plan.optimizer, network)
        moments = torch.empty(numbers // (run.ranks.world if zero else 1), device=feed.codec.device)
    for number in feed.sources:
        stage, aux = plan.stages[number], plan.aux(begins[number + 1] - 1)
        for side in stage.sides:
            B = plan.micro_batch_of(stage, side, run.ranks.world)
            shape = (run.sizes["channels"], side // feed.codec.factor, side // feed.codec.factor)
            x0 = torch.zeros(B, *shape, device=feed.codec.device)
            c = (
                torch.zeros(B, plan.txt_len, run.sizes["txt_dim"], device=feed.codec.device),
                torch.zeros(B, run.sizes["vec_dim"], device=feed.codec.device),
            )
            draws = feed.draw(0, 0, list(range(B)), shape, device=feed.codec.device)
            no_null = torch.zeros(B, dtype=torch.bool, device=feed.codec.device)
            try:
                run.objective(x0, c, c, c, no_null, draws, 1.0, 0.0, aux)[0].backward()
            except torch.OutOfMemoryError as error:
                term = " with the auxiliary term" if aux else ""
                raise errors.UserError(
                    f"{B} pictures of {side} x {side}{term} do not fit into the device's memory: a smaller "
                    f"--micro-batch, --recompute N or --zero ({str(error).splitlines()[0]})"
                ) from error
            network.zero_grad(set_to_none=True)
    del moments
