"""What is said of a photo: products, how sure, its category, similar ones. From an engine's numbers
and an index; no HTTP.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from sicot_jax.index.backends.base import Neighbour, ActiveProducts, ProductIndex
from sicot_jax.index.storage.products import ProductRecord
from sicot_jax.search.category import NEAREST, Fusion, by_classifier, by_neighbours
from sicot_jax.search.ranker import Ranker
from sicot_jax.search.rejection import Calibration, Evidence

_TRIES = 3  # for products that are withdrawn meanwhile
_LIKELY = 3  # categories
_CANDIDATES = 2  # for each similar product that is shown, where a ranker chooses
NEIGHBOURS = 10  # products that are looked at to tell how sure an answer is


@dataclasses.dataclass(frozen=True)
class Scored:
    """A product with its probability (recognised) or cosine (similar), and the photo of it that is
    nearest, or -1.
    """

    product: ProductRecord
    score: float
    row: int = -1


@dataclasses.dataclass(frozen=True)
class Told:
    """A photo's category. likely: names of a few and their probabilities, the most probable first.
    sure: the first of them is, enough to look for similar products in it alone. log_factors [K +
    1]: what the scores of each category's products are raised by; of none by 0.
    """

    likely: list[tuple[str, float]]
    sure: bool
    log_factors: np.ndarray


@dataclasses.dataclass(frozen=True)
class Answer:
    """matches: most probable first. similar: nearest first, or as the ranker has them, of the
    category `searched` where that is not None. certainty: that the first match is right, calibrated
    over photos of products and of others; known: whether it is enough. Both None where the index
    has no calibration; `category` None where it has no fit of categories.
    """

    matches: list[Scored]
    similar: list[Scored]
    certainty: float | None = None
    known: bool | None = None
    category: Told | None = None
    searched: str | None = None


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of the model's `classes`, whose numbers are 0 to classes - 1, then of `active.new_products`:
    values float32 [C + M], -inf of what is not offered; weights float64 [C + M] = exp(values -
    highest).
    """

    active: ActiveProducts
    classes: int
    values: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, embedding: np.ndarray, logits: np.ndarray, active: ActiveProducts) -> Scores:
        """From an engine's embedding [D] and logits [C]; later products have rows of their own."""
        classes = len(logits)
        values = np.concatenate([logits, active.kernel @ embedding + active.bias])
        values[active.deleted[active.deleted < classes]] = -np.inf
        values[classes:][np.isin(active.new_products, active.deleted)] = -np.inf
        return cls(active, classes, values, _weights(values))

    @functools.cached_property
    def by_category(self) -> np.ndarray:
        """Sums of weights float64 [K], not divided by their total."""
        names, category = self.active.category_names, self.active.product_category
        known = by_classifier(self.weights[: self.classes], category[: self.classes], len(names))
        return known + by_classifier(
            self.weights[self.classes :], category[self.active.new_products], len(names)
        )

    def without(self, product: int) -> Scores:
        """As if it were not offered."""
        values = self.values.copy()
        values[self.row(product)] = -np.inf
        return Scores(self.active, self.classes, values, _weights(values))

    def raised(self, log_factors: np.ndarray) -> np.ndarray:
        """Values with those of each category's products, or of none [K + 1], raised."""
        category = self.active.product_category
        own = (log_factors[category[: self.classes]], log_factors[category[self.active.new_products]])
        return self.values + np.concatenate(own)

    def row(self, product: int) -> np.ndarray:
        """Of the arrays; of a product without a row none."""
        if product < self.classes:
            return np.array([product])
        return self.classes + np.flatnonzero(self.active.new_products == product)


def _weights(values: np.ndarray) -> np.ndarray:
    highest = values.max(initial=-np.inf)
    return (
        np.exp(values - highest, dtype=np.float64)
        if np.isfinite(highest)
        else np.zeros(len(values))
    )


def told(fusion: Fusion, scores: Scores, photos: Sequence[Neighbour]) -> Told | None:
    """From the scores and the nearest photos; None where no product has a category."""
    active = scores.active
    if not active.category_names or not scores.weights.any():
        return None
    fusion, count = fusion.of(active.category_names), len(active.category_names)
    shares = scores.by_category[None] / scores.weights.sum()
    cosines, voting = voters(active, photos, NEAREST)
    votes = by_neighbours(cosines[None], voting[None], count, fusion.temperature)
    probability = fusion(shares, votes)[0]
    likely = [
        (active.category_names[n], float(probability[n]))
        for n in np.argsort(-probability, kind="stable")[:_LIKELY]
    ]
    factors = np.append(fusion.log_factors(shares, probability[None])[0], 0.0)
    # The nearest photo of another category, or of none: what is most alike must not be left out.
    agreed = len(photos) > 0 and bool(voting[0] == probability.argmax())
    return Told(likely, agreed and fusion.sure is not None and likely[0][1] >= fusion.sure, factors)


