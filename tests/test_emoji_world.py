"""Perfect evaluators on emoji of the tests' own: Bayes' rule picture by picture, and Delta's budget."""

import numpy as np
import pytest
import torch
from emoji_tiles import coarse_source

from experiments import emoji_judge
from toy import emoji_world, pictures


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Eight concepts, of which the first four share a tag."""
    path = tmp_path_factory.mktemp("tiles") / "tiles.npz"
    return coarse_source(path, [["common"]] * 4 + [[]] * 4, 4, 8)


def test_posterior_means_are_bayes_rule_picture_by_picture(source):
    texts = ["a common", "group 0", "a thing 5"]
    world = emoji_world.World(source, texts, 0.2)
    x_t, t = torch.randn(4, 8 * 8 * 3, generator=torch.Generator().manual_seed(0)), 0.8
    for i, text in enumerate([*texts, None]):
        top, bottom = np.zeros((4, 192)), np.zeros((4, 1))
        for concept, maker in source.pairs:
            captions = source.captions(concept, maker)
            share = sum(c.share for c in captions if c.text == text) if text else 1.0
            x0 = ((source.pictures[concept, maker] / 127.5 - 1) * 0.2).transpose(2, 0, 1).ravel()
            near = np.exp(-np.square(x_t.numpy() - (1 - t) * x0).sum(1, keepdims=True) / (2 * t**2) + 150)
            top, bottom = top + share * near * x0, bottom + share * near
        mean = world.posterior_mean(x_t, t, torch.full((4,), i))
        assert mean.numpy() == pytest.approx(top / bottom, abs=1e-4)


def test_flow_matching_on_exact_prompts_draws_them_at_once(source):
    judge, texts = emoji_judge.Judge(source), source.prompts("exact")[:5]
    world = emoji_world.World(source, texts)
    scores = emoji_world.draw(world, judge, "flow matching", 2, pictures.SETTINGS[0], (0, 0))
    assert scores["right"] == scores["variety"] == scores["score"] == 1.0 and scores["total"] == 20
    unseen = emoji_judge.summary(source, texts, [judge([source.pictures.mean((0, 1)).astype(np.uint8)])] * 5)
    assert unseen["right"] == unseen["score"] == 0.0 and unseen["variety"] is None
