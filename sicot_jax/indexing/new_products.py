"""Imprints class weights of products added after training, from their photos and title words."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sicot_jax.classifier.imprint import MAX_PHOTOS, ImprintModel, load_imprint, mean_directions
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import ProductStore, upsert_class_weights
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing.title_regression import (
    TitleAndCategory,
    TitleRegression,
    load_title_regression,
)

TITLE_WEIGHT = 0.5  # photos that a title counts as (docs/results/open_set.md)
_PRODUCTS_PER_COMMIT = 4096
_FIRST_PHOTOS = """
SELECT row FROM photos WHERE product_id = ? AND NOT deleted AND row < ? ORDER BY row LIMIT ?"""


@dataclasses.dataclass(frozen=True)
class WeightImprinter:
    """Makes class weights from photos and titles.

    Attributes:
      imprint: maps from mean directions to class weights.
      titles: maps from titles to directions.
    """

    imprint: ImprintModel
    titles: TitleRegression

    def class_weights(
        self, means: np.ndarray, num_photos: np.ndarray, texts: Sequence[TitleAndCategory]
    ) -> np.ndarray:
        """Computes class weights in the direction (n (m - g) + k t) / (n + k), k = `TITLE_WEIGHT`.

        Args:
          means: m, mean unit embedding of each product, float32 [K, D].
          num_photos: n, photos of each mean, int [K].
          texts: (title, category) of each product.

        Returns:
          Class weights, float32 [K, D].
        """
        count = num_photos[:, None]
        total = count * (means - self.imprint.center) + TITLE_WEIGHT * self.titles.predict(texts)
        return self.imprint.rows(self.imprint.center + total / (count + TITLE_WEIGHT))


def load_weight_imprinter(folder: Path) -> WeightImprinter:
    """Reads what a version makes class weights with.

    Args:
      folder: version folder.

    Returns:
      The imprinter.

    Raises:
      InputError: a file is missing or damaged.
    """
    return WeightImprinter(
        load_imprint(folder / layout.IMPRINT),
        load_title_regression(folder / layout.TITLE_REGRESSION),
    )


def imprint_products(
    connection: sqlite3.Connection,
    vectors: VectorFiles,
    imprinter: WeightImprinter,
    product_ids: Sequence[int],
    num_rows: int,
) -> None:
    """Writes class weights of products, from their titles and first `MAX_PHOTOS` active photos.

    A product without a photo gets none.

    Args:
      connection: connection of a transaction that has the products' records.
      vectors: photo files of the version.
      imprinter: imprinter of the version.
      product_ids: the products.
      num_rows: rows of the photo files that count.
    """
    features = vectors.memmap(layout.FEATURES, num_rows)
    rows: list[int] = []
    row_products: list[int] = []
    texts: dict[int, TitleAndCategory] = {}
    for product_id in product_ids:
        photos = connection.execute(_FIRST_PHOTOS, (product_id, num_rows, MAX_PHOTOS)).fetchall()
        rows += [line[0] for line in photos]
        row_products += [product_id] * len(photos)
        texts[product_id] = connection.execute(
            "SELECT title, category FROM products WHERE product_id = ?", (product_id,)
        ).fetchone()
    without_photos = sorted(set(product_ids) - set(row_products))
    connection.executemany(
        "DELETE FROM class_weights WHERE product_id = ?", ((p,) for p in without_photos)
    )
    if rows:
        embeddings = np.asarray(features[rows], np.float32)
        ids, means = mean_directions(embeddings, np.array(row_products))
        num_photos = np.bincount(np.searchsorted(ids, row_products))
        kernel = imprinter.class_weights(means, num_photos, [texts[p] for p in ids.tolist()])
        bias = [imprinter.imprint.bias] * len(ids)
        upsert_class_weights(connection, ids.tolist(), kernel, bias)


def imprint_all_new_products(
    store: ProductStore, vectors: VectorFiles, imprinter: WeightImprinter, num_classes: int
) -> None:
    """Writes class weights of all products that the model has no class for, in several commits.

    Args:
      store: product store of the version, writable.
      vectors: its photo files.
      imprinter: imprinter of the version.
      num_classes: classes of the model.
    """
    num_rows = store.num_rows()
    lines = store.connection.execute(
        "SELECT product_id FROM products WHERE product_id >= ? ORDER BY product_id", (num_classes,)
    )
    ids = [line[0] for line in lines.fetchall()]
    for first in range(0, len(ids), _PRODUCTS_PER_COMMIT):
        with store.transaction() as connection:
            imprint_products(
                connection, vectors, imprinter, ids[first : first + _PRODUCTS_PER_COMMIT], num_rows
            )
