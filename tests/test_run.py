"""engine/run.py: what a checkpoint says of its pictures; the rehearsal before the first iteration on a GPU, here on the CPU."""

import copy
import types

import pytest
import torch
from programs import TINY

import losses
import model
import recipe
from engine import errors, feed, optimizers, processes
from engine.run import Run, rehearse


def test_a_checkpoint_draws_the_largest_pictures_of_its_stage():
    """Where several sides take turns, config.json names the larger, and the mu of its tokens."""
    stages = recipe.Stage(0, (16,), 8), recipe.Stage(0.5, (16, 32), 8)
    plan = recipe.replace(recipe.make("laptop", steps=10), stages=stages)
    codec = feed.Codec(None, None, torch.device("cpu"), patch=4)
    fields = dict.fromkeys(Run._fields) | {
        "plan": plan,
        "codec": codec,
        "feed": feed.Feed(plan, None, 0, codec),
    }
    for step, side in ((4, 16), (5, 32)):
        expected = {"side": side, "mu": losses.mu_of_length(side**2 // 16), "buckets": [[side, side, 1.0]]}
        assert Run(**fields).pictures_of_stage(step) == expected


def test_the_rehearsal_meets_every_stage_and_leaves_nothing_behind(monkeypatch):
    plan = recipe.replace(
        recipe.make("laptop", steps=10, aux_from=0.8, micro_batch=4),
        txt_len=5,
        stages=(recipe.Stage(0, (16,), 8), recipe.Stage(0.5, (16, 32), 8)),
    )
    network = model.Denoiser(**TINY)
    objective, seen = losses.SelfE(network, copy.deepcopy(network).requires_grad_(False)), []
    codec, ranks = feed.Codec(None, None, torch.device("cpu"), patch=4), processes.Ranks()
    data_feed, args = feed.Feed(plan, losses.draw, 0, codec), types.SimpleNamespace(zero=False)
    run = types.SimpleNamespace(plan=plan, feed=data_feed, codec=codec, ranks=ranks, args=args)
    adam = optimizers.build("adam", network, plan.lr, plan.betas)
    right = objective.forward

    def forward(x0, *batch):
        seen.append((tuple(x0.shape), batch[-1]))
        return right(x0, *batch)

    monkeypatch.setattr(objective, "forward", forward)
    before = copy.deepcopy(network.state_dict())
    rehearse(run, network, objective, adam)
    assert seen == [((4, 3, 16, 16), False), ((4, 3, 16, 16), True), ((2, 3, 32, 32), True)]
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    def full(*a):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(objective, "forward", full)
    with pytest.raises(errors.UserError, match="--micro-batch"):
        rehearse(run, network, objective, adam)
