"""Normalised discounted cumulative gain."""

import math

import numpy as np
import pytest

from sicot_jax.search.ranker import ndcg, ndcg_per_list


def test_ndcg_by_hand():
    """Gains 1, 0, 3 in this order: 1 + 0 + 3 / 2 of at most 3 + 1 / log2(3)."""
    assert ndcg([1, 0, 3]) == pytest.approx(2.5 / (3 + 1 / math.log2(3)))
    assert ndcg([3, 1, 0]) == 1
    assert ndcg([1, 0, 3], k=1) == pytest.approx(1 / 3)
    assert math.isnan(ndcg([0, 0]))


def test_lists_are_sorted_by_score_and_lists_without_gains_left_out():
    gains = np.array([1.0, 0, 3, 0, 0, 5, 4])
    scores, list_id = np.array([3.0, 2, 1, 1, 1, 0, 0]), np.array([0, 0, 0, 1, 1, 2, 2])
    expected = [2.5 / (3 + 1 / math.log2(3)), 1]
    np.testing.assert_allclose(ndcg_per_list(scores, list_id, gains), expected)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_equal_to_scikit_learn(k):
    """On lists of two and more products, of which one has a gain."""
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for length in (2, 5, 30):
        gains = rng.integers(0, 4, length) + np.eye(length)[0]
        shown = -np.arange(length)
        expected = metrics.ndcg_score(gains[None], shown[None], k=k)
        assert ndcg(gains, k) == pytest.approx(expected, rel=1e-12)
