"""Bootstrap intervals of paired differences between two runs on the same photos."""

from __future__ import annotations

import math

import numpy as np

NUM_RESAMPLES = 2000


class FixedDraws:
    """Draws of resamples whose stream is the same with every version of NumPy.

    The distributions of `numpy.random.Generator` may change with any release (2.5 changed its
    multinomial); the raw bits of PCG64 and the distributions of `RandomState` are frozen (NEP 19).
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)
        self._frozen = np.random.RandomState(self._bits)
        self._left_over = np.zeros(0, "<u4")  # second half of a number whose first half is used

    def counts(self, total: int, shares: np.ndarray, size: int) -> np.ndarray:
        """Returns how often each kind is drawn.

        Args:
          total: draws of one resample.
          shares: float [K], probability of each kind, sum 1.
          size: number of resamples.

        Returns:
          int64 [size, K], each row with sum `total`.
        """
        return self._frozen.multinomial(total, shares, size).astype(np.int64)

    def integers(self, high: int, shape: tuple[int, ...]) -> np.ndarray:
        """Returns uniform integers from 0 to `high - 1`.

        Args:
          high: at most 2^32; probabilities differ by 2^-32 at most.
          shape: shape of the result.

        Returns:
          int64 [shape].
        """
        size = math.prod(shape)
        more = self._bits.random_raw((size - len(self._left_over) + 1) // 2)
        halves = np.concatenate([self._left_over, more.astype("<u8").view("<u4")])
        self._left_over = halves[size:]
        drawn = halves[:size].astype(np.uint64) * np.uint64(high) >> np.uint64(32)
        return drawn.astype(np.int64).reshape(shape)


def paired_interval(
    difference: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0
) -> tuple[float, float]:
    """Computes the 95 % percentile bootstrap interval of a mean paired difference.

    Photos are resampled with replacement (Efron & Tibshirani 1993); with several seeds, photos and
    seeds are. With S seeds the variance between seeds comes out (S - 1) / S of its size: an
    interval of few seeds is too narrow.

    `scipy.stats.bootstrap` gives the same intervals of one seed, but cannot resample photos and
    seeds together, and takes 0.35 s for 20,000 photos where this takes 0.01 s.

    Equal input gives equal intervals with every version of NumPy, see `FixedDraws`.

    Args:
      difference: float [N] or [S, N], per photo (and seed): result of one run minus that of the
        other.
      groups: int [N], the class of each photo. With classes the statistic is the mean over classes
        of their mean difference: photos weigh 1 / photos of their class, and a resample's weighted
        sum is divided by its sum of weights. (The mean over the classes that happen to be drawn is
        a quarter too narrow where classes have one photo.)
      seed: seed of the resampling.

    Returns:
      (low, high) in the unit of `difference`; (nan, nan) without photos.
    """
    difference = np.atleast_2d(difference)
    num_seeds, num_photos = difference.shape
    if not num_photos:
        return float("nan"), float("nan")
    draws = FixedDraws(seed)
    weights = np.ones(num_photos)
    if groups is not None:
        _, row, counts = np.unique(groups, return_inverse=True, return_counts=True)
        weights = 1 / counts[row]
    # The statistic depends on how often each distinct (differences, weight) is drawn, not on which
    # photo gave it.
    kinds, counts = np.unique(np.stack([*difference, weights], -1), axis=0, return_counts=True)
    drawn = draws.counts(num_photos, counts / num_photos, NUM_RESAMPLES)
    # [resamples, seeds]
    means = drawn @ (kinds[:, :-1] * kinds[:, -1:]) / (drawn @ kinds[:, -1:])
    if num_seeds > 1:
        means = np.take_along_axis(means, draws.integers(num_seeds, means.shape), 1)
    low, high = np.quantile(means.mean(1), [0.025, 0.975])
    return float(low), float(high)
