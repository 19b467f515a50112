"""Bootstrap intervals of paired differences between two runs on the same photos."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000


def paired_interval(difference: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean paired difference, photos resampled with replacement (Efron & Tibshirani 1993).

    Args:
      difference: float [N], per photo (hit of one run minus hit of the other).
      groups: int [N] or None; with classes given, the statistic is the mean over classes of their mean difference:
        photos weigh 1 / photos of their class, and a resample's weighted sum is divided by its sum of weights. (The
        mean over the classes that happen to be drawn is a quarter too narrow where classes have one photo.)

    Returns: (low, high); (nan, nan) without photos.
    """
    if not len(difference):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    weights = np.ones(len(difference))
    if groups is not None:
        _, row, counts = np.unique(groups, return_inverse=True, return_counts=True)
        weights = 1 / counts[row]
    # The statistic depends on how often each distinct (difference, weight) is drawn, not on which photo gave it.
    kinds, counts = np.unique(np.stack([difference, weights], -1), axis=0, return_counts=True)
    drawn = rng.multinomial(len(difference), counts / len(difference), RESAMPLES)
    means = drawn @ kinds.prod(-1) / (drawn @ kinds[:, 1])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
