"""How much places are looked at, by hand."""

import numpy as np
import pytest

from sicot_jax.events import propensity as position


def test_two_pairs_at_two_places():
    """6 of 10 and 3 of 10 clicks; 8 of 20 and 1 of 5: by both the second place is looked at half as
    often.

    Information: 9 * 2/3 * 1/3 + 9 * 8/9 * 1/9 = 2.889, as 9 clicks of each pair fall on the first
      place with 10 / (10 + 10 / 2) and 20 / (20 + 5 / 2).
    """
    counts = [[1, 0, 10, 6], [1, 1, 10, 3], [2, 0, 20, 8], [2, 1, 5, 1]]
    found = position.estimate(*np.array(counts).T, places=2, least_clicks=1)
    np.testing.assert_allclose(found.chance, [1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found.error, [0, 1 / np.sqrt(26 / 9)], rtol=1e-6)
    assert found.clicks.tolist() == [14, 4]
    assert found.source.startswith("estimated")
    np.testing.assert_allclose(found.weights(1.5), [1, 1.5])


def test_places_join_through_chains_of_pairs():
    """1 with 2 by one pair (1/2), 2 with 3 by another (1/2): the third place has 1/4, and the
    fourth, which none joins.
    """
    counts = [[1, 0, 10, 8], [1, 1, 10, 4], [2, 1, 10, 8], [2, 2, 10, 4], [3, 3, 10, 5]]
    found = position.estimate(*np.array(counts).T, places=4, least_clicks=1)
    np.testing.assert_allclose(found.chance, [1, 0.5, 0.25, 0.25], rtol=1e-6)
    assert np.isnan(found.error).tolist() == [False, False, False, True]


def test_few_clicks_tell_nothing_of_a_place():
    counts = [[1, 0, 100, 80], [1, 1, 100, 40], [1, 2, 100, 3]]
    found = position.estimate(*np.array(counts).T, places=3, least_clicks=10)
    np.testing.assert_allclose(found.chance, [1, 0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize("counts", [np.zeros((0, 4), int), np.array([[1, 0, 9, 5], [2, 1, 9, 5]])])
def test_without_variation_all_places_weigh_one(counts):
    found = position.estimate(*counts.T, places=2, least_clicks=1)
    assert found.chance.tolist() == [1, 1]
    assert found.source.startswith("none")


def test_assumed():
    np.testing.assert_allclose(position.assumed(3, 2.0).chance, [1, 1 / 4, 1 / 9])
