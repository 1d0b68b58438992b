"""Samples of the toy networks, and how far they are from the data.

evaluate(net, member)              # {"1": measures, "2": ..., "50": ...} by number of steps
evaluate(None, member)             # the floor: fresh data, measured as if it had been generated
"""

import numpy as np
import torch
from torch import Tensor

from objectives import OBJECTIVES
from rng import normal, rng
from toy.training import Member, Net

BUDGETS = (1, 2, 4, 8, 50)  # network evaluations, Tab. 1 and one step
SAMPLES, REFERENCE = 1000, 4000  # per condition: generated, and fresh data to compare with


def generate(net: Net, member: Member, c: Tensor, steps: int, objective="self_e", **choices) -> Tensor:
    """Samples [n, 2] for the conditions c [n]. The choices go to sampler.trajectory, or to the sampler of `objective`
    where it has its own.

    The noise is a function of the member's seed and the step, so it is the same for every objective and every choice.
    """

    def noise(k: int) -> Tensor:
        return normal(member.seed, "toy sampling", [(k,)], (len(c), 2))[0]

    choices["draw_noise"] = lambda k: noise(k + 1)
    trajectory, null = OBJECTIVES[objective].trajectory, member.q.null(c)
    *_, end = trajectory(net, noise(0), (c,), (null,), steps=steps, **choices)
    return end[1]


def within(x: Tensor) -> float:
    """E|X - X'| over pairs of different samples."""
    return float(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)))


def energy_distance(x: Tensor, y: Tensor, within_y: float | None = None) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased: zero for equal distributions only, and equal ones scatter around it."""
    return 2 * float(torch.cdist(x, y).mean()) - within(x) - (within(y) if within_y is None else within_y)


class Truth:
    """q(x0 | c) of one member and one condition: its modes, and fresh data to compare with."""

    def __init__(self, member: Member, c: int):
        q = member.q
        present = q.table[c] > 0  # all modes for the null prompt, which has row C of the table
        self.means, self.std, self.weights = q.m[present], q.v[present].sqrt(), q.table[c][present]
        self.data = q.sample(torch.full((REFERENCE,), c), rng(member.seed, "toy reference", c))
        self.within = within(self.data)

    def measure(self, x: Tensor) -> dict:
        """Of the samples x [n, 2]:

        energy      energy distance to the data
        off_modes   share of the samples that are further than 4 standard deviations from every mode
        mass_error  total variation between the shares of the samples nearest to each mode and the true ones
        """
        distance = torch.cdist(x, self.means) / self.std
        mass = torch.bincount(distance.argmin(1), minlength=len(self.means)) / len(x)
        return {
            "energy": energy_distance(x, self.data, self.within),
            "off_modes": float((distance.min(1).values > 4).float().mean()),
            "mass_error": float((mass - self.weights).abs().sum() / 2),
        }


def evaluate(net: Net | None, member: Member, labels=True, **choices) -> dict:
    """{"1": measures, ..., "50": measures}, averaged over the conditions.

    labels False asks the null prompt instead. net None measures fresh data against fresh data, the floor.
    """
    q, result = member.q, {}
    conditions = list(range(q.C)) if labels else [q.C]
    truth = [Truth(member, k) for k in conditions]
    c = torch.tensor(conditions).repeat_interleave(SAMPLES)
    for steps in BUDGETS:
        if net is None:
            x = q.sample(c, rng(member.seed, "toy floor", steps))
        else:
            x = generate(net, member, c, steps, **choices)
        measured = [part.measure(a) for part, a in zip(truth, x.split(SAMPLES))]
        result[str(steps)] = {key: float(np.mean([m[key] for m in measured])) for key in measured[0]}
    return result
