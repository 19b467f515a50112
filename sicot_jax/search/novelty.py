"""Scores how far a photo is outside a catalogue, by the Mahalanobis distance of its embedding.

A Gaussian with a few principal components and one variance for every other direction (probabilistic
PCA, Tipping & Bishop 1999) is fitted to the embeddings of half of the validation photos. A photo's
Mahalanobis distance to it (Lee et al. 2018, arXiv:1807.03888) is ranked among the distances of the
other half. Embeddings are not normalised: their length carries much of the signal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

NUM_COMPONENTS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class NoveltyDetector:
    """Gaussian of a catalogue's embeddings, and held-out distances to rank new photos among.

    Attributes:
      mean: Mean embedding, float64 [D].
      components: Orthonormal principal directions, float64 [D, K].
      explained_variances: Variance along each component, float64 [K].
      residual_variance: Variance along every other direction.
      reference_distances: Squared distances of the M held-out reference photos, ascending,
        float64 [M].
    """

    mean: np.ndarray
    components: np.ndarray
    explained_variances: np.ndarray
    residual_variance: float
    reference_distances: np.ndarray

    def squared_distances(self, embeddings: np.ndarray) -> np.ndarray:
        """Returns squared Mahalanobis distances to the Gaussian.

        d^2 = sum_k (z . u_k)^2 / v_k + |z - sum_k (z . u_k) u_k|^2 / residual, z = x - mean.

        Args:
          embeddings: Embeddings as the network gives them, float [N, D].

        Returns:
          Squared distances, float64 [N].
        """
        centred = np.asarray(embeddings, np.float64) - self.mean
        projected = centred @ self.components
        residual = np.maximum(np.square(centred).sum(1) - np.square(projected).sum(1), 0)
        within = (np.square(projected) / self.explained_variances).sum(1)
        return within + residual / self.residual_variance

    def p_value(self, embedding: np.ndarray) -> float:
        """Returns the conformal p-value of a photo under the catalogue's distribution.

        The p-value is (1 + number of reference photos at least as distant) / (1 + M), with M the
        number of reference photos (`reference_distances`). Beyond the most distant one it is
        multiplied by the ratio of squared distances, because with few reference photos 1 / (1 + M)
        alone is not small.

        Args:
          embedding: Embedding of one photo, float [D].

        Returns:
          A number in (0, 1]; small for photos unlike the catalogue's.
        """
        distance, farthest = (
            self.squared_distances(embedding[None])[0],
            self.reference_distances[-1],
        )
        count = len(self.reference_distances)
        num_farther = count - np.searchsorted(self.reference_distances, distance)
        beyond = farthest / distance if distance > farthest else 1
        return float((1 + num_farther) / (1 + count) * beyond)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values, numbers rounded to six significant digits."""
        return {name: _rounded(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> NoveltyDetector:
        """Builds a detector from the output of `to_json`.

        Args:
          stored: Field names and their JSON values.

        Returns:
          The detector.

        Raises:
          TypeError: Fields are missing or unknown.
          ValueError: Shapes do not match, or values are no numbers.
          OverflowError: A number fits into no float.
        """
        if not isinstance(stored, dict):
            raise TypeError(f"the novelty detector is {type(stored).__name__}, wanted a table")
        arrays: dict[str, Any] = {
            name: np.asarray(value, np.float64) for name, value in stored.items()
        }
        residual = float(stored.get("residual_variance", 0))
        detector = cls(**arrays | {"residual_variance": residual})
        width, count = detector.components.shape
        if (
            detector.mean.shape != (width,)
            or detector.explained_variances.shape != (count,)
            or detector.reference_distances.ndim != 1
            or not detector.reference_distances.size
        ):
            raise ValueError("the shapes of the novelty detector's arrays do not match")
        return detector


def fit_novelty_detector(embeddings: np.ndarray) -> NoveltyDetector:
    """Fits a detector: the Gaussian to every second photo, reference distances from the others.

    Args:
      embeddings: Embeddings of validation photos in random order, float [N, D], N >= 4.

    Returns:
      The fitted detector.
    """
    return _fit_halves(embeddings[::2], embeddings[1::2])


def cross_fitted_p_values(embeddings: np.ndarray) -> np.ndarray:
    """Returns p-values of the photos a detector is fitted to, as if each were a new photo.

    Each photo is scored by the Gaussian of the half it is not part of; its distance there is left
    out of the reference distances.

    Args:
      embeddings: Embeddings of the catalogue's photos in random order, float [N, D], N >= 4.

    Returns:
      P-values, float64 [N].
    """
    p_values = np.empty(len(embeddings))
    for half in (0, 1):
        photos = embeddings[half::2]
        detector = _fit_halves(embeddings[1 - half :: 2], photos)
        distances = detector.reference_distances
        positions = np.searchsorted(distances, detector.squared_distances(photos))
        without_itself = (
            dataclasses.replace(detector, reference_distances=np.delete(distances, position))
            for position in positions
        )
        p_values[half::2] = [
            other.p_value(photo) for other, photo in zip(without_itself, photos, strict=True)
        ]
    return p_values


def _fit_halves(embeddings: np.ndarray, reference: np.ndarray) -> NoveltyDetector:
    # Not sklearn.decomposition.PCA: scikit-learn belongs to the service extra, and its noise
    # variance is averaged over min(N, D) - K directions, too much where there are fewer photos
    # than dimensions.
    fitted = np.asarray(embeddings, np.float64)
    mean = fitted.mean(0)
    count = min(NUM_COMPONENTS, len(fitted) // 4, fitted.shape[1] - 1)
    _, singular_values, directions = np.linalg.svd(fitted - mean, full_matrices=False)
    variances = np.square(singular_values) / max(len(fitted) - 1, 1)
    # Identical photos have no variance: the floor keeps the distances finite.
    floor = max(variances.sum() / fitted.shape[1], np.finfo(np.float32).tiny) * 1e-6
    residual = max(variances[count:].sum() / (fitted.shape[1] - count), floor)
    explained = np.maximum(variances[:count], floor)
    detector = NoveltyDetector(mean, directions[:count].T, explained, float(residual), np.zeros(0))
    distances = np.sort(detector.squared_distances(reference))
    return dataclasses.replace(detector, reference_distances=distances)


def _rounded(value: Any) -> Any:
    if not np.size(value):
        return np.asarray(value).tolist()
    return np.vectorize(lambda x: float(f"{x:.6g}"), otypes=[float])(value).tolist()
