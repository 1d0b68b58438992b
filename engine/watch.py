"""What a run reports while it trains: progress, records, picture grids, updates that are left out.

    watch = watch.Watch(run, precision, state, closing)
    watch.seen(batch, stats, aux)              # a micro-batch
    watch.updated(norm)                        # or, after a gradient that is not finite, watch.left_out(...)
    watch.log(step); watch.draw(step, ema)     # where they are due

Grids: the data's first prompts in rows, each from one noise, and sample.STEP_COUNTS in columns.
"""

import contextlib
import math
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable

import torch
from PIL import Image
from tqdm import tqdm

import files
import model
import sample
from engine import errors, machine, monitor, price
from engine.feed import Batch
from engine.run import Run
from objectives import OBJECTIVES

PATIENCE = 5  # iterations in a row without a finite gradient before the run stops
DIVERGED = 10.0  # a loss that ends at so many times that of the first record is no success


def grid_prompts(source, n: int = 8) -> dict[str, tuple[int, int]]:
    """The prompts of the picture grids, the first captions of the data, no two alike -> (height, width) of their sample.
    With buckets they follow from the batch size too, so a run resumed in another stage draws others."""
    found = {}
    for g in range(8 * n):
        if len(found) < n:
            found.setdefault(source.sample(g, 0).caption, source.bucket(g, 0))
    return found


def draw_grid(loaded: sample.Loaded, prompts: dict, stop: Callable[[], bool]) -> Image.Image:
    """The sheet of pictures: prompts in rows, step counts in columns, one noise per row. Raises sample.Stopped."""
    keys, shapes = [(i,) for i in range(len(prompts))], list(prompts.values())
    how = {"shapes": shapes, "stop": stop}
    columns = [sample.generate(loaded, list(prompts), keys, steps=n, **how) for n in sample.STEP_COUNTS]
    return sample.sheet([list(row) for row in zip(*columns)], sample.STEP_COUNTS, list(prompts))


