"""Predicts a photo's category: classifier posterior fused with a vote of the nearest photos.

    p_c = a_c m_c + (1 - a_c) s_c, normalised over the categories
    m_c = sum of the classifier's probabilities of the products of category c, normalised
    s_c = sum_i w_i [c_i = c] / sum_i w_i,  w_i = exp((cos_i - cos_1) / T),
          over the `NUM_NEIGHBOURS` nearest photos of the index

Product probabilities are then rescaled by (p_c / m_c)^b. Both branches and the vote of 30 follow
Pailitao (Zhang et al. 2018, arXiv:2102.04674), whose classifier branch is a separate network; here
it is the product classifier itself, whose sum is more accurate than a category head fitted to the
embeddings (docs/results/ranking.md). a, b and T are fitted to photos that neither classifier nor
index have seen (`category_fit`).

Categories are integers from 0 to num_categories - 1; num_categories itself means "no category".
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.common.files import read_json, write_json
from sicot_jax.common.json_types import check_field_types
from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError

FORMAT = 2
NUM_NEIGHBOURS = 30
MIN_PROBABILITY = 1e-6  # floor under logarithms, so that one impossible photo decides no fit


def sum_by_category(values: np.ndarray, category: np.ndarray, num_categories: int) -> np.ndarray:
    """Returns the sum of values per category.

    Args:
      values: One value per product or photo, float [N].
      category: Category of each, int [N]; num_categories where it has none.
      num_categories: Number of categories, K.

    Returns:
      Sums, float64 [K]; entries without a category are left out.
    """
    sums = np.bincount(category, weights=values, minlength=num_categories + 1)
    return sums[:num_categories].astype(np.float64)  # bincount of nothing gives integers


def neighbour_vote(
    similarity: np.ndarray, category: np.ndarray, num_categories: int, temperature: float
) -> np.ndarray:
    """Returns the similarity-weighted vote of the nearest photos over categories.

    Args:
      similarity: Cosines of the nearest photos, float [B, N].
      category: Category of each photo, int [B, N]; num_categories where it has none.
      num_categories: Number of categories, K.
      temperature: T; a greater one gives more equal weights.

    Returns:
      Votes that sum to 1, float64 [B, K]; zeros where no photo has a category.
    """
    has_category = category < num_categories
    nearest = np.max(np.where(has_category, similarity, -np.inf), 1, keepdims=True, initial=-1.0)
    weights = np.exp((similarity - nearest) / temperature) * has_category
    votes = [
        sum_by_category(row, row_category, num_categories)
        for row, row_category in zip(weights, category, strict=True)
    ]
    return normalize_rows(np.reshape(votes, (len(similarity), num_categories)))


def normalize_rows(rows: np.ndarray) -> np.ndarray:
    """Divides each row by its sum; rows of zeros stay zero.

    Args:
      rows: Non-negative values, float64 [..., K].

    Returns:
      Float64 [..., K], each row sums to 1 or is zero.
    """
    total = rows.sum(-1, keepdims=True)
    return np.divide(rows, total, out=np.zeros_like(rows), where=total > 0)


@dataclasses.dataclass(frozen=True, eq=False)
class CategoryFusion:
    """Fitted weights that fuse the classifier's category posterior with the neighbour vote.

    Attributes:
      names: Names of the categories, K of them.
      classifier_weights: a, the weight of the classifier for each category, float64 [K].
      default_weight: a of a category that the fit has not seen.
      temperature: T of the neighbour vote.
      rescaling_exponent: b, the exponent with which product probabilities follow the category.
      confident_from: Least probability at which `category_fit.CONFIDENT_PRECISION` of the photos
        have the predicted category, given that their nearest photo agrees; None where no
        probability is enough.
      num_photos: Number of photos in the fit.
    """

    names: tuple[str, ...]
    classifier_weights: np.ndarray
    default_weight: float
    temperature: float
    rescaling_exponent: float
    confident_from: float | None
    num_photos: int

    def for_categories(self, names: tuple[str, ...]) -> CategoryFusion:
        """Returns the fusion for other categories; new ones get the default weight.

        Args:
          names: Names of the categories, in the order of the arrays to fuse.

        Returns:
          The fusion, `self` where the names are the same.
        """
        if names == self.names:
            return self
        known = dict(zip(self.names, self.classifier_weights.tolist(), strict=True))
        weights = np.array([known.get(name, self.default_weight) for name in names])
        return dataclasses.replace(self, names=names, classifier_weights=weights)

    def __call__(self, category_mass: np.ndarray, votes: np.ndarray) -> np.ndarray:
        """Returns the fused category posterior.

        Args:
          category_mass: Sums of product probabilities per category, float64 [B, K]; they need
            not sum to 1, since products may have no category.
          votes: Neighbour votes, float64 [B, K].

        Returns:
          Posterior p, float64 [B, K]. Where one branch is all zeros the other decides; zeros
          where both are.
        """
        weights = self.classifier_weights
        return normalize_rows(weights * normalize_rows(category_mass) + (1 - weights) * votes)

    def log_factors(self, category_mass: np.ndarray, posterior: np.ndarray) -> np.ndarray:
        """Returns what is added to the logits of each category's products, b log(p / m).

        Args:
          category_mass: Sums of product probabilities per category, float64 [B, K].
          posterior: Fused posterior p, float64 [B, K].

        Returns:
          Float64 [B, K]; zeros for a photo of which `category_mass` or `posterior` is all zeros.
        """
        return self.rescaling_exponent * _log_ratio(category_mass, posterior)


def _log_ratio(category_mass: np.ndarray, posterior: np.ndarray) -> np.ndarray:
    classifier = np.maximum(normalize_rows(category_mass), MIN_PROBABILITY)
    ratio = np.log(np.maximum(posterior, MIN_PROBABILITY)) - np.log(classifier)
    defined = category_mass.any(-1, keepdims=True) & posterior.any(-1, keepdims=True)
    return ratio * defined


def write_fusion(path: Path, fusion: CategoryFusion) -> None:
    """Writes a category fusion as JSON, atomically.

    Args:
      path: File to write.
      fusion: The fusion.
    """
    stored = {field.name: getattr(fusion, field.name) for field in dataclasses.fields(fusion)}
    weights = fusion.classifier_weights.tolist()
    write_json(path, stored | {"classifier_weights": weights, "format": FORMAT})


def read_fusion(path: Path) -> CategoryFusion | None:
    """Reads a category fusion.

    Args:
      path: File that `write_fusion` wrote.

    Returns:
      The fusion, or None without a file (the index was built from too few validation photos).

    Raises:
      InputError: The file is of another format, or damaged.
    """
    if not path.exists():
        return None
    stored: dict[str, Any] = read_json(path, "the categories of an index")
    if stored.pop("format", None) != FORMAT:
        raise InputError(
            f"{path}: of another format, this version reads {FORMAT}; build the index again"
        )
    try:
        check_field_types(CategoryFusion, stored)
        weights = np.array(stored["classifier_weights"], float)
        if weights.shape != (len(stored["names"]),):
            raise ValueError(f"weights {weights.shape} of {len(stored['names'])} categories")
        return CategoryFusion(
            **stored | {"names": tuple(stored["names"]), "classifier_weights": weights}
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path}: damaged or incomplete ({one_line_error(error)}); build the index again"
        ) from error
