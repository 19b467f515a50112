"""Rows of the classifier for products that came after the model, from the features of their photos
and their titles' words.
"""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sicot_jax.classifier import imprint
from sicot_jax.classifier.imprint import PHOTOS, Imprint, mean_directions
from sicot_jax.index.storage import layout
from sicot_jax.index.storage import products as cards_of
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing import title_regression as titles
from sicot_jax.indexing.title_regression import Titles

TITLE = 0.5  # photos that a title is worth (docs/service.md)
_PIECE = 4096


@dataclasses.dataclass(frozen=True)
class MadeWith:
    """What an index's rows are made with."""

    imprint: Imprint
    titles: Titles

    def rows(
        self, means: np.ndarray, photos: np.ndarray, texts: Sequence[tuple[str, str]]
    ) -> np.ndarray:
        """m of products [K, D] over so many photos, int [K], and their (title, category) -> rows
        float32 [K, D]: the direction is (n (m - g) + k t) / (n + k) with k = `TITLE`.
        """
        apart = photos[:, None] * (means - self.imprint.centre) + TITLE * self.titles.directions(
            texts
        )
        return self.imprint.rows(self.imprint.centre + apart / (photos[:, None] + TITLE))


def load(folder: Path) -> MadeWith:
    """Of a version. InputError where a file is none."""
    return MadeWith(imprint.load(folder / layout.IMPRINT), titles.load(folder / layout.TITLE_REGRESSION))


def put(
    connection: sqlite3.Connection,
    vectors: VectorFiles,
    made_with: MadeWith,
    products: Sequence[int],
    places: int,
) -> None:
    """Rows of these products, from their titles and their first `PHOTOS` photos that are offered
    among `places` lines, none without a photo; inside a change, after their cards.
    """
    features = vectors.memmap(layout.FEATURES, places)
    lines: list[int] = []
    owners: list[int] = []
    texts: dict[int, tuple[str, str]] = {}
    for number in products:
        found = connection.execute(
            "SELECT place FROM photos WHERE product = ? AND NOT withdrawn AND place < ? ORDER BY place LIMIT ?",
            (number, places, PHOTOS),
        ).fetchall()
        lines += [row[0] for row in found]
        owners += [number] * len(found)
        texts[number] = connection.execute(
            "SELECT title, category FROM products WHERE product = ?", (number,)
        ).fetchone()
    without = sorted(set(products) - set(owners))
    connection.executemany("DELETE FROM rows WHERE product = ?", ((number,) for number in without))
    if lines:
        numbers, means = mean_directions(np.asarray(features[lines], np.float32), np.array(owners))
        photos = np.bincount(np.searchsorted(numbers, owners))
        made = made_with.rows(means, photos, [texts[number] for number in numbers.tolist()])
        cards_of.upsert_class_weights(
            connection, numbers.tolist(), made, [made_with.imprint.bias] * len(numbers)
        )


def put_all(cards: ProductStore, vectors: VectorFiles, made_with: MadeWith, classes: int) -> None:
    """Rows of all products that the model has no class for; a commit for every few thousand."""
    places = cards.state(vectors.width).places
    found = cards.connection.execute(
        "SELECT product FROM products WHERE product >= ? ORDER BY product", (classes,)
    )
    later = [row[0] for row in found.fetchall()]
    for first in range(0, len(later), _PIECE):
        with cards.change() as connection:
            put(connection, vectors, made_with, later[first : first + _PIECE], places)