class Watch:
    """The eyes on one run. Only rank 0 prints, writes and draws; the sums are taken over all ranks.

    `state` is what the last state.json said, {} at the beginning.
    """

    def __init__(self, run: Run, precision: torch.dtype, state: dict, closing: contextlib.ExitStack):
        self.run, first = run, run.ranks.is_first
        self.skipped = (
            run.feed.skipped()
        )  # told with the plan; what is read from here on is told when it is found
        self.prompts = grid_prompts(run.feed.source(run.start)) if first else {}
        self.meter = monitor.Meter(run.codec.device)
        self.peak = machine.peak_flops(run.codec.device, precision)
        self.began, self.elapsed_before = time.perf_counter(), state.get("elapsed", 0.0)
        self.nonfinite = state.get("nonfinite", 0)  # updates left out so far
        self.first_loss, self.last_loss = state.get("first_loss"), None  # of the records
        if first:
            price.tell(run.args, run.plan, run.config["model"], run.codec.factor, run.ranks.world, run.start)
            for line in run.feed.tell():
                print("  " + line)
            print(f"  on {run.config['machine']}, in {run.config['precision']}", flush=True)
        self.log_file = monitor.Log(run.folder, run.start) if first else None
        self.screen = errors.Screen(sys.stderr)
        self.bar = tqdm(
            total=run.plan.steps,
            initial=run.start,
            disable=not first,
            unit="it",
            dynamic_ncols=True,
            file=self.screen,
            smoothing=0.05,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )  # a log of days stays readable
        for close in (self.bar.close, *([self.log_file.close] if first else [])):
            closing.callback(close)
        self.in_a_row, self.failure = 0, ""

    def elapsed(self) -> float:
        """Seconds of training, those before the last stop included."""
        return self.elapsed_before + time.perf_counter() - self.began

    def state(self, step: int) -> dict:
        """What state.json says after `step` iterations."""
        counts = {"elapsed": self.elapsed(), "nonfinite": self.nonfinite, "first_loss": self.first_loss}
        return {"step": step, "steps": self.run.plan.steps} | self.run.continuity() | counts

    def say(self, text: str) -> None:
        if self.run.ranks.is_first:
            self.bar.write(text, file=self.screen)

    # --------------------------------------------------------------------------------------------------------
    # Every iteration
    # --------------------------------------------------------------------------------------------------------
    def seen(self, batch: Batch, stats: dict, aux: bool) -> None:
        """Count a micro-batch: what its loss reports, and what it cost."""
        run = self.run
        forwards = OBJECTIVES[run.args.objective].forwards(aux, run.args.train_guidance != 1)
        tokens = batch.x0[0, 0].numel() // run.codec.patch**2
        each = forwards * price.forward_flops(run.config["model"], tokens, run.plan.txt_len)
        self.meter.add(stats, each * len(batch.keys))

    def updated(self, norm: torch.Tensor) -> None:
        self.in_a_row = 0
        self.meter.keep(norm)

    def left_out(self, step: int, loss: float, norm: float, keys: list[str]) -> bool:
        """Say which samples led to a loss or gradient that is not finite; true where that came too often in a row.

        The samples of the processes whose own loss is not finite, or of all where only the gradient is not.
        """
        run = self.run
        self.nonfinite, self.in_a_row = self.nonfinite + 1, self.in_a_row + 1
        self.meter.drop()
        everyone = run.ranks.gather((math.isfinite(loss), keys))
        suspects = [key for finite, own in everyone if not finite for key in own]
        suspects = suspects or [key for _, own in everyone for key in own]
        if self.log_file:
            self.log_file.write(
                {"step": step, "update_left_out": True, "grad_norm": str(norm), "keys": suspects}
            )
            print(
                f"iteration {step}: no finite gradient (loss {loss}, norm {norm}); its update is left out",
                file=self.screen,
            )
        if self.in_a_row == PATIENCE:
            more = " ..." if len(suspects) > 8 else ""
            self.failure = (
                f"no finite gradient in {self.in_a_row} iterations in a row, last with {', '.join(suspects[:8])}{more} "
                f"(all are in {run.folder / 'metrics.jsonl'}); the weights from before them are saved. --resume goes "
                "on "
                "behind them, with a lower --lr if need be; without these samples it would be a new run"
            )
        return bool(self.failure)

    # --------------------------------------------------------------------------------------------------------
    # Now and then
    # --------------------------------------------------------------------------------------------------------
    def log(self, step: int) -> None:
        """After iteration `step`, where it is due: a line of metrics.jsonl. All ranks call it together."""
        self.bar.update()
        run, last = self.run, step - 1  # the iteration that has just ended, counted from 0
        if step % run.args.log_every and step != run.plan.steps:
            return
        record = self.meter.record(run.ranks.world, self.peak, run.feed.waited)
        new = {key: why for key, why in run.feed.skipped().items() if key not in self.skipped}
        for found in run.ranks.gather(new):  # told once, whichever process met it
            for key in found.keys() - self.skipped.keys():
                self.say(f"left out {files.printable(key)}: {found[key]}")
            self.skipped |= found
        if self.log_file and record:
            self.last_loss = record["loss"]
            self.first_loss = self.first_loss or self.last_loss
            record["skipped"] = len(self.skipped)
            record["images_per_s"] = record["iterations_per_s"] * run.plan.stage(last).batch_size
            plan = {"lr": run.plan.learning_rate(last), "tau": run.plan.tau(last), "aux": run.plan.aux(last)}
            self.log_file.write(
                {"step": step, **record, **plan, "nonfinite": self.nonfinite, "elapsed": self.elapsed()}
            )
            self.bar.set_postfix_str(f"loss {record['loss']:.4f}, {record['images_per_s']:.0f} images/s")

    def draw(self, step: int, ema: model.Denoiser) -> None:
        """Draw and keep a picture grid of the moving average; a signal to stop ends it without one."""
        if not self.run.ranks.is_first:
            return
        run, pause = self.run, time.perf_counter()
        loaded = sample.Loaded(ema, run.config, run.codec.text, run.codec.autoencoder)
        try:
            with torch.compiler.set_stance(
                "force_eager"
            ):  # sampling's batch shapes are not worth compiling for
                sheet = draw_grid(loaded, self.prompts, lambda: bool(run.stop))
            (run.folder / "grids").mkdir(exist_ok=True)  # somebody may have tidied up
            sheet.save(run.folder / "grids" / f"step_{step:06d}.png")
            self.log_file.grid(sheet, step)
        except sample.Stopped:
            pass  # the run is about to end; its grid can be drawn again
        except (
            OSError
        ) as error:  # a picture is not worth the run; where the disk is full, saving a state says so
            self.say(f"  the picture grid of iteration {step} was not written: {error}")
        self.meter.began += time.perf_counter() - pause

    def conclude(self, step: int) -> None:
        """Say how to go on, or how to make pictures. Raises UserError for a run that failed; a run that was stopped ends
        the process with 128 and the signal's number."""
        self.bar.close()
        run = self.run
        if self.failure:
            raise errors.UserError(self.failure)
        if step < run.plan.steps:
            if run.ranks.is_first:
                print(
                    f"stopped by {run.stop.name or 'a signal to another process'} after iteration {step}; the state is "
                    f"saved. To go on:\n  {run.command('train.py --resume --out')}"
                )
            sys.exit(128 + (run.stop.number or signal.SIGTERM))
        if self.last_loss and self.last_loss > DIVERGED * self.first_loss:
            raise errors.UserError(
                f"the loss ended at {self.last_loss:.3g}, {self.last_loss / self.first_loss:.0f} times what it was at "
                f"first: the run has diverged, and {run.folder} draws nothing; begin again with a lower --lr"
            )
        if run.ranks.is_first:
            if run.start == step:
                print(f"{run.folder} has its {step:,} iterations; --steps N makes more")
            prompt = " ".join(next(iter(self.prompts)).split())
            plain = re.fullmatch(r"[\w ,.'-]*", prompt)
            shown = f'"{prompt}"' if plain else shlex.quote(prompt)  # what the shell would read
            shown = ("=" if prompt.startswith("-") else " ") + shown
            print(
                f"done: {run.folder}. To make pictures:\n  {run.command('sample.py --checkpoint')} "
                f"--steps 1 2 4 8 50 --prompt{shown}"
            )
