"""What is trained, for how long, at which size and rate: the paper's recipe as data (S.2, Sec. 4.2).

    plan = recipe.RECIPES["2b"]
    plan.stage(600_000)             # the second stage: 256 and 512 pixels in turns, 768 pictures an iteration
    plan.first(600_000)             # the global index of the first sample of iteration 600,000
    plan.learning_rate(600_000), plan.tau(600_000), plan.aux(600_000)

Everything that changes during a run is a function of the iteration, given here (but for the EMA's first decays,
`train.train`). So there is no schedule to save, only the number of the iteration. Times are shares of the run (the
paper's iterations out of its 710k), so a run of any length goes through every part of its recipe. `2b` and
`0.1b` have the auxiliary stage; `--aux-from 0.775` adds it to the others.
"""

import math
from dataclasses import dataclass, replace

from engine import errors

# ------------------------------------------------------------------------------------------------------------
# The numbers
# ------------------------------------------------------------------------------------------------------------
# The milestones of the paper's 2B run (S.2), as shares of its 710k iterations.
TAU_UNTIL = 300 / 710
LARGER_FROM = 500 / 710
AUX_FROM = 550 / 710

SETTINGS = {
    # Classifier score only, the "Ours" of Table 2: in a quarter of an hour the auxiliary stage is not worth its cost.
    # Adam's longer memory (0.99) suits so short a run.
    "laptop": dict(
        steps=5200,
        stages=((0, (16,), 32),),  # (begin, as a share of the run; sides of the pictures; batch)
        lr=5e-3,
        tau_until=TAU_UNTIL,
        aux_from=1.0,
        micro_batch=None,
        guidance=1.5,
        t_max=0.94,
        data=("one-shape",),
        text="words",
        txt_len=14,
        autoencoder="pixels",
        betas=(0.9, 0.99),
    ),
    # One GPU, one night: a quarter of the paper's batch, its schedules in proportion, at 256 pixels alone. Not yet run.
    "0.1b": dict(
        steps=150_000, stages=((0, (256,), 256),), tau_until=TAU_UNTIL, aux_from=AUX_FROM, micro_batch=64
    ),
    # Sec. 4.2: 300k iterations, other settings as in Sec. 4.1: tau rises over all of them, and they end before the
    # iteration at which the auxiliary term would join.
    "0.5b": dict(steps=300_000, stages=((0, (256,), 1024),), tau_until=1.0, aux_from=1.0, micro_batch=64),
    "2b": dict(
        steps=710_000,
        stages=((0, (256,), 1024), (LARGER_FROM, (256, 512), 768)),
        tau_until=TAU_UNTIL,
        aux_from=AUX_FROM,
        micro_batch=16,
    ),
}


# ------------------------------------------------------------------------------------------------------------
# What they mean
# ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stage:
    """A part of the run with its own picture sizes and batch."""

    begin: float  # where it begins, as a share of the run's iterations
    sides: tuple[int, ...]  # of the pictures, pixels; iterations take turns among them
    batch_size: int  # global: over all processes and micro-batches


@dataclass(frozen=True)
class Recipe:
    """One training run. For the big sizes the numbers are the paper's where it gives one; `laptop` is made
    for a quarter of an hour."""

    steps: int  # iterations
    stages: tuple[Stage, ...]
    tau_until: float  # share of the run over which tau rises from 0 to 1 (s.13)
    aux_from: float  # share of the run after which the auxiliary term joins (S.1.2); 1 is never
    # Pictures a process computes at once, at most, at the first stage's first side; None: all of its own
    micro_batch: int | None
    lr: float = 3e-4  # peak learning rate, reached after the warm-up,
    lr_end: float = 1e-5  # and where its linear decay ends
    guidance: float = 5.0  # of the picture grids and the checkpoint's default
    t_max: float = 1.0  # the same; at which time at most the network is asked (sampler.py)
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
    # Micro-batches are multiples of it: of two samples one has s < t (s.13); other objectives need 4 or 8
    group: int = 2

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
        g, number, begins = 0, self.stage_number(step), self.begins()
        for stage, begin, end in zip(self.stages, begins, [*begins[1 : number + 1], step]):
            g = (-(-g // stage.batch_size) + end - begin) * stage.batch_size
        return g

    def side(self, step: int) -> int:
        """The side of the (square) pictures of iteration `step`: the sides of a stage take turns."""
        stage = self.stage(step)
        return stage.sides[self.first(step) // stage.batch_size % len(stage.sides)]

    def factor(self) -> int:
        """What the auto-encoder shrinks sides by, for --dry-run and bench.py, which load none; kl:A may have another."""
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
        share = stage.batch_size // world
        if self.micro_batch is None:
            return share
        base = self.stages[0].sides[0]
        most = max(self.group, self.micro_batch * base**2 // side**2)
        return max(m for m in range(self.group, share + 1, self.group) if share % m == 0 and m <= most)

    def check_division(self, world: int, micro_batch: int | None = None) -> None:
        """Raise UserError unless every stage's batch divides into `world` processes and equal micro-batches."""
        if micro_batch and micro_batch % self.group:
            raise errors.UserError(f"--micro-batch must be a multiple of {self.group}, not {micro_batch}")
        unit = world * math.lcm(self.group, micro_batch or 1)
        for stage in self.stages:
            if stage.batch_size % unit:
                raise errors.UserError(
                    f"a batch of {stage.batch_size} does not divide into {world} processes and equal micro-batches: "
                    f"--batch-size must be a multiple of {unit} here, such as {unit * max(1, stage.batch_size // unit)}"
                )


RECIPES = {
    size: Recipe(**settings | {"stages": tuple(Stage(*stage) for stage in settings["stages"])})
    for size, settings in SETTINGS.items()
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
