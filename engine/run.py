"""What is fixed for a whole run, and what follows from it: for the loop of train.py, and for what it reports and saves."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import losses
import model
import recipe
from engine import errors, machine, optimizers
from engine.feed import Codec, Feed
from engine.processes import Ranks, StopSignal


class Run(NamedTuple):
    """One process's part of a run; what learns is train.py's."""

    args: argparse.Namespace
    plan: recipe.Recipe
    folder: Path
    ranks: Ranks
    codec: Codec  # the frozen encoders and the device
    feed: Feed
    config: dict  # what config.json says
    start: int  # the first iteration
    stop: StopSignal

    @property
    def grid_every(self) -> int:
        """Iterations between picture grids; 0 is never."""
        return max(1, self.plan.steps // 10) if self.args.grid_every is None else self.args.grid_every

    @property
    def save_every(self) -> int:
        """Iterations between states; 0 is only at the end."""
        return max(1, self.plan.steps // 5) if self.args.save_every is None else self.args.save_every

    def what_all_must_share(self) -> dict:
        """What every process must have found alike."""
        apart = ("data", "index", "workers", "device")
        flags = {name: value for name, value in vars(self.args).items() if name not in apart}
        found = {"iteration": self.start, "recipe": self.plan, "data": self.feed.fingerprints()}
        return flags | found | {"precision": self.config["precision"]}

    def continuity(self) -> dict:
        """What the next samples follow from: a run that is resumed must find it unchanged."""
        fixed = {"seed": self.args.seed, "data": self.feed.fingerprints()}
        fixed |= {name: self.config[name] for name in ("objective", "model")}
        if len(self.plan.stages) > 1:  # the number of iterations moves them
            fixed["steps"] = self.plan.steps
        return fixed

    def pictures_of_stage(self, step: int) -> dict:
        """What config.json says of the pictures that a checkpoint draws from iteration `step` on: the stage's largest."""
        side = max(self.plan.stage(step).sides)
        tokens = (side // (self.codec.factor * self.codec.patch)) ** 2
        buckets = [[*sides, share] for sides, share in self.feed.buckets(step).items()]
        return {"side": side, "mu": losses.mu_of_length(tokens), "buckets": buckets}

    def compile(self, network: model.Denoiser, ema: model.Denoiser) -> str:
        """torch.compile the blocks of both networks where it works and pays; returns what was done, in words."""
        if self.args.compile is False:
            return "eager (--no-compile)"
        buckets = sum(len(part.buckets) for part in self.feed.parts())
        if self.args.compile is None and self.codec.device.type == "cpu" and buckets > 4:
            return f"eager ({buckets} picture sizes: compiling would take longer than it saves)"
        works, why_not = machine.compile_works(self.codec.device)
        if not works:
            return f"eager ({why_not})"
        machine.allow_shapes(8 * buckets)  # with and without gradient, whole and half batches
        torch._dynamo.config.optimize_ddp = False  # or DDP cuts each block at its 25 MiB buckets
        network.compile_blocks()
        ema.compile_blocks()
        return "compiled, which takes a minute or two the first time"

    def command(self, program: str) -> str:
        """How to call a program on this run's folder, to be pasted into a shell."""
        inside = Path(sys.executable).is_relative_to(Path.cwd())
        python = os.path.relpath(sys.executable) if inside else "python"
        return f"{python} {program} {shlex.quote(str(self.folder))}"


def made_up_batch(network: model.Denoiser, shape: tuple[int, ...], txt_len: int) -> tuple:
    """x0 of this shape, c, null, fake and is_null as an objective takes them: noise for pictures and prompts."""
    B, widths = shape[0], (network.txt_in.in_features, network.vector_in.in_layer.in_features)
    with network.txt_in.weight.device:
        prompts = [(torch.randn(B, txt_len, widths[0]), torch.randn(B, widths[1])) for _ in range(3)]
        return torch.randn(shape), *prompts, torch.zeros(B, dtype=torch.bool)


def rehearse(run: Run, network: model.Denoiser, objective: torch.nn.Module, optimizer) -> None:
    """The forward and backward pass of every stage to come, at its largest pictures, before the first iteration on a GPU:
    what does not fit into its memory fails now, not after days. Nothing is learned. Raises UserError with what to do."""
    plan, codec, moments = run.plan, run.codec, None
    if not getattr(optimizer, "optim", optimizer).state:  # those of a new run come with its first update
        spread = run.ranks.world if run.args.zero else 1
        moments = torch.empty(optimizers.moments(plan.optimizer, network) // spread, device=codec.device)
    for number in run.feed.sources:
        stage, aux = plan.stages[number], plan.aux(plan.begins()[number + 1] - 1)
        for side in stage.sides:
            B = plan.micro_batch_of(stage, side, run.ranks.world)
            shape = (codec.channels, side // codec.factor, side // codec.factor)
            draws = run.feed.draw(0, 0, list(range(B)), shape, device=codec.device)
            try:
                batch = made_up_batch(network, (B, *shape), plan.txt_len)
                objective(*batch, draws, 1.0, 0.0, aux)[0].backward()
            except torch.OutOfMemoryError as error:
                term = " with the auxiliary term" if aux else ""
                raise errors.UserError(
                    f"{B} pictures of {side} x {side}{term} do not fit into the device's memory: a smaller "
                    f"--micro-batch, --recompute N or --zero ({str(error).splitlines()[0]})"
                ) from error
            network.zero_grad(set_to_none=True)
    del moments
