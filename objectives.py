"""The objectives that the one loop trains (Sec. 4.2): what the loop, the sampler and the price must know of each.

    objective = objectives.OBJECTIVES["self_e"]
    module = objective.build(network, ema, flags)        # one nn.Module, called like losses.SelfE
    draws = objective.draw(seed, step, index, shape)     # its random numbers
    for t, x, *_ in objective.trajectory(network, noise, cond, null, steps=4, guidance=1.5, draw_noise=fresh): ...

To add one, write its module and give it an entry here; flags of its own stand in FLAGS. The module is called as

    loss, stats = module(x0, c, null, fake, is_null, draws, tau, mu, aux)

stats holds what engine/monitor.py watches: t, s and loss, one value per sample (IMM: per group), all detached. What is
trained and saved is the network; a module has no parameters of its own.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import losses
import sampler
from peers import imm, meanflow, shortcut, tim, variants

# Choices of one objective or of some, words or numbers, as argparse takes them; `range` is the least and the most.
FLAGS = {
    "target": dict(default="renorm", choices=("renorm", "tar", "sum"), help="Eq. 20, Eq. 18 or Eq. 16"),
    "delta_scale": dict(default=1.0, range=(0, 100), help="times the self-evaluation; 0 is the control"),
    "null_branch": dict(
        default="online", choices=("online", "ema"), help="sees the null prompt (S.2: online)"
    ),
    "aux_from": dict(
        default=None, range=(0, 1), help="share of the run before the auxiliary term; 1 is never"
    ),
    "k": dict(default=0.9, range=(0, 1), help="share of the classifier term beside the auxiliary term"),
    "imm_k": dict(default=imm.K, range=(1, 20), type=int, help="IMM's steps of time, as a power of two"),
    "train_guidance": dict(default=1.0, range=(0.01, 100), help="scale of guidance in the target; 1 is off"),
    "derivative": dict(
        default="difference", choices=tuple(meanflow.DERIVATIVES), help="forward: exact, and not compiled"
    ),
    "loss_power": dict(default=1.0, range=(0, 1), help="errors are divided by their own power P; 0 is off"),
}


class Objective(NamedTuple):
    """What everyone but the objective's own module must know of it."""

    build: Callable  # (network, ema, the flags of train.py) -> the module
    below: float  # the share of samples with s < t
    evaluations: float  # passes without gradient for each of these samples
    guided: float = 0.0  # more such passes for guidance in the target, per sample of the batch
    group: int = 2  # batch and micro-batch are multiples of it
    flags: tuple[str, ...] = ()  # its own, of FLAGS
    s_rules: tuple[float, ...] = (0.0, 0.5, 1.0)  # the sensible ones of sampler.py, its default first
    # Of the time features (model.sinusoid); 1 for all peers but IMM, as their authors have it
    time_factor: float = 1000.0
    derives: bool = False  # the target holds a time derivative of the network: exact, or a difference in fp32
    other_draw: Callable | None = None  # instead of losses.draw
    trajectory: Callable = sampler.trajectory  # from noise to data; another one has guidance alone to choose

    @property
    def walks_as_the_paper(self) -> bool:
        """Whether its sampler is sampler.py, with eta, s_rule, space, t_max and mu."""
        return self.trajectory is sampler.trajectory

    def draw(self, *arguments, **more):
        """The random numbers of a micro-batch; arguments as for losses.draw, but for the share of s = t."""
        if self.other_draw:
            return self.other_draw(*arguments, **more)
        return losses.draw(*arguments, p_equal=1 - self.below, **more)

    def forwards(self, aux: bool = False, guided: bool = False) -> float:
        """The price of a training step in forward passes of the batch; a backward pass counts as two.

        The auxiliary term of Self-E is a forward and a backward pass of the samples with s < t.
        """
        return 3 + self.evaluations * self.below + 3 * self.below * aux + self.guided * guided


def self_e(network, ema, flags, module=losses.SelfE, **departures) -> losses.SelfE:
    """Self-E with the choices of Table 2. Flow matching is the same module with draws that never have s < t."""
    unconditional = {"online": network, "ema": ema}[flags.null_branch]
    choices = {"target": flags.target, "k": flags.k, "delta_scale": flags.delta_scale}
    return module(network, ema, unconditional=unconditional, **choices, **departures)


def variant(**departures) -> Callable:
    """Builds Self-E with something exchanged."""
    return functools.partial(self_e, module=variants.Variant, **departures)


def mean_flow(network, ema, flags, improved: bool) -> meanflow.MeanFlow:
    return meanflow.MeanFlow(network, flags.train_guidance, improved, flags.derivative, flags.loss_power)


SELF_E = Objective(
    self_e, below=0.5, evaluations=2, flags=("target", "k", "delta_scale", "null_branch", "aux_from")
)
VARIANTS = {  # Self-E with something exchanged: questions of experiments/rows.py
    "self_e_literal_null": SELF_E._replace(build=variant(null_target="literal")),
    "self_e_quarter_lambda": SELF_E._replace(build=variant(lam_scale=0.25)),
    "self_e_middle_lambda": SELF_E._replace(build=variant(lam_time="middle")),
    "self_e_mostly_equal": SELF_E._replace(below=0.25, group=4),  # three quarters learn from data alone
}
PUSHFORWARD = functools.partial(imm.trajectory, start=1.0)
DERIVES = dict(trajectory=PUSHFORWARD, guided=2.0, time_factor=1.0, derives=True)
MEANFLOW = dict(**DERIVES, flags=("train_guidance", "derivative", "loss_power"))

OBJECTIVES = {
    "self_e": SELF_E,
    "flow_matching": Objective(self_e, below=0.0, evaluations=0, s_rules=(1.0,)),
    "imm": Objective(
        lambda network, ema, flags: imm.IMM(network, flags.imm_k),
        below=1.0,
        evaluations=1,
        group=imm.M,
        flags=("imm_k",),
        other_draw=imm.draw,
        trajectory=imm.trajectory,
    ),
    "shortcut": Objective(
        lambda network, ema, flags: shortcut.Shortcut(network, ema, flags.train_guidance),
        below=1 / 8,
        evaluations=2,
        guided=2 / 8,
        group=8,
        flags=("train_guidance",),
        time_factor=1.0,
        trajectory=shortcut.trajectory,
    ),
    "meanflow": Objective(
        functools.partial(mean_flow, improved=False), below=0.25, evaluations=2, group=4, **MEANFLOW
    ),
    "improved_meanflow": Objective(
        functools.partial(mean_flow, improved=True), below=0.5, evaluations=3, **MEANFLOW
    ),
    "tim": Objective(
        lambda network, ema, flags: tim.TiM(network, ema, flags.train_guidance, flags.loss_power),
        below=0.5,
        evaluations=2,
        flags=("train_guidance", "loss_power"),
        **DERIVES,
    ),
} | VARIANTS
