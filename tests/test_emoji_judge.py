"""The judge of emoji on tiles of the tests' own: distances counted by hand, mixtures of a known share."""

import numpy as np
import pytest
from emoji_tiles import coarse_source

import emoji
from experiments import emoji_judge


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Twelve concepts by three makers: coarse random pictures, of which no two are alike."""
    path = tmp_path_factory.mktemp("tiles") / "tiles.npz"
    return emoji_judge.Judge(coarse_source(path, [["animal"]] * 12, 8, 16))


def test_distances_are_those_counted_by_hand(judge):
    picture = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    nearest, other_maker, other_concept = judge([picture])[0]
    counted = {}
    for i, m in np.ndindex(12, 3):
        moved = [emoji.shifted(judge.source.pictures[i, m], a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
        counted[i, m] = min(np.square(picture.astype(float) - original).mean() ** 0.5 for original in moved)
    first = min(counted, key=counted.get)
    others = {pair: far for pair, far in counted.items() if pair[0] != first[0]}
    other_makers = {pair: far for pair, far in counted.items() if pair[0] == first[0] and pair != first}
    for near, candidates in ((nearest, counted), (other_maker, other_makers), (other_concept, others)):
        best = min(candidates, key=candidates.get)
        assert near[:2] == best and near.distance == pytest.approx(counted[best], rel=1e-3)


def test_originals_pass_and_what_shows_no_single_one_fails(judge):
    shares = emoji_judge.passing(judge, emoji_judge.specimens(judge, 0, 100))
    assert shares.pop("originals, noise and shift") >= 0.98
    assert len(shares) == 5 and max(shares.values()) <= 0.01, shares


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
    assert set(carriers["a 3D thing 3"]) == {(3, 0)} and set(carriers["an animal"]) == set(every)
    assert set(carriers["a thing 3"]) == {(3, m) for m in range(3)}
    assert sum(sum(shares.values()) for shares in carriers.values()) == pytest.approx(len(every))
    verdict = judge([source.pictures[3, 1]])[0]
    assert verdict.right(carriers["a thing 3"]) and verdict.right(carriers["a soft thing 3"])
    assert not verdict.right(carriers["a 3D thing 3"])


def test_variety_counts_what_draws_from_the_data_would_show():
    shares = {(0, 0): 0.2, (1, 0): 0.1, (2, 0): 0.1}
    g = np.random.default_rng(0)
    drawn = [len(set(g.choice(3, 4, p=[0.5, 0.25, 0.25]).tolist())) for _ in range(20000)]
    shown, expected = emoji_judge.variety([(0, 0), (0, 0), (2, 0), (2, 0)], shares)
    assert shown == 2 and expected == pytest.approx(np.mean(drawn), abs=0.02)
