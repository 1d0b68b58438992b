"""What an iteration takes on many GPUs: predicted from its parts, and the model of the all-reduce held against a run.

    python engine/scaling.py                                            # the 2B model on 8, 64 and 256 GPUs
    python engine/scaling.py --size 0.5b --mfu 0.35 --bandwidth 100     # what your machines give
    python engine/scaling.py --measure 2 --out results/all-reduce.json  # 2 processes here: does the model hold?

An iteration is the arithmetic of a process's pictures (model.forward_flops at a share of the peak that you measure with
engine/benchmark.py), then what of the gradients' all-reduce the backward pass does not hide, then the update, which
every GPU makes whole, at the rate of its memory. Saving is a share of the time, and data a rate to be met.

    all-reduce of S bytes over N processes in a ring     T = a + 2 (N - 1) / N  S / bandwidth
    DDP                                                  buckets of 25 MiB, each on its way as soon as it is complete

The bandwidth is what nccl-tests calls bus bandwidth: that of the slowest link of the ring, 350 to 400 GB/s on nodes
with NVLink and one 400 Gb/s card a GPU, 12.5 GB/s with one 100 Gb/s card a node (the cards' own rates, not measured).
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

if (
    __name__ == "__main__"
):  # started as a file: modules are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import model
import recipe
from engine import checkpoint, errors, machine

BUCKET = 25 * 2**20  # bytes: DDP's default
BYTES = 4  # of a gradient, a weight, a moment: all are fp32
KEPT = 4  # tensors of a state: weights, their average, Adam's two moments
# How often an update reads or writes a number of the model's size: the norm 1, clipping 2, Adam 7, the average 3,
# zeroing 1. And the rate of an H100's memory in bytes/s, by NVIDIA's data sheet.
TOUCHES, MEMORY = 14, 3.35e12


# ------------------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------------------
def all_reduce_seconds(size: float, world: int, bandwidth: float, latency: float = 0.0) -> float:
    """Seconds to sum `size` bytes over `world` processes in a ring; bandwidth in bytes/s, latency in seconds."""
    return 0.0 if world == 1 else latency + 2 * (world - 1) / world * size / bandwidth


def exposed_seconds(
    size: float, backward: float, world: int, bandwidth: float, latency: float = 0.0
) -> float:
    """Seconds that the gradients' all-reduce goes on after the backward pass that makes them has ended.

    The gradients come evenly over `backward` seconds; buckets are reduced one after the other, none before it is full.
    """
    buckets = max(1, math.ceil(size / BUCKET))
    each, end = all_reduce_seconds(size / buckets, world, bandwidth, latency), 0.0
    for i in range(buckets):
        end = max(end, backward * (i + 1) / buckets) + each
    return end - backward


def iteration(
    size: str, side: int, world: int, mfu: float, bandwidth: float, aux: bool = False
) -> dict[str, float]:
    """The parts of one Self-E iteration on `world` GPUs, in seconds, and what a GPU reads, in bytes/s.

    `side` is one of the recipe's, and the stage the first that has it; mfu is the share of recipe.H100_FLOPS that the
    arithmetic reaches; bandwidth in bytes/s. Raises UserError where the stage's batch does not divide.
    """
    plan, shape = recipe.RECIPES[size], model.SIZES[size]
    stage = next(stage for stage in plan.stages if side in stage.sides)
    recipe.make(size, batch_size=stage.batch_size).check_division(world)
    own, micro = stage.batch_size // world, plan.micro_batch_of(stage, side, world)
    rate = mfu * recipe.H100_FLOPS
    compute = own * recipe.picture_flops(shape, plan, "self_e", side, plan.factor(), aux) / rate
    tokens = recipe.image_tokens(shape, side, plan.factor())
    backward = 2 * micro * model.forward_flops(shape, tokens, plan.txt_len) / rate  # of the last micro-batch
    gradients = BYTES * model.count_parameters(shape)
    exposed, update = exposed_seconds(gradients, backward, world, bandwidth), TOUCHES * gradients / MEMORY
    seconds = compute + exposed + update
    latent = BYTES * shape["channels"] * (side // plan.factor()) ** 2
    sample = (
        latent + 2 * plan.txt_len * shape["txt_dim"] + BYTES * shape["vec_dim"]
    )  # tokens are bf16 in a cache
    return {
        "compute": compute,
        "exposed": exposed,
        "update": update,
        "seconds": seconds,
        "pictures": own,
        "micro_batch": micro,
        "efficiency": compute / seconds,
        "bytes_per_s": own * sample / seconds,
    }


def saving_share(size: str, disk: float, every: float = 1800.0) -> float:
    """Share of the time that goes into states, all processes waiting: `disk` bytes/s, one state in `every` seconds."""
    seconds = KEPT * BYTES * model.count_parameters(model.SIZES[size]) / disk
    return seconds / (every + seconds)


def tell(args: argparse.Namespace) -> None:
    parameters = model.count_parameters(model.SIZES[args.size])
    print(
        f"{args.size}: {BYTES * parameters / 1e9:.1f} GB of gradients; arithmetic at {args.mfu:.0%} of "
        f"{recipe.H100_FLOPS / 1e12:.0f} TFLOP/s, all-reduce at {args.bandwidth:g} GB/s; a state every half hour at "
        f"{args.disk:g} GB/s takes {saving_share(args.size, 1e9 * args.disk):.1%} of the time"
    )
    print(
        f"{'GPUs':>6}{'side':>6}{'pictures a GPU':>16}{'micro-batch':>13}{'compute s':>11}{'exposed s':>11}"
        f"{'update s':>10}{'efficiency':>12}{'GPU reads MB/s':>16}"
    )
    for world in args.gpus:
        for side in sorted({side for stage in recipe.RECIPES[args.size].stages for side in stage.sides}):
            try:
                row = iteration(args.size, side, world, args.mfu, 1e9 * args.bandwidth)
            except errors.UserError as error:
                print(f"{world:6}{side:6}  {error}")
                continue
            print(
                f"{world:6}{side:6}{row['pictures']:16}{row['micro_batch']:13}{row['compute']:11.3f}"
                f"{row['exposed']:11.3f}{row['update']:10.3f}{row['efficiency']:12.1%}"
                f"{row['bytes_per_s'] / 1e6:16.0f}"
            )


# ------------------------------------------------------------------------------------------------------------
# The model against a run
# ------------------------------------------------------------------------------------------------------------
SIZES = [2**power for power in range(12, 28)]  # bytes: 4 KiB to 128 MiB
ROUNDS = 15


def one_process(rank: int, world: int, meeting: str, out: str, sizes: list[int], rounds: int) -> None:
    """Time the all-reduce of each size, in turns; rank 0 writes the medians."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    tensors = [torch.ones(size // BYTES) for size in sizes]
    times = np.zeros((rounds + 2, len(sizes)))
    for turn in range(rounds + 2):
        for i, tensor in enumerate(tensors):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            times[turn, i] = time.perf_counter() - began
    if rank == 0:
        checkpoint.write_json(Path(out), np.median(times[2:], axis=0).tolist())
    dist.destroy_process_group()


