"""Bootstrap intervals of paired differences between two runs on the same photos."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000


def paired_interval(
    difference: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean paired difference, photos resampled with replacement
    (Efron & Tibshirani 1993).

    Of several seeds both are resampled, photos and seeds. With S seeds the spread between seeds
    comes out (S - 1) / S of its
    variance: an interval of few seeds is too narrow.

    Args:
      difference: float [N] or [S, N], per photo (and seed): hit of one run minus hit of the other.
      groups: int [N] or None; with classes given, the statistic is the mean over classes of their
        mean difference:
        photos weigh 1 / photos of their class, and a resample's weighted sum is divided by its sum
        of weights. (The mean over the classes that happen to be drawn is a quarter too narrow where
        classes have one photo.)

    Returns: (low, high); (nan, nan) without photos.
    """
    difference = np.atleast_2d(difference)
    seeds, photos = difference.shape
    if not photos:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    weights = np.ones(photos)
    if groups is not None:
        _, row, counts = np.unique(groups, return_inverse=True, return_counts=True)
        weights = 1 / counts[row]
    # The statistic depends on how often each distinct (differences, weight) is drawn, not on which
    # photo gave it.
    kinds, counts = np.unique(np.stack([*difference, weights], -1), axis=0, return_counts=True)
    drawn = rng.multinomial(photos, counts / photos, RESAMPLES)
    means = drawn @ (kinds[:, :-1] * kinds[:, -1:]) / (drawn @ kinds[:, -1:])  # [resamples, seeds]
    if seeds > 1:
        means = np.take_along_axis(means, rng.integers(seeds, size=means.shape), 1)
    means = means.mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
