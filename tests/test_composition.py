"""Held-out pairs: palettes told apart on pictures never seen, and what knowing models and copying ones score."""

import numpy as np
import pytest

import emoji
import sample
from experiments import composition


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Forty concepts, coarse random pictures; every maker has a third of the brightness for itself."""
    path = tmp_path_factory.mktemp("tiles") / "tiles.npz"
    g = np.random.default_rng(0)
    dark = g.integers(0, 80, (40, 3, 8, 8, 3)) + 85 * np.arange(3)[:, None, None, None]
    words = [emoji.Concept(f"{i}", f"thing {i}", ["one"], "group", "animals-nature") for i in range(40)]
    emoji.write(path, dark.astype(np.uint8).repeat(8, 2).repeat(8, 3), words)
    return composition.Pairs(emoji.Emoji(16, "emoji", path))


def test_a_palette_is_told_on_pictures_that_training_never_shows(pairs):
    assert len(pairs.pairs) > 5
    held_out = np.stack([pairs.source.pictures[pair] for pair in pairs.pairs.values()])
    assert (pairs.palette(held_out) == [maker for _, maker in pairs.pairs.values()]).all()


@pytest.mark.parametrize("moved, concept, maker", [((0, 0), 1, 1), ((0, 1), 1, 0), ((1, 0), 0, 1)])
def test_concept_and_maker_are_asked_apart(pairs, monkeypatch, moved, concept, maker):
    """A model that draws another maker's picture, or another concept's."""

    def draws(loaded, prompts, keys, **choices):
        assert len(set(keys)) == len(keys)  # no noise is used twice
        asked = [pairs.pairs[prompt] for prompt in prompts]
        return [pairs.source.pictures[(c + moved[0]) % 40, (m + moved[1]) % 3] for c, m in asked]

    monkeypatch.setattr(sample, "generate", draws)
    found = composition.measure(None, pairs, 4)
    assert (found["concept"], found["maker"]) == (concept, maker)
    assert found["both"] == found["original"] == concept * maker


def test_originals_are_right_and_other_makers_pictures_are_not(pairs):
    scores = pairs.references()
    assert scores["the original"]["both"] == 1 and scores["another maker's"]["concept"] == 1
    assert scores["another maker's"]["both"] == 0
