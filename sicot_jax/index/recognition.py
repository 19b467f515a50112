"""What is said of a photo: products, how sure, and similar ones. From an engine's numbers and an index; no HTTP here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sicot_jax.index.cards import Product
from sicot_jax.index.product_index import Neighbour, Offered, ProductIndex
from sicot_jax.index.unknown import Calibration, Evidence

_TRIES = 3  # for products that are withdrawn meanwhile
NEIGHBOURS = 10  # products that are looked at to tell how sure an answer is


@dataclasses.dataclass(frozen=True)
class Scored:
    """A product with its probability (recognised) or cosine (similar), and the photo of it that is nearest, or -1."""

    product: Product
    score: float
    place: int = -1


@dataclasses.dataclass(frozen=True)
class Answer:
    """matches: most probable first. similar: nearest first. certainty: that the first match is right, calibrated over photos of
    products and of others; known: whether it is enough. Both None where the index has no calibration.
    """

    matches: list[Scored]
    similar: list[Scored]
    certainty: float | None = None
    known: bool | None = None


def best_products(embedding: np.ndarray, logits: np.ndarray, offered: Offered, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers int64 [k] of the most probable products, best first, and their probabilities float64 [k]: softmax over the
    products that are offered; fewer where there are fewer.

    Logits [C] are of the model's classes, whose numbers are 0 to C - 1; later products have rows of their own.
    """
    classes = len(logits)
    scores = np.concatenate([logits, offered.kernel @ embedding + offered.bias])
    scores[offered.withdrawn[offered.withdrawn < classes]] = -np.inf
    scores[classes:][np.isin(offered.products, offered.withdrawn)] = -np.inf
    k = min(k, int(np.isfinite(scores).sum()))
    if not k:
        return np.zeros(0, np.int64), np.zeros(0)
    some = np.argpartition(-scores, k - 1)[:k]
    best = some[np.argsort(-scores[some], kind="stable")]
    highest = scores[best[0]]
    shares = np.exp((scores[best] - highest).astype(np.float64)) / np.exp(scores - highest, dtype=np.float64).sum()
    later = best >= classes
    numbers = best.astype(np.int64)
    numbers[later] = offered.products[best[later] - classes]
    return numbers, shares


def evidence(numbers: np.ndarray, shares: np.ndarray, near: Sequence[Neighbour], usual: float) -> Evidence:
    """Of the first of `numbers`, from its probability, the nearest products, and how usual the photo is."""
    own = next((n.similarity for n in near if n.product == numbers[0]), 0.0)
    return Evidence(float(shares[0]), near[0].similarity if near else 0.0, own, usual)


def answer(
    index: ProductIndex,
    calibration: Calibration | None,
    embedding: np.ndarray,
    logits: np.ndarray,
    *,
    k: int,
    similar: int,
    category: str | None = None,
) -> Answer:
    """The k most probable products and as many similar ones as asked for, of one `category` where it is given."""
    offered = index.offered()
    near = index.nearest(embedding[None], max(similar, NEIGHBOURS if k else 0))[0]
    shown = near[:similar] if category is None else index.nearest(embedding[None], similar, category=category)[0]
    for _ in range(_TRIES):
        numbers, shares = best_products(embedding, logits, offered, k)
        cards = index.products([*numbers.tolist(), *(neighbour.product for neighbour in shown)])  # all at once
        best, others = cards[: len(numbers)], cards[len(numbers) :]
        gone = [number for number, card in zip(numbers.tolist(), best, strict=True) if card is None]
        if not gone:
            break
        # Withdrawn a moment ago: nothing may be said of it, and its share belongs to the others.
        offered = dataclasses.replace(offered, withdrawn=np.union1d(offered.withdrawn, gone))
    certainty = None
    if calibration and len(numbers):
        certainty = calibration.certainty(evidence(numbers, shares, near[:NEIGHBOURS], calibration.usual(embedding)))
    return Answer(
        [Scored(p, float(s)) for p, s in zip(best, shares, strict=True) if p is not None],
        [Scored(p, n.similarity, n.place) for p, n in zip(others, shown, strict=True) if p is not None],
        certainty,
        None if calibration is None or certainty is None else certainty >= calibration.threshold,
    )
