"""Bootstrap intervals of paired differences between two runs on the same photos."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000


def paired_interval(difference: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean paired difference, photos resampled with replacement (Efron & Tibshirani 1993).

    Args:
      difference: float [N], per photo (hit of one run minus hit of the other).
      groups: int [N] or None; with classes given, the statistic is the mean over (drawn) classes of their mean difference.

    Returns: (low, high); (nan, nan) without photos.
    """
    if not len(difference):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    if groups is not None:
        _, row = np.unique(groups, return_inverse=True)
        means = []
        for _ in range(RESAMPLES):
            drawn = rng.integers(0, len(row), len(row))
            counts = np.bincount(row[drawn])
            sums = np.bincount(row[drawn], difference[drawn])
            means.append(np.mean(sums[counts > 0] / counts[counts > 0]))
    else:
        # A mean depends on how often each distinct value is drawn, not on which photo gave it.
        values, counts = np.unique(difference, return_counts=True)
        drawn = rng.multinomial(len(difference), counts / len(difference), RESAMPLES)
        means = drawn @ values / len(difference)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
