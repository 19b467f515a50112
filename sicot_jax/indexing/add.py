"""`sicot index add`: adds products and photos to the version in use, without a rebuild.

Photos are committed in groups: an addition that was stopped can be given again.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sicot_jax.catalog.importing.manifest import read_source
from sicot_jax.catalog.importing.manifest_rows import (
    NO_BOX,
    ROLES,
    DroppedRow,
    ManifestRow,
    SourceNotes,
)
from sicot_jax.catalog.importing.photos import FolderPhotos, PreparedPhoto, prepare_photos
from sicot_jax.catalog.importing.settings import ImportSettings
from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.binary_codes import BinaryEncoder
from sicot_jax.index.storage.products import (
    PICTURES,
    SHARPNESS,
    ProductStore,
    insert_photos,
    merge_quality,
    parse_quality,
    set_num_rows,
    upsert_products,
)
from sicot_jax.index.storage.vectors import VectorFiles, unit_features
from sicot_jax.indexing.mass_changes import MAX_CHANGE_SHARE, check_added_rows
from sicot_jax.indexing.new_products import imprint_products, load_weight_imprinter
from sicot_jax.indexing.update import open_for_writing
from sicot_jax.recognizer import Engine, jax_engine, onnx_engine
from sicot_jax.search.ranking_features import image_sharpness
from sicot_jax.weights.bundle import read_bundle

_PHOTOS_PER_COMMIT = 256
_BATCH_SIZE = 32


@dataclasses.dataclass
class AdditionReport:
    """What an addition did.

    Attributes:
      new_products: products that the index did not have.
      new_photos: photos that were added.
      known_photos: photos that the products had already.
      dropped: rows that could not be used, a line each.
      left_out: reason -> files and rows that were left out on purpose.
      notes: what the reader of the source has to say.
    """

    new_products: int = 0
    new_photos: int = 0
    known_photos: int = 0
    dropped: list[str] = dataclasses.field(default_factory=list)
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)
    notes: SourceNotes = dataclasses.field(default_factory=SourceNotes)

    def summary(self) -> str:
        """Returns the report: a line of counts, then what was left out, changed or is doubtful."""
        known = f", {self.known_photos} photos were there" if self.known_photos else ""
        dropped = f", {len(self.dropped)} rows dropped" if self.dropped else ""
        left_out = [f"left out: {number} {reason}" for reason, number in self.left_out.items()]
        return "\n".join(
            [
                f"{self.new_products} products and {self.new_photos} photos new{known}{dropped}",
                *left_out,
                *self.notes.remarks(),
                *(f"WARNING: {line}" for line in self.notes.warnings()),
            ]
        )


def add_products(
    index: Path, source: Path, *, max_change_share: float = MAX_CHANGE_SHARE
) -> AdditionReport:
    """Adds the products and photos of a manifest.

    An existing product gets the photos that it lacks and the manifest's texts; a deleted one is
    restored. A product that the model has no class for gets class weights from its photos.

    Args:
      index: index folder.
      source: manifest, or a folder with one folder per SKU.
      max_change_share: share of all products that may be renamed.

    Returns:
      What was added, and rows that could not be used.

    Raises:
      InputError: no such source, no row of it can be used, or more changes than allowed; nothing
        is changed.
    """
    report = AdditionReport()
    with open_for_writing(index) as (folder, manifest, store):
        known = (row for row in read_source(source) if isinstance(row, ManifestRow))
        check_added_rows(store, known, source, max_change_share)
        rows = read_source(source, report.notes)
        reader = FolderPhotos(source if source.is_dir() else source.parent)
        adder = _PhotoAdder(folder, manifest, store)
        for chunk in _chunks(rows, _PHOTOS_PER_COMMIT):
            usable = [row for row in chunk if isinstance(row, ManifestRow)]
            unusable = [row for row in chunk if isinstance(row, DroppedRow)]
            report.dropped += [str(row) for row in unusable if row.bad]
            report.left_out.update(row.reason for row in unusable if not row.bad)
            photos = prepare_photos(
                reader,
                [row.image for row in usable],
                short_side=ImportSettings().short_side,
                workers=1,
            )
            prepared = list(zip(usable, photos, strict=True))
            report.dropped += [
                f"{row.image}: {photo.error}" for row, photo in prepared if photo.error
            ]
            ignored = _ignored_columns(usable)
            report.notes.unused_columns += sorted(ignored - set(report.notes.unused_columns))
            adder.commit([(row, photo) for row, photo in prepared if not photo.error], report)
        store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    if report.dropped and not report.new_photos + report.known_photos:
        raise InputError(
            f"{source}: no row can be used, such as {report.dropped[0]}; nothing was changed"
        )
    return report


def open_index_engine(folder: Path) -> Engine:
    """Opens a version's recogniser: ONNX Runtime where it and the graph are there, else JAX.

    Args:
      folder: version folder.

    Returns:
      The engine.
    """
    if (folder / layout.ONNX_MODEL).is_dir() and importlib.util.find_spec("onnxruntime"):
        return onnx_engine(folder / layout.ONNX_MODEL)
    return jax_engine(read_bundle(folder / layout.MODEL))


def _ignored_columns(rows: Sequence[ManifestRow]) -> set[str]:
    """Columns of a manifest that only an import reads, where some row has a value."""
    return {
        name
        for row in rows
        for name, value in (
            ("box", row.box != NO_BOX),
            ("role", row.role != ROLES[0]),
            ("split", row.split),
        )
        if value
    }


def _chunks(rows: Iterator, size: int) -> Iterator[tuple]:
    rows = iter(rows)
    while chunk := tuple(itertools.islice(rows, size)):
        yield chunk


class _PhotoAdder:
    """Embeds photos and commits them with their products."""

    def __init__(self, folder: Path, manifest: layout.IndexManifest, store: ProductStore):
        converted = read_bundle(folder / layout.MODEL)
        self.preprocessing, self.num_classes = converted.preprocessing, converted.model.num_classes
        self.engine = open_index_engine(folder)
        self.encoder = BinaryEncoder.load(folder / layout.BINARY_ENCODER)
        self.imprinter = load_weight_imprinter(folder)
        self.vectors, self.store = VectorFiles(folder, manifest.width, manifest.bits), store

    def commit(
        self, photos: Sequence[tuple[ManifestRow, PreparedPhoto]], report: AdditionReport
    ) -> None:
        num_rows = self.store.num_rows()
        ids = self._assign_ids(sorted({row.sku for row, _ in photos}), report)
        new_photos = self._unknown_photos(photos, ids, report)
        features = self._embed([photo for _, photo in new_photos])
        row_products = np.array([product_id for product_id, _ in new_photos], np.int32)
        self.vectors.write_rows(layout.FEATURES, num_rows, features)
        self.vectors.write_rows(layout.CODES, num_rows, self.encoder.encode(features))
        self.vectors.write_rows(layout.ROW_PRODUCTS, num_rows, row_products)
        with self.store.transaction() as connection:
            upsert_products(connection, self._records(connection, photos, ids))
            self._insert_photos(connection, new_photos, num_rows)
            num_rows += len(new_photos)
            set_num_rows(connection, num_rows)
            # Those without new photos too: their titles may be new.
            without_class = sorted({p for p in ids.values() if p >= self.num_classes})
            imprint_products(connection, self.vectors, self.imprinter, without_class, num_rows)
        report.new_photos += len(new_photos)

    def _assign_ids(self, skus: Sequence[str], report: AdditionReport) -> dict[str, int]:
        """SKU -> product id."""
        known = zip(skus, self.store.product_ids(skus), strict=True)
        ids = {sku: product_id for sku, product_id in known if product_id is not None}
        new = [sku for sku in skus if sku not in ids]
        first = max(self.store.next_product_id(), self.num_classes)
        report.new_products += len(new)
        return ids | {sku: product_id for product_id, sku in enumerate(new, first)}

    def _unknown_photos(
        self,
        photos: Sequence[tuple[ManifestRow, PreparedPhoto]],
        ids: dict[str, int],
        report: AdditionReport,
    ) -> list[tuple[int, PreparedPhoto]]:
        """Product id and photo of those that the products do not have yet."""
        seen: set[tuple[int, str]] = set()
        unknown = []
        for row, photo in photos:
            key = ids[row.sku], photo.image_id
            if key in seen or self._has_photo(*key):
                report.known_photos += 1
            else:
                unknown.append((ids[row.sku], photo))
            seen.add(key)
        return unknown

    def _embed(self, photos: Sequence[PreparedPhoto]) -> np.ndarray:
        """Unit float16 [N, D]."""
        features = [np.zeros((0, self.vectors.width), np.float16)]
        for first in range(0, len(photos), _BATCH_SIZE):
            chunk = photos[first : first + _BATCH_SIZE]
            batch = self.preprocessing.batch([photo.image for photo in chunk])
            image_ids = [photo.image_id for photo in chunk]
            features.append(unit_features(self.engine(batch).embedding, image_ids))
        return np.concatenate(features)

    def _records(
        self,
        connection: sqlite3.Connection,
        photos: Sequence[tuple[ManifestRow, PreparedPhoto]],
        ids: dict[str, int],
    ) -> Iterator[tuple[int, str, str, str, str, dict[str, float]]]:
        """What the rows say of their products; what they leave empty stays as it is."""
        texts: dict[str, tuple[str, str, str]] = {}
        for row, _ in photos:
            title, tags, category = texts.get(row.sku, ("", "", ""))
            texts[row.sku] = title or row.title, tags or row.tags, category or row.category
        for sku, new in texts.items():
            stored = connection.execute(
                "SELECT title, tags, category, quality FROM products WHERE product_id = ?",
                (ids[sku],),
            ).fetchone()
            old, quality = (stored[:3], parse_quality(stored[3])) if stored else (("",) * 3, {})
            title, tags, category = (a or b for a, b in zip(new, old, strict=True))
            yield ids[sku], sku, title, tags, category, quality

    def _insert_photos(
        self,
        connection: sqlite3.Connection,
        photos: Sequence[tuple[int, PreparedPhoto]],
        first_row: int,
    ) -> None:
        """Inserts photos, and pictures and sharpness of products with fewer than `PICTURES`."""
        num_pictures = {p: self._count_pictures(connection, p) for p in {p for p, _ in photos}}
        for row, (product_id, photo) in enumerate(photos, first_row):
            jpeg = photo.image if num_pictures[product_id] < PICTURES else None
            if not num_pictures[product_id]:
                sharpness = {SHARPNESS: image_sharpness(photo.image)}
                merge_quality(connection, product_id, sharpness)
            num_pictures[product_id] += jpeg is not None
            insert_photos(connection, [(row, product_id, photo.image_id, jpeg)])

    def _has_photo(self, product_id: int, image_id: str) -> bool:
        # "+" keeps SQLite from reading all photos of the product, of which there may be thousands.
        query = "SELECT 1 FROM photos WHERE image_id = ? AND +product_id = ? AND NOT deleted"
        return self.store.connection.execute(query, (image_id, product_id)).fetchone() is not None

    def _count_pictures(self, connection: sqlite3.Connection, product_id: int) -> int:
        query = (
            "SELECT count(*) FROM pictures JOIN photos USING (row) "
            "WHERE pictures.product_id = ? AND NOT deleted"
        )
        return connection.execute(query, (product_id,)).fetchone()[0]
