"""`sicot index update` and `remove`: changes records and deletes products, without a rebuild."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import (
    QUALITY,
    ProductStore,
    delete_products,
    merge_quality,
)
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing.new_products import imprint_products, load_weight_imprinter
from sicot_jax.weights.bundle import read_bundle_config

_TEXTS = ("title", "tags", "category")


@contextlib.contextmanager
def open_for_writing(index: Path) -> Iterator[tuple[Path, layout.IndexManifest, ProductStore]]:
    """Holds the write lock of an index and opens its version in use.

    Args:
      index: index folder.

    Yields:
      Version folder, manifest, and the writable product store.

    Raises:
      InputError: no index, a sharded one, or another process is changing it.
    """
    with layout.write_lock(index):
        folder = layout.current_version(index)
        manifest = layout.read_unsharded_manifest(folder)
        path = folder / layout.PRODUCTS
        with contextlib.closing(ProductStore(path, writable=True)) as store:
            yield folder, manifest, store


def remove_products(index: Path, skus: Sequence[str], *, photos: Sequence[str] = ()) -> int:
    """Marks products and single photos as deleted.

    Args:
      index: index folder.
      skus: products.
      photos: image ids.

    Returns:
      How many of both were not deleted before.

    Raises:
      InputError: an unknown SKU or image id; nothing is changed.
    """
    with open_for_writing(index) as (folder, manifest, store):
        ids = store.product_ids(skus)
        if unknown := [sku for sku, known in zip(skus, ids, strict=True) if known is None]:
            raise InputError(
                f"{index}: no product {unknown[0]!r} ({len(unknown)} of {len(skus)} are unknown); "
                "none was removed"
            )
        query = "SELECT 1 FROM photos WHERE image_id = ?"
        for image_id in photos:
            if store.connection.execute(query, (image_id,)).fetchone() is None:
                raise InputError(f"{index}: no photo {image_id!r}; nothing was removed")
        with store.transaction() as connection:
            before = connection.total_changes
            delete_products(
                connection, (product_id for product_id in ids if product_id is not None)
            )
            connection.executemany(
                "UPDATE photos SET deleted = 1 WHERE image_id = ? AND NOT deleted",
                ((image_id,) for image_id in photos),
            )
            removed = connection.total_changes - before
            if photos:  # class weights are made of them
                affected = _products_of_photos(connection, photos)
                _imprint_again(connection, folder, manifest, store, affected)
            return removed


def _imprint_again(
    connection: sqlite3.Connection,
    folder: Path,
    manifest: layout.IndexManifest,
    store: ProductStore,
    product_ids: Sequence[int],
) -> None:
    """Rewrites class weights of those products that the model has no class for."""
    num_classes = read_bundle_config(folder / layout.MODEL).model.num_classes
    if without_class := sorted({p for p in product_ids if p >= num_classes}):
        vectors = VectorFiles(folder, manifest.width, manifest.bits)
        imprinter = load_weight_imprinter(folder)
        imprint_products(connection, vectors, imprinter, without_class, store.num_rows())


def _products_of_photos(connection: sqlite3.Connection, photos: Sequence[str]) -> list[int]:
    query = "SELECT DISTINCT product_id FROM photos WHERE image_id = ?"
    return [line[0] for photo in photos for line in connection.execute(query, (photo,))]


def update_products(index: Path, source: Path) -> int:
    """Changes titles, tags, categories and quality numbers of products.

    Args:
      index: index folder.
      source: CSV in UTF-8 with a column "sku" and some of title, tags, category, price, sales,
        conversion, rating; an empty cell leaves the stored value.

    Returns:
      How many products were changed.

    Raises:
      InputError: an unknown column or SKU, or a cell that is no number; nothing is changed.
    """
    with open_for_writing(index) as (folder, manifest, store):
        changes = _read_changes(source, store)
        with store.transaction() as connection:
            for change in changes:
                for name, value in change.texts.items():
                    connection.execute(
                        f"UPDATE products SET {name} = ? WHERE product_id = ?",
                        (value, change.product_id),
                    )
                if change.quality:
                    merge_quality(connection, change.product_id, change.quality)
            # Class weights are made of these two texts.
            affected = [c.product_id for c in changes if {"title", "category"} & set(c.texts)]
            _imprint_again(connection, folder, manifest, store, affected)
        return len(changes)


@dataclasses.dataclass(frozen=True)
class _ProductChange:
    product_id: int
    texts: dict[str, str]
    quality: dict[str, float]


def _read_changes(source: Path, store: ProductStore) -> list[_ProductChange]:
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            names = rows.fieldnames or []
            allowed = ("sku", *_TEXTS, *QUALITY)
            if "sku" not in names or (unknown := [name for name in names if name not in allowed]):
                wrong = "no column sku" if "sku" not in names else f"a column {unknown[0]!r}"
                raise InputError(
                    f"{source}: {wrong}, wanted sku and some of {', '.join(allowed[1:])}; "
                    "nothing was changed"
                )
            return [_read_change(f"{source}: line {rows.line_num}", row, store) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source}: {error}; wanted a CSV in UTF-8 with a column sku") from error


def _read_change(where: str, row: dict[str, str], store: ProductStore) -> _ProductChange:
    if None in row or None in row.values():
        raise InputError(f"{where}: more or fewer cells than columns; nothing was changed")
    product_id = store.product_ids([row["sku"].strip()])[0]
    if product_id is None:
        raise InputError(f"{where}: no product {row['sku']!r}; nothing was changed")
    quality = {}
    for name in QUALITY:
        if row.get(name, "").strip():
            try:
                quality[name] = float(row[name])
            except ValueError:
                quality[name] = math.nan
            if not math.isfinite(quality[name]):
                raise InputError(
                    f"{where}: {name}={row[name]!r}, wanted a number; nothing was changed"
                )
    texts = {name: row[name] for name in _TEXTS if row.get(name, "").strip()}
    return _ProductChange(product_id, texts, quality)
