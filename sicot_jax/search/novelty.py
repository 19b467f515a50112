"""How usual a photo is for a catalogue, told by the catalogue's own photos: something else
altogether is far from all of them.

Embeddings of half of the validation photos as a Gaussian with a few principal directions and one
variance for all others (probabilistic PCA, Tipping and Bishop 1999); a photo's Mahalanobis distance
from it (Lee et al. 2018, arXiv:1807.03888) among those of the other half. Embeddings are taken as
they are: their length tells much of it, and cosines know nothing of that.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

DIRECTIONS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Typicality:
    """mean [D], directions [D, K] with their variances [K], the variance of every other direction,
    and the distances of photos that it was not fitted to, sorted [M]; float64.
    """

    mean: np.ndarray
    directions: np.ndarray
    variances: np.ndarray
    rest: float
    distances: np.ndarray

    def distance(self, embeddings: np.ndarray) -> np.ndarray:
        """[N, D] -> [N], d^2 = sum_k (z . u_k)^2 / v_k + |z - sum_k (z . u_k) u_k|^2 / rest with z
        = x - mean.
        """
        apart = np.asarray(embeddings, np.float64) - self.mean
        along = apart @ self.directions
        beside = np.maximum(np.square(apart).sum(1) - np.square(along).sum(1), 0)
        return (np.square(along) / self.variances).sum(1) + beside / self.rest

    def share(self, embedding: np.ndarray) -> float:
        """Of the catalogue's photos, those that are at least as unusual as [D]: (1 + number) / (1 +
        M), a conformal p-value; beyond the farthest of them less, by the ratio of d^2, as with few
        photos the p-value alone says little.
        """
        distance, farthest = self.distance(embedding[None])[0], self.distances[-1]
        farther = len(self.distances) - np.searchsorted(self.distances, distance)
        return float(
            (1 + farther)
            / (1 + len(self.distances))
            * (farthest / distance if distance > farthest else 1)
        )

    def stored(self) -> dict[str, Any]:
        """For JSON; six digits."""
        return {name: _listed(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def read(cls, stored: dict[str, Any]) -> Typicality:
        """What `stored` gave. TypeError or ValueError where it is something else."""
        arrays: dict[str, Any] = {
            name: np.asarray(value, np.float64) for name, value in stored.items()
        }
        made = cls(**arrays | {"rest": float(stored.get("rest", 0))})
        width, count = made.directions.shape
        if (
            made.mean.shape != (width,)
            or made.variances.shape != (count,)
            or made.distances.ndim != 1
        ):
            raise ValueError("the typicality's arrays do not fit each other")
        return made


def fit(embeddings: np.ndarray) -> Typicality:
    """From embeddings [N, D] of photos as they come, N >= 4."""
    return _fit(embeddings[::2], embeddings[1::2])


def shares_of_fitted(embeddings: np.ndarray) -> np.ndarray:
    """[N, D] -> [N], the shares of the very photos of `fit` as if they were new ones: by what is
    fitted to the half that a photo is not in, its own distance left out.
    """
    shares = np.empty(len(embeddings))
    for half in (0, 1):
        photos = embeddings[half::2]
        made = _fit(embeddings[1 - half :: 2], photos)
        own = np.searchsorted(made.distances, made.distance(photos))
        others = (
            dataclasses.replace(made, distances=np.delete(made.distances, place)) for place in own
        )
        shares[half::2] = [
            without.share(photo) for without, photo in zip(others, photos, strict=True)
        ]
    return shares


def _fit(embeddings: np.ndarray, others: np.ndarray) -> Typicality:
    """The Gaussian of embeddings, and the distances of others from it."""
    fitted = np.asarray(embeddings, np.float64)
    mean = fitted.mean(0)
    count = min(DIRECTIONS, len(fitted) // 4, fitted.shape[1] - 1)
    _, lengths, directions = np.linalg.svd(fitted - mean, full_matrices=False)
    variances = np.square(lengths) / max(len(fitted) - 1, 1)
    # The same photo again and again has no variance; none is so sure that it divides by nothing.
    floor = max(variances.sum() / fitted.shape[1], np.finfo(np.float32).tiny) * 1e-6
    rest = max(variances[count:].sum() / (fitted.shape[1] - count), floor)
    made = Typicality(
        mean, directions[:count].T, np.maximum(variances[:count], floor), float(rest), np.zeros(0)
    )
    return dataclasses.replace(made, distances=np.sort(made.distance(others)))


def _listed(value: Any) -> Any:
    rounded = (
        np.vectorize(lambda x: float(f"{x:.6g}"), otypes=[float])(value)
        if np.size(value)
        else np.asarray(value)
    )
    return rounded.tolist()
