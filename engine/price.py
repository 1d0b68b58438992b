"""What a run will be, hold and cost, known from its arguments alone (train.py --dry-run).

price.forward_flops(size, image_tokens=256, text_tokens=256)    # one forward pass for one sample
price.run_flops(size, plan, "self_e", factor=8)                 # all passes of a run
price.tell(args, plan, sizes, factor, world, start)             # prints the recipe as the run will follow it
"""

import argparse
import math
from pathlib import Path

import torch

import losses
import model
from engine import arguments, checkpoint, optimizers
from objectives import OBJECTIVES
from recipe import Recipe, Stage
from scale.shards import check_sides

H100_FLOPS = 989e12  # dense bf16, NVIDIA's data sheet
ASSUMED_MFU = 0.40


# ------------------------------------------------------------------------------------------------------------
# Operations
# ------------------------------------------------------------------------------------------------------------
def forward_flops(size: dict, image_tokens: int, text_tokens: int) -> float:
    """Floating-point operations of one forward pass for one sample (a multiply-add is two); `size` is that of SIZES.

    Counted layer by layer, because "6 N per token" is wrong here: the weights of a modulation act once per sample, and
    those of a double block once per token of one stream.
    """
    d, N = size["width"], image_tokens + text_tokens
    blocks = size["double"] + size["single"]
    # qkv 3, proj 1, MLP 8; a single block's two linears, 7 + 5, are as many
    per_token = blocks * 12 * d**2 * N
    per_sample = (size["double"] * 12 + size["single"] * 3 + 2) * d**2  # modulations
    ends = (2 * size["channels"] * size["patch"] ** 2 * image_tokens + size["txt_dim"] * text_tokens) * d
    embedders = (2 * 256 + size["vec_dim"] + 3 * d) * d
    attention = blocks * 2 * N**2 * d  # queries on keys, weights on values
    return 2.0 * (per_token + per_sample + ends + embedders + attention)


