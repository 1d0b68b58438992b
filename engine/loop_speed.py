"""What an iteration of train.py costs here and where its time goes: the loop itself, with a clock at each part.

    python engine/loop_speed.py --threads 1 --out results/loop-speed-1.json
    python engine/loop_speed.py --iterations 100 --rounds 9

engine/benchmark.py times steps on made-up numbers. This program times `train.train` as a user runs it: data, encoders,
both networks, targets, clipping, Adam, the average, records. Each objective has a run of its own in a temporary folder,
with the compiler where train.py would use it. The runs take turns, so that the machine's moods hit all alike.

    outside     share of an iteration that is neither a forward nor a backward pass of a network
    hidden      seconds that the reading thread computes; beside the loop where there is a second core, in it where not

Saving and picture grids are left out: they come a few times a run.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

if (
    __name__ == "__main__"
):  # started as a file: modules are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import losses
import model
import train
from engine import arguments, checkpoint, errors, feed, machine, preparation, watch
from engine.processes import Ranks

ROWS = {
    "flow matching": ["--objective", "flow_matching"],
    "Self-E": ["--aux-from", "1"],
    "Self-E + aux": ["--aux-from", "0"],
}
PASSES = ("forward", "evaluation", "backward")
WARM = 15  # iterations before the clock, after the compiler has come in


class Clock:
    """Seconds of each part, exclusive of the parts inside it: at any moment the innermost part is charged."""

    def __init__(self):
        self.spent, self.open, self.last = defaultdict(float), ["other"], time.perf_counter()

    def charge(self) -> None:
        now = time.perf_counter()
        self.spent[self.open[-1]] += now - self.last
        self.last = now

    def reset(self) -> None:
        self.charge()
        self.spent.clear()

    @contextlib.contextmanager
    def part(self, name: str):
        self.charge()
        self.open.append(name)
        try:
            yield
        finally:
            self.charge()
            self.open.pop()

    def watch(self, owner, attribute: str, name, closing: contextlib.ExitStack) -> None:
        """Charge the calls of a function or method to a part, until `closing` ends; `name` may be a function of the
        call."""
        work = getattr(owner, attribute)

        def watched(*words, **options):
            with self.part(name() if callable(name) else name):
                return work(*words, **options)

        setattr(owner, attribute, watched)
        closing.callback(setattr, owner, attribute, work)


def watch_parts(clock: Clock, closing: contextlib.ExitStack) -> list[float]:
    """Put the clock to everything an iteration consists of. Returns a list that the reading thread adds its own
    computing seconds to."""
    clock.watch(
        model.Denoiser, "forward", lambda: "forward" if torch.is_grad_enabled() else "evaluation", closing
    )
    clock.watch(torch.Tensor, "backward", "backward", closing)
    clock.watch(losses.SelfE, "forward", "targets and loss", closing)
    clock.watch(feed.Feed, "encode", "encoding", closing)
    clock.watch(torch.nn.utils, "clip_grad_norm_", "clipping", closing)
    clock.watch(torch.optim.Adam, "step", "Adam", closing)
    clock.watch(torch.optim.Adam, "zero_grad", "Adam", closing)
    clock.watch(train, "update", "average", closing)  # what of it is not Adam
    clock.watch(Ranks, "any", "stop or not", closing)
    for name in ("seen", "updated", "log"):
        clock.watch(watch.Watch, name, "records", closing)
    fetch, read = feed.Feed.fetch, []

    def fetched(*words):
        began = time.thread_time()
        try:
            return fetch(*words)
        finally:
            read.append(time.thread_time() - began)

    feed.Feed.fetch = fetched
    closing.callback(setattr, feed.Feed, "fetch", fetch)
    return read


@dataclasses.dataclass
class Row:
    """One objective's run, and what was measured of it."""

    run: preparation.Run
    watch: watch.Watch
    seconds: list[float]  # of an iteration, per round
    parts: dict[str, float]  # seconds of an iteration, summed over the rounds
    hidden: float = 0.0
    waited: float = 0.0


def begin(flags: list[str], folder: Path, iterations: int, closing: contextlib.ExitStack) -> Row:
    """A run made ready as train.py makes it ready, of so many iterations. Raises UserError."""
    args = arguments.parse([*flags, "--steps", str(iterations), "--out", str(folder), "--grid-every", "0"])
    plan, ranks = arguments.plan_of(args), Ranks()
    plan.check_division(1, args.micro_batch)
    with contextlib.redirect_stdout(sys.stderr):  # the plan of each
        run = preparation.prepare(args, plan, folder, machine.pick_device(args.device), ranks, closing)
    return Row(run, watch.Watch(run, closing), [], defaultdict(float))


