"""Fits category prediction and confidence of a new version to the run's validation photos."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sicot_jax.catalog.batches import evenly_spaced
from sicot_jax.catalog.catalog import Split
from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.index.backends.base import ActiveProducts, Neighbour, Neighbours
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import layout
from sicot_jax.recognizer import jax_engine
from sicot_jax.search.answer import NUM_CONFIDENCE_NEIGHBOURS, confidence_features
from sicot_jax.search.category import (
    EXPONENTS,
    NUM_NEIGHBOURS,
    CategoryFitData,
    CategoryFusion,
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
from sicot_jax.weights.bundle import WEIGHTS_FILE, WeightsBundle, read_bundle

_MAX_PHOTOS = 5_000
_MAX_CELLS = 20_000_000  # photos x categories
_SPARE_NEIGHBOURS = 100  # nearest photos that may be of the photo's product
_BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True, eq=False)
class _ValidationPhotos:
    """B validation photos, searched in the index.

    Attributes:
      active: products that may be answers.
      embeddings: float32 [B, D].
      products: product id of each, int64 [B].
      neighbours: search results of each.
      kernel: class weights of the model, float32 [C, D].
      bias: float32 [C].
    """

    active: ActiveProducts
    embeddings: np.ndarray
    products: np.ndarray
    neighbours: list[Neighbours]
    kernel: np.ndarray
    bias: np.ndarray

    def scores(self) -> Iterator[ProductScores]:
        """Computed again each time: a million logits of each photo would not fit."""
        for first in range(0, len(self.embeddings), _BATCH_SIZE):
            batch = self.embeddings[first : first + _BATCH_SIZE]
            for embedding, logits in zip(batch, batch @ self.kernel.T + self.bias, strict=True):
                yield ProductScores.from_logits(embedding, logits, self.active)


def calibrate_version(
    folder: Path, split: Split, product_ids: np.ndarray
) -> tuple[Calibration, CategoryFusion] | None:
    """Fits confidence and category prediction of a version that is complete but for these.

    Args:
      folder: version folder.
      split: validation photos.
      product_ids: product id of each class of the split, int64 [products].

    Returns:
      Calibration and category fusion; None where there are fewer than `MIN_PHOTOS` photos.
    """
    with contextlib.closing(LocalIndex(folder)) as index:
        num_categories = len(index.active_products().category_names)
        most = max(min(_MAX_PHOTOS, _MAX_CELLS // (1 + num_categories)), MIN_PHOTOS)
        chosen = evenly_spaced(len(split), most)
        if len(chosen) < MIN_PHOTOS:
            return None
        records = _Records(split, chosen, product_ids)
        photos = _search_photos(index, read_bundle(folder / layout.MODEL), records)
    fusion = _fit_fusion(photos)
    calibration = _fit_confidence(photos, fusion)
    return (calibration, fusion) if calibration else None


@dataclasses.dataclass(frozen=True)
class _Records:
    """Some photos of a split, and the product id of each class."""

    split: Split
    chosen: np.ndarray
    product_ids: np.ndarray


def _search_photos(
    index: LocalIndex, converted: WeightsBundle, records: _Records
) -> _ValidationPhotos:
    import safetensors.numpy

    engine, batches, products = jax_engine(converted), [], []
    for first in range(0, len(records.chosen), _BATCH_SIZE):
        batch = [records.split[int(i)] for i in records.chosen[first : first + _BATCH_SIZE]]
        images = converted.preprocessing.batch([record["image"] for record in batch])
        batches.append(engine(images).embedding)
        products += [int(records.product_ids[record["class_id"]]) for record in batch]
    embeddings = np.concatenate(batches)
    neighbours = index.nearest(
        embeddings, NUM_CONFIDENCE_NEIGHBOURS + 1, num_photos=NUM_NEIGHBOURS + _SPARE_NEIGHBOURS
    )
    arrays = safetensors.numpy.load_file(converted.folder / WEIGHTS_FILE)
    class_weights = ClassWeights.from_named_arrays(arrays)
    return _ValidationPhotos(
        index.active_products(),
        embeddings,
        np.array(products),
        neighbours,
        class_weights.kernel,
        class_weights.bias,
    )


def _fit_fusion(photos: _ValidationPhotos) -> CategoryFusion:
    active = photos.active
    mass = np.array([scores.category_mass / scores.exp_logits.sum() for scores in photos.scores()])
    voters = [
        voting_neighbours(active, result.photos, NUM_NEIGHBOURS) for result in photos.neighbours
    ]
    similarity, neighbour_category = (np.array(part) for part in zip(*voters, strict=True))
    category = active.product_category[photos.products]
    labelled = category < len(active.category_names)
    fusion = fit_category_fusion(
        CategoryFitData(
            mass[labelled],
            similarity[labelled],
            neighbour_category[labelled],
            category[labelled],
            photos.products[labelled],
            active.category_names,
        )
    )
    exponent = fit_rescaling_exponent(_reciprocal_ranks(photos, fusion), photos.products)
    return dataclasses.replace(fusion, rescaling_exponent=exponent)


def _reciprocal_ranks(photos: _ValidationPhotos, fusion: CategoryFusion) -> np.ndarray:
    """Of each photo's product, float64 [exponents, B]; 0 for a product without class weights."""
    reciprocal = np.zeros((len(EXPONENTS), len(photos.products)))
    for photo, (product, result, scores) in enumerate(
        zip(photos.products, photos.neighbours, photos.scores(), strict=True)
    ):
        posterior = category_posterior(fusion, scores, result.photos)
        for number, exponent in enumerate(EXPONENTS):
            logits = (
                scores.adjusted_logits(exponent * posterior.log_factors)
                if posterior
                else scores.logits
            )
            rank = 1 + np.sum(logits > logits[scores.rows_of(product), None], 1)
            reciprocal[number, photo] = np.sum(1 / rank)
    return reciprocal


