"""Examination propensities: how likely a position of a list is examined, estimated from logs alone.

Position-based click model: E[clicks] = views * propensity(position) * relevance(query, sku). The
same item shown for the same query at several positions (shuffled lists, changed rankings)
separates propensity from relevance: intervention harvesting (Agarwal et al., WSDM 2019). The
estimate is the conditional maximum likelihood of Poisson counts with an effect per pair (query,
sku) (Hausman, Hall, Griliches 1984): given the C clicks of a pair, those at position k are
multinomial with q_k = views_k * propensity_k / sum of the same over its positions, so that
relevance cancels. It uses all pairs of positions at once, is concave, and is consistent however few
clicks a pair has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from scipy import stats

_PAIR_CHUNK = 1 << 19  # pairs times positions that are dense at a time
_MAX_ITERATIONS, _TOLERANCE, _MAX_STEP = 100, 1e-6, 1.0


@dataclasses.dataclass(frozen=True)
class ExaminationPropensity:
    """Propensity of each of R positions, from the first on.

    Attributes:
      propensity: float64 [R], probability that the position is examined, relative to the first.
      log_error: float64 [R], standard error of its logarithm; nan where it is not estimated.
      clicks: int [R], clicks that the estimate rests on.
      source: how the values were obtained.
    """

    propensity: np.ndarray
    log_error: np.ndarray
    clicks: np.ndarray
    source: str

    def weights(self, max_weight: float) -> np.ndarray:
        """Returns clipped inverse propensities.

        Args:
          max_weight: largest weight.

        Returns:
          min(1 / propensity, max_weight), float64 [R].
        """
        return np.minimum(1 / self.propensity, max_weight)

    def intervals(self) -> np.ndarray:
        """Returns 95 % intervals of the propensities.

        Returns:
          (low, high) by position, float64 [R, 2]; nan where a propensity is not estimated.
        """
        margin = stats.norm.ppf(0.975) * self.log_error
        return self.propensity[:, None] * np.exp(np.stack([-margin, margin], -1))


def power_law_propensity(num_positions: int, eta: float) -> ExaminationPropensity:
    """Returns assumed propensities that fall as a power of the position.

    Args:
      num_positions: number of positions R.
      eta: exponent; position r has propensity r^-eta.

    Returns:
      Propensities without errors.
    """
    propensity = np.arange(1, num_positions + 1, dtype=np.float64) ** -eta
    return ExaminationPropensity(
        propensity,
        np.full(num_positions, np.nan),
        np.zeros(num_positions, int),
        f"assumed: r^-{eta:g}",
    )


@dataclasses.dataclass(frozen=True, eq=False)
class PositionCounts:
    """Views and clicks of pairs (query, sku) by position; M rows, sorted by pair.

    Attributes:
      pair: int [M], id of the pair.
      position: int [M], from 0.
      views: [M], times the pair was shown there.
      clicks: [M], times it was clicked there.
    """

    pair: np.ndarray
    position: np.ndarray
    views: np.ndarray
    clicks: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> PositionCounts:
        return PositionCounts(
            self.pair[rows], self.position[rows], self.views[rows], self.clicks[rows]
        )


def estimate_propensity(
    counts: PositionCounts, *, num_positions: int, min_clicks: int = 50
) -> ExaminationPropensity:
    """Estimates the propensities of all positions.

    A position with fewer than `min_clicks` clicks on pairs that were elsewhere too, or that no
    chain of such pairs connects with the first, takes the propensity of the nearest estimated
    position above it.

    Args:
      counts: views and clicks by pair and position.
      num_positions: number of positions R.
      min_clicks: fewest clicks to estimate a position from.

    Returns:
      Propensities; all are 1 where nothing can be estimated, as `source` says then.
    """
    usable = np.ones(len(counts.pair), bool)
    while True:  # leaving out a position leaves pairs with one position
        kept = counts[usable]
        varied = _pair_sums(kept.pair, np.ones(len(kept.pair))) > 1
        varied &= _pair_sums(kept.pair, kept.clicks) > 0
        kept = kept[varied]
        num_clicks = np.bincount(kept.position, kept.clicks, num_positions)
        estimable = (num_clicks >= min_clicks) & _connected_positions(kept, num_positions)
        remaining = usable.copy()
        remaining[np.flatnonzero(usable)[~varied]] = False
        remaining &= estimable[counts.position]
        if (remaining == usable).all():
            break
        usable = remaining
    log_error = np.full(num_positions, np.nan)
    if not usable.any() or estimable.sum() < 2:
        return ExaminationPropensity(
            np.ones(num_positions),
            log_error,
            num_clicks.astype(int),
            "none: no item was shown at several positions for one query; every position weighs 1",
        )
    log_propensity, covariance = _fit_newton(kept, np.flatnonzero(estimable)[1:], num_positions)
    log_error[estimable] = np.sqrt(np.concatenate([[0], np.diag(covariance)]))
    nearest = np.maximum.accumulate(np.where(estimable, np.arange(num_positions), 0))
    return ExaminationPropensity(
        np.exp(log_propensity)[nearest],
        log_error,
        num_clicks.astype(int),
        "estimated: the same items at several positions",
    )


def _pair_sums(pair: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sum of values over the rows of the same pair, [M]."""
    if not len(pair):
        return np.zeros(0)
    begins = np.flatnonzero(np.concatenate([[True], pair[1:] != pair[:-1]]))
    lengths = np.diff(np.append(begins, len(pair)))
    return np.repeat(np.add.reduceat(values, begins), lengths)


