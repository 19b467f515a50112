from __future__ import annotations

import numpy as np
import pytest

from sicot_jax.catalog.statistics import (
    class_counts,
    default_head_boundary,
    head_mask,
    log_prior,
    vocabulary_overlap,
)


def test_counts():
    counts = class_counts(np.array([0, 2, 2], np.int32), 4)
    assert counts.tolist() == [1, 0, 2, 0]
    assert counts.dtype == np.int64
    assert class_counts(np.array([], np.int32), 2).tolist() == [0, 0]
    with pytest.raises(ValueError, match="wanted 0 to 1"):
        class_counts(np.array([2]), 2)


@pytest.mark.parametrize(
    ("counts", "boundary", "head"),
    [
        ([10, 5, 3, 2], 9, [True, False, False, False]),  # 10 of 20 are half
        ([9, 5, 3, 3], 4, [True, True, False, False]),
        ([3, 9, 5, 3], 4, [False, True, True, False]),
        ([6, 4, 4, 4], 3, [True] * 4),  # 6 + 4 of 18 are half: classes of equal count stay together
        ([7, 4, 4, 1, 0], 3, [True, True, True, False, False]),
        ([5, 5], 4, [True, True]),
        ([1], 0, [True]),
        ([0, 0], 0, [False, False]),
    ],
)
def test_head_by_hand(counts, boundary, head):
    counts = np.array(counts)
    assert default_head_boundary(counts) == boundary
    assert head_mask(counts, boundary).tolist() == head


def test_head_is_the_smallest_set_with_half():
    generator = np.random.default_rng(0)
    for _ in range(100):
        counts = generator.integers(0, 30, size=generator.integers(1, 20))
        if counts.sum() == 0:
            continue
        head = head_mask(counts, default_head_boundary(counts))
        smallest = counts[head].min()
        assert 2 * counts[head].sum() >= counts.sum()
        assert 2 * counts[counts > smallest].sum() < counts.sum()


def test_log_prior():
    prior = log_prior(np.array([1, 3, 0]))
    np.testing.assert_allclose(
        prior, np.log([0.25, 0.75, 0.25]), rtol=1e-15
    )  # no photo counts as one
    with pytest.raises(ValueError, match="at least 1"):
        log_prior(np.array([0, 0]))


def test_vocabulary_overlap():
    ids = [np.array([1, 2]), np.array([2, 3]), np.array([4]), np.array([], np.int32)]
    overlap = vocabulary_overlap(ids, np.array([0, 1, 0, 1]), np.array([True, False]))
    assert overlap == {"head": 3, "tail": 2, "both": 1, "share": 0.25}
    assert vocabulary_overlap([], np.array([]), np.array([True]))["share"] == 0
