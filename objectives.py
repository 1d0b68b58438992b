"""The objectives that the one loop trains (Sec. 4.2): what the loop, the sampler and the price must know of each.

    objective = objectives.OBJECTIVES["self_e"]
    module = objective.build(network, ema, flags)        # one nn.Module, called like losses.SelfE

To add one, write its module, give it an entry here, and a row in experiments/rows.ROWS. The module is called as

    loss, stats = module(x0, c, null, fake, is_null, draws, tau, mu, aux)

stats holds what engine/monitor.py watches: t, s and loss, one value per sample (IMM: per group), all detached.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import losses
from peers import imm, meanflow, shortcut, tim, variants


class Objective(NamedTuple):
    """What everyone but the objective's own module must know of it."""

    build: Callable  # (network, ema, the flags of train.py) -> the module
    draw: Callable  # the random numbers of a micro-batch, like losses.draw
    forwards: (
        float  # a training step's price, in forward passes of the batch: 1 forward + 2 backward + evaluations
    )
    guided: float = 0.0  # forward passes more for guidance in the target (--train-guidance)
    group: int = 2  # batch and micro-batch are multiples of it
    flags: tuple[str, ...] = ()  # of train.py's flags below "the objective", those that are its own
    s_rules: tuple[float, ...] = (
        0.0,
        0.5,
        1.0,
    )  # the rules for s_k that make sense (sampler.py), its default first
    time_factor: float = (
        1000.0  # of the time features (model.sinusoid); 1 for peers/, as in their authors' code
    )
    derives: bool = (
        False  # the target holds a time derivative of the network: exact, or a difference that needs fp32
    )
    trajectory: Callable | None = None  # its own sampler, like imm.trajectory; None: sampler.trajectory


def self_e(network, ema, flags, module=losses.SelfE, **departures) -> losses.SelfE:
    """Self-E with the choices of Table 2. Flow matching is the same module with draws that never have s < t."""
    null_branch = {"online": network, "ema": ema}[flags.null_branch]
    choices = {"target": flags.target, "k": flags.k, "delta_scale": flags.delta_scale}
    return module(network, ema, unconditional=null_branch, **choices, **departures)


def variant(**departures) -> Callable:
    """Builds Self-E with something exchanged."""
    return functools.partial(self_e, module=variants.Variant, **departures)


def mean_flow(network, ema, flags, improved: bool) -> meanflow.MeanFlow:
    return meanflow.MeanFlow(network, flags.train_guidance, improved, flags.derivative, flags.loss_power)


FLOW_MAP = functools.partial(imm.trajectory, start=1.0)  # x_s = x_t - (t - s) V, from t = 1 in equal steps

SELF_E = Objective(
    self_e,
    functools.partial(losses.draw, p_equal=0.5),
    forwards=4.0,  # two evaluations of half of the batch
    flags=("target", "k", "delta_scale", "null_branch", "aux_from"),
)
VARIANTS = {  # Self-E with something exchanged: questions of experiments/rows.py
    "self_e_literal_null": SELF_E._replace(build=variant(null_target="literal")),
    "self_e_quarter_lambda": SELF_E._replace(build=variant(lam_scale=0.25)),
    "self_e_middle_lambda": SELF_E._replace(build=variant(lam_time="middle")),
    "self_e_mostly_equal": SELF_E._replace(
        draw=functools.partial(losses.draw, p_equal=0.75),
        forwards=3.5,  # two evaluations of a quarter
        group=4,
        flags=SELF_E.flags[:-1],  # no auxiliary term
    ),
}
OBJECTIVES = {
    "self_e": SELF_E,
    "flow_matching": Objective(
        self_e, functools.partial(losses.draw, p_equal=1.0), forwards=3.0, s_rules=(1.0,)
    ),
    "imm": Objective(
        lambda network, ema, flags: imm.IMM(network, flags.imm_k),
        imm.draw,
        forwards=4.0,
        group=imm.M,
        flags=("imm_k",),
        trajectory=imm.trajectory,
    ),
    "shortcut": Objective(
        lambda network, ema, flags: shortcut.Shortcut(network, ema, flags.train_guidance),
        functools.partial(losses.draw, p_equal=7 / 8),
        forwards=3.25,
        guided=0.25,  # two evaluations of an eighth
        group=8,
        flags=("train_guidance",),
        time_factor=1.0,
        trajectory=shortcut.trajectory,
    ),
    "meanflow": Objective(
        functools.partial(mean_flow, improved=False),
        functools.partial(losses.draw, p_equal=0.75),
        forwards=3.5,
        guided=2.0,
        group=4,  # two evaluations of a quarter
        flags=("train_guidance", "derivative", "loss_power"),
        time_factor=1.0,
        derives=True,
        trajectory=FLOW_MAP,
    ),
    "improved_meanflow": Objective(
        functools.partial(mean_flow, improved=True),
        functools.partial(losses.draw, p_equal=0.5),
        forwards=4.5,
        guided=2.0,  # three evaluations of half
        flags=("train_guidance", "derivative", "loss_power"),
        time_factor=1.0,
        derives=True,
        trajectory=FLOW_MAP,
    ),
    "tim": Objective(
        lambda network, ema, flags: tim.TiM(network, ema, flags.train_guidance, flags.loss_power),
        functools.partial(losses.draw, p_equal=0.5),
        forwards=4.0,
        guided=2.0,  # two evaluations of half
        flags=("train_guidance", "loss_power"),
        time_factor=1.0,
        derives=True,
        trajectory=FLOW_MAP,
    ),
} | VARIANTS
AUX_FORWARDS = 5.5  # Self-E with the auxiliary term: a forward and a backward pass of half of the batch more
