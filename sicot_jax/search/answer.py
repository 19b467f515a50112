"""Answers a query photo: which product it shows, how confident that is, and similar products.

Works on an engine's embedding and logits and on a product index; there is no HTTP here.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Sequence

import numpy as np

from sicot_jax.errors import InputError
from sicot_jax.index.backends.base import Neighbour, ProductIndex
from sicot_jax.index.storage.products import ProductRecord
from sicot_jax.search.category import NUM_NEIGHBOURS, CategoryFusion
from sicot_jax.search.product_scores import (
    CategoryPosterior,
    ProductScores,
    category_posterior,
    top_products,
)
from sicot_jax.search.ranker import Ranker
from sicot_jax.search.rejection import Calibration, ConfidenceFeatures

NUM_CONFIDENCE_NEIGHBOURS = 10  # nearest products that the confidence is computed from
_CANDIDATES_PER_RESULT = 2  # products that a ranker chooses each similar one from
_MIN_NAME_RATIO = 0.5  # of difflib, for a category that may be meant
_MAX_COMPARED_NAMES = 300
_MAX_LOOKUPS = 3  # repeated where products are deleted between two reads of the index


@dataclasses.dataclass(frozen=True, eq=False)
class Query:
    """A query photo and what is asked about it.

    Attributes:
      embedding: Embedding of the photo, float32 [D].
      logits: Logits of the model's classes, float32 [C].
      k: Number of recognised products to return; 0 for a similarity search alone.
      num_similar: Number of similar products to return.
      category: Category that similar products are restricted to; None for the predicted category
        where that is confident, else all.
      any_category: Ignore the predicted category, in the search and in the probabilities.
      rerank: Let the ranker, where the index has one, order the similar products.
    """

    embedding: np.ndarray
    logits: np.ndarray
    k: int = 5
    num_similar: int = 20
    category: str | None = None
    any_category: bool = False
    rerank: bool = True


@dataclasses.dataclass(frozen=True)
class ScoredProduct:
    """A product of an answer.

    Attributes:
      product: The product record.
      score: Probability of a recognised product, cosine of a similar one.
      row: Row of the product's nearest photo in the index; -1 for recognised products.
    """

    product: ProductRecord
    score: float
    row: int = -1


@dataclasses.dataclass(frozen=True)
class Answer:
    """Answer to a query photo.

    Attributes:
      matches: Recognised products, most probable first.
      similar: Similar products, nearest first or in the ranker's order.
      confidence: Calibrated probability that the first match is right; None without calibration.
      known: Whether the confidence reaches the rejection threshold; None without calibration.
      category: Predicted category; None where the index has no category fusion.
      searched_category: Category that similar products were restricted to.
    """

    matches: list[ScoredProduct]
    similar: list[ScoredProduct]
    confidence: float | None = None
    known: bool | None = None
    category: CategoryPosterior | None = None
    searched_category: str | None = None


def confidence_features(
    product_ids: np.ndarray, probability: np.ndarray, nearest: Sequence[Neighbour], p_value: float
) -> ConfidenceFeatures:
    """Collects the features that the confidence of an answer is computed from.

    Args:
      product_ids: Recognised products, most probable first, int64 [k], k >= 1.
      probability: Their probabilities, float64 [k].
      nearest: Nearest products, nearest first.
      p_value: Conformal p-value of the photo (`novelty`).

    Returns:
      The features of the first product.
    """
    match_similarity = next((n.similarity for n in nearest if n.product_id == product_ids[0]), 0.0)
    nearest_similarity = nearest[0].similarity if nearest else 0.0
    return ConfidenceFeatures(float(probability[0]), nearest_similarity, match_similarity, p_value)


@dataclasses.dataclass(frozen=True, eq=False)
class _ResolvedProducts:
    """Recognised products with their records, and records of the nearest products."""

    product_ids: np.ndarray
    probability: np.ndarray
    matches: list[ProductRecord | None]
    similar: list[ProductRecord | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Searcher:
    """Answers queries from a product index.

    Attributes:
      index: The product index.
      calibration: Confidence and rejection threshold; None where the index has none.
      category_fusion: Category prediction; None where the index has none.
      ranker: Order of similar products; None for nearest first.
    """

    index: ProductIndex
    calibration: Calibration | None = None
    category_fusion: CategoryFusion | None = None
    ranker: Ranker | None = None

    def check_category(self, category: str) -> None:
        """Raises an error for a category that the index does not have.

        Args:
          category: Category that similar products are to be restricted to.

        Raises:
          InputError: An unknown category; the message names the nearest ones.
        """
        names = self.index.active_products().category_names
        if category in names:
            return
        asked, folded = category.casefold(), {name.casefold(): name for name in names}
        # Comparing 10,000 names would take as long as many photos: those with a word or the
        # beginning in common first.
        words = set(asked.split())
        alike = [n for n in folded if n[:2] == asked[:2] or not words.isdisjoint(n.split())]
        compared = itertools.islice(dict.fromkeys([*alike, *folded]), _MAX_COMPARED_NAMES)
        nearest = difflib.get_close_matches(asked, compared, cutoff=_MIN_NAME_RATIO)
        wanted = ", ".join(repr(folded[name]) for name in nearest) or "one of the catalogue's"
        raise InputError(
            f"category={category!r:.100}: no such category, wanted {wanted}; "
            "leave it out for all categories"
        )

    def answer(self, query: Query) -> Answer:
        """Recognises the product of a photo and finds similar products.

        Args:
          query: The photo's embedding and logits, and what is asked.

        Returns:
          The answer. Deleted products are never part of it.

        Raises:
          IndexUnavailableError: The index cannot be read at the moment.
        """
        fusion, ranker = self.category_fusion, self.ranker if query.rerank else None
        num_candidates = query.num_similar * (_CANDIDATES_PER_RESULT if ranker else 1)
        active = self.index.active_products()
        nearest = self.index.nearest(
            query.embedding[None],
            max(num_candidates, NUM_CONFIDENCE_NEIGHBOURS if query.k else 0),
            num_photos=NUM_NEIGHBOURS if fusion else 0,
        )[0]
        scores = ProductScores.from_logits(query.embedding, query.logits, active)
        posterior = category_posterior(fusion, scores, nearest.photos) if fusion else None
        category = _category_to_search(query, posterior)
        candidates = nearest.products[:num_candidates]
        if category is not None:
            candidates = self.index.nearest(
                query.embedding[None], num_candidates, category=category
            )[0].products
        resolved = self._resolve(
            query, scores, None if query.any_category else posterior, candidates
        )
        confidence, known = self._confidence(query, resolved, nearest.products)
        matches = [
            ScoredProduct(product, float(probability))
            for product, probability in zip(resolved.matches, resolved.probability, strict=True)
            if product is not None
        ]
        similar = [
            ScoredProduct(product, neighbour.similarity, neighbour.row)
            for product, neighbour in zip(resolved.similar, candidates, strict=True)
            if product is not None
        ]
        similar = _ranked(ranker, similar)[: query.num_similar]
        return Answer(matches, similar, confidence, known, posterior, category)

    def _resolve(
        self,
        query: Query,
        scores: ProductScores,
        posterior: CategoryPosterior | None,
        candidates: Sequence[Neighbour],
    ) -> _ResolvedProducts:
        """Returns product records; recognises again without products deleted meanwhile."""
        for _ in range(_MAX_LOOKUPS):
            product_ids, probability = top_products(scores, query.k, posterior)
            # One read for both lists.
            records = self.index.products(
                [*product_ids.tolist(), *(n.product_id for n in candidates)]
            )
            matches, similar = records[: len(product_ids)], records[len(product_ids) :]
            resolved = _ResolvedProducts(product_ids, probability, matches, similar)
            deleted = [
                n for n, record in zip(product_ids.tolist(), matches, strict=True) if record is None
            ]
            if not deleted:
                break
            # The probability of a deleted product belongs to the others.
            active = dataclasses.replace(
                scores.active, deleted=np.union1d(scores.active.deleted, deleted)
            )
            scores = ProductScores.from_logits(query.embedding, query.logits, active)
        return resolved

    def _confidence(
        self, query: Query, resolved: _ResolvedProducts, nearest: Sequence[Neighbour]
    ) -> tuple[float | None, bool | None]:
        if self.calibration is None or not len(resolved.product_ids):
            return None, None
        features = confidence_features(
            resolved.product_ids,
            resolved.probability,
            nearest[:NUM_CONFIDENCE_NEIGHBOURS],
            self.calibration.p_value(query.embedding),
        )
        confidence = self.calibration.confidence(features)
        return confidence, confidence >= self.calibration.threshold


def _category_to_search(query: Query, posterior: CategoryPosterior | None) -> str | None:
    if query.category is not None or query.any_category or posterior is None:
        return query.category
    return posterior.top[0][0] if posterior.confident else None


def _ranked(ranker: Ranker | None, similar: list[ScoredProduct]) -> list[ScoredProduct]:
    if ranker is None:
        return similar
    similarity = np.array([scored.score for scored in similar])
    scores = ranker.scores(similarity, [scored.product for scored in similar])
    return [similar[n] for n in np.argsort(-scores, kind="stable")]
