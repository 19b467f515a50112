"""Embeds the photos of an index that is being built, group by group, so that it can be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from sicot_jax.catalog.batches import HostBatch, PhotoBatchLoader, prefetch
from sicot_jax.catalog.catalog import Catalog, ClassTable, Record, Split
from sicot_jax.errors import InputError
from sicot_jax.export.from_run import ExportedRun
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import (
    PICTURES,
    SHARPNESS,
    ProductStore,
    insert_photos,
    merge_quality,
    set_num_rows,
)
from sicot_jax.index.storage.vectors import VectorFiles, category_ranges, unit_features
from sicot_jax.parallel import mesh
from sicot_jax.search.ranking_features import image_sharpness
from sicot_jax.training import device_batches
from sicot_jax.weights.batch_norm_folding import fold_batch_norms, folded_forward


@dataclasses.dataclass(frozen=True)
class IndexSource:
    """Products and training photos of a catalogue, in the order of the index.

    Attributes:
      catalog: the catalogue.
      class_table: products of the model's classes.
      product_ids: product id of each product of the catalogue, int64 [products]; ids below
        `num_classes` are class ids of the model.
      photos: indices of the training photos to index, ordered by category and product, int64 [N].
    """

    catalog: Catalog
    class_table: ClassTable
    product_ids: np.ndarray
    photos: np.ndarray

    @property
    def num_classes(self) -> int:
        """Classes of the model."""
        return len(self.class_table)

    @property
    def labels(self) -> np.ndarray:
        """Product of each photo as the catalogue numbers them, int [N]."""
        return np.asarray(self.catalog.splits["train"].labels)[self.photos]

    @property
    def row_products(self) -> np.ndarray:
        """Product id of each photo, int64 [N]."""
        return self.product_ids[self.labels]

    @property
    def category_ranges(self) -> dict[str, list[int]]:
        """Category -> [first row, last row + 1]."""
        return category_ranges(np.asarray(self.catalog.classes.category, str)[self.labels])


def match_catalog(catalog: Catalog, table: ClassTable) -> IndexSource:
    """Matches the products of a catalogue to the model's classes by SKU.

    Products that the model has no class for get the ids after its classes.

    Args:
      catalog: the run's catalogue, or a later version of it.
      table: products of the run's classes.

    Returns:
      What to index.

    Raises:
      InputError: no training photo of a product that is not discontinued.
    """
    products = catalog.classes
    class_ids = {sku: number for number, sku in enumerate(table.sku)}
    product_ids, next_id = np.empty(len(products), np.int64), len(class_ids)
    for product in range(len(products)):
        class_id = class_ids.get(products.sku[product])
        product_ids[product] = next_id if class_id is None else class_id
        next_id += class_id is None
    labels = np.asarray(catalog.splits["train"].labels)
    category = np.unique(np.asarray(products.category, str), return_inverse=True)[1]
    photos = np.lexsort((np.arange(len(labels)), labels, category[labels]))
    photos = photos[~np.asarray(products.discontinued, bool)[labels[photos]]]
    if not len(photos):
        raise InputError(
            f"{catalog.name}: no training photo of a product that is sold, wanted some to index; "
            "import with more"
        )
    return IndexSource(catalog, table, product_ids, photos)


_BATCHES_PER_COMMIT = 16

EmbedBatches = Callable[[Iterator[HostBatch]], Iterator[tuple[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class PhotoReading:
    """How photos are read.

    Attributes:
      batch_size: photos of a batch, a multiple of the number of devices.
      workers: processes that decode photos; 0 for threads.
      source: `data.source` of the catalogue.
    """

    batch_size: int
    workers: int
    source: str


class KnownFeatures:
    """Embeddings that the version in use has, by the same model; none where it cannot be read."""

    def __init__(self, index: Path, model_sha256: str):
        """Opens the version in use.

        Args:
          index: index folder.
          model_sha256: digest of the recogniser that is built with.
        """
        self._store: ProductStore | None = None
        store = None
        try:
            folder = layout.current_version(index)
            manifest = layout.read_index_manifest(folder)
            if manifest.model_sha256 == model_sha256:
                store = ProductStore(folder / layout.PRODUCTS)
                vectors = VectorFiles(folder, manifest.width, manifest.bits)
                self._features = vectors.memmap(layout.FEATURES, store.num_rows())
                self._store = store
        except (InputError, OSError, sqlite3.Error) as error:
            if (index / layout.CURRENT).exists():
                print(
                    f"the version in use cannot be read ({error}); all photos are embedded",
                    file=sys.stderr,
                )
        finally:
            if store is not None and self._store is None:
                store.close()

    def look_up(self, split: Split, photos: np.ndarray) -> dict[int, tuple[str, np.ndarray]]:
        """Finds the embeddings of photos that the version in use has.

        Args:
          split: the photos' records.
          photos: indices of records, int [N].

        Returns:
          Position in `photos` -> image id and unit embedding, float16 [D].
        """
        if self._store is None:
            return {}
        query = "SELECT row FROM photos WHERE image_id = ? AND row < ? LIMIT 1"
        known = {}
        for position, photo in enumerate(photos.tolist()):
            image_id = split[photo]["image_id"]
            match = self._store.connection.execute(
                query, (image_id, len(self._features))
            ).fetchone()
            if match is not None:
                known[position] = image_id, self._features[match[0]]
        return known

    def close(self) -> None:
        """Closes the version in use."""
        if self._store is not None:
            self._store.close()


def embed_photos(
    recognizer: ExportedRun,
    source: IndexSource,
    reading: PhotoReading,
    known: KnownFeatures,
    vectors: VectorFiles,
    store: ProductStore,
) -> None:
    """Embeds every photo that is not yet in `store` and appends it in batches.

    Resumes a killed build: each batch of rows counts once `store` has committed their number.

    Args:
      recognizer: recogniser whose visual stream computes the embeddings.
      source: products and training photos to index, in the order of the rows.
      reading: batch size and decoding workers.
      known: embeddings of the version in use, taken instead of computing them again.
      vectors: writer of the embeddings (unit, float16 [D]) and the product id of each row.
      store: product store of the new version, writable; holds the number of committed rows.
    """
    split, row_products = source.catalog.splits["train"], source.row_products
    done, total = store.num_rows(), len(row_products)
    progress = tqdm(
        total=total,
        initial=done,
        unit="photo",
        desc="embedding",
        file=sys.stderr,
        mininterval=1,
    )
    inserter = _PhotoInserter(source)
    with progress, photo_embedder(recognizer) as embed:
        while done < total:
            end = min(done + reading.batch_size * _BATCHES_PER_COMMIT, total)
            photos = known.look_up(split, source.photos[done:end])
            missing = np.array([n for n in range(end - done) if n not in photos], np.int64)
            loader = PhotoBatchLoader(
                split,
                recognizer.preprocessing,
                reading.batch_size,
                source.photos[done + missing],
            )
            batches = prefetch(
                loader, 0, len(loader), workers=reading.workers, source=reading.source
            )
            photos |= zip(missing.tolist(), embed(batches), strict=True)
            image_ids, features = zip(*(photos[n] for n in range(end - done)), strict=True)
            vectors.write_rows(layout.FEATURES, done, np.stack(features))
            vectors.write_rows(layout.ROW_PRODUCTS, done, row_products[done:end])
            with store.transaction() as connection:
                inserter.insert(connection, done, image_ids)
                set_num_rows(connection, end)
            progress.update(end - done)
            done = end


class _PhotoInserter:
    """Inserts photos; of a product's first photos also pictures, tags and sharpness."""

    def __init__(self, source: IndexSource):
        self._source, self._split = source, source.catalog.splits["train"]
        self._row_products = source.row_products
        # Photos of a product follow each other.
        starts = np.flatnonzero(np.r_[True, np.diff(self._row_products) != 0])
        counts = np.diff(np.r_[starts, len(self._row_products)])
        self._rank = np.arange(len(self._row_products)) - np.repeat(starts, counts)

    def insert(
        self, connection: sqlite3.Connection, first_row: int, image_ids: Sequence[str]
    ) -> None:
        for row, image_id in enumerate(image_ids, first_row):
            jpeg, product_id = None, int(self._row_products[row])
            if self._rank[row] < PICTURES:
                record = self._split[int(self._source.photos[row])]
                jpeg = _encoded_image(record)
                if self._rank[row] == 0:
                    merge_quality(connection, product_id, {SHARPNESS: image_sharpness(jpeg)})
                if self._rank[row] == 0 and record["tags"]:
                    connection.execute(
                        "UPDATE products SET tags = ? WHERE product_id = ?",
                        (record["tags"], product_id),
                    )
            insert_photos(connection, [(row, product_id, image_id, jpeg)])


