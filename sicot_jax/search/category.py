"""Which category a photo shows: what the classifier says of its products, and a vote of the nearest photos, fused.

    p_c = a_c m_c + (1 - a_c) s_c, divided by the sum over categories
    m_c = sum of the classifier's shares over the products of category c
    s_c = sum_i w_i [c_i = c] / sum_i w_i,  w_i = exp((cos_i - cos_1) / T),  over the `NEAREST` photos of the index

The two branches and the vote of 30 are those of Pailitao (Zhang et al. 2018, arXiv:2102.04674). Its model branch is a network
of its own; here it is the classifier that is there already, whose sum was better than a head fitted to the embeddings
(docs/search.md). a and T are fitted to photos that neither classifier nor index have seen.
"""

from __future__ import annotations

import dataclasses

import numpy as np

NEAREST = 30
TEMPERATURES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1)  # more flattens the vote until it is a count
_WEIGHTS = np.linspace(0, 1, 21)
_PRIOR = 3.0  # strength with which a category's weight is held to that of all of them
_LEAST = 1e-6  # probability, so that one photo that was thought impossible does not decide a fit


def by_classifier(shares: np.ndarray, category: np.ndarray, count: int) -> np.ndarray:
    """Shares of classes [B, C] and the category of each, int [C] (-1: none) -> m [B, count], float64.

    Rows sum to 1 where some class of a category has a share; without one to 0.
    """
    inside = category >= 0
    found = np.zeros((len(shares), count))
    for row, own in zip(found, shares, strict=True):
        row[:] = np.bincount(category[inside], weights=own[inside], minlength=count)
    return _normalised(found)


def by_neighbours(similarity: np.ndarray, category: np.ndarray, count: int, temperature: float) -> np.ndarray:
    """Cosines of the nearest photos [B, N] and their categories, int [B, N] (-1: none, or no such photo) -> s [B, count]."""
    voting = category >= 0
    nearest = np.max(np.where(voting, similarity, -np.inf), 1, keepdims=True, initial=-1.0)
    weight = np.exp((similarity - nearest) / temperature) * voting
    found = np.zeros((len(similarity), count))
    for row, own, names in zip(found, weight, np.maximum(category, 0), strict=True):
        row[:] = np.bincount(names, weights=own, minlength=count)
    return _normalised(found)


def _normalised(rows: np.ndarray) -> np.ndarray:
    total = rows.sum(1, keepdims=True)
    return np.divide(rows, total, out=np.zeros_like(rows), where=total > 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Fusion:
    """a float64 [K], the weight of the classifier for each category, and T."""

    weights: np.ndarray
    temperature: float

    def __call__(self, classifier: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
        """m and s [B, K] -> p [B, K]."""
        return _normalised(self.weights * classifier + (1 - self.weights) * neighbours)


def fit(classifier: np.ndarray, similarity: np.ndarray, neighbours: np.ndarray, category: np.ndarray) -> Fusion:
    """From photos of known category, int [B]: m [B, K], and cosines and categories of their nearest photos [B, N].

    T and one weight a for all categories are those of the greatest mean log p. Then each category has a weight of its own: the
    one of the greatest log likelihood of "it is c" and "it is not" under a_c m_c + (1 - a_c) s_c, less 3 (a_c - a)^2, so that
    a category with few photos keeps a. Without a photo: a = 1/2, T = 0.05.
    """
    count = classifier.shape[1]
    if not len(category):
        return Fusion(np.full(count, 0.5), 0.05)
    votes = {t: by_neighbours(similarity, neighbours, count, t) for t in TEMPERATURES}
    photos = np.arange(len(category))

    def likelihood(temperature: float, weight: float) -> float:
        own = weight * classifier[photos, category] + (1 - weight) * votes[temperature][photos, category]
        return float(np.log(np.maximum(own, _LEAST)).mean())

    pairs = [(temperature, float(weight)) for temperature in TEMPERATURES for weight in _WEIGHTS]
    temperature, common = max(pairs, key=lambda pair: likelihood(*pair))
    vote, right = votes[temperature], np.arange(count) == category[:, None]
    scores = np.empty((len(_WEIGHTS), count))
    for row, weight in zip(scores, _WEIGHTS, strict=True):
        mixed = np.clip(weight * classifier + (1 - weight) * vote, _LEAST, 1 - _LEAST)
        row[:] = np.log(np.where(right, mixed, 1 - mixed)).sum(0) - _PRIOR * (weight - common) ** 2
    return Fusion(_WEIGHTS[scores.argmax(0)], temperature)
