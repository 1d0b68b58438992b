"""The plan of a run, printed: what it will be, hold and cost, known from its arguments alone (train.py --dry-run)."""

import argparse
from pathlib import Path

import torch

import data
import emoji
import model
import recipe
from engine import arguments, optimizers
from engine.feed import check_sides


def tell(
    args: argparse.Namespace, plan: recipe.Recipe, sizes: dict, factor: int, world: int, start: int
) -> None:
    """Print the recipe as this run will follow it, from iteration `start` on."""
    print(
        f"{args.size}: {model.count_parameters(sizes) / 1e6:,.2f} M parameters, {args.objective}, seed {args.seed}, "
        f"data {' '.join(plan.data) or 'not given'}; iterations {start:,} to {plan.steps:,}"
    )
    for line in recipe.describe(sizes, plan, args.objective, factor, world):
        print("  " + line)


def dry_run(args: argparse.Namespace, plan: recipe.Recipe, world: int, start: int) -> None:
    """Print what a run will be, hold and cost; no encoder is loaded and nothing
    is written. Raises DataError for no data."""
    sizes, factor = arguments.sizes_of(args), plan.factor()
    for stage in plan.stages:
        check_sides(stage.sides, factor * sizes["patch"])
    tell(args, plan, sizes, factor, world, start)
    with torch.device("meta"):
        moments = optimizers.moments(plan.optimizer, model.Denoiser(**sizes))
    parameters = model.count_parameters(sizes)
    state = recipe.state_bytes(parameters, world, args.zero, moments)
    parts = ", ".join(
        f"{optimizers.OPTIMIZERS[plan.optimizer] if name == 'Adam' else name} {size / 2**30:.2f}"
        for name, size in state.items()
    )
    encoders = "; T5-XXL, CLIP and the VAE take 9.3 GiB more, with a cache on the first process only"
    print(
        f"memory of each process: {sum(state.values()) / 2**30:.2f} GiB of state ({parts}), and activations "
        f"(bench.py measures them){encoders if plan.text == 'flux' else ''}"
    )
    print(
        f"each saved state: {4 * (2 * parameters + moments) / 2**30:.2f} GiB on disk; {args.keep} are kept"
        + (f", and one every {args.milestone_every:,} iterations" if args.milestone_every else "")
    )
    for name in plan.data:
        tell_data(name)
    for line in recipe.price(sizes, plan, args.objective, factor, start):
        print(line)


def tell_data(name: str) -> None:
    """Print how large a folder of tar shards or a cache is."""
    if name not in (*data.SETS, *emoji.SETS) and not Path(name).is_dir():
        raise data.DataError(f"no such folder: {name}")
    for kind, pattern, more in (
        ("shards", "*.tar", f"; python -m engine.feed --data {name} says more"),
        ("cached shards", "*x*_*.safetensors", ""),
    ):
        if files := sorted(Path(name).glob(pattern)):
            print(
                f"{name}: {len(files)} {kind}, {sum(file.stat().st_size for file in files) / 2**30:.2f} GiB{more}"
            )
            return
