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
from sicot_jax.search.answer import NUM_CONFIDENCE_NEIGHBOURS, confidence_features
from sicot_jax.search.category import NUM_NEIGHBOURS, CategoryFusion
from sicot_jax.search.category_fit import (
    EXPONENTS,
    CategoryFitData,
    fit_category_fusion,
    fit_rescaling_exponent,
)
from sicot_jax.search.novelty import cross_fitted_p_values, fit_novelty_detector
from sicot_jax.search.product_scores import (
    ProductScores,
    category_posterior,
    top_products,
    voting_neighbours,
)
from sicot_jax.search.rejection import (
    MIN_PHOTOS,
    Calibration,
    ConfidenceFeatures,
    fit_calibration,
)
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

    def scores(self) -> Iterator[ProductScores]:
        """Computed anew each time: a million logits of each photo would not fit."""
        for first in range(0, len(self.embeddings), _BATCH):
            some = self.embeddings[first : first + _BATCH]
            for embedding, logits in zip(some, some @ self.kernel.T + self.bias, strict=True):
                yield ProductScores.from_logits(embedding, logits, self.offered)


def calibrate(
    folder: Path, split: Split, numbers: np.ndarray
) -> tuple[Calibration, CategoryFusion] | None:
    """None where fewer than `MIN_PHOTOS` photos of products are there. `folder`: a version,
    whole but for this;
    numbers: product of each class of the split, int64.
    """
    index = LocalIndex(folder)
    try:
        most = max(min(_MOST, _CELLS // (1 + len(index.active_products().names))), MIN_PHOTOS)
        chosen = evenly_spaced(len(split), most)
        if len(chosen) < MIN_PHOTOS:
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
    near = index.nearest(found, NUM_CONFIDENCE_NEIGHBOURS + 1, photos=NUM_NEIGHBOURS + _SPARE)
    arrays = safetensors.numpy.load_file(converted.folder / folders.WEIGHTS)
    return _Photos(
        index.active_products(),
        found,
        np.array(products),
        near,
        arrays["fc.weight"],
        arrays["fc.bias"],
    )


def _categories(photos: _Photos) -> CategoryFusion:
    offered = photos.offered
    shares = np.array(
        [scores.category_mass / scores.exp_logits.sum() for scores in photos.scores()]
    )
    voters = [voting_neighbours(offered, near.photos, NUM_NEIGHBOURS) for near in photos.near]
    similarity, voting = (np.array(part) for part in zip(*voters, strict=True))
    truth = offered.category[photos.products]
    named = truth < len(offered.names)
    fusion = fit_category_fusion(
        CategoryFitData(
            shares[named],
            similarity[named],
            voting[named],
            truth[named],
            photos.products[named],
            offered.names,
        )
    )
    return dataclasses.replace(
        fusion,
        rescaling_exponent=fit_rescaling_exponent(
            _reciprocal_ranks(photos, fusion), photos.products
        ),
    )


def _reciprocal_ranks(photos: _Photos, fusion: CategoryFusion) -> np.ndarray:
    """Of each photo's product, float64 [strengths, B]; 0 where the classifier has no row for it."""
    found = np.zeros((len(EXPONENTS), len(photos.products)))
    for at, (product, near, scores) in enumerate(
        zip(photos.products, photos.near, photos.scores(), strict=True)
    ):
        told = category_posterior(fusion, scores, near.photos)
        for number, strength in enumerate(EXPONENTS):
            values = scores.adjusted_logits(strength * told.log_factors) if told else scores.logits
            found[number, at] = np.sum(
                1 / (1 + np.sum(values > values[scores.rows_of(product), None], 1))
            )
    return found


def _calibration(photos: _Photos, fusion: CategoryFusion) -> Calibration | None:
    known: list[ConfidenceFeatures] = []
    right: list[bool] = []
    absent: list[tuple[int, ConfidenceFeatures]] = []  # and the number of its photo
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
        if (alone := _evidence(fusion, scores.excluding(product), *others)) is not None:
            absent.append((number, alone[0]))
    if not absent:
        return None
    shares = cross_fitted_p_values(photos.embeddings).tolist()
    as_new = [dataclasses.replace(e, p_value=share) for e, share in zip(known, shares, strict=True)]
    without = [dataclasses.replace(e, p_value=shares[number]) for number, e in absent]
    novelty = fit_novelty_detector(photos.embeddings)
    return fit_calibration(as_new, right, without, novelty=novelty)


def _evidence(
    fusion: CategoryFusion,
    scores: ProductScores,
    products: Sequence[Neighbour],
    photos: Sequence[Neighbour],
) -> tuple[ConfidenceFeatures, int] | None:
    """Of the answer, and its product; how usual the photo is comes later. None where nothing is
    offered.
    """
    told = category_posterior(fusion, scores, photos[:NUM_NEIGHBOURS])
    numbers, shares = top_products(scores, 1, told)
    if not len(numbers):
        return None
    return confidence_features(numbers, shares, products[:NUM_CONFIDENCE_NEIGHBOURS], 1.0), int(
        numbers[0]
    )
