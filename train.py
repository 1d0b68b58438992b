"""Train Self-E: the one loop, from a laptop's CPU to many GPUs (Sec. 3.3, S.2).

    python train.py                                            # the laptop model on the built-in shapes, on this machine
    python train.py --data pictures/ --out runs/mine           # your own folder of captioned pictures
    python train.py --objective flow_matching --out runs/fm    # the baseline of Table 2
    python train.py --resume --out runs/mine                   # go on where a run stopped
    torchrun --nproc-per-node 8 train.py --size 2b --data ...  # the paper's model

What it prints: the plan, then one line with loss, images/s and time left, and at the end the command that samples.
What it writes: see checkpoint.py; besides, grids/step_*.png: fixed prompts and noise in rows, 1, 2, 4, 8, 50 steps in columns.
"""

import argparse
import copy
import dataclasses
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import baselines
import checkpoint
import data
import encoders
import errors
import losses
import machine
import model
import sample
from randomness import rng


# ---------------------------------------------------------------------------------------------------------------------
# S.2        The recipe. For the big sizes every number is the paper's; `laptop` is chosen for the result per minute.
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Recipe:
    steps: int  # iterations
    batch_size: int  # global: over all ranks and micro-batches
    side: int  # of the pictures, pixels
    lr: float  # peak learning rate, reached after the warm-up,
    lr_end: float  # and where its linear decay ends
    data: str = "shapes"
    text: str = encoders.FLUX_TEXT
    txt_len: int = 256
    autoencoder: str = encoders.FLUX_VAE
    warmup: int = 1000  # iterations, at most 5% of the run
    clip: float = 1.0  # largest gradient norm
    betas: tuple[float, float] = (0.9, 0.95)
    ema: float = 0.9999
    dropout: float = 0.1  # share of prompts replaced by ""
    grid_guidance: float = 5.0  # of the picture grids


RECIPES = {
    "laptop": Recipe(6000, 32, 24, 4e-3, 1e-5, text="words", txt_len=16, autoencoder="pixels", grid_guidance=2.0),
    "0.5b": Recipe(300_000, 1024, 256, 3e-4, 1e-5),
    "2b": Recipe(710_000, 1024, 256, 3e-4, 1e-5),
}

OBJECTIVES = ("self_e", "flow_matching", "imm")

# When things happen, as shares of the run: the paper's iterations out of its 710k (S.2).
TAU_UNTIL = 300 / 710  # tau rises linearly from 0 to 1 until here (s.13)
AUX_FROM = 550 / 710  # the auxiliary term joins here
EAGER_STEPS = 20  # iterations before torch.compile comes in, and the first picture grid
STEP_COUNTS = (1, 2, 4, 8, 50)  # the columns of the picture grids


