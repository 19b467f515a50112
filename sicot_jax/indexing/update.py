"""`sicot index update` and `remove`: changes records and deletes products, without a rebuild."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sicot_jax.common.sku import normalize_category, normalize_sku, normalize_skus
from sicot_jax.common.table_files import (
    DroppedRow,
    EmptyTableError,
    TableColumns,
    encoding_error,
    read_table,
)
from sicot_jax.common.text import strip_markup
from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import (
    QUALITY,
    ProductStore,
    delete_products,
    merge_quality,
)
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing.mass_changes import MAX_CHANGE_SHARE, MassChanges, ProductState
from sicot_jax.indexing.new_products import imprint_products, load_weight_imprinter
from sicot_jax.weights.bundle import read_bundle_config

_TEXTS = ("title", "tags", "category")
_COLUMNS = TableColumns(("sku", *_TEXTS, *QUALITY), ("sku",))
_QUOTED = re.compile(r'"(?:[^"]|"")*"')


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


def read_sku_list(path: Path) -> list[str]:
    """Reads a file with a SKU per line.

    Args:
      path: text in UTF-8, with or without a byte order mark, with a SKU in each line, also in
        quotes; or a CSV whose header has a column sku. Empty lines do not count.

    Returns:
      The SKUs, as `normalize_sku` spells them.

    Raises:
      InputError: no such file, or not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise encoding_error(path) from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, wanted a file with a SKU per line") from error
    delimiter = max(",;\t|", key=lines[0].count)
    header = [name.strip().lower() for name in next(csv.reader(lines[:1], delimiter=delimiter), [])]
    if "sku" in header:
        column = header.index("sku")
        cells = (row[column : column + 1] for row in csv.reader(lines[1:], delimiter=delimiter))
        return normalize_skus(cell for row in cells for cell in row)
    quoted = (line.strip() for line in lines)
    return normalize_skus(
        next(csv.reader([line]))[0] if _QUOTED.fullmatch(line) else line for line in quoted
    )


def remove_products(
    index: Path,
    skus: Sequence[str],
    *,
    photos: Sequence[str] = (),
    max_change_share: float = MAX_CHANGE_SHARE,
) -> int:
    """Marks products and single photos as deleted.

    Args:
      index: index folder.
      skus: products.
      photos: image ids.
      max_change_share: share of all products that may be removed.

    Returns:
      How many of both were not deleted before.

    Raises:
      InputError: an unknown SKU or image id, or more products than allowed; nothing is changed.
    """
    with open_for_writing(index) as (folder, manifest, store):
        skus = [normalize_sku(sku) for sku in skus]
        ids = store.product_ids(skus)
        if unknown := [sku for sku, known in zip(skus, ids, strict=True) if known is None]:
            raise InputError(
                f"{index}: no product {unknown[0]!r} ({len(unknown)} of {len(skus)} are unknown); "
                "none was removed"
            )
        changes = MassChanges(store.counts()["products"])
        for record in store.products(sorted({known for known in ids if known is not None})):
            if record is not None:
                changes.compare(record.sku, ProductState(record.title, record.category), None)
        changes.check(index, max_change_share)
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


def update_products(
    index: Path, source: Path, *, max_change_share: float = MAX_CHANGE_SHARE
) -> int:
    """Changes titles, tags, categories and quality numbers of products.

    Args:
      index: index folder.
      source: table that `common.table_files` reads, with a column "sku" and some of title, tags,
        category, price, sales, conversion, rating; an empty cell leaves the stored value.
      max_change_share: share of all products that may be renamed, or get the price 0.

    Returns:
      How many products were changed.

    Raises:
      InputError: an unknown column or SKU, a cell that is no number, or more changes than allowed;
        nothing is changed.
    """
    with open_for_writing(index) as (folder, manifest, store):
        changes = _read_changes(source, store)
        _check_mass_changes(source, changes, store, max_change_share)
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
    if not source.is_file():
        raise InputError(f"{source}: no such file, wanted a table with a column sku")
    unknown: list[str] = []
    rows = []
    with contextlib.suppress(EmptyTableError):  # of an evening without changes
        for location, values in read_table(source, _COLUMNS, unknown):
            rows.append(_read_change(f"{source}: {location}", values, store))
    if unknown:
        raise InputError(
            f"{source}: a column {unknown[0]!r}, wanted sku and some of "
            f"{', '.join(_COLUMNS.names[1:])}; nothing was changed"
        )
    return rows


def _read_change(
    where: str, row: Mapping[str, str] | DroppedRow, store: ProductStore
) -> _ProductChange:
    if isinstance(row, DroppedRow):
        raise InputError(f"{where}: {row.reason}, {row.detail}; nothing was changed")
    sku = normalize_sku(row.get("sku", ""))
    product_id = store.product_ids([sku])[0]
    if product_id is None:
        raise InputError(f"{where}: no product {sku!r}; nothing was changed")
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
    texts = {name: strip_markup(row.get(name, "")) for name in _TEXTS}
    texts["category"] = normalize_category(texts["category"])
    texts = {name: text for name, text in texts.items() if text.strip()}  # blank: as it is stored
    return _ProductChange(product_id, texts, quality)


def _check_mass_changes(
    source: Path, changes: Sequence[_ProductChange], store: ProductStore, max_share: float
) -> None:
    counted = MassChanges(store.counts()["products"])
    records = store.products([change.product_id for change in changes])
    for change, record in zip(changes, records, strict=True):
        if record is not None:
            before = ProductState(record.title, record.category, record.quality.get("price"))
            after = ProductState(
                change.texts.get("title", before.title),
                change.texts.get("category", before.category),
                change.quality.get("price", before.price),
            )
            counted.compare(record.sku, before, after)
    counted.check(source, max_share)
