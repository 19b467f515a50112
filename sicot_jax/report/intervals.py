"""Bootstrap intervals of paired differences between two runs on the same photos."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000


def paired_interval(difference: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean paired difference, photos resampled with replacement (Efron & Tibshirani 1993).

    Args:
      difference: float [N], per photo (hit of one run minus hit of the other).
      groups: int [N] or None; with classes given, the statistic is the mean over classes of their mean difference, and
        photos are resampled within classes and classes as well, so that a class of one photo still varies.

    Returns: (low, high); (nan, nan) without photos.
    """
    if not len(difference):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    if groups is not None:
        order = np.argsort(groups, kind="stable")
        _, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
        ordered = difference[order]
        means = []
        for _ in range(RESAMPLES):
            chosen = rng.integers(0, len(counts), len(counts))
            spread = counts[chosen]
            rows = np.repeat(starts[chosen], spread) + (rng.random(spread.sum()) * np.repeat(spread, spread)).astype(np.int64)
            ends = np.cumsum(spread)
            sums = np.add.reduceat(ordered[rows], ends - spread)
            means.append(np.mean(sums / spread))
    else:
        # A mean depends on how often each distinct value is drawn, not on which photo gave it.
        values, counts = np.unique(difference, return_counts=True)
        drawn = rng.multinomial(len(difference), counts / len(difference), RESAMPLES)
        means = drawn @ values / len(difference)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
