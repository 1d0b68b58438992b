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
    keys, how = [(i,) for i in range(len(prompts))], {"shapes": list(prompts.values()), "stop": stop}
    columns = [sample.generate(loaded, list(prompts), keys, steps=n, **how) for n in sample.STEP_COUNTS]
    return sample.sheet([list(row) for row in zip(*columns)], sample.STEP_COUNTS, list(prompts))


class Watch:
    """The eyes on one run. Only rank 0 prints, writes and draws; the sums are taken over all ranks.

    `state` is what the last state.json said, {} at the beginning.
    """

    def __init__(self, run: Run, precision: torch.dtype, state: dict, closing: contextlib.ExitStack):
        self.run, self.is_first = run, run.ranks.is_first
        # Reported with the plan; what is found from here on, when it is found
        self.skipped = run.feed.skipped()
        self.prompts = grid_prompts(run.feed.source(run.start)) if self.is_first else {}
        self.meter = monitor.Meter(run.codec.device)
        self.peak = machine.peak_flops(run.codec.device, precision)
        self.began, self.elapsed_before = time.perf_counter(), state.get("elapsed", 0.0)
        self.nonfinite = state.get("nonfinite", 0)  # updates left out so far
        self.first_loss, self.last_loss = state.get("first_loss"), None  # of the records
        self.in_a_row, self.failure = 0, ""
        if self.is_first:
            price.tell(run.args, run.plan, run.config["model"], run.codec.factor, run.ranks.world, run.start)
            for line in (*run.feed.tell(), f"on {run.config['machine']}, in {run.config['precision']}"):
                print("  " + line, flush=True)
            self.log_file = monitor.Log(run.folder)
            closing.callback(self.log_file.close)
        often = 0.5 if sys.stderr.isatty() else 30  # seconds: a log of days stays readable
        looks = dict(unit="it", dynamic_ncols=True, smoothing=0.05, mininterval=often)
        self.bar = tqdm(total=run.plan.steps, initial=run.start, disable=not self.is_first, **looks)
        closing.callback(self.bar.close)

    def elapsed(self) -> float:
        """Seconds of training, those before the last stop included."""
        return self.elapsed_before + time.perf_counter() - self.began

    def state(self, step: int) -> dict:
        """What state.json says after `step` iterations."""
        counts = {"elapsed": self.elapsed(), "nonfinite": self.nonfinite, "first_loss": self.first_loss}
        return {"step": step, "steps": self.run.plan.steps} | self.run.continuity() | counts

    def say(self, text: str) -> None:
        if self.is_first:
            self.bar.write(text, file=sys.stderr)

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

        The samples of the processes whose loss is not finite, or of all where only the gradient is not.
        """
        self.nonfinite, self.in_a_row = self.nonfinite + 1, self.in_a_row + 1
        self.meter.drop()
        everyone = self.run.ranks.gather((math.isfinite(loss), keys))
        suspects = [key for finite, some in everyone if not finite for key in some]
        suspects = suspects or [key for _, some in everyone for key in some]
        if self.is_first:
            record = {"step": step, "update_left_out": True, "grad_norm": str(norm), "keys": suspects}
            self.log_file.write(record)
        self.say(f"iteration {step}: no finite gradient (loss {loss}, norm {norm}); its update is left out")
        if self.in_a_row == PATIENCE:
            self.failure = (
                f"no finite gradient in {PATIENCE} iterations in a row, last with {', '.join(suspects[:8])} (all are in "
                f"{self.run.folder / 'metrics.jsonl'}); the weights from before them are saved, and --resume goes on "
                "behind them, with a lower --lr if need be"
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
        for found in run.ranks.gather(new):  # each once, whichever process met it
            for key in found.keys() - self.skipped.keys():
                self.say(f"left out {files.printable(key)}: {found[key]}")
            self.skipped |= found
        if self.is_first and record:
            self.last_loss = record["loss"]
            self.first_loss = self.first_loss or self.last_loss
            record["skipped"] = len(self.skipped)
            record["images_per_s"] = record["iterations_per_s"] * run.plan.stage(last).batch_size
            record |= {
                "lr": run.plan.learning_rate(last),
                "tau": run.plan.tau(last),
                "aux": run.plan.aux(last),
            }
            record |= {"nonfinite": self.nonfinite, "elapsed": self.elapsed()}
            self.log_file.write({"step": step} | record)
            self.bar.set_postfix_str(f"loss {record['loss']:.4f}, {record['images_per_s']:.0f} images/s")

    def draw(self, step: int, ema: model.Denoiser) -> None:
        """Draw and keep a picture grid of the moving average; a signal to stop ends it without one."""
        if not self.is_first:
            return
        run, pause = self.run, time.perf_counter()
        loaded = sample.Loaded(ema, run.config, run.codec.text, run.codec.autoencoder)
        try:
            with torch.compiler.set_stance("force_eager"):  # these batch shapes are not worth compiling for
                sheet = draw_grid(loaded, self.prompts, lambda: bool(run.stop))
            (run.folder / "grids").mkdir(exist_ok=True)  # somebody may have tidied up
            sheet.save(run.folder / "grids" / f"step_{step:06d}.png")
        except sample.Stopped:
            pass  # the run is about to end; its grid can be drawn again
        except OSError as error:
            # A picture is not worth the run; a full disk is reported with the next state
            self.say(f"  the picture grid of iteration {step} was not written: {error}")
        self.meter.began += time.perf_counter() - pause

    def conclude(self, step: int) -> None:
        """Say how to go on, or how to make pictures. Raises UserError for a run that failed; a run that was stopped ends
        the process with 128 and the signal's number."""
        self.bar.close()
        run, ratio = self.run, (self.last_loss or 0) / (self.first_loss or 1)
        if self.failure:
            raise errors.UserError(self.failure)
        if step < run.plan.steps:
            if self.is_first:
                by = run.stop.name or "a signal to another process"
                print(f"stopped by {by} after iteration {step}; the state is saved. To go on:")
                print(f"  {run.command('train.py --resume --out')}")
            sys.exit(128 + (run.stop.number or signal.SIGTERM))
        if ratio > DIVERGED:
            raise errors.UserError(
                f"the loss ended at {ratio:.0f} times what it was at first: the run has diverged, and {run.folder} draws "
                "nothing; begin again with a lower --lr"
            )
        if self.is_first:
            if run.start == step:
                print(f"{run.folder} has its {step:,} iterations; --steps N makes more")
            prompt = files.printable(" ".join(next(iter(self.prompts)).split())[:200])
            shown = f'"{prompt}"' if re.fullmatch(r"[\w ,.'-]*", prompt) else shlex.quote(prompt)
            program = run.command("sample.py --checkpoint")
            print(f"done: {run.folder}. To make pictures:\n  {program} --steps 1 2 4 8 50 --prompt {shown}")
