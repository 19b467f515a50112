"""Draws of the bootstrap: fixed numbers, whatever the version of NumPy."""

import numpy as np
import pytest

from sicot_jax.common.bootstrap import FixedDraws, paired_interval


def test_draws_are_these_numbers():
    draws = FixedDraws(7)
    assert draws.counts(1000, np.array([0.1, 0.2, 0.3, 0.4]), 2).tolist() == [
        [106, 189, 280, 425],
        [108, 203, 293, 396],
    ]
    assert draws.integers(5, (2, 5)).tolist() == [[2, 2, 2, 2, 2], [4, 4, 3, 3, 3]]
    assert draws.integers(5, (0,)).size == 0


def test_integers_go_on_where_the_last_ones_ended():
    """An odd number of draws leaves half of a 64-bit number, which comes next."""
    together, apart = FixedDraws(3), FixedDraws(3)
    parts = [apart.integers(7, (size,)) for size in (3, 1, 4, 2)]
    np.testing.assert_array_equal(np.concatenate(parts), together.integers(7, (10,)))


def test_draws_are_fair():
    draws = FixedDraws(0)
    np.testing.assert_allclose(np.bincount(draws.integers(4, (40_000,))), 10_000, rtol=0.04)
    counts = draws.counts(100, np.array([0.2, 0.8]), 10_000)
    assert counts.dtype == np.int64
    assert (counts.sum(1) == 100).all()
    # Standard deviation of a count: sqrt(100 * 0.2 * 0.8) = 4
    np.testing.assert_allclose([counts[:, 0].mean(), counts[:, 0].std()], [20, 4], rtol=0.03)


def test_intervals_use_no_stream_that_may_change(monkeypatch):
    """NumPy 2.5 changed `Generator.multinomial`, and with it committed intervals."""

    def refuse(*args):
        pytest.fail("a stream that NumPy does not promise to keep (NEP 19)")

    monkeypatch.setattr(np.random, "default_rng", refuse)
    monkeypatch.setattr(np.random, "Generator", refuse)
    difference = 100.0 * np.resize([1, 0, 0, -1, 0, 1, 0, 0, 0, 0, 1], (3, 200))
    low, high = paired_interval(difference, np.arange(200) % 37)
    np.testing.assert_allclose([low, high], [13.362781886481175, 23.10538364305744], rtol=1e-12)