def _fit_confidence(photos: _ValidationPhotos, fusion: CategoryFusion) -> Calibration | None:
    """Fits to answers to the photos, and to the same photos with their product left out."""
    known: list[ConfidenceFeatures] = []
    correct: list[bool] = []
    unknown: list[tuple[int, ConfidenceFeatures]] = []  # and the number of the photo
    for photo, (product, result, scores) in enumerate(
        zip(photos.products, photos.neighbours, photos.scores(), strict=True)
    ):
        answer = _answer_features(fusion, scores, result.products, result.photos)
        assert answer is not None  # some product is active
        known.append(answer[0])
        correct.append(answer[1] == product)
        others = (
            [n for n in neighbours if n.product_id != product]
            for neighbours in (result.products, result.photos)
        )
        without = _answer_features(fusion, scores.excluding(product), *others)
        if without is not None:
            unknown.append((photo, without[0]))
    if not unknown:
        return None
    p_values = cross_fitted_p_values(photos.embeddings).tolist()
    return fit_calibration(
        [dataclasses.replace(f, p_value=p) for f, p in zip(known, p_values, strict=True)],
        correct,
        [dataclasses.replace(f, p_value=p_values[photo]) for photo, f in unknown],
        novelty=fit_novelty_detector(photos.embeddings),
    )


def _answer_features(
    fusion: CategoryFusion,
    scores: ProductScores,
    products: Sequence[Neighbour],
    photos: Sequence[Neighbour],
) -> tuple[ConfidenceFeatures, int] | None:
    """Features of the answer, their p-value still 1, and its product; None without one."""
    posterior = category_posterior(fusion, scores, photos[:NUM_NEIGHBOURS])
    product_ids, probability = top_products(scores, 1, posterior)
    if not len(product_ids):
        return None
    nearest = products[:NUM_CONFIDENCE_NEIGHBOURS]
    return confidence_features(product_ids, probability, nearest, 1.0), int(product_ids[0])
