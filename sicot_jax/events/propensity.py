"""How much a place on the page is looked at, from the log alone.

The position-based model: E[clicks] = views * chance(place) * relevance(query, sku). The same thing
shown for the same query at several places (lists shuffled, rankings changed) tells chances apart
from relevance: intervention harvesting, Agarwal et al., WSDM 2019. The estimate is the conditional
maximum likelihood of Poisson counts with an effect of each (query, sku) (Hausman, Hall, Griliches
1984): given the C clicks of a pair, those at place k are multinomial with q_k = views_k * chance_k
/ sum of the same over its places, so that relevance drops out. It uses all pairs of places at once,
is concave, and consistent however few clicks a pair has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

_PAIRS = 1 << 16  # rows of counts in one go
_STEPS, _CLOSE, _FARTHEST = 100, 1e-6, 1.0


@dataclasses.dataclass(frozen=True)
class Looking:
    """chance: [R], of looking at place r, relative to the first. error: [R], standard error of its
    logarithm, nan where it is not estimated. clicks: [R], that it rests on. source: how it was
    found, in words.
    """

    chance: np.ndarray
    error: np.ndarray
    clicks: np.ndarray
    source: str

    def weights(self, largest: float) -> np.ndarray:
        """min(1 / chance, largest), [R]: inverse propensities, clipped."""
        return np.minimum(1 / self.chance, largest)


def assumed(places: int, eta: float) -> Looking:
    """r^-eta, of no log."""
    chance = np.arange(1, places + 1, dtype=np.float64) ** -eta
    return Looking(chance, np.full(places, np.nan), np.zeros(places, int), f"assumed: r^-{eta:g}")


def estimate(
    pair: np.ndarray,
    place: np.ndarray,
    views: np.ndarray,
    clicks: np.ndarray,
    *,
    places: int,
    least_clicks: int = 50,
) -> Looking:
    """From counts of (query, sku) at places: all arrays [M], sorted by `pair`; `place` from 0.

    A place with fewer than `least_clicks` clicks of pairs that were elsewhere too, or that no chain
    of such pairs joins to the first, is looked at like the nearest estimated one above it. Where
    nothing is estimated (every thing stands at one place for a query) all chances are 1, and
    `source` says so: clicks then weigh alike.
    """
    rows = np.ones(len(pair), bool)
    while True:  # leaving out a place leaves pairs with one place
        kept = [array[rows] for array in (pair, place, views, clicks)]
        several = _together(kept[0], np.ones(len(kept[0]))) > 1
        several &= _together(kept[0], kept[3]) > 0
        kept = [array[several] for array in kept]
        support = np.bincount(kept[1], kept[3], places)
        good = (support >= least_clicks) & _joined(kept[0], kept[1], places)
        new = rows.copy()
        new[np.flatnonzero(rows)[~several]] = False
        new &= good[place]
        if (new == rows).all():
            break
        rows = new
    error = np.full(places, np.nan)
    if not rows.any() or good.sum() < 2:
        note = "none: no thing stands at several places for one query; every place weighs 1"
        return Looking(np.ones(places), error, support.astype(int), note)
    log_chance, covariance = _newton(*kept, free=np.flatnonzero(good)[1:], places=places)
    error[good] = np.sqrt(np.concatenate([[0], np.diag(covariance)]))
    filled = np.maximum.accumulate(np.where(good, np.arange(places), 0))
    return Looking(
        np.exp(log_chance)[filled],
        error,
        support.astype(int),
        "estimated: the same things at several places",
    )


def _together(pair: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[M]: the sum of `values` over the rows of the same pair."""
    if not len(pair):
        return np.zeros(0)
    begins = np.flatnonzero(np.concatenate([[True], pair[1:] != pair[:-1]]))
    lengths = np.diff(np.append(begins, len(pair)))
    return np.repeat(np.add.reduceat(values, begins), lengths)


def _joined(pair: np.ndarray, place: np.ndarray, places: int) -> np.ndarray:
    """[R]: whether a chain of pairs leads from the first place to this one."""
    reached = np.zeros(places, bool)
    reached[:1] = True
    while len(pair):
        touched = _together(pair, reached[place].astype(float)) > 0
        new = reached.copy()
        new[place[touched]] = True
        if (new == reached).all():
            break
        reached = new
    return reached


def _newton(
    pair: np.ndarray,
    place: np.ndarray,
    views: np.ndarray,
    clicks: np.ndarray,
    *,
    free: np.ndarray,
    places: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the chances, [R] (0 where not free), and the covariance of the free ones."""
    beta = np.zeros(places)
    for _ in range(_STEPS):
        gradient, information = np.zeros(places), np.zeros((places, places))
        for counts, shown in _dense(pair, place, views, clicks, places):
            total = counts.sum(1)
            share = shown * np.exp(beta)
            share /= share.sum(1, keepdims=True)
            expected = total[:, None] * share
            gradient += (counts - expected).sum(0)
            information += np.diag(expected.sum(0)) - expected.T @ share
        step = np.linalg.solve(information[np.ix_(free, free)], gradient[free])
        beta[free] += step * min(1.0, _FARTHEST / np.abs(step).max()) if step.any() else 0
        if np.abs(step).max() < _CLOSE:
            break
    return beta, np.linalg.inv(information[np.ix_(free, free)])


def _dense(
    pair: np.ndarray, place: np.ndarray, views: np.ndarray, clicks: np.ndarray, places: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Clicks and views as [pairs, R], some pairs at a time."""
    begins = np.concatenate([[0], np.flatnonzero(pair[1:] != pair[:-1]) + 1, [len(pair)]])
    size = max(_PAIRS // places, 1) * 8
    for first in range(0, len(begins) - 1, size):
        some = begins[first : first + size + 1]
        rows = slice(some[0], some[-1])
        number = np.repeat(np.arange(len(some) - 1), np.diff(some))
        counts, shown = np.zeros((2, len(some) - 1, places))
        counts[number, place[rows]] = clicks[rows]
        shown[number, place[rows]] = views[rows]
        yield counts, shown
