"""Accuracy by hand, and the intervals of paired differences."""

import numpy as np
import pytest

from sicot_jax.common.bootstrap import paired_interval
from sicot_jax.training.metrics import accuracy

# Class 0 has 50 training photos, class 1 has 10, class 2 has 3, class 3 has 1 and no test photo.
COUNTS = np.array([50, 10, 3, 1])
LABEL = np.array([0, 0, 0, 0, 1, 2, 2])
TOP = np.array(
    [
        [0, 1, 2, 3],
        [0, 2, 1, 3],
        [1, 0, 2, 3],  # second
        [1, 2, 3, 0],  # fourth: no top-3 hit
        [1, 0, 2, 3],
        [0, 1, 2, 3],  # third
        [0, 1, 3, 2],  # fourth
    ]
)


def test_accuracy_by_hand():
    result = accuracy(LABEL, TOP, COUNTS, 10)  # class 1 with exactly 10 photos is tail
    assert result["overall"] == {
        "top1": round(300 / 7, 4),
        "top3": round(500 / 7, 4),
        "photos": 7,
        "classes": 3,
    }
    assert result["head"] == {"top1": 50.0, "top3": 75.0, "photos": 4, "classes": 1}
    assert result["tail"] == {
        "top1": round(100 / 3, 4),
        "top3": round(200 / 3, 4),
        "photos": 3,
        "classes": 2,
    }
    # Class by class: top-1 2/4, 1/1, 0/2; top-3 3/4, 1/1, 1/2.
    assert result["class_mean"] == {"top1": 50.0, "top3": 75.0, "photos": 7, "classes": 3}


@pytest.mark.parametrize(("boundary", "full", "empty"), [(0, "head", "tail"), (50, "tail", "head")])
def test_an_empty_group_has_no_figure(boundary, full, empty):
    result = accuracy(LABEL, TOP, COUNTS, boundary)
    assert result[empty] == {"top1": None, "top3": None, "photos": 0, "classes": 0}
    assert result[full] == result["overall"]


def test_no_photo_at_all():
    result = accuracy(np.zeros(0, np.int32), np.zeros((0, 4), np.int32), COUNTS, 10)
    for row in result.values():
        assert row == {"top1": None, "top3": None, "photos": 0, "classes": 0}


def test_fewer_candidates_than_three():
    result = accuracy(LABEL, TOP[:, :2], COUNTS, 10)["overall"]
    assert (result["top1"], result["top3"]) == (round(300 / 7, 4), round(400 / 7, 4))


@pytest.mark.parametrize("groups", [None, np.array([0, 0, 1, 3, 3])])
def test_interval_of_equal_runs_is_zero(groups):
    assert paired_interval(np.zeros(5), groups) == (0.0, 0.0)
    np.testing.assert_allclose(paired_interval(np.full(5, 100.0), groups), [100, 100], rtol=1e-12)


@pytest.mark.parametrize("groups", [None, np.zeros(0, int)])
def test_interval_without_photos(groups):
    assert np.isnan(paired_interval(np.zeros(0), groups)).all()


@pytest.mark.parametrize("groups", [None, np.arange(400)])
def test_interval_has_the_width_of_a_mean(groups):
    """400 photos (of 400 classes: the same), half +100, half -100: deviation of the mean 5, so +-
    9.8.
    """
    difference = np.tile([100.0, -100.0], 200)
    low, high = paired_interval(difference, groups)
    # Means move in steps of 0.5, and quantiles of 2,000 resamples are off by some 3 % of a
    # deviation of 5.
    np.testing.assert_allclose([low, high], [-9.8, 9.8], atol=0.8)
    assert paired_interval(difference, groups) == (low, high)
    assert paired_interval(difference, groups, seed=1) != (low, high)


@pytest.mark.parametrize("per_class", [None, 15, 1])
def test_interval_contains_the_truth_as_often_as_it_says(per_class):
    """Differences -100, 0, 100 with mean 10: 95 % of intervals hold it, 38 of 40; less than 34 is
    one chance in 300.
    """
    rng = np.random.default_rng(0)
    groups = None if per_class is None else np.arange(300) % (300 // per_class)
    held = 0
    for seed in range(40):
        difference = rng.choice([-100.0, 0.0, 100.0], 300, p=[0.2, 0.5, 0.3])
        low, high = paired_interval(difference, groups, seed=seed)
        assert low < difference.mean() < high
        held += low <= 10 <= high
    assert held >= 34


def test_interval_over_classes_is_about_the_mean_of_classes():
    """One class of 90 photos lost, nine of one photo each won: by photo -82, by class +80."""
    groups = np.array([0] * 90 + list(range(1, 10)))
    difference = np.where(groups == 0, -100.0, 100.0)
    order = np.random.default_rng(0).permutation(99)
    low, high = paired_interval(difference[order], groups[order])
    assert 40 < low < 80 < high <= 100
    low, high = paired_interval(difference)
    assert -100 <= low < 100 * (9 - 90) / 99 < high < -60
