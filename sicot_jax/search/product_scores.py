"""Turns an engine's logits into product and category probabilities over the active products."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from sicot_jax.index.backends.base import ActiveProducts, Neighbour
from sicot_jax.search.category import (
    NUM_NEIGHBOURS,
    CategoryFusion,
    neighbour_vote,
    sum_by_category,
)

_NUM_LISTED_CATEGORIES = 3


@dataclasses.dataclass(frozen=True, eq=False)
class ProductScores:
    """Logits of the model's C classes, then of the M products that were added after training.

    Attributes:
      active: Products that may be answers, and the classifier rows of the added ones.
      num_classes: C, the classes of the model; their product ids are 0 to C - 1.
      logits: Float32 [C + M]; -inf for deleted products.
      exp_logits: exp(logits - greatest logit), float64 [C + M]; zeros where all are deleted.
    """

    active: ActiveProducts
    num_classes: int
    logits: np.ndarray
    exp_logits: np.ndarray

    @classmethod
    def from_logits(
        cls, embedding: np.ndarray, logits: np.ndarray, active: ActiveProducts
    ) -> ProductScores:
        """Adds the logits of added products to those of an engine, and masks deleted products.

        Args:
          embedding: Embedding of the photo, float32 [D].
          logits: Logits of the model's classes, float32 [C].
          active: Active products.

        Returns:
          The scores.
        """
        num_classes = len(logits)
        joined = np.concatenate([logits, active.kernel @ embedding + active.bias])
        joined[active.deleted[active.deleted < num_classes]] = -np.inf
        joined[num_classes:][np.isin(active.new_products, active.deleted)] = -np.inf
        return cls(active, num_classes, joined, _stable_exp(joined))

    @functools.cached_property
    def category_mass(self) -> np.ndarray:
        """Sums of `exp_logits` per category, float64 [K]; not divided by their total."""
        category, num_categories = self.active.product_category, len(self.active.category_names)
        trained, added = np.split(self.exp_logits, [self.num_classes])
        return sum_by_category(
            trained, category[: self.num_classes], num_categories
        ) + sum_by_category(added, category[self.active.new_products], num_categories)

    def excluding(self, product_id: int) -> ProductScores:
        """Returns the scores as if a product were deleted.

        Args:
          product_id: Id of the product.

        Returns:
          The scores.
        """
        logits = self.logits.copy()
        logits[self.rows_of(product_id)] = -np.inf
        return ProductScores(self.active, self.num_classes, logits, _stable_exp(logits))

    def adjusted_logits(self, log_factors: np.ndarray) -> np.ndarray:
        """Returns the logits plus a term for the category of each product.

        Args:
          log_factors: Term of each category, the last for "no category", float64 [K + 1].

        Returns:
          Float64 [C + M].
        """
        category = self.active.product_category
        per_product = (
            log_factors[category[: self.num_classes]],
            log_factors[category[self.active.new_products]],
        )
        return self.logits + np.concatenate(per_product)

    def rows_of(self, product_id: int) -> np.ndarray:
        """Returns the indices of a product in the arrays, int64 [0 or 1].

        Args:
          product_id: Id of the product.

        Returns:
          Its index; empty where the classifier has no row for the product.
        """
        if product_id < self.num_classes:
            return np.array([product_id])
        return self.num_classes + np.flatnonzero(self.active.new_products == product_id)


def _stable_exp(logits: np.ndarray) -> np.ndarray:
    greatest = logits.max(initial=-np.inf)
    if not np.isfinite(greatest):
        return np.zeros(len(logits))
    return np.exp(logits - greatest, dtype=np.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class CategoryPosterior:
    """Predicted category of a photo.

    Attributes:
      top: Names and probabilities of the most probable categories, most probable first.
      confident: Whether the first is certain enough to restrict the search to it.
      log_factors: What is added to the logits of each category's products, 0 for products
        without a category, float64 [K + 1].
    """

    top: list[tuple[str, float]]
    confident: bool
    log_factors: np.ndarray


def category_posterior(
    fusion: CategoryFusion, scores: ProductScores, photos: Sequence[Neighbour]
) -> CategoryPosterior | None:
    """Predicts the category of a photo from product scores and its nearest photos.

    Args:
      fusion: Fitted fusion of classifier and neighbour vote.
      scores: Scores of the products.
      photos: Nearest photos of the index, nearest first.

    Returns:
      The prediction; None where no product is active, or none has a category.
    """
    names = scores.active.category_names
    if not names or not scores.exp_logits.any():
        return None
    fusion = fusion.for_categories(names)
    mass = scores.category_mass[None] / scores.exp_logits.sum()
    similarity, category = voting_neighbours(scores.active, photos, NUM_NEIGHBOURS)
    votes = neighbour_vote(similarity[None], category[None], len(names), fusion.temperature)
    posterior = fusion(mass, votes)[0]
    most_probable = np.argsort(-posterior, kind="stable")[:_NUM_LISTED_CATEGORIES]
    top = [(names[n], float(posterior[n])) for n in most_probable]
    log_factors = np.append(fusion.log_factors(mass, posterior[None])[0], 0.0)
    # The search is restricted only where the nearest photo is of the predicted category: what is
    # most similar must never be left out.
    agrees = len(photos) > 0 and bool(category[0] == posterior.argmax())
    threshold = fusion.confident_from
    confident = agrees and threshold is not None and top[0][1] >= threshold
    return CategoryPosterior(top, confident, log_factors)


def voting_neighbours(
    active: ActiveProducts, photos: Sequence[Neighbour], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns cosines and categories of the first photos, padded to a fixed length.

    Args:
      active: Active products and their categories.
      photos: Nearest photos, nearest first.
      count: Number of photos that vote.

    Returns:
      Cosines float64 [count] and categories int64 [count]. The category is K where there is no
      such photo, where its product has no category, or was added after `active` was read.
    """
    similarity, category = np.zeros(count), np.full(count, len(active.category_names))
    for rank, photo in enumerate(photos[:count]):
        similarity[rank] = photo.similarity
        if photo.product_id < len(active.product_category):
            category[rank] = active.product_category[photo.product_id]
    return similarity, category


def top_products(
    scores: ProductScores, k: int, posterior: CategoryPosterior | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the most probable products: a softmax over active products, rescaled by category.

    Args:
      scores: Scores of the products.
      k: Number of products.
      posterior: Category prediction whose factors rescale the probabilities.

    Returns:
      Product ids int64 [k], most probable first, and their probabilities float64 [k]; fewer
      where fewer are active.
    """
    logits, total = scores.logits, scores.exp_logits.sum()
    if posterior is not None and posterior.log_factors.any():
        logits = scores.adjusted_logits(posterior.log_factors)
        total += np.sum(scores.category_mass * np.expm1(posterior.log_factors[:-1]))
    k = min(k, int(np.isfinite(logits).sum()))
    if not k:
        return np.zeros(0, np.int64), np.zeros(0)
    candidates = np.argpartition(-logits, k - 1)[:k]
    best = candidates[np.argsort(-logits[candidates], kind="stable")]
    probability = np.exp((logits[best] - scores.logits.max()).astype(np.float64)) / total
    added = best >= scores.num_classes
    product_ids = best.astype(np.int64)
    product_ids[added] = scores.active.new_products[best[added] - scores.num_classes]
    return product_ids, probability
