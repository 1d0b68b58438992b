"""The judge of emoji on tiles of the tests' own: distances counted by hand, mixtures of a known share."""

import numpy as np
import pytest

import emoji
from experiments import emoji_judge


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Twelve concepts by three makers: coarse random pictures, of which no two are alike."""
    path = tmp_path_factory.mktemp("tiles") / "tiles.npz"
    coarse = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8, 3), dtype=np.uint8)
    tags = ["animal"]
    words = [emoji.Concept(f"{i}", f"thing {i}", tags, "birds", "animals-nature") for i in range(12)]
    emoji.write(path, coarse.repeat(8, 2).repeat(8, 3), words)
    return emoji_judge.Judge(emoji.Emoji(16, "emoji", path))


def test_distances_are_those_counted_by_hand(judge):
    picture = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    nearest, other_maker, other_concept = judge([picture])[0]
    counted = {}
    for i, m in np.ndindex(12, 3):
        moved = [emoji.shifted(judge.source.pictures[i, m], a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
        counted[i, m] = min(np.square(picture.astype(float) - original).mean() ** 0.5 for original in moved)
    first = min(counted, key=counted.get)
    for near, among in (
        (nearest, list(counted)),
        (other_maker, [p for p in counted if p[0] == first[0] and p != first]),
        (other_concept, [p for p in counted if p[0] != first[0]]),
    ):
        best = min(among, key=counted.get)
        assert near[:2] == best and near.distance == pytest.approx(counted[best], rel=1e-3)


def test_originals_pass_and_what_shows_no_single_one_fails(judge):
    for kind, some in emoji_judge.specimens(judge.source, 0, 100).items():
        verdicts = judge([picture for picture, _ in some])
        if kind.startswith("originals"):
            right = [v.clear and judge.says(v).startswith(words) for v, (_, words) in zip(verdicts, some)]
            assert np.mean(right) >= 0.98
        else:
            assert np.mean([v.clear for v in verdicts]) <= 0.01, kind


@pytest.mark.parametrize("share, passes", [(0.52, False), (0.62, True)])
def test_a_mixture_passes_from_a_share_of_four_sevenths(judge, share, passes):
    pictures = judge.source.pictures.astype(float)
    mixed = [share * pictures[0, 0] + (1 - share) * other for other in (pictures[5, 0], pictures[0, 1])]
    concepts, makers = judge([x.round().astype(np.uint8) for x in mixed])
    assert concepts.clear is passes and concepts.pair == (0, 0)
    assert makers.clear is passes and makers.clear_concept


def test_what_fits_a_prompt_is_what_carries_it(judge):
    source = judge.source
    every = source.pairs + source.held_out_pairs
    carriers = source.carriers(every)
    assert set(carriers["a 3D thing 3"]) == {(3, 0)} and set(carriers["a thing 3"]) == {
        (3, m) for m in range(3)
    }
    assert set(carriers["an animal"]) == set(every)
    assert sum(sum(own.values()) for own in carriers.values()) == pytest.approx(len(every))
    verdict = judge([source.pictures[3, 1]])[0]
    assert [verdict.right(carriers[p]) for p in ("a thing 3", "a soft thing 3", "a 3D thing 3")] == [
        True,
        True,
        False,
    ]
    assert set(source.prompts("label")) == {f"a thing {i}" for i in range(12)}


def test_variety_counts_what_draws_from_the_data_would_show():
    shares = {(0, 0): 0.2, (1, 0): 0.1, (2, 0): 0.1}
    g = np.random.default_rng(0)
    drawn = [len(set(g.choice(3, 4, p=[0.5, 0.25, 0.25]).tolist())) for _ in range(20000)]
    shown, expected = emoji_judge.variety([(0, 0), (0, 0), (2, 0), (2, 0)], shares)
    assert shown == 2 and expected == pytest.approx(np.mean(drawn), abs=0.02)
