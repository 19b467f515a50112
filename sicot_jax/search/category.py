"""Which category a photo shows: what the classifier says of its products, and a vote of the nearest
photos, fused.

    p_c = a_c m_c + (1 - a_c) s_c, divided by the sum over categories m_c = sum of the classifier's
    shares over the products of category c, divided by that sum over all categories s_c = sum_i w_i
    [c_i = c] / sum_i w_i,  w_i = exp((cos_i - cos_1) / T),  over the `NEAREST` photos of the index

and back to products: their shares are multiplied by (p_c / m_c)^b. The two branches and the vote of
  30 are those of Pailitao (Zhang et al. 2018, arXiv:2102.04674). Its model branch is a network of
  its own; here it is the classifier that is there already, whose sum was better than a head fitted
  to the embeddings (docs/search.md). a, b and T are fitted to photos that neither classifier nor
  index have seen.

Categories are numbers from 0 to count - 1; `count` itself stands for none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.common.files import read_json, write_json
from sicot_jax.errors import InputError

FORMAT = 1
NEAREST = 30
SURE = 0.99  # of photos whose category is called sure, so many have it
SUPPORT = 0.05  # of the photos, at least so many of them
TEMPERATURES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1)  # more flattens the vote until it is a count
_WEIGHTS = np.linspace(0, 1, 21)
STRENGTHS = np.linspace(0, 1, 11)
# r, with which a category's weight is held to that of all; by the first it is that one.
RESTRAINTS = (1e12, 300.0, 30.0, 3.0)
_PARTS = 10
_EQUAL = 1e-9  # means that differ by less are equal
_LEAST = 1e-6  # probability, so that one photo that was thought impossible does not decide a fit


def by_classifier(shares: np.ndarray, category: np.ndarray, count: int) -> np.ndarray:
    """Shares of products [N] and the category of each, int [N] -> their sums [count], float64."""
    return np.bincount(category, weights=shares, minlength=count + 1)[:count].astype(
        np.float64
    )  # of nothing: integers


def by_neighbours(
    similarity: np.ndarray, category: np.ndarray, count: int, temperature: float
) -> np.ndarray:
    """Cosines of the nearest photos [B, N] and their categories, int [B, N] -> s [B, count]; zeros
    where none votes.
    """
    voting = category < count
    nearest = np.max(np.where(voting, similarity, -np.inf), 1, keepdims=True, initial=-1.0)
    weight = np.exp((similarity - nearest) / temperature) * voting
    found = [by_classifier(own, names, count) for own, names in zip(weight, category, strict=True)]
    return _normalised(np.reshape(found, (len(similarity), count)))


def _normalised(rows: np.ndarray) -> np.ndarray:
    total = rows.sum(-1, keepdims=True)
    return np.divide(rows, total, out=np.zeros_like(rows), where=total > 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Fusion:
    """names: of the categories. weights: a float64 [K]; common: that of a category that the fit has
    not seen. strength: b.
    sure: the least probability at which `SURE` of the photos have that category, if their nearest
      photo has it too; None where no probability is enough. photos: of the fit.
    """

    names: tuple[str, ...]
    weights: np.ndarray
    common: float
    temperature: float
    strength: float
    sure: float | None
    photos: int

    def of(self, names: tuple[str, ...]) -> Fusion:
        """The same for these categories, in this order."""
        if names == self.names:
            return self
        known = dict(zip(self.names, self.weights.tolist(), strict=True))
        return dataclasses.replace(
            self, names=names, weights=np.array([known.get(n, self.common) for n in names])
        )

    def __call__(self, shares: np.ndarray, votes: np.ndarray) -> np.ndarray:
        """Of categories, sums of shares and s [B, K] -> p [B, K]; a branch that says nothing leaves
        it to the other.
        """
        return _normalised(self.weights * _normalised(shares) + (1 - self.weights) * votes)

    def log_factors(self, shares: np.ndarray, told: np.ndarray) -> np.ndarray:
        """Sums of shares and p [B, K] -> b log(p / m) [B, K], what scores of a category's products
        have to be raised by.
        """
        return self.strength * _log_ratio(shares, told)


def _log_ratio(shares: np.ndarray, told: np.ndarray) -> np.ndarray:
    """log(p / m); 0 for a photo of which one of the two says nothing."""
    ratio = np.log(np.maximum(told, _LEAST)) - np.log(np.maximum(_normalised(shares), _LEAST))
    return ratio * (shares.any(-1, keepdims=True) & told.any(-1, keepdims=True))


def fit(
    shares: np.ndarray,
    similarity: np.ndarray,
    neighbours: np.ndarray,
    category: np.ndarray,
    products: np.ndarray,
    names: Sequence[str],
) -> Fusion:
    """From photos of known category and product, int [B]: sums of shares [B, K], and cosines and
    categories of their nearest photos [B, N].

    T and one weight a for all categories are those of the greatest mean log p, or the better branch
    alone where that is as good (`simplest`, by 1 / rank of the right category: what is too sure of
    itself gains likelihood by any mixture); where that is the classifier, T is the best one for the
    vote alone. Then each category has a weight of its own: the one of the greatest log likelihood
    of "it is c" and "it is not" under a_c m_c + (1 - a_c) s_c, less r (a_c - a)^2, so that a
    category with few photos keeps a; r is the greatest of `RESTRAINTS` that is as good for each
    tenth of the products, fitted to the photos of the others. b stays 1. Without a photo: a = 1/2,
    T = 0.05, never sure.
    """
    count, photos = len(names), np.arange(len(category))
    if not len(category):
        return Fusion(tuple(names), np.full(count, 0.5), 0.5, 0.05, 1.0, None, 0)
    classifier = _normalised(shares)
    votes = {t: by_neighbours(similarity, neighbours, count, t) for t in TEMPERATURES}

    def mixed(pair: tuple[float, float]) -> np.ndarray:
        temperature, weight = pair
        return weight * classifier + (1 - weight) * votes[temperature]

    def likelihood(pair: tuple[float, float]) -> float:
        return float(np.log(np.maximum(mixed(pair)[photos, category], _LEAST)).mean())

    # Of equal pairs the first counts.
    by_vote = sorted(TEMPERATURES, key=lambda temperature: -likelihood((temperature, 0.0)))
    pairs = [(temperature, float(weight)) for temperature in by_vote for weight in _WEIGHTS]
    choices = [
        max(some, key=likelihood) for some in ([pair for pair in pairs if pair[1] in (0, 1)], pairs)
    ]
    ranks = np.stack([_reciprocal(mixed(pair), category) for pair in choices])
    temperature, common = choices[simplest(ranks, products)]
    vote = votes[temperature]
    parts, unseen = _parts(products), np.zeros((len(RESTRAINTS), len(category)))
    scores = _likelihoods(classifier, vote, category, parts)
    for part, out in enumerate(parts):
        for own, restraint in zip(unseen, RESTRAINTS, strict=True):
            weights = _weights(scores.sum(0) - scores[part], common, restraint)
            told = _normalised(weights * classifier[out] + (1 - weights) * vote[out])
            own[out] = _reciprocal(told, category[out])
    weights = _weights(scores.sum(0), common, RESTRAINTS[simplest(unseen, products)])
    fused = Fusion(tuple(names), weights, common, temperature, 1.0, None, len(category))
    told = fused(shares, vote)
    agreed = neighbours[photos, similarity.argmax(1)] == told.argmax(1)
    sure = _sure(told.max(1)[agreed], (told.argmax(1) == category)[agreed], SUPPORT * len(category))
    return dataclasses.replace(fused, sure=sure)


def _reciprocal(probability: np.ndarray, category: np.ndarray) -> np.ndarray:
    """1 / rank of the right category of each photo, [B, K] -> [B]; equal ones share the middle of
    their ranks.
    """
    own = probability[np.arange(len(category)), category][:, None]
    return 2 / (1 + (probability > own).sum(1) + (probability >= own).sum(1))


def _likelihoods(
    m: np.ndarray, s: np.ndarray, category: np.ndarray, parts: list[np.ndarray]
) -> np.ndarray:
    """Log likelihood of "it is c" and "it is not" by each part of the photos, weight and category,
    [parts, weights, K].
    """
    right, found = (
        np.arange(m.shape[1]) == category[:, None],
        np.empty((len(parts), len(_WEIGHTS), m.shape[1])),
    )
    for number, weight in enumerate(_WEIGHTS):
        mixed = np.clip(weight * m + (1 - weight) * s, _LEAST, 1 - _LEAST)
        likelihood = np.log(np.where(right, mixed, 1 - mixed))
        for part, out in enumerate(parts):
            found[part, number] = likelihood[out].sum(0)
    return found


def _weights(likelihood: np.ndarray, common: float, restraint: float) -> np.ndarray:
    """Of each category [K], from the likelihood of each weight [weights, K]."""
    return _WEIGHTS[(likelihood - restraint * (_WEIGHTS[:, None] - common) ** 2).argmax(0)]


def _parts(products: np.ndarray) -> list[np.ndarray]:
    """Photos of each tenth of the products, which are drawn at random: their numbers may follow
    their categories.
    """
    own, product = np.unique(products, return_inverse=True)
    part = (np.random.default_rng(0).permutation(len(own)) % _PARTS)[product]
    return [np.flatnonzero(part == number) for number in range(_PARTS)]


def simplest(values: np.ndarray, products: np.ndarray) -> int:
    """Which of choices, the simplest first, from a value for each photo, [choices, B]: the first
    one whose mean is within a standard error of the greatest. The error is that of differences in
    pairs, photos of a product counted as one draw: sqrt(sum over products of (sum of deviations)^2)
    / B.
    """
    less = values[values.mean(1).argmax()] - values
    mean = less.mean(1)
    sums = [
        np.bincount(np.unique(products, return_inverse=True)[1], weights=row)
        for row in less - mean[:, None]
    ]
    error = np.sqrt([np.sum(own**2) for own in sums]) / values.shape[1]
    return int(np.flatnonzero(mean <= error + _EQUAL)[0])


def strength(reciprocal: np.ndarray, products: np.ndarray) -> float:
    """b from 1 / rank of the right product of each photo at each of `STRENGTHS`, [11, B]: the
    `simplest`. By rank, not by
    likelihood: a classifier that is too sure of itself gains likelihood from any flattening.
    """
    return float(STRENGTHS[simplest(reciprocal, products)]) if reciprocal.shape[1] else 0.0


def _sure(probability: np.ndarray, right: np.ndarray, fewest: float) -> float | None:
    order = np.argsort(-probability, kind="stable")
    precision = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    last = np.append(np.diff(probability[order]) != 0, True)  # equal ones are sure together
    enough = np.flatnonzero((precision >= SURE) & last & (np.arange(1, len(order) + 1) >= fewest))
    return float(probability[order[enough[-1]]]) if len(enough) else None


def write_fusion(path: Path, fusion: Fusion) -> None:
    stored = {field.name: getattr(fusion, field.name) for field in dataclasses.fields(fusion)}
    write_json(path, stored | {"weights": fusion.weights.tolist(), "format": FORMAT})


def read_fusion(path: Path) -> Fusion | None:
    """None where the index has none, as it had too few validation photos. InputError for a file of
    another format.
    """
    if not path.exists():
        return None
    stored: dict[str, Any] = read_json(path, "the categories of an index")
    if stored.pop("format", None) != FORMAT:
        raise InputError(
            f"{path}: of another format, this version reads {FORMAT}; build the index again"
        )
    try:
        return Fusion(
            **stored
            | {"names": tuple(stored["names"]), "weights": np.array(stored["weights"], float)}
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not as it was written ({error}); build the index again"
        ) from error
