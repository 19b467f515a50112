"""Normalised discounted cumulative gain of ranked lists."""

from __future__ import annotations

import numpy as np

NDCG_CUTOFF = 20  # positions that count


def ndcg(gains: np.ndarray, k: int = NDCG_CUTOFF) -> float:
    """Returns NDCG@k of one list, with linear gains (Järvelin & Kekäläinen 2002).

    sum_i g_i / log2(i + 1) over the first k positions, divided by its value for the best order.
    Equal to scikit-learn's `dcg_score` of the list over that of its best order; not taken from
    there, because that validates its input for a millisecond a list (the ranker's report needs a
    million lists) and refuses lists of one product, and `ndcg_score` gives 0 for a list without
    any gain.

    Args:
      gains: Gain of each product, in the order of the list, float [N].
      k: Number of positions that count.

    Returns:
      NDCG, 0 to 1; NaN where no product has a gain.
    """
    gains = np.asarray(gains, np.float64)
    discount = 1 / np.log2(np.arange(min(k, len(gains))) + 2)
    ideal = float(np.sort(gains)[::-1][: len(discount)] @ discount)
    return float(gains[: len(discount)] @ discount) / ideal if ideal > 0 else float("nan")


def ndcg_per_list(
    scores: np.ndarray, list_id: np.ndarray, gains: np.ndarray, k: int = NDCG_CUTOFF
) -> np.ndarray:
    """Returns NDCG@k of each list when its products are sorted by score.

    Args:
      scores: Score of each product, float [N]; equal ones keep the order they were shown in.
      list_id: Number of the list of each product, ascending, int [N].
      gains: Gain of each product, float [N].
      k: Number of positions that count.

    Returns:
      NDCG of each list that has a gain, float64 [at most the number of lists].
    """
    order = np.lexsort((-scores, list_id))  # stable
    lists = np.split(gains[order], np.flatnonzero(np.diff(list_id)) + 1)
    values = np.array([ndcg(one, k) for one in lists])
    return values[~np.isnan(values)]
