"""Examination propensities, by hand."""

import numpy as np
import pytest

from sicot_jax.events.propensity import (
    PositionCounts,
    estimate_propensity,
    power_law_propensity,
)


def test_two_pairs_at_two_positions():
    """By both pairs the second position is examined half as often as the first.

    6 of 10 and 3 of 10 clicks; 8 of 20 and 1 of 5. Information: 9 * 2/3 * 1/3 + 9 * 8/9 * 1/9 =
    2.889, as 9 clicks of each pair fall on the first position with the probabilities
    10 / (10 + 10 / 2) and 20 / (20 + 5 / 2).
    """
    counts = [[1, 0, 10, 6], [1, 1, 10, 3], [2, 0, 20, 8], [2, 1, 5, 1]]
    estimate = estimate_propensity(
        PositionCounts(*np.array(counts).T), num_positions=2, min_clicks=1
    )
    np.testing.assert_allclose(estimate.propensity, [1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(estimate.log_error, [0, 1 / np.sqrt(26 / 9)], rtol=1e-6)
    assert estimate.clicks.tolist() == [14, 4]
    assert estimate.source.startswith("estimated")
    np.testing.assert_allclose(estimate.weights(1.5), [1, 1.5])


def test_positions_are_connected_by_chains_of_pairs():
    """1 with 2 by one pair (1/2), 2 with 3 by another (1/2): the third position has 1/4, and the
    fourth, which none joins.
    """
    counts = [[1, 0, 10, 8], [1, 1, 10, 4], [2, 1, 10, 8], [2, 2, 10, 4], [3, 3, 10, 5]]
    estimate = estimate_propensity(
        PositionCounts(*np.array(counts).T), num_positions=4, min_clicks=1
    )
    np.testing.assert_allclose(estimate.propensity, [1, 0.5, 0.25, 0.25], rtol=1e-6)
    assert np.isnan(estimate.log_error).tolist() == [False, False, False, True]


def test_positions_with_few_clicks_take_the_propensity_above():
    counts = [[1, 0, 100, 80], [1, 1, 100, 40], [1, 2, 100, 3]]
    estimate = estimate_propensity(
        PositionCounts(*np.array(counts).T), num_positions=3, min_clicks=10
    )
    np.testing.assert_allclose(estimate.propensity, [1, 0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize("counts", [np.zeros((0, 4), int), np.array([[1, 0, 9, 5], [2, 1, 9, 5]])])
def test_without_variation_all_positions_weigh_one(counts):
    estimate = estimate_propensity(PositionCounts(*counts.T), num_positions=2, min_clicks=1)
    assert estimate.propensity.tolist() == [1, 1]
    assert estimate.source.startswith("none")


def test_power_law():
    np.testing.assert_allclose(power_law_propensity(3, 2.0).propensity, [1, 1 / 4, 1 / 9])
