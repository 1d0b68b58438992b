"""What a training step costs on this machine: time, arithmetic, memory (S.2).

    python bench.py                                                                     # the laptop model
    python bench.py --size 2b --batch 48 --compile --objectives self_e --out 2b.json    # on a GPU

A step is that of train.py but for the data: loss, gradient, clipping, Adam and moving average, on noise in place of
pictures and prompts, with tau = 1, all in one precision (train.py takes fp32 for finite differences). Objectives take
turns, so that the machine's moods hit all alike, and medians count. Ratios are to flow matching, which is always
measured; each is the median of the rounds' own ratios.

    passes    forward passes of the whole batch; one with a backward pass counts 3
    MFU       passes x price.forward_flops, by the best rate of a large matrix product in the same rounds;
              recomputation is not counted as work
    peak      all memory of a step, on CUDA
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

import losses
import model
import recipe
from engine import arguments, checkpoint, errors, machine, optimizers, price
from engine.run import made_up_batch
from objectives import OBJECTIVES, VARIANTS

WARM_UP = 2  # rounds that are not counted


# ------------------------------------------------------------------------------------------------------------
# Time and memory
# ------------------------------------------------------------------------------------------------------------
def now() -> float:
    """The time in seconds, once the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def in_turns(works: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """The seconds of each piece of work, taken in turns, `repeats` times after the warm-up."""
    seconds = {name: [] for name in works}
    for turn in range(WARM_UP + repeats):
        for name, work in works.items():
            began = now()
            work()
            if turn >= WARM_UP:
                seconds[name].append(now() - began)
    return seconds


def ratio(seconds: list[float], others: list[float]) -> float:
    return median(a / b for a, b in zip(seconds, others, strict=True))


# ------------------------------------------------------------------------------------------------------------
# A training step
# ------------------------------------------------------------------------------------------------------------
def networks(size: dict, device: torch.device, precision: torch.dtype, args: argparse.Namespace) -> tuple:
    """The network and its moving average."""
    with device:  # drawn where it runs: two billion numbers take a processor half a minute
        network = model.Denoiser(**size, precision=precision)
    network.recompute = args.recompute
    ema = copy.deepcopy(network).requires_grad_(False)
    if args.compile:
        machine.allow_shapes(64)  # whole batches and shares of them, with and without gradient
        network.compile_blocks()
        ema.compile_blocks()
    return network, ema


def kinds(names: list[str]) -> dict[str, tuple[str, list[str], bool]]:
    """label -> (objective, train.py's flags beside it, whether the auxiliary term has joined), flow matching first."""
    found = {}
    for name in dict.fromkeys(["flow_matching", *names]):
        found[name] = name, [], False
        if "aux_from" in OBJECTIVES[name].flags:
            found[f"{name}, aux"] = name, [], True
        if "train_guidance" in OBJECTIVES[name].flags:
            found[f"{name}, guided"] = name, ["--train-guidance", "2"], False
    return found


class Step:
    """A training step of one kind; all kinds share networks, optimizer and batch."""

    def __init__(self, kind: tuple, networks: tuple, optimizer: torch.optim.Optimizer, batch: tuple):
        name, flags, aux = kind
        (self.network, self.ema), self.optimizer, x0 = networks, optimizer, batch[0]
        self.device, objective = x0.device, OBJECTIVES[name]
        self.passes = objective.forwards(aux, guided=bool(flags))
        self.objective = objective.build(*networks, arguments.parse(["--objective", name, *flags]))
        mu = losses.mu_of_length(self.network.tokens(x0))
        draws = objective.draw(0, 0, list(range(len(x0))), x0.shape[1:], device=self.device)
        self.inputs = (*batch, draws, 1.0, mu, aux)

    def __call__(self) -> None:
        self.objective(*self.inputs)[0].backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), recipe.Recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        average = get_ema_multi_avg_fn(recipe.Recipe.ema)
        average(list(self.ema.parameters()), list(self.network.parameters()), 0)

    def peak(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        torch.cuda.reset_peak_memory_stats(self.device)
        self()
        return {"peak_gib": torch.cuda.max_memory_allocated(self.device) / 2**30}


def measure(steps: dict[str, Step], picture_flops: float, repeats: int) -> dict:
    """The machine's peak, and a row for each kind of step. `picture_flops`: a forward pass of one picture."""
    peaks, rates = {name: step.peak() for name, step in steps.items()}, []
    one = steps["flow_matching"]
    batch, device, precision = len(one.inputs[0]), one.device, one.network.precision

    def matrix_product():
        rates.append(machine.peak_flops(device, precision))

    seconds, rows = in_turns(steps | {"matrix product": matrix_product}, repeats), {}
    for name, step in steps.items():
        typical = median(seconds[name])
        rate = step.passes * batch * picture_flops / typical
        rows[name] = {
            "seconds": typical,
            "ratio": ratio(seconds[name], seconds["flow_matching"]),
            "pictures_per_s": batch / typical,
            "passes": step.passes,
            "tflops": rate / 1e12,
            "mfu": rate / max(rates),
        } | peaks[name]
    return {"peak_tflops": max(rates) / 1e12, "rows": rows}


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------
def parse_arguments() -> argparse.Namespace:
    parser = errors.Parser("bench.py", "Measure a training step of each objective on this machine.")
    a = parser.add_argument
    names, papers = list(OBJECTIVES), [name for name in OBJECTIVES if name not in VARIANTS]
    a("--size", default="laptop", choices=list(model.SIZES), help="which model")
    a("--batch", metavar="N", type=int, default=32, help="pictures a step")
    a("--side", metavar="N", type=int, help="side of the pictures in pixels (default: the recipe's)")
    a("--objectives", metavar="NAME", nargs="+", choices=names, default=papers, help="(default: all papers')")
    a("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="(default: the faster)")
    a("--compile", action="store_true", help="torch.compile each block")
    a("--recompute", metavar="N", type=int, default=0, help="blocks that recompute activations")
    a("--repeats", metavar="N", type=int, default=7, help="measured rounds")
    a("--device", metavar="NAME", default="auto", help="cuda, mps, cpu (default: the best there is)")
    a("--out", metavar="FILE", type=errors.file_to_write, help="write the figures as JSON")
    args = parser.parse_args()
    ranges = {"batch": (2, 2**20), "side": (1, 2**13), "repeats": (1, 10**6)}
    parser.check_ranges(args, **ranges, recompute=(0, 10**6))
    plan, size = recipe.RECIPES[args.size], model.SIZES[args.size]
    args.side = args.side or plan.stages[0].sides[0]
    group = math.lcm(*(OBJECTIVES[name].group for name in args.objectives))
    for name, unit in (("batch", group), ("side", size["patch"] * plan.factor())):
        if getattr(args, name) % unit:
            parser.error(f"--{name} must be a multiple of {unit}")
    return args


def show(report: dict) -> None:
    def line(first: str, *cells: str) -> None:
        print(f"{first:26}" + "".join(f"{cell:>17}" for cell in cells))

    tokens = f"{report['image_tokens']} + {report['text_tokens']} tokens"
    print(f"{report['size']}, batch {report['batch']}, {tokens}")
    print(f"{report['precision']}{', compiled' * report['compile']}, on {report['hardware']}")
    print(f"a large matrix product: {report['peak_tflops']:.2f} TFLOP/s\n")
    line("step", "ms", "x flow matching", "pictures/s", "passes", "TFLOP/s", "MFU", "peak")
    for name, row in report["rows"].items():
        peak = f"{row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
        cells = f"{1e3 * row['seconds']:.1f}", f"{row['ratio']:.2f}", f"{row['pictures_per_s']:.1f}"
        line(name, *cells, f"{row['passes']:.2f}", f"{row['tflops']:.3f}", f"{row['mfu']:.1%}", peak)


def main() -> None:
    args = parse_arguments()
    machine.keep_freed_memory()
    torch.manual_seed(0)
    plan, device = recipe.RECIPES[args.size], machine.pick_device(args.device)
    precision = checkpoint.DTYPES.get(args.precision) or machine.pick_precision(device)
    size = model.SIZES[args.size]
    side = args.side // plan.factor()
    tokens = (side // size["patch"]) ** 2

    network, ema = networks(size, device, precision, args)
    # The weights do move: a last layer that stays zero hands back zeros, which a GPU multiplies faster.
    adam = optimizers.build("adam", network, 1e-4, plan.betas)
    batch = made_up_batch(network, (args.batch, size["channels"], side, side), plan.txt_len)
    steps = {name: Step(kind, (network, ema), adam, batch) for name, kind in kinds(args.objectives).items()}
    settings = {name: value for name, value in vars(args).items() if name not in ("device", "out")}
    settings |= {"precision": str(precision).removeprefix("torch.")}
    report = machine.provenance(device) | settings | {"image_tokens": tokens, "text_tokens": plan.txt_len}
    report |= measure(steps, price.forward_flops(size, tokens, plan.txt_len), args.repeats)
    show(report)
    if args.out:
        checkpoint.write_json(args.out, report)


if __name__ == "__main__":
    errors.run(main)
