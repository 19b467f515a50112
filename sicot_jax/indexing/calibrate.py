"""What a new version knows of itself from the run's validation photos: which category they show,
and how sure an answer is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sicot_jax.catalog.batches import evenly_spaced
from sicot_jax.catalog.catalog import Split
from sicot_jax.index.backends.base import ActiveProducts, Neighbour, Neighbours
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import layout
from sicot_jax.recognizer import jax_engine
from sicot_jax.search import answer as recognition
from sicot_jax.search import category
from sicot_jax.search import novelty as typicality
from sicot_jax.search import rejection as unknown
from sicot_jax.search.answer import NEIGHBOURS, Scores
from sicot_jax.search.category import NEAREST, STRENGTHS, Fusion
from sicot_jax.search.rejection import Calibration, Evidence
from sicot_jax.weights import bundle as folders
from sicot_jax.weights.bundle import Converted

_MOST = 5_000  # photos that are looked at
_CELLS = 20_000_000  # of photos x categories, at most
_SPARE = 100  # nearest photos that may be of the photo's own product
_BATCH = 32


@dataclasses.dataclass(frozen=True, eq=False)
class _Photos:
    """Embeddings [B, D] of photos, their products int64 [B] and logits [C] one after the other,
    what is near.
    """

    offered: ActiveProducts
    embeddings: np.ndarray
    products: np.ndarray
    near: list[Neighbours]
    kernel: np.ndarray
    bias: np.ndarray

    def scores(self) -> Iterator[Scores]:
        """Computed anew each time: a million logits of each photo would not fit."""
        for first in range(0, len(self.embeddings), _BATCH):
            some = self.embeddings[first : first + _BATCH]
            for embedding, logits in zip(some, some @ self.kernel.T + self.bias, strict=True):
                yield Scores.of(embedding, logits, self.offered)


def calibrate(folder: Path, split: Split, numbers: np.ndarray) -> tuple[Calibration, Fusion] | None:
    """None where fewer than `unknown.FEWEST` photos of products are there. `folder`: a version,
    whole but for this;
    numbers: product of each class of the split, int64.
    """
    index = LocalIndex(folder)
    try:
        most = max(min(_MOST, _CELLS // (1 + len(index.active_products().names))), unknown.FEWEST)
        chosen = evenly_spaced(len(split), most)
        if len(chosen) < unknown.FEWEST:
            return None
        photos = _look(index, folders.read_converted(folder / layout.MODEL), split, numbers, chosen)
    finally:
        index.close()
    fusion = _categories(photos)
    calibration = _calibration(photos, fusion)
    return (calibration, fusion) if calibration else None


def _look(
    index: LocalIndex,
    converted: Converted,
    split: Split,
    numbers: np.ndarray,
    chosen: Sequence[int] | np.ndarray,
) -> _Photos:
    import safetensors.numpy

    engine, embeddings, products = jax_engine(converted), [], []
    for first in range(0, len(chosen), _BATCH):
        records = [split[int(i)] for i in chosen[first : first + _BATCH]]
        embeddings.append(
            engine(converted.preprocessing.batch([record["image"] for record in records])).embedding
        )
        products += [int(numbers[record["class_id"]]) for record in records]
    found = np.concatenate(embeddings)
    near = index.nearest(found, NEIGHBOURS + 1, photos=NEAREST + _SPARE)
    arrays = safetensors.numpy.load_file(converted.folder / folders.WEIGHTS)
    return _Photos(
        index.active_products(), found, np.array(products), near, arrays["fc.weight"], arrays["fc.bias"]
    )


def _categories(photos: _Photos) -> Fusion:
    offered = photos.offered
    shares = np.array([scores.by_category / scores.weights.sum() for scores in photos.scores()])
    voters = [recognition.voters(offered, near.photos, NEAREST) for near in photos.near]
    similarity, voting = (np.array(part) for part in zip(*voters, strict=True))
    truth = offered.category[photos.products]
    named = truth < len(offered.names)
    fusion = category.fit(
        shares[named],
        similarity[named],
        voting[named],
        truth[named],
        photos.products[named],
        offered.names,
    )
    return dataclasses.replace(
        fusion, strength=category.strength(_reciprocal_ranks(photos, fusion), photos.products)
    )


def _reciprocal_ranks(photos: _Photos, fusion: Fusion) -> np.ndarray:
    """Of each photo's product, float64 [strengths, B]; 0 where the classifier has no row for it."""
    found = np.zeros((len(STRENGTHS), len(photos.products)))
    for at, (product, near, scores) in enumerate(
        zip(photos.products, photos.near, photos.scores(), strict=True)
    ):
        told = recognition.told(fusion, scores, near.photos)
        for number, strength in enumerate(STRENGTHS):
            values = scores.raised(strength * told.log_factors) if told else scores.values
            found[number, at] = np.sum(
                1 / (1 + np.sum(values > values[scores.row(product), None], 1))
            )
    return found


def _calibration(photos: _Photos, fusion: Fusion) -> Calibration | None:
    known: list[Evidence] = []
    right: list[bool] = []
    absent: list[tuple[int, Evidence]] = []  # and the number of its photo
    for number, (product, near, scores) in enumerate(
        zip(photos.products, photos.near, photos.scores(), strict=True)
    ):
        answered = _evidence(fusion, scores, near.products, near.photos)
        assert answered is not None  # something is offered
        known.append(answered[0])
        right.append(answered[1] == product)
        others = (
            [n for n in part if n.product != product] for part in (near.products, near.photos)
        )
        if (alone := _evidence(fusion, scores.without(product), *others)) is not None:
            absent.append((number, alone[0]))
    if not absent:
        return None
    shares = typicality.shares_of_fitted(photos.embeddings).tolist()
    as_new = [dataclasses.replace(e, usual=share) for e, share in zip(known, shares, strict=True)]
    without = [dataclasses.replace(e, usual=shares[number]) for number, e in absent]
    return unknown.fit(as_new, right, without, typicality=typicality.fit(photos.embeddings))


def _evidence(
    fusion: Fusion, scores: Scores, products: Sequence[Neighbour], photos: Sequence[Neighbour]
) -> tuple[Evidence, int] | None:
    """Of the answer, and its product; how usual the photo is comes later. None where nothing is
    offered.
    """
    told = recognition.told(fusion, scores, photos[:NEAREST])
    numbers, shares = recognition.best_products(scores, 1, told)
    if not len(numbers):
        return None
    return recognition.evidence(numbers, shares, products[:NEIGHBOURS], 1.0), int(numbers[0])