def learning_rate(step: int, recipe: Recipe) -> float:
    """The learning rate of iteration `step` = 0, 1, ...: linear warm-up, then linear decay to lr_end."""
    warmup = min(recipe.warmup, max(1, recipe.steps // 20))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    return recipe.lr + (recipe.lr_end - recipe.lr) * (step - warmup) / max(1, recipe.steps - warmup)


def anneal(step: int, steps: int, until: float) -> float:
    """tau of iteration `step`: 0 at the start, 1 from `until` (a share of the run) on."""
    return min(1.0, step / (until * steps)) if until > 0 else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# One micro-batch
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Batch:
    x0: torch.Tensor
    c: tuple
    null: tuple
    fake: tuple | None
    is_null: torch.Tensor
    keys: list[str]


class Feed:
    """Turns global sample indices into what the loss takes: latents and encoded prompts, with prompts dropped."""

    def __init__(self, source, text, autoencoder, seed: int, dropout: float, device: torch.device):
        self.source, self.text, self.autoencoder = source, text, autoencoder
        self.seed, self.dropout, self.device = seed, dropout, device

    def batch(self, index: list[int], with_fake: bool) -> Batch:
        samples = [self.source.sample(g, self.seed) for g in index]
        x0 = self.autoencoder.encode(data.to_tensor([s.picture for s in samples]).to(self.device))
        prompts = ["" if rng(self.seed, "dropout", g).random() < self.dropout else s.caption
                   for g, s in zip(index, samples)]  # fmt: skip
        c, fake = self.text(prompts), None
        if with_fake:
            fake = self.text([encoders.fake_prompt(p) for p in prompts])
        null = tuple(a.expand(len(index), *a.shape[1:]) for a in self.text([""]))
        is_null = torch.tensor([p == "" for p in prompts], device=self.device)
        return Batch(x0, c, null, fake, is_null, [s.key for s in samples])


# ---------------------------------------------------------------------------------------------------------------------
# Stopping: Ctrl-C and SIGTERM finish the iteration, save, and say how to go on
# ---------------------------------------------------------------------------------------------------------------------
class StopSignal:
    """Becomes true at the first SIGINT or SIGTERM; a second one ends the process as usual."""

    def __init__(self):
        self.name = ""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def __bool__(self) -> bool:
        return self.name != ""


# ---------------------------------------------------------------------------------------------------------------------
# Pictures on the way
# ---------------------------------------------------------------------------------------------------------------------
def grid_prompts(source, n: int = 8) -> list[str]:
    """The prompts of the picture grids: the first captions of the data, no two alike."""
    captions = [source.sample(g, 0).caption for g in range(64)]
    return list(dict.fromkeys(captions))[:n]


def draw_grid(loaded: sample.Loaded, prompts: list[str], stop: Callable[[], bool]) -> Image.Image:
    """The sheet of pictures: prompts in rows, step counts in columns, one noise per row. Raises sample.Stopped."""
    keys = [(i,) for i in range(len(prompts))]
    columns = [sample.generate(loaded, prompts, keys, steps=n, stop=stop) for n in STEP_COUNTS]
    rows = [list(row) for row in zip(*columns)]
    return data.label_grid(rows, [f"{n} steps" for n in STEP_COUNTS], prompts, scale=max(1, 96 // rows[0][0].shape[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------
def parse_arguments(argv=None) -> argparse.Namespace:
    """The flags; with --resume, those not given are taken from the run that goes on."""
    parser = errors.Parser("train.py", "Train Self-E.")
    a = parser.add_argument_group("the run").add_argument
    a("--size", default="laptop", choices=list(model.SIZES), help="model and recipe (default: laptop)")
    a("--data", metavar="DIR", help='"shapes" or a folder of captioned pictures (default: the recipe\'s)')
    a("--text", metavar="SPEC", help="frozen text encoder, see encoders.py (default: the recipe's)")
    a("--autoencoder", metavar="SPEC", help="frozen auto-encoder, see encoders.py (default: the recipe's)")
    a("--side", metavar="N", type=int, help="side of the pictures in pixels (default: the recipe's)")
    a("--out", metavar="DIR", default="runs/laptop", help="folder of the run (default: runs/laptop)")
    a("--resume", action="store_true", help="go on from the last state in --out")
    a("--steps", metavar="N", type=int, help="iterations (default: the recipe's)")
    a("--batch-size", metavar="N", type=int, help="pictures an iteration, over all processes (default: the recipe's)")
    a("--micro-batch", metavar="N", type=int, help="pictures a process computes at once (default: all of its share)")
    a("--lr", metavar="X", type=float, help="peak learning rate (default: the recipe's)")
    a("--seed", metavar="N", type=int, default=0, help="of everything random (default: 0)")
    a("--device", metavar="NAME", default="auto", help="cuda, mps, cpu (default: the best there is)")
    a("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="inside the network (default: the faster)")
    a("--compile", action=argparse.BooleanOptionalAction, help="torch.compile each block (default: where it works)")
    a = parser.add_argument_group("the objective (Sec. 3.3, Table 2)").add_argument
    a("--objective", default="self_e", choices=OBJECTIVES, help="default: self_e")
    a("--target", default="renorm", choices=("renorm", "tar", "sum"), help="Eq. 20, Eq. 18 or Eq. 16 (default: renorm)")
    a("--delta-scale", metavar="X", type=float, default=1.0, help="times the self-evaluation; 0 is the control (default: 1)")
    a("--aux-from", metavar="X", type=float, default=AUX_FROM, help="share of the run after which the auxiliary term joins; 1 is never "
      f"(default: {AUX_FROM:.3f})")  # fmt: skip
    a = parser.add_argument_group("what is written").add_argument
    a("--grid-every", metavar="N", type=int, help="iterations between picture grids; 0 is off (default: ten a run, and an early one)")
    a("--save-every", metavar="N", type=int, help="iterations between saved states; 0 is only at the end (default: five a run)")
    a("--log-every", metavar="N", type=int, default=20, help="iterations between lines of metrics.jsonl (default: 20)")
    args = parser.parse_args(argv)
    if args.resume:
        parser.set_defaults(**checkpoint.read_json(Path(args.out) / "config.json")["arguments"])
        args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "micro_batch", "side", "log_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.batch_size is not None and args.batch_size % 2:
        parser.error("--batch-size must be even: every second sample has s < t (s.13)")
    if args.micro_batch is not None and args.micro_batch % 2:
        parser.error("--micro-batch must be even: every second sample has s < t (s.13)")
    if args.seed < 0:
        parser.error("--seed must not be negative")
    if args.lr is not None and not 0 < args.lr < 1:
        parser.error("--lr must lie between 0 and 1")
    if not 0 <= args.delta_scale < float("inf"):
        parser.error("--delta-scale must be a number from 0 up")
    if not 0 <= args.aux_from <= 1:
        parser.error("--aux-from is a share of the run, between 0 and 1")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
def main() -> None:
    args = parse_arguments()
    machine.keep_freed_memory()
    recipe = dataclasses.replace(RECIPES[args.size])
    for name in ("steps", "batch_size", "data", "lr", "side", "text", "autoencoder"):
        if getattr(args, name) is not None:
            setattr(recipe, name, getattr(args, name))
    train(args, recipe, Path(args.out))


def train(args, recipe: Recipe, run: Path) -> None:
    # Where: one process, or as many as torchrun started.
    device = machine.pick_device(args.device)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    chief = rank == 0
    share = recipe.batch_size // world
    micro = args.micro_batch or share
    if recipe.batch_size % world or share % micro or micro % 2:
        raise errors.UserError(f"a batch of {recipe.batch_size} does not divide into {world} processes x micro-batches of {micro}")
    if args.objective == "imm" and micro % baselines.M:
        raise errors.UserError(f"IMM compares groups of {baselines.M}: batches and micro-batches must be multiples of {baselines.M}")

    # What: data, frozen encoders, the network and its average.
    source = data.open_source(recipe.data, recipe.side)
    text = encoders.text_encoder(recipe.text, recipe.txt_len, device)
    autoencoder = encoders.autoencoder(recipe.autoencoder, device)
    feed = Feed(source, text, autoencoder, args.seed, recipe.dropout, device)
    sizes = model.SIZES[args.size] | {"channels": autoencoder.channels, "txt_dim": text.d_txt, "vec_dim": text.d_vec}
    side, remainder = divmod(recipe.side, autoencoder.factor * sizes["patch"])
    if remainder:
        raise errors.UserError(f"--side must be a multiple of {autoencoder.factor * sizes['patch']}, not {recipe.side}")
    shape, mu = (autoencoder.channels, side * sizes["patch"], side * sizes["patch"]), losses.mu_of_length(side**2)
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(args.precision) or machine.pick_precision(device)
    torch.manual_seed(args.seed)
    network = model.Denoiser(**sizes, precision=precision).to(device)
    ema = copy.deepcopy(network).requires_grad_(False)
    self_e = args.objective == "self_e"
    if args.objective == "imm":
        objective, draw = baselines.IMM(network), baselines.draw
    else:  # flow matching is Self-E that never meets s < t
        objective = losses.SelfE(network, ema, mu=mu, target=args.target, delta_scale=args.delta_scale)
        draw = functools.partial(losses.draw, p_equal=0.5 if self_e else 1.0)
    adam = torch.optim.Adam(network.parameters(), lr=recipe.lr, betas=recipe.betas, fused=True)

    config = {
        "format": 1, "size": args.size, "model": sizes, "objective": args.objective, "target": args.target,
        "delta_scale": args.delta_scale, "aux_from": args.aux_from, "side": recipe.side, "mu": mu,
        "text_encoder": recipe.text, "txt_len": recipe.txt_len, "autoencoder": recipe.autoencoder, "data": recipe.data,
        "s_rule": 1.0 if args.objective == "flow_matching" else 0.0, "eta": 1.0,
        "guidance": recipe.grid_guidance, "guidance_space": "v",
        "steps": recipe.steps, "batch_size": recipe.batch_size, "lr": recipe.lr, "seed": args.seed,
        "precision": str(precision).removeprefix("torch."), "machine": machine.describe(device),
        "command": " ".join(["python train.py", *sys.argv[1:]]),
        "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device")},
    }  # fmt: skip

    # Go on, or start afresh; never over another run.
    start, elapsed_before = 0, 0.0
    states = checkpoint.complete_states(run)
    if args.resume:
        if not states:
            raise checkpoint.CheckpointError(f"nothing to resume: {run / 'state'} holds no complete state")
        state = checkpoint.load_state(states[-1], network, ema, adam)
        start, elapsed_before = state["step"], state["elapsed"]
    elif states or (run / "model.safetensors").exists():
        raise errors.UserError(f"{run} already holds a run; add --resume to go on, or choose another --out")
    if chief:
        (run / "grids").mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(run / "config.json", config)

    compiled, why_not = (False, "--no-compile") if args.compile is False else machine.compile_works(device)
    if compiled:
        for block in [*network.double_blocks, *network.single_blocks, *ema.double_blocks, *ema.single_blocks]:
            block.compile(dynamic=False)
    step_module = DistributedDataParallel(objective) if world > 1 else objective
    if chief:
        parameters = sum(p.numel() for p in network.parameters())
        print(f"{args.size}: {parameters / 1e6:.2f} M parameters, {recipe.side} x {recipe.side} pixels, {args.objective}; "
              f"{recipe.steps} iterations of {recipe.batch_size} on {config['machine']} in {config['precision']}, "
              + ("compiled" if compiled else f"eager ({why_not})"))  # fmt: skip

    # Iterate.
    stop = StopSignal()
    grid_every = args.grid_every if args.grid_every is not None else max(1, recipe.steps // 10)
    save_every = args.save_every if args.save_every is not None else max(1, recipe.steps // 5)
    prompts = grid_prompts(source)
    metrics = open(run / "metrics.jsonl", "a", encoding="utf-8") if chief else None
    began, window_began, window = time.perf_counter(), time.perf_counter(), []
    bar = tqdm(total=recipe.steps, initial=start, disable=not chief, unit="it", dynamic_ncols=True, smoothing=0.05)
    step = start
    while step < recipe.steps and not stop:
        tau = anneal(step, recipe.steps, TAU_UNTIL)
        aux = self_e and step >= args.aux_from * recipe.steps and args.aux_from < 1
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, recipe)

        first = step * recipe.batch_size + rank * share
        # The first iterations run as they are: they end in a first picture grid before the compiler takes its minute or two.
        torch.compiler.set_stance("force_eager" if step < EAGER_STEPS else "default")
        total = 0.0
        for m in range(0, share, micro):
            index = list(range(first + m, first + m + micro))
            batch = feed.batch(index, with_fake=aux)
            draws = draw(args.seed, step, index, shape, device=device)
            last = m + micro == share
            step_module.require_backward_grad_sync = last  # what DDP's no_sync() sets: reduce once an iteration
            loss, stats = step_module(batch.x0, batch.c, batch.null, batch.fake, batch.is_null, draws, tau, aux)
            (loss * micro / share).backward()
            total += loss.item() * micro / share
        norm = nn.utils.clip_grad_norm_(network.parameters(), recipe.clip).item()
        adam.step()
        adam.zero_grad(set_to_none=False)
        decay = min(recipe.ema, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(network.parameters()), 0)
        step += 1

        window.append(total)
        bar.update()
        if chief and (step % args.log_every == 0 or step == recipe.steps):
            seconds = time.perf_counter() - window_began
            rate = len(window) * recipe.batch_size / seconds
            record = {"step": step, "loss": sum(window) / len(window), "grad_norm": norm, "lr": adam.param_groups[0]["lr"],
                      "tau": tau, "aux": aux, "images_per_s": round(rate, 2),
                      "elapsed": round(elapsed_before + time.perf_counter() - began, 1)}  # fmt: skip
            record |= {k: v.float().mean().item() for k, v in stats.items() if k in ("w", "delta_norm", "fake_loss")}
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            bar.set_postfix_str(f"loss {record['loss']:.4f}, {rate:.0f} images/s")
            window, window_began = [], time.perf_counter()
        early = step == min(EAGER_STEPS, recipe.steps)
        if chief and grid_every and (step % grid_every == 0 or step == recipe.steps or early) and not stop:
            pause = time.perf_counter()
            torch.compiler.set_stance("force_eager")  # sampling's batch shapes are not worth compiling for
            try:
                sheet = draw_grid(sample.Loaded(ema, config, text, autoencoder), prompts, lambda: bool(stop))
                sheet.save(run / "grids" / f"step_{step:06d}.png")
            except sample.Stopped:
                pass  # the run is about to be saved; its grid can be drawn again
            window_began += time.perf_counter() - pause
        if stop or step == recipe.steps or (save_every and step % save_every == 0):
            if chief:
                state = {"step": step, "elapsed": elapsed_before + time.perf_counter() - began, "seed": args.seed}
                checkpoint.save_state(run, step, network, ema, adam.state_dict(), state)
                checkpoint.save_weights(run / "model.safetensors", ema)
    bar.close()
    if chief:
        if stop:
            print(f"stopped by {stop.name} after iteration {step}; the state is saved. To go on:\n"
                  f"  python train.py --resume --out {run}")  # fmt: skip
        else:
            print(f"done: {run}. To make pictures:\n  python sample.py --checkpoint {run} --steps 1 2 4 8 50 "
                  f'--prompt "{prompts[0]}"')  # fmt: skip
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    errors.run(main)
