"""What is trained, for how long, at which size and rate: the paper's recipe as data (S.2, Sec. 4.2), and its price.

    plan = recipe.RECIPES["2b"]
    plan.stage(600_000)             # the second stage: 256 and 512 pixels in turns, 768 pictures an iteration
    plan.first(600_000)             # the global index of the first sample of iteration 600,000
    plan.learning_rate(600_000), plan.tau(600_000), plan.aux(600_000)

Everything that changes during a run is a function of the iteration, given here (but for the EMA's first decays,
`train.update`). So there is no schedule to save, only the number of the iteration. Times are shares of the run (the
paper's iterations out of its 710k), so a run of any length goes through every part of its recipe. `2b` has the
auxiliary stage; `--aux-from 0.775` adds it to the others.
"""

import math
from dataclasses import dataclass, replace

import losses
import model
import objectives
from engine import errors, optimizers


@dataclass(frozen=True)
class Stage:
    """A part of the run with its own picture sizes and batch."""

    begin: float  # where it begins, as a share of the run's iterations
    sides: tuple[int, ...]  # of the pictures, pixels; iterations take turns among them
    batch_size: int  # global: over all processes and micro-batches


@dataclass(frozen=True)
class Recipe:
    """One training run. For the big sizes the numbers are the paper's where it gives one; `laptop` is what gave
    the best pictures after a quarter of an hour."""

    steps: int  # iterations
    stages: tuple[Stage, ...]
    lr: float  # peak learning rate, reached after the warm-up,
    lr_end: float  # and where its linear decay ends
    tau_until: float  # share of the run over which tau rises from 0 to 1 (s.13)
    aux_from: float  # share of the run after which the auxiliary term joins (S.1.2); 1 is never
    # Pictures a process computes at once, at most, at the first stage's first side; None: all of its own
    micro_batch: int | None
    guidance: float  # of the picture grids and the checkpoint's default
    data: tuple[str, ...] = ()  # what --data takes; the big sizes have no data of their own
    text: str = "flux"  # encoders.py
    txt_len: int = 256
    autoencoder: str = "flux"
    warmup: int = 1000  # iterations, at most 5% of the run
    clip: float = 1.0  # largest gradient norm
    betas: tuple[float, float] = (0.9, 0.95)
    optimizer: str = "adam"  # or "muon" for the blocks' matrices (engine/optimizers.py)
    ema: float = 0.9999
    dropout: float = 0.1  # share of prompts replaced by ""
    wrong_captions: float = 0.0  # share of samples that carry the caption of another (data.WrongCaptions)
    guided: float = (
        0.0  # forward passes a picture that guidance in the objective's target takes (objectives.py)
    )
    group: int = (
        2  # micro-batches are multiples of it: 2, every second sample has s < t (s.13); IMM's groups have 4
    )

    # --------------------------------------------------------------------------------------------------------
    # Functions of the iteration, `step` = 0, 1, ...
    # --------------------------------------------------------------------------------------------------------
    def begins(self) -> list[int]:
        """The iteration at which each stage begins, and the end of the run."""
        return [round(stage.begin * self.steps) for stage in self.stages] + [self.steps]

    def stage_number(self, step: int) -> int:
        return max(i for i, begin in enumerate(self.begins()[:-1]) if begin <= step)

    def stage(self, step: int) -> Stage:
        """The stage that iteration `step` belongs to."""
        return self.stages[self.stage_number(step)]

    def first(self, step: int) -> int:
        """The global index g of the first sample of iteration `step`: the whole position of a run in its data.

        Samples are counted through all stages. A new stage begins at the next multiple of its batch size, because data
        in buckets is arranged in aligned blocks of one batch.
        """
        g, begins = 0, self.begins()
        for stage, begin, end in zip(self.stages, begins, begins[1:]):
            g = -(-g // stage.batch_size) * stage.batch_size
            if step < end or end == self.steps:
                return g + (step - begin) * stage.batch_size
            g += (end - begin) * stage.batch_size
        raise AssertionError("the last stage ends with the run")

    def side(self, step: int) -> int:
        """The side of the (square) pictures of iteration `step`: the sides of a stage take turns."""
        stage = self.stage(step)
        return stage.sides[self.first(step) // stage.batch_size % len(stage.sides)]

    def factor(self) -> int:
        """What the auto-encoder shrinks sides by, known without loading it: 8 for all but the pictures themselves."""
        return 1 if self.autoencoder == "pixels" else 8

    def warmup_steps(self) -> int:
        return min(self.warmup, max(1, self.steps // 20))

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to lr_end."""
        warmup = self.warmup_steps()
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr + (self.lr_end - self.lr) * (step - warmup) / max(1, self.steps - warmup)

    def tau(self, step: int) -> float:
        """How far below t the second time may lie (s.13): 0 at the start, 1 from tau_until on."""
        return min(1.0, step / (self.tau_until * self.steps)) if self.tau_until > 0 else 1.0

    def aux(self, step: int) -> bool:
        """Whether iteration `step` has the auxiliary term."""
        return self.aux_from < 1 and step >= self.aux_from * self.steps

    # --------------------------------------------------------------------------------------------------------
    # The global batch, divided
    # --------------------------------------------------------------------------------------------------------
    def micro_batch_of(self, stage: Stage, side: int, world: int) -> int:
        """Pictures that each of `world` processes computes at once at a stage and side.

        The largest divisor of a process's part of the batch that takes no more memory than micro_batch pictures of the
        first stage, and at least `group`.
        """
        own = stage.batch_size // world
        if self.micro_batch is None:
            return own
        base = self.stages[0].sides[0]
        most = max(self.group, self.micro_batch * base**2 // side**2)
        return max(m for m in range(self.group, own + 1, self.group) if own % m == 0 and m <= most)

    def check_division(self, world: int, asked: int | None = None) -> None:
        """Raise UserError unless every stage's batch divides into `world` processes and equal micro-batches.

        `asked` is the micro-batch that was asked for; None takes any that fits. The message names the nearest
        combinations that divide.
        """
        batches, group = sorted({stage.batch_size for stage in self.stages}), self.group
        micro = asked or group

        def divides(world, micro, batches):
            return micro % group == 0 and all(b % (world * micro) == 0 for b in batches)

        if divides(world, micro, batches):
            return
        said = " and ".join(map(str, batches))
        worlds = [w for w in range(1, math.gcd(*batches) + 1) if divides(w, micro, batches)]
        micros = [m for m in range(group, max(batches) + 1, group) if divides(world, m, batches)]
        even = -(-micro // group) * group
        unit, so = world * even, "" if even == micro else f" with micro-batches of {even}"
        ways = []
        if worlds:
            ways.append(
                f"{' or '.join(map(str, nearest(worlds, world)))} processes with micro-batches of {micro}"
            )
        if micros:
            ways.append(
                f"micro-batches of {' or '.join(map(str, nearest(micros, micro)))} on {world} processes"
            )
        if len(batches) == 1:
            near = nearest([unit * max(1, batches[0] // unit), unit * (batches[0] // unit + 1)], batches[0])
            ways.append(f"--batch-size {' or '.join(map(str, near))}{so}")
        else:
            ways.append(f"--batch-size {unit * max(1, round(batches[-1] / unit))} in all stages{so}")
        raise errors.UserError(
            f"a batch of {said} does not divide into {world} process{'es' * (world > 1)} x "
            f"micro-batches of {micro} "
            f"(multiples of {group}); the nearest that do: {'; '.join(ways)}"
        )


def nearest(values: list[int], wanted: int) -> list[int]:
    """The values next to `wanted` from below and from above, without repeats."""
    below, above = [v for v in values if v <= wanted], [v for v in values if v >= wanted]
    return sorted({*below[-1:], *above[:1]})


# The milestones of the paper's 2B run (S.2), as shares of its 710k iterations.
TAU_UNTIL = 300 / 710
LARGER_FROM = 500 / 710
AUX_FROM = 550 / 710

RECIPES = {
    # Classifier score only, the "Ours" of Table 2: in a quarter of an hour the auxiliary stage is not worth its cost.
    # In so short a run Adam's longer memory (0.99) is worth a quarter of the iterations.
    "laptop": Recipe(
        steps=5200,
        stages=(Stage(0, (16,), 32),),
        lr=5e-3,
        lr_end=1e-5,
        tau_until=TAU_UNTIL,
        aux_from=1.0,
        micro_batch=None,
        guidance=1.5,
        data=("one-shape",),
        text="words",
        txt_len=14,
        autoencoder="pixels",
        betas=(0.9, 0.99),
    ),
    # Sec. 4.2: 300k iterations, other settings as in Sec. 4.1: tau rises over all of them, and they end before the
    # iteration at which the auxiliary term would join.
    "0.5b": Recipe(
        steps=300_000,
        stages=(Stage(0, (256,), 1024),),
        lr=3e-4,
        lr_end=1e-5,
        tau_until=1.0,
        aux_from=1.0,
        micro_batch=64,
        guidance=5.0,
    ),
    "2b": Recipe(
        steps=710_000,
        stages=(Stage(0, (256,), 1024), Stage(LARGER_FROM, (256, 512), 768)),
        lr=3e-4,
        lr_end=1e-5,
        tau_until=TAU_UNTIL,
        aux_from=AUX_FROM,
        micro_batch=16,
        guidance=5.0,
    ),
}


def make(size: str, **changes) -> Recipe:
    """The recipe of a size with some of its fields changed; None leaves a field as it is.

    `batch_size` and `side` change every stage: stages that become alike are merged.
    """
    side, batch_size = changes.pop("side", None), changes.pop("batch_size", None)
    base = RECIPES[size]
    stages = []
    for stage in base.stages:
        stage = replace(
            stage, sides=(side,) if side else stage.sides, batch_size=batch_size or stage.batch_size
        )
        if not stages or replace(stage, begin=stages[-1].begin) != stages[-1]:
            stages.append(stage)
    return replace(base, stages=tuple(stages), **{k: v for k, v in changes.items() if v is not None})


# ------------------------------------------------------------------------------------------------------------
# What a run will be and cost
# ------------------------------------------------------------------------------------------------------------
H100_FLOPS = 989e12  # dense bf16, NVIDIA's data sheet
ASSUMED_MFU = 0.40


def image_tokens(size: dict, side: int, factor: int) -> int:
    """Tokens of a picture of side x side pixels, behind an auto-encoder that shrinks sides by `factor`."""
    return (side // (factor * size["patch"])) ** 2


def latent_tokens(size: dict, shape: tuple[int, ...]) -> int:
    """Tokens of a sample in a batch of latents of this shape, [B, C, h, w]."""
    return shape[2] * shape[3] // size["patch"] ** 2


def forward_passes(plan: Recipe, objective: str, aux: bool) -> float:
    """The price of one training step in forward passes, with guidance in the target."""
    return (objectives.AUX_FORWARDS if aux else objectives.OBJECTIVES[objective].forwards) + plan.guided


def picture_flops(size: dict, plan: Recipe, objective: str, side: int, factor: int, aux: bool) -> float:
    """Operations of one training step per picture of side x side pixels."""
    tokens = image_tokens(size, side, factor)
    return forward_passes(plan, objective, aux) * model.forward_flops(size, tokens, plan.txt_len)


def run_flops(size: dict, plan: Recipe, objective: str, factor: int, start: int = 0) -> float:
    """Operations of a run from iteration `start` to its end, recomputation and frozen encoders not counted."""
    total = 0.0
    marks = sorted({start, *plan.begins(), min(plan.steps, math.ceil(plan.aux_from * plan.steps))})
    for begin, end in zip(marks, marks[1:]):
        if begin < start:
            continue
        stage, aux = plan.stage(begin), plan.aux(begin)
        each = sum(picture_flops(size, plan, objective, side, factor, aux) for side in stage.sides) / len(
            stage.sides
        )
        total += (end - begin) * stage.batch_size * each
    return total


def describe(size: dict, plan: Recipe, objective: str, factor: int, world: int) -> list[str]:
    """The recipe of a run in lines, as printed at its start."""
    begins, lines = plan.begins(), []
    for stage, begin, end in zip(plan.stages, begins, begins[1:]):
        sides = " and ".join(f"{side} x {side}" for side in stage.sides)
        turns = " in turns" * (len(stage.sides) > 1)
        micro = {side: plan.micro_batch_of(stage, side, world) for side in stage.sides}
        parts = ", ".join(
            f"{stage.batch_size // world // m} x {m}" + (f" at {side}" if len(micro) > 1 else "")
            for side, m in micro.items()
        )
        mu = ", ".join(f"{losses.mu_of_length(image_tokens(size, side, factor)):.2f}" for side in stage.sides)
        lines.append(
            f"iterations {begin:,} to {end:,}: {sides} pixels{turns}, {stage.batch_size} pictures "
            f"each ({world} process{'es' * (world > 1)} x {parts}), mu {mu}"
        )
    name = optimizers.OPTIMIZERS[plan.optimizer]
    lines.append(
        f"{name} {plan.betas}, learning rate {plan.lr:g} after {plan.warmup_steps():,} iterations, down to "
        f"{plan.lr_end:g}; gradients clipped at {plan.clip:g}; "
        f"EMA {plan.ema:g}; {plan.dropout:.0%} of prompts dropped"
        + (f"; {plan.wrong_captions:.3g} of captions wrong" if plan.wrong_captions else "")
    )
    if objective == "self_e":
        aux = "no auxiliary term"
        if plan.aux_from < 1:
            aux = f"auxiliary term from iteration {math.ceil(plan.aux_from * plan.steps):,}"
        lines.append(f"tau from 0 to 1 over {round(plan.tau_until * plan.steps):,} iterations; {aux}")
    return lines


def state_bytes(parameters: int, world: int, zero: bool, moments: int | None = None) -> dict[str, float]:
    """Bytes of what a process keeps on its device all the time, fp32: weights, gradients, the optimizer's moments, EMA.

    `moments` is how many numbers those are, None two a parameter: Adam's.
    """
    each, kept = 4.0 * parameters, 4.0 * (2 * parameters if moments is None else moments)
    return {"weights": each, "gradients": each, "Adam": kept / (world if zero else 1), "EMA": each}


def price(size: dict, plan: Recipe, objective: str, factor: int, start: int = 0) -> list[str]:
    """Operations and time left, in lines, by the number of H100 GPUs if it is more than a day of one."""
    flops = run_flops(size, plan, objective, factor, start)
    hours = flops / (H100_FLOPS * ASSUMED_MFU) / 3600
    time = f"{hours:,.1f} H100-hours" if hours > 1 else f"{3600 * hours:,.1f} H100-seconds"
    lines = [
        f"{flops:.2e} FLOP from iteration {start:,} on, {time} at {ASSUMED_MFU:.0%} of {H100_FLOPS / 1e12:.0f} "
        "TFLOP/s (an assumption; "
        "bench.py measures it)"
    ]
    if hours > 24:
        lines += [
            f"{n:6} GPU{'s:' if n > 1 else ': '} {hours / n / 24:8.1f} days" for n in (1, 8, 16, 32, 64, 128)
        ]
    return lines
