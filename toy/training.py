"""A small two-time network in 2-D, and its training with losses.SelfE, the very module that train.py uses.

    net = train(Member("between", 0), target="tar")                 # returns the moving average of the weights

PAPER below lists every choice of the objective with the paper's value; train takes departures from it.
"""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

import losses
import objectives
from peers import imm, variants
from rng import rng
from toy.mixture import LAYOUTS, Mixture

STEPS, BATCH = 2000, 256


class Member(NamedTuple):
    """The data and the seed of one network. They also name every random number of its training."""

    layout: str
    seed: int

    @property
    def q(self) -> Mixture:
        return Mixture(**LAYOUTS[self.layout])


class Net(nn.Module):
    """V(x_t, t, s, c): a residual MLP of 40,000 weights (Eq. 6, s.9-s.10)."""

    FREQUENCIES = (1.0, 2.0, 4.0, 8.0, 16.0)

    def __init__(self, seed: int, conditions: int, width: int = 96, depth: int = 4):
        super().__init__()
        times = 2 * len(self.FREQUENCIES)
        prompts = 2 * (conditions + 1)  # c, the null prompt, and "fake image " + each of them
        self.blocks = [f"block{i}" for i in range(depth)]
        shapes = {"x": (2, width), "t": (times, width), "gap": (times, width), "prompt": (prompts, width)}
        for name, (fan_in, fan_out) in (shapes | dict.fromkeys(self.blocks, (width, width))).items():
            std = 1.0 if name == "prompt" else fan_in**-0.5
            init = std * rng(seed, f"weights of {name}").standard_normal((fan_in, fan_out))
            self.register_parameter(name, nn.Parameter(torch.tensor(init, dtype=torch.float32)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(1, fan_out)))
        self.out = nn.Parameter(torch.zeros(width, 2))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return torch.addmm(getattr(self, f"{name}_bias"), x, getattr(self, name))  # [B, width]

    def waves(self, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.tensor(self.FREQUENCIES)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)  # [B, times]

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor) -> Tensor:
        """x_t [B, 2], t and s [B], c [B] int64 -> V [B, 2]."""
        h = self.linear("x", x_t) + self.prompt[c]
        h = h + self.linear("t", self.waves(t)) + self.linear("gap", self.waves(t - s))  # s.9, s.10
        for name in self.blocks:
            h = h + self.linear(name, silu(h))
        return silu(h) @ self.out


PAPER = dict(
    objective="self_e",  # or a peer's of objectives.OBJECTIVES; tau_over to null_target are choices of self_e
    p_equal=0.5,  # share of s = t
    tau_over=0.42,  # share of the training over which tau rises from 0 to 1 (s.13); 0 starts at 1
    aux_from=None,  # share of the training after which the auxiliary term is on; None: never
    conditional="ema",  # which network evaluates with the condition,
    unconditional="online",  # and which with the null prompt
    target="renorm",  # Eq. 20; "tar": Eq. 18 as the target; "sum": Eq. 16 to the letter
    k=0.9,
    delta_scale=1.0,
    lam_scale=1.0,
    null_target="data",
    labels=True,  # False: no condition is ever shown
    wrong_labels=0.0,  # share of samples that are shown with the condition of another one
    train_guidance=1.0,  # of the targets of peers/; 1 is off
    imm_k=6,  # IMM's steps of the range of times, as a power of two; its paper has 12
    derivative="forward",  # of MeanFlow's target
    loss_power=1.0,  # of its own that MeanFlow and TiM divide each error by
)


def batches(member: Member, steps: int, labels: bool, wrong: float = 0.0, at_once: int = 100):
    """Yield (x0, c, is_null, z, u, eps, eps_s) for each step: a function of the member's layout, seed and the step.

    With probability `wrong` a sample is shown with the condition of another one.
    """
    q = member.q
    for start in range(0, steps, at_once):
        g, n = rng(member.seed, "toy batches", start), at_once * BATCH
        c = torch.from_numpy(g.integers(0, q.C, n))
        x0 = q.sample(c, g)
        if wrong:
            swaps = rng(member.seed, "toy wrong labels", start)  # numbers of their own: nothing else changes
            swapped = torch.from_numpy(swaps.random(n) < wrong)
            c = torch.where(swapped, c[torch.from_numpy(swaps.integers(0, n, n))], c)
        is_null = torch.from_numpy(g.random(n) < (0.1 if labels else 1.0))  # prompt dropout
        c = torch.where(is_null, q.C, c)
        z, u = (torch.from_numpy(a.astype(np.float32)) for a in (g.standard_normal(n), g.random(n)))
        eps, eps_s = (torch.from_numpy(g.standard_normal((n, 2)).astype(np.float32)) for _ in range(2))
        yield from zip(*(a.split(BATCH) for a in (x0, c, is_null, z, u, eps, eps_s)))


def step_of(net: Net, ema: Net, o: dict) -> nn.Module:
    """The training step of PAPER with its departures: the module that train.py uses, on the toy's networks."""
    if o["objective"] != "self_e":
        return objectives.OBJECTIVES[o["objective"]].build(net, ema, SimpleNamespace(**o))
    networks = {"online": net, "ema": ema}
    choices = {name: o[name] for name in ("target", "k", "delta_scale", "lam_scale", "null_target")}
    evaluators = networks[o["conditional"]], networks[o["unconditional"]]
    return variants.Variant(net, evaluators[0], unconditional=evaluators[1], **choices)


def train(member: Member, steps: int = STEPS, **changes) -> Net:
    """Train a network; `changes` are departures from PAPER. Returns the moving average of the weights."""
    if unknown := changes.keys() - PAPER.keys():
        raise TypeError(f"PAPER has no {', '.join(unknown)}")
    o, C = PAPER | changes, member.q.C
    net, ema = (Net(member.seed, C) for _ in range(2))
    ema.requires_grad_(False)
    step_loss = step_of(net, ema, o)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.9, 0.95))
    below = losses.below_positions(list(range(BATCH)), o["p_equal"])
    data = batches(member, steps, o["labels"], o["wrong_labels"])

    for i, (x0, c, is_null, z, u, eps, eps_s) in zip(range(steps), data):  # batches come by the hundred
        draws = losses.Draws(z, u, eps, eps_s, below)
        if o["objective"] == "imm":  # its groups share two uniform numbers
            draws = imm.Draws(torch.special.ndtr(z)[:: imm.M], u[:: imm.M], eps)
        tau = min(i / (o["tau_over"] * steps), 1.0) if o["tau_over"] > 0 else 1.0
        aux = o["aux_from"] is not None and i >= o["aux_from"] * steps
        null, fake = torch.full_like(c, C), c + C + 1
        loss, _ = step_loss(x0, (c,), (null,), (fake,), is_null, draws, tau, 0.0, aux)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {float(loss)} at step {i}: {o}")
        optimizer.zero_grad()
        loss.backward()
        warm_up, fall = min((i + 1) / 100, 1), 1 - i / steps
        optimizer.param_groups[0]["lr"] = 2e-3 * (warm_up * fall)
        optimizer.step()
        with torch.no_grad():
            keep = min(0.999, (1 + i) / (10 + i))
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - keep)
    return ema


TRAINED = {}  # studies that cross trainings with choices of the sampler share their networks


def trained(member: Member, steps: int, changes: dict) -> Net:
    """`train`, once in a process for each set of arguments."""
    key = repr((member, steps, sorted(changes.items())))
    if key not in TRAINED:
        TRAINED[key] = train(member, steps, **changes)
    return TRAINED[key]