def fit(sizes: list[int], seconds: list[float], world: int) -> tuple[float, float]:
    """(latency in s, bandwidth in bytes/s) of the ring's model, by least squares of the relative errors."""
    sent = 2 * (world - 1) / world * np.array(sizes, float)
    rows = np.stack([np.ones(len(sent)), sent], axis=1) / np.array(seconds)[:, None]
    latency, per_byte = np.linalg.lstsq(rows, np.ones(len(sent)), rcond=None)[0]
    return float(latency), float(1 / per_byte)


def measure(world: int, sizes: list[int] = SIZES, rounds: int = ROUNDS) -> dict:
    """All-reduce times of `world` processes on this machine; the model fitted to every second size, held against the
    others."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        torch.multiprocessing.spawn(
            one_process, (world, f"{folder}/meeting", str(out), sizes, rounds), nprocs=world
        )
        seconds = checkpoint.read_json(out)
    latency, bandwidth = fit(sizes[::2], seconds[::2], world)
    model_of = {size: all_reduce_seconds(size, world, bandwidth, latency) for size in sizes}
    held = [model_of[size] / measured - 1 for size, measured in zip(sizes[1::2], seconds[1::2])]
    return {
        "world": world,
        "latency": latency,
        "bandwidth": bandwidth,
        "rows": [
            {"bytes": size, "seconds": s, "model": model_of[size], "fitted": i % 2 == 0}
            for i, (size, s) in enumerate(zip(sizes, seconds))
        ],
        "worst_error": max(map(abs, held)),
        "median_error": float(np.median(np.abs(held))),
    }


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------
def parse_arguments() -> argparse.Namespace:
    parser = errors.Parser("engine/scaling.py", "Predict the time of an iteration on many GPUs.")
    a = parser.add_argument
    a("--size", default="2b", choices=("0.5b", "2b"), help="which model (default: 2b)")
    a("--gpus", metavar="N", type=int, nargs="+", default=[8, 64, 256], help="how many (default: 8 64 256)")
    a(
        "--mfu",
        metavar="X",
        type=float,
        default=recipe.ASSUMED_MFU,
        help=f"share of an H100's peak that the arithmetic reaches (default: {recipe.ASSUMED_MFU}, an assumption)",
    )
    a("--bandwidth", metavar="GB", type=float, default=100.0, help="of the ring, GB/s (default: 100)")
    a("--disk", metavar="GB", type=float, default=1.0, help="that states are written to, GB/s (default: 1)")
    a("--measure", metavar="N", type=int, help="time the all-reduce of N processes here instead, over gloo")
    a("--out", metavar="FILE", type=errors.file_to_write, help="write what was measured as JSON")
    args = parser.parse_args()
    parser.check_ranges(
        args, gpus=(1, 2**20), mfu=(1e-4, 1), bandwidth=(1e-3, 1e6), disk=(1e-3, 1e6), measure=(2, 64)
    )
    if args.out and not args.measure:
        parser.error("--out goes with --measure")
    return args


def main() -> None:
    args = parse_arguments()
    if not args.measure:
        tell(args)
        return
    found = measure(args.measure)
    for row in found["rows"]:
        print(
            f"{row['bytes']:12,} bytes {1e3 * row['seconds']:9.3f} ms, model {1e3 * row['model']:9.3f} ms"
            + (" (fitted)" if row["fitted"] else "")
        )
    print(
        f"latency {1e6 * found['latency']:.0f} us, {found['bandwidth'] / 1e9:.2f} GB/s; on sizes not fitted the "
        f"model is off by {found['median_error']:.0%} (median), {found['worst_error']:.0%} at most"
    )
    if args.out:
        checkpoint.write_json(args.out, machine.provenance(torch.device("cpu")) | found)


if __name__ == "__main__":
    errors.run(main)