def _encoded_image(record: Record) -> bytes:
    from PIL import Image

    from sicot_jax.common import image

    stored = record["image"]
    return stored if isinstance(stored, bytes) else image.encode_jpeg(Image.fromarray(stored))


@contextlib.contextmanager
def photo_embedder(recognizer: ExportedRun) -> Iterator[EmbedBatches]:
    """Compiles the model for batches that are divided over all devices.

    Args:
      recognizer: the model.

    Yields:
      A function from host batches to the image id and unit embedding, float16 [D], of each photo;
      results are fetched one batch late.
    """
    devices = mesh.make_mesh()
    with jax.set_mesh(devices):
        weights = mesh.replicate_tree(fold_batch_norms(recognizer.arrays), devices)

        @jax.jit
        def compute(weights: Any, image: jax.Array) -> jax.Array:
            preprocessing = recognizer.preprocessing
            image = preprocessing.normalize(preprocessing.centre_crop(image))
            return mesh.replicate(folded_forward(recognizer.model, weights, image)[0])

        def embed(batches: Iterator[HostBatch]) -> Iterator[tuple[str, np.ndarray]]:
            pending: tuple[jax.Array, HostBatch] | None = None
            for batch in batches:
                result = compute(weights, device_batches.to_device(batch, devices)["image"])
                if pending is not None:
                    yield from _unit_embeddings(*pending)
                pending = result, batch
            if pending is not None:
                yield from _unit_embeddings(*pending)

        yield embed


def _unit_embeddings(embeddings: jax.Array, batch: HostBatch) -> Iterator[tuple[str, np.ndarray]]:
    real = batch["label"] >= 0
    image_ids = batch["image_id"][real].tolist()
    return zip(image_ids, unit_features(np.asarray(embeddings)[real], image_ids), strict=True)
