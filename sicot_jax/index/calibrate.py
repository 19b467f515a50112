"""The calibration of a new version, from the run's validation photos."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from sicot_jax import pipeline
from sicot_jax.catalog.catalog import Split
from sicot_jax.convert import folder as folders
from sicot_jax.index import layout, recognition, typicality, unknown
from sicot_jax.index.embedded import EmbeddedIndex
from sicot_jax.index.unknown import Calibration, Evidence
from sicot_jax.recognizer import jax_engine

_MOST = 5_000  # photos that are looked at
_BATCH = 32


def calibrate(folder: Path, split: Split, numbers: np.ndarray) -> Calibration | None:
    """None where fewer than `unknown.FEWEST` photos of products are there. `folder`: a version, whole but for this;
    numbers: product of each class of the split, int64.
    """
    chosen = pipeline.evenly(len(split), _MOST)
    if len(chosen) < unknown.FEWEST:
        return None
    converted = folders.read_converted(folder / layout.MODEL)
    index = EmbeddedIndex(folder)
    try:
        known: list[Evidence] = []
        right: list[bool] = []
        absent: list[tuple[int, Evidence]] = []  # and the number of its photo
        engine = jax_engine(converted)
        embeddings = []
        for first in range(0, len(chosen), _BATCH):
            records = [split[int(i)] for i in chosen[first : first + _BATCH]]
            photos = converted.preprocessing.batch([record["image"] for record in records])
            for record, embedding, logits in zip(records, *engine(photos), strict=True):
                product = int(numbers[record["class_id"]])
                answered, alone = _both(index, embedding, logits, product)
                if alone is not None:
                    absent.append((len(known), alone))
                known.append(answered[0])
                right.append(answered[1] == product)
                embeddings.append(embedding)
    finally:
        index.close()
    if not absent:
        return None
    photos = np.array(embeddings)
    shares = typicality.shares_of_fitted(photos).tolist()
    as_new = [dataclasses.replace(e, usual=share) for e, share in zip(known, shares, strict=True)]
    without = [dataclasses.replace(e, usual=shares[number]) for number, e in absent]
    return unknown.fit(as_new, right, without, typicality=typicality.fit(photos))


def _both(
    index: EmbeddedIndex, embedding: np.ndarray, logits: np.ndarray, label: int
) -> tuple[tuple[Evidence, int], Evidence | None]:
    """Evidence of the answer and its product; and of the answer if the photo's product were not there; how usual it is comes
    later.
    """
    offered = index.offered()
    near = index.nearest(embedding[None], recognition.NEIGHBOURS + 1)[0]
    numbers, shares = recognition.best_products(embedding, logits, offered, 1)
    answered = recognition.evidence(numbers, shares, near[: recognition.NEIGHBOURS], 1.0), int(numbers[0])
    without = dataclasses.replace(offered, withdrawn=np.union1d(offered.withdrawn, [label]))
    numbers, shares = recognition.best_products(embedding, logits, without, 1)
    others = [neighbour for neighbour in near if neighbour.product != label][: recognition.NEIGHBOURS]
    return answered, recognition.evidence(numbers, shares, others, 1.0) if len(numbers) else None