def _connected_positions(counts: PositionCounts, num_positions: int) -> np.ndarray:
    """Whether a chain of pairs leads from the first position to this one, bool [R]."""
    reached = np.zeros(num_positions, bool)
    reached[:1] = True
    while len(counts.pair):
        touched = _pair_sums(counts.pair, reached[counts.position].astype(float)) > 0
        extended = reached.copy()
        extended[counts.position[touched]] = True
        if (extended == reached).all():
            break
        reached = extended
    return reached


def _fit_newton(
    counts: PositionCounts, free: np.ndarray, num_positions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log propensities [R], 0 where not free, and the covariance of the free ones."""
    beta = np.zeros(num_positions)
    for _ in range(_MAX_ITERATIONS):
        gradient, information = np.zeros(num_positions), np.zeros((num_positions, num_positions))
        for clicks, views in _dense_chunks(counts, num_positions):
            total = clicks.sum(1)
            share = views * np.exp(beta)
            share /= share.sum(1, keepdims=True)
            expected = total[:, None] * share
            gradient += (clicks - expected).sum(0)
            information += np.diag(expected.sum(0)) - expected.T @ share
        step = np.linalg.solve(information[np.ix_(free, free)], gradient[free])
        largest = np.abs(step).max()
        beta[free] += step * min(1.0, _MAX_STEP / largest) if largest else 0
        if largest < _TOLERANCE:
            break
    return beta, np.linalg.inv(information[np.ix_(free, free)])


def _dense_chunks(
    counts: PositionCounts, num_positions: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Clicks and views as [pairs, R], some pairs at a time."""
    pair = counts.pair
    begins = np.concatenate([[0], np.flatnonzero(pair[1:] != pair[:-1]) + 1, [len(pair)]])
    size = max(_PAIR_CHUNK // num_positions, 8)
    for first in range(0, len(begins) - 1, size):
        bounds = begins[first : first + size + 1]
        rows = slice(bounds[0], bounds[-1])
        row = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        clicks, views = np.zeros((2, len(bounds) - 1, num_positions))
        clicks[row, counts.position[rows]] = counts.clicks[rows]
        views[row, counts.position[rows]] = counts.views[rows]
        yield clicks, views