def image_tokens(size: dict, side: int, factor: int) -> int:
    """Tokens of a picture of side x side pixels, behind an auto-encoder that shrinks sides by `factor`."""
    return (side // (factor * size["patch"])) ** 2


def run_flops(
    size: dict, plan: Recipe, objective: str, factor: int, start: int = 0, guided: bool = False
) -> float:
    """Operations of a run from iteration `start` to its end, recomputation and frozen encoders not counted."""
    total, marks = 0.0, sorted({start, *plan.begins(), joins(plan)})
    marks = marks[marks.index(start) :]
    for begin, end in zip(marks, marks[1:]):
        stage, forwards = plan.stage(begin), OBJECTIVES[objective].forwards(plan.aux(begin), guided)
        tokens = [image_tokens(size, side, factor) for side in stage.sides]  # the sides take turns
        each = sum(forward_flops(size, n, plan.txt_len) for n in tokens) / len(tokens)
        total += (end - begin) * stage.batch_size * forwards * each
    return total


def joins(plan: Recipe) -> int:
    """The first iteration with the auxiliary term; the end of the run where it has none."""
    return min(plan.steps, math.ceil(plan.aux_from * plan.steps))


def state_bytes(parameters: int, moments: int, world: int) -> dict[str, float]:
    """Bytes of what a process keeps on its device all the time, fp32. The optimizer's moments are as many numbers in
    all, spread over `world` processes (ZeRO-1; 1 without it)."""
    each = 4.0 * parameters
    return {"weights": each, "gradients": each, "optimizer": 4.0 * moments / world, "EMA": each}


# ------------------------------------------------------------------------------------------------------------
# In words
# ------------------------------------------------------------------------------------------------------------
def tell(args: argparse.Namespace, plan: Recipe, size: dict, factor: int, world: int, start: int) -> None:
    """Print the recipe as this run will follow it, from iteration `start` on."""
    parameters = model.count_parameters(size) / 1e6
    print(
        f"{args.size}: {parameters:,.2f} M parameters, {args.objective}, seed {args.seed}, "
        f"data {' '.join(plan.data) or 'not given'}; iterations {start:,} to {plan.steps:,}"
    )
    begins = plan.begins()
    for stage, begin, end in zip(plan.stages, begins, begins[1:]):
        print(f"  iterations {begin:,} to {end:,}: {stage_in_words(size, plan, stage, factor, world)}")
    wrong = f"; {plan.wrong_captions:.3g} of captions wrong" if plan.wrong_captions else ""
    print(
        f"  {optimizers.OPTIMIZERS[plan.optimizer]} {plan.betas}, learning rate {plan.lr:g} after "
        f"{plan.warmup_steps():,} iterations, down to {plan.lr_end:g}; gradients clipped at {plan.clip:g}; "
        f"EMA {plan.ema:g}; {plan.dropout:.0%} of prompts dropped{wrong}"
    )
    if "aux_from" in OBJECTIVES[args.objective].flags:
        aux = f"auxiliary term from iteration {joins(plan):,}" if plan.aux_from < 1 else "no auxiliary term"
        print(f"  tau from 0 to 1 over {round(plan.tau_until * plan.steps):,} iterations; {aux}")


def stage_in_words(size: dict, plan: Recipe, stage: Stage, factor: int, world: int) -> str:
    sides = " and ".join(f"{side} x {side}" for side in stage.sides)
    turns = " in turns" if len(stage.sides) > 1 else ""
    micro = [plan.micro_batch_of(stage, side, world) for side in stage.sides]
    parts = " or ".join(f"{stage.batch_size // world // m} x {m}" for m in micro)
    mu = ", ".join(f"{losses.mu_of_length(image_tokens(size, side, factor)):.2f}" for side in stage.sides)
    processes = "1 process" if world == 1 else f"{world} processes"
    return f"{sides} pixels{turns}, {stage.batch_size} pictures each ({processes} x {parts}), mu {mu}"


def dry_run(args: argparse.Namespace, plan: Recipe, world: int) -> None:
    """Print what a run will be, hold and cost; no data are read, no encoder is loaded and nothing is written."""
    size, factor, gib = arguments.sizes_of(args), plan.factor(), 2**30
    states = checkpoint.complete_states(Path(args.out)) if args.resume else []
    start = checkpoint.step_of(states[-1]) if states else 0
    for stage in plan.stages:
        check_sides(stage.sides, factor * size["patch"])
    tell(args, plan, size, factor, world, start)
    with torch.device("meta"):
        network = model.Denoiser(**size)
    parameters, moments = model.count_parameters(size), optimizers.moments(plan.optimizer, network)
    state = state_bytes(parameters, moments, world if args.zero else 1)
    parts = ", ".join(f"{name} {held / gib:.2f}" for name, held in state.items())
    frozen = "; T5-XXL, CLIP and the VAE take 9.3 GiB more, with a cache on the first process only"
    print(
        f"memory of each process: {sum(state.values()) / gib:.2f} GiB of state ({parts}), and activations "
        f"(bench.py measures them){frozen if plan.text == 'flux' else ''}"
    )
    milestones = f", and one every {args.milestone_every:,} iterations" if args.milestone_every else ""
    on_disk = 4 * (2 * parameters + moments) / gib
    print(f"each saved state: {on_disk:.2f} GiB on disk; {args.keep} are kept{milestones}")
    tell_price(run_flops(size, plan, args.objective, factor, start, args.train_guidance != 1), start)


def tell_price(flops: float, start: int) -> None:
    """Print operations and time left, by the number of H100 GPUs if it is more than a day of one."""
    hours = flops / (H100_FLOPS * ASSUMED_MFU) / 3600
    time = f"{hours:,.1f} H100-hours" if hours > 1 else f"{3600 * hours:,.1f} H100-seconds"
    print(
        f"{flops:.2e} FLOP from iteration {start:,} on, {time} at {ASSUMED_MFU:.0%} of {H100_FLOPS / 1e12:.0f} TFLOP/s "
        "(an assumption; bench.py measures it)"
    )
    for n in (1, 8, 16, 32, 64, 128) if hours > 24 else ():
        print(f"{n:6} GPU{'s:' if n > 1 else ': '} {hours / n / 24:8.1f} days")
