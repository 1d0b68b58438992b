"""rng.py: the same numbers everywhere, different numbers for different purposes."""

import numpy as np
import torch

import rng as randomness


def test_a_row_depends_on_its_own_key_alone():
    keys = [(3, 0), (3, 7), (4, 0), (0, 3)]
    rows = randomness.normal(1, "noise", keys, (2, 5))
    assert rows.shape == (4, 2, 5) and rows.dtype == torch.float32
    for i, key in enumerate(keys):
        assert torch.equal(randomness.normal(1, "noise", [key], (2, 5))[0], rows[i])
    assert torch.equal(randomness.normal(1, "noise", keys[::-1], (2, 5)), rows.flip(0))
    assert randomness.normal(1, "time", keys, ()).shape == (4,)


def test_every_part_of_the_key_counts():
    """Seeds, purposes, steps, indices and their order: no two of these streams share a number."""
    keys = [(1, 2), (2, 1), (1, 3), (12, 0)]
    calls = [(seed, p, *key) for seed in (0, 1, 2**40) for p in ("noise", "time", "Noise") for key in keys]
    values = np.concatenate([randomness.rng(*call).random(8) for call in calls])
    assert len(np.unique(values)) == len(values) == 8 * 36


def test_global_random_state_is_neither_read_nor_changed():
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        states.append(randomness.normal(5, "noise", [(1, 1)], (3,)))
        assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert torch.equal(*states)


def test_the_numbers_themselves():
    """Written down once: a change here changes every seeded result, on this machine or between two of them."""
    integers = [2101075135, 2763782779, 2150871399, 2719410709]
    assert randomness.rng(7, "noise", 3, 11).integers(0, 2**32, 4).tolist() == integers
    normals = [0.98642856, 0.96624613, -0.68490297, 0.44363254]
    np.testing.assert_allclose(randomness.normal(7, "noise", [(3, 11)], (4,))[0], normals, rtol=1e-6)