def go_on(row: Row, iterations: int) -> float:
    """`train.train` over the next iterations of a run; returns its seconds."""
    run, whole = row.run, row.run.plan
    run.plan = dataclasses.replace(whole, steps=run.start + iterations)
    began = time.perf_counter()
    train.train(run, row.watch)
    seconds = time.perf_counter() - began
    run.plan, run.start = whole, run.start + iterations
    return seconds


def measure(flags: list[str], iterations: int, rounds: int) -> dict[str, Row]:
    """The runs of ROWS in turns, `rounds` times `iterations` iterations each after a warm-up."""
    with contextlib.ExitStack() as closing:
        home = Path(closing.enter_context(tempfile.TemporaryDirectory()))
        runs_out = closing.enter_context(
            contextlib.ExitStack()
        )  # threads and files end before the folder goes
        for owner, name in ((preparation.Run, "save"), (watch.Watch, "conclude")):
            closing.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, lambda self, step: None)
        warm = WARM + train.EAGER_STEPS if "--no-compile" not in flags else 2
        total = warm + rounds * iterations
        rows = {
            name: begin([*flags, *own], home / name.replace(" ", "_"), total, runs_out)
            for name, own in ROWS.items()
        }
        for row in rows.values():
            go_on(row, warm)
        clock = Clock()
        read = watch_parts(clock, closing)
        for _ in range(rounds):
            for row in rows.values():
                clock.reset()
                read.clear()
                waited = row.run.feed.waited
                row.seconds.append(go_on(row, iterations) / iterations)
                clock.charge()
                row.hidden += sum(read)
                row.waited += row.run.feed.waited - waited
                for part, spent in clock.spent.items():
                    row.parts[part] += spent
        return rows


def describe(rows: dict[str, Row], iterations: int, rounds: int) -> dict:
    """What was measured, as it is written: milliseconds of an iteration, and ratios to flow matching's."""
    base, described = rows["flow matching"].seconds, {}
    for name, row in rows.items():
        n = iterations * rounds
        parts = {
            part: 1e3 * spent / n for part, spent in sorted(row.parts.items(), key=lambda item: -item[1])
        }
        seconds, whole = statistics.median(row.seconds), sum(parts.values())
        outside = whole - sum(parts.get(part, 0.0) for part in PASSES)
        described[name] = {
            "milliseconds": 1e3 * seconds,
            "images_per_s": row.run.plan.stages[0].batch_size / seconds,
            "ratio": statistics.median(own / other for own, other in zip(row.seconds, base)),
            "outside": outside / whole,
            "hidden": 1e3 * row.hidden / n,
            "waited": 1e3 * row.waited / n,
            "parts": parts,
        }
    return described


def tell(report: dict) -> None:
    print(f"{report['hardware']}, in {report['precision']}, {report['compiler']}")
    for name, row in report["rows"].items():
        print(
            f"{name:14} {row['milliseconds']:8.1f} ms, {row['images_per_s']:7.1f} images/s, {row['ratio']:.3f} x "
            f"flow matching; outside the networks {row['outside']:.1%}; waiting for data {row['waited']:.2f} ms, its "
            f"thread computes {row['hidden']:.2f} ms"
        )
        print("  " + ", ".join(f"{part} {spent:.2f}" for part, spent in row["parts"].items()))


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = errors.Parser(
        "engine/loop_speed.py", "Time train.py's own loop, part by part. Further flags: train.py's."
    )
    a = parser.add_argument
    a("--threads", metavar="N", type=int, help="of torch (default: as many as it takes)")
    a("--iterations", metavar="N", type=int, default=20, help="in a round (default: 20)")
    a("--rounds", metavar="N", type=int, default=15, help="turns of each objective (default: 15)")
    a("--out", metavar="FILE", type=errors.file_to_write, help="write the figures as JSON")
    args, flags = parser.parse_known_args()
    parser.check_ranges(args, iterations=(1, 10**6), rounds=(1, 10**6), threads=(1, 1024))
    arguments.refuse(flags, ("--out", "--objective", "--aux-from", "--steps", "--resume", "--dry-run"))
    return args, flags


def main() -> None:
    args, flags = parse_arguments()
    machine.keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = measure(flags, args.iterations, args.rounds)
    run = rows["Self-E"].run
    compiled = any(block._compiled_call_impl for block in run.network.double_blocks)
    report = machine.provenance(run.device) | {
        "threads": torch.get_num_threads(),
        "precision": run.config["precision"],
        "batch": run.plan.stages[0].batch_size,
        "compiler": "compiled" if compiled else "eager",
        "iterations": args.iterations,
        "rounds": args.rounds,
        "rows": describe(rows, args.iterations, args.rounds),
    }
    tell(report)
    if args.out:
        checkpoint.write_json(args.out, report)


if __name__ == "__main__":
    errors.run(main, "stopped; nothing was written")
