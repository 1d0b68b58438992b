"""Samples of the toy networks, and how far they are from the data.

evaluate(net, members)              # for each member {"1": measures, "2": ..., "50": ...} by number of steps
evaluate(None, members)             # the floor: fresh data, measured as if it had been generated
"""

import numpy as np
import torch
from torch import Tensor

from objectives import OBJECTIVES
from rng import normal, rng
from toy.training import Member, Net, assemble

BUDGETS = (1, 2, 4, 8, 50)  # network evaluations, Tab. 1 and one step
SAMPLES, REFERENCE = 1000, 4000  # per condition: generated, and fresh data to compare with


def generate(net: Net, members: list[Member], c: Tensor, steps: int, objective="self_e", **choices) -> Tensor:
    """Samples [E, n, 2] for the conditions c [n] (every member the same). The choices go to sampler.trajectory, or to
    the sampler of `objective` where it has its own.

    The noise is a function of the member's seed and the step, so every objective and every choice meets the same.
    """
    if len(members) > 1 and choices.get("guidance", 1.0) != 1:
        # Guidance joins two branches in one batch, which an ensemble would deal out to the wrong members.
        alone = [(assemble([m], [net.weights_of(e)]), [m]) for e, m in enumerate(members)]
        return torch.cat([generate(*one, c, steps, objective, **choices) for one in alone])

    def noise(k: int) -> Tensor:
        return torch.cat([normal(m.seed, "toy sampling", [(k,)], (len(c), 2))[0] for m in members])

    prompts = c.repeat(len(members))
    null = torch.full_like(prompts, members[0].q.C)
    choices["draw_noise"] = lambda k: noise(k + 1)
    trajectory = OBJECTIVES[objective].trajectory
    *_, end = trajectory(net, noise(0), (prompts,), (null,), steps=steps, **choices)
    return end[1].view(len(members), len(c), 2)


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


def evaluate(net: Net | None, members: list[Member], labels=True, budgets=BUDGETS, **choices) -> list[dict]:
    """For each member {"1": measures, ..., "50": measures}, averaged over the conditions.

    labels False asks the null prompt instead. net None measures fresh data against fresh data, the floor.
    """
    C = members[0].q.C
    conditions = list(range(C)) if labels else [C]
    truth = [[Truth(m, k) for k in conditions] for m in members]
    c = torch.tensor(conditions).repeat_interleave(SAMPLES)
    result = [{} for _ in members]
    for steps in budgets:
        if net is None:
            x = [m.q.sample(c, rng(m.seed, "toy floor", steps)) for m in members]
        else:
            x = generate(net, members, c, steps, **choices)
        for row, parts, samples in zip(result, truth, x):
            measured = [part.measure(a) for part, a in zip(parts, samples.split(SAMPLES))]
            row[str(steps)] = {key: float(np.mean([m[key] for m in measured])) for key in measured[0]}
    return result