def voters(
    active: ActiveProducts, photos: Sequence[Neighbour], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines [count] of the first photos, and their categories; K where there is no such photo, or
    its product has none or came after `active`.
    """
    cosines, category = np.zeros(count), np.full(count, len(active.category_names))
    for place, photo in enumerate(photos[:count]):
        cosines[place] = photo.similarity
        if photo.product_id < len(active.product_category):
            category[place] = active.product_category[photo.product_id]
    return cosines, category


def best_products(
    scores: Scores, k: int, category: Told | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers int64 [k] of the most probable products, best first, and their probabilities float64
    [k]: softmax over the products that are offered, weighted by what is told of their category;
    fewer where there are fewer.
    """
    values, active, classes, total = (
        scores.values,
        scores.active,
        scores.classes,
        scores.weights.sum(),
    )
    if category is not None and category.log_factors.any():
        factors = category.log_factors
        values = scores.raised(factors)
        total += np.sum(scores.by_category * np.expm1(factors[:-1]))
    k = min(k, int(np.isfinite(values).sum()))
    if not k:
        return np.zeros(0, np.int64), np.zeros(0)
    some = np.argpartition(-values, k - 1)[:k]
    best = some[np.argsort(-values[some], kind="stable")]
    shares = np.exp((values[best] - scores.values.max()).astype(np.float64)) / total
    later = best >= classes
    numbers = best.astype(np.int64)
    numbers[later] = active.new_products[best[later] - classes]
    return numbers, shares


def evidence(
    numbers: np.ndarray, shares: np.ndarray, near: Sequence[Neighbour], usual: float
) -> Evidence:
    """Of the first of `numbers`, from its probability, the nearest products, and how usual the
    photo is.
    """
    own = next((n.similarity for n in near if n.product_id == numbers[0]), 0.0)
    return Evidence(float(shares[0]), near[0].similarity if near else 0.0, own, usual)


def answer(
    index: ProductIndex,
    calibration: Calibration | None,
    fusion: Fusion | None,
    embedding: np.ndarray,
    logits: np.ndarray,
    *,
    k: int,
    similar: int,
    category: str | None = None,
    any_category: bool = False,
    ranker: Ranker | None = None,
    rerank: bool = True,
) -> Answer:
    """The k most probable products and as many similar ones as asked for: of one `category` where
    it is given, else of the photo's where that is sure. `any_category`: what the photo's category
    is decides neither. `rerank`: the ranker, where there is one, chooses the similar ones from
    twice as many and puts them in order.
    """
    ranker = ranker if rerank else None
    active, candidates = index.active_products(), similar * (_CANDIDATES if ranker else 1)
    near = index.nearest(
        embedding[None], max(candidates, NEIGHBOURS if k else 0), num_photos=NEAREST if fusion else 0
    )[0]
    scores = Scores.of(embedding, logits, active)
    named = told(fusion, scores, near.photos) if fusion else None
    searched = (
        named.likely[0][0]
        if category is None and named and named.sure and not any_category
        else category
    )
    shown = near.products[:candidates]
    if searched is not None:
        shown = index.nearest(embedding[None], candidates, category=searched)[0].products
    for _ in range(_TRIES):
        numbers, shares = best_products(scores, k, None if any_category else named)
        cards = index.products(
            [*numbers.tolist(), *(neighbour.product_id for neighbour in shown)]
        )  # all at once
        best, others = cards[: len(numbers)], cards[len(numbers) :]
        gone = [number for number, card in zip(numbers.tolist(), best, strict=True) if card is None]
        if not gone:
            break
        # Withdrawn a moment ago: nothing may be said of it, and its share belongs to the others.
        active = dataclasses.replace(active, deleted=np.union1d(active.deleted, gone))
        scores = Scores.of(embedding, logits, active)
    certainty = None
    if calibration and len(numbers):
        usual = calibration.usual(embedding)
        certainty = calibration.certainty(
            evidence(numbers, shares, near.products[:NEIGHBOURS], usual)
        )
    alike = zip(others, shown, strict=True)
    return Answer(
        [Scored(p, float(s)) for p, s in zip(best, shares, strict=True) if p is not None],
        _ranked(ranker, [Scored(p, n.similarity, n.row) for p, n in alike if p is not None])[
            :similar
        ],
        certainty,
        None if calibration is None or certainty is None else certainty >= calibration.threshold,
        named,
        searched,
    )


def _ranked(ranker: Ranker | None, similar: list[Scored]) -> list[Scored]:
    if ranker is None:
        return similar
    scores = ranker.scores(
        np.array([scored.score for scored in similar]), [scored.product for scored in similar]
    )
    return [similar[n] for n in np.argsort(-scores, kind="stable")]
