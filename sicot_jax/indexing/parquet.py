"""`sicot index export` and `import`: an index as Parquet, for other systems and machines.

products.parquet   sku, title, tags, category, quality numbers and sharpness (null for none)
photos.parquet     sku, image_id, embedding (list of D float32, length 1), code (bits / 8
bytes), picture (JPEG, or null)
the other files    as in a version: recogniser, fitted files, manifest
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.common.files import atomic_directory
from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.binary_codes import BinaryEncoder
from sicot_jax.index.storage.inverted_lists import write_lists_if_large
from sicot_jax.index.storage.products import (
    QUALITY,
    SHARPNESS,
    ProductStore,
    delete_products,
    insert_photos,
    set_num_rows,
    upsert_products,
)
from sicot_jax.index.storage.vectors import VectorFiles, category_ranges, unit_features
from sicot_jax.indexing.mass_changes import MAX_CHANGE_SHARE, check_imported_version
from sicot_jax.indexing.new_products import imprint_all_new_products, load_weight_imprinter
from sicot_jax.indexing.verify import verify_version
from sicot_jax.weights.bundle import read_bundle, read_bundle_classes

PRODUCTS, PHOTOS = "products.parquet", "photos.parquet"
_TEXTS = ("sku", "title", "tags", "category")
_NUMBERS = (*QUALITY, SHARPNESS)
_ROW_GROUP = 4096
_COPIED = (*layout.FITTED, layout.MANIFEST, layout.MODEL, layout.ONNX_MODEL)
_ACTIVE_PHOTOS = """
SELECT photos.row, sku, image_id, jpeg
FROM photos JOIN products USING (product_id) LEFT JOIN pictures USING (row)
WHERE NOT photos.deleted AND NOT products.deleted AND photos.row < ? ORDER BY photos.row"""


def export_index(index: Path, out: Path) -> dict[str, int]:
    """Writes the active products and photos of the version in use as Parquet.

    Args:
      index: index folder.
      out: new folder.

    Returns:
      How many "products" and "photos" were written.

    Raises:
      InputError: no index, or `out` exists.
    """
    import pyarrow as pa

    folder = layout.current_version(index)
    manifest = layout.read_unsharded_manifest(folder)
    product_schema = pa.schema(
        [*((name, pa.string()) for name in _TEXTS), *((name, pa.float64()) for name in _NUMBERS)]
    )
    photo_schema = pa.schema(
        [
            ("sku", pa.string()),
            ("image_id", pa.string()),
            ("embedding", pa.list_(pa.float32(), manifest.width)),
            ("code", pa.binary(manifest.bits // 8)),
            ("picture", pa.binary()),
        ]
    )
    with (
        atomic_directory(out) as new,
        contextlib.closing(ProductStore(folder / layout.PRODUCTS)) as store,
    ):
        _copy_files(folder, new)
        vectors = VectorFiles(folder, manifest.width, manifest.bits)
        return {
            "products": _write(new / PRODUCTS, product_schema, _product_lines(store)),
            "photos": _write(new / PHOTOS, photo_schema, _photo_lines(store, vectors)),
        }


def _copy_files(source: Path, to: Path) -> None:
    for name in _COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, to / name)
        elif (source / name).exists():
            shutil.copy(source / name, to / name)


def _write(path: Path, schema: Any, lines: Iterator[dict[str, Any]]) -> int:
    import pyarrow as pa
    from pyarrow import parquet

    count = 0
    with parquet.ParquetWriter(path, schema) as writer:
        for group in _row_groups(lines):
            writer.write_table(pa.Table.from_pylist(group, schema))
            count += len(group)
    return count


def _product_lines(store: ProductStore) -> Iterator[dict[str, Any]]:
    for record in store.all_products():
        texts = {name: getattr(record, name) for name in _TEXTS}
        yield texts | {name: record.quality.get(name) for name in _NUMBERS}


def _photo_lines(store: ProductStore, vectors: VectorFiles) -> Iterator[dict[str, Any]]:
    num_rows = store.num_rows()
    features, codes = (vectors.memmap(name, num_rows) for name in (layout.FEATURES, layout.CODES))
    for row, sku, image_id, jpeg in store.connection.execute(_ACTIVE_PHOTOS, (num_rows,)):
        yield {
            "sku": sku,
            "image_id": image_id,
            "embedding": np.asarray(features[row], np.float32),
            "code": codes[row].tobytes(),
            "picture": jpeg,
        }


def _row_groups(lines: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for line in lines:
        group.append(line)
        if len(group) == _ROW_GROUP:
            yield group
            group = []
    if group:
        yield group


def import_index(source: Path, index: Path, *, max_change_share: float = MAX_CHANGE_SHARE) -> Path:
    """Makes the next version of an index from an export; photos are ordered by category again.

    Args:
      source: folder that `export_index` wrote.
      index: index folder; made where there is none.
      max_change_share: share of the products of the version in use that may be withdrawn, renamed,
        or lose title or category.

    Returns:
      Folder of the new version.

    Raises:
      InputError: no export, a damaged file, photos of no product, or more changes than allowed; the
        version in use stays.
    """
    manifest = layout.read_index_manifest(source)
    products, photos = _open(source / PRODUCTS), _open(source / PHOTOS)
    with layout.write_lock(index, create=True):
        folder = index / layout.BUILDING
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        _copy_files(source, folder)
        converted = read_bundle(folder / layout.MODEL)
        table = read_bundle_classes(converted)
        encoder = BinaryEncoder.load(folder / layout.BINARY_ENCODER)
        if encoder.bits != manifest.bits or encoder.width != manifest.width:
            raise InputError(
                f"{source / layout.BINARY_ENCODER}: of another width than the manifest; "
                "export again"
            )
        vectors = VectorFiles(folder, manifest.width, manifest.bits)
        with contextlib.closing(ProductStore.create(folder / layout.PRODUCTS)) as store:
            ids, category = _import_products(products, list(table.sku), store)
            ranges = _import_photos(_PhotoFile(photos, ids, category), encoder, store, vectors)
            imprint_all_new_products(
                store, vectors, load_weight_imprinter(folder), converted.model.num_classes
            )
            num_rows = store.num_rows()
            write_lists_if_large(folder, vectors, ranges)
            store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        layout.write_index_manifest(
            folder,
            dataclasses.replace(
                manifest,
                num_photos=num_rows,
                num_products=len(ids),
                category_ranges=ranges,
                sha256=layout.file_digests(folder),
            ),
        )
        if faults := verify_version(folder):
            raise InputError(f"{source}: {faults[0]}; export again")
        check_imported_version(index, folder, source, max_change_share)
        return layout.publish_version(index, folder)


def _open(path: Path) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{path}: {one_line_error(error, 120)}; wanted a file of `sicot index export`"
        ) from error


def _read(file: Any, columns: Iterable[str]) -> Iterator[list[dict[str, Any]]]:
    import pyarrow as pa

    try:
        for batch in file.iter_batches(_ROW_GROUP, columns=list(columns)):
            yield batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"a Parquet file cannot be read: {one_line_error(error, 120)}; export again"
        ) from error


def _import_products(
    file: Any, class_skus: list[str], store: ProductStore
) -> tuple[dict[str, int], dict[str, str]]:
    """Inserts records; classes of the model that the export lacks are deleted products.

    Returns SKU -> product id and SKU -> category.
    """
    class_ids = {sku: number for number, sku in enumerate(class_skus)}
    ids: dict[str, int] = {}
    category: dict[str, str] = {}
    next_id = len(class_skus)
    with store.transaction() as connection:
        for lines in _read(file, (*_TEXTS, *_NUMBERS)):
            records = []
            for line in lines:
                product_id = class_ids.get(line["sku"], next_id)
                next_id += product_id == next_id
                ids[line["sku"]], category[line["sku"]] = product_id, line["category"]
                quality = {name: line[name] for name in _NUMBERS if line.get(name) is not None}
                sku, title, tags, name = (line[text] for text in _TEXTS)
                records.append((product_id, sku, title, tags, name, quality))
            upsert_products(connection, records)
        deleted = {sku: product_id for sku, product_id in class_ids.items() if sku not in ids}
        upsert_products(
            connection, ((product_id, sku, "", "", "", {}) for sku, product_id in deleted.items())
        )
        delete_products(connection, deleted.values())
    return ids, category


@dataclasses.dataclass(frozen=True)
class _PhotoFile:
    """`photos.parquet`, with the product id and the category of each SKU."""

    file: Any
    product_ids: dict[str, int]
    category: dict[str, str]

    def read_products(self) -> tuple[np.ndarray, np.ndarray]:
        """Product ids, int64 [N], and category names, str [N], in the order of the file."""
        skus = [line["sku"] for lines in _read(self.file, ["sku"]) for line in lines]
        if unknown := [sku for sku in skus if sku not in self.product_ids]:
            raise InputError(
                f"{PHOTOS}: a photo of {unknown[0]!r}, which is not in {PRODUCTS}; export again"
            )
        products = np.array([self.product_ids[sku] for sku in skus], np.int64)
        return products, np.array([self.category[sku] for sku in skus], str)


def _import_photos(
    photos: _PhotoFile, encoder: BinaryEncoder, store: ProductStore, vectors: VectorFiles
) -> dict[str, list[int]]:
    """Writes all photos, by category and product; returns the range of each category."""
    products, names = photos.read_products()
    count = len(products)
    order = np.lexsort((np.arange(count), products, names))
    row_of = np.empty(count, np.int64)
    row_of[order] = np.arange(count)
    vectors.allocate(count)
    features, codes, row_products = (
        vectors.memmap(name, count, writable=True)
        for name in (layout.FEATURES, layout.CODES, layout.ROW_PRODUCTS)
    )
    first = 0
    for lines in _read(photos.file, ["image_id", "embedding", "picture"]):
        chunk = slice(first, first + len(lines))
        rows = row_of[chunk]
        embeddings = np.array([line["embedding"] for line in lines], np.float32)
        features[rows] = unit_features(embeddings, [line["image_id"] for line in lines])
        codes[rows] = encoder.encode(features[rows])
        row_products[rows] = products[chunk]
        with store.transaction() as connection:
            insert_photos(
                connection,
                (
                    (row, product_id, line["image_id"], line["picture"])
                    for row, product_id, line in zip(
                        rows.tolist(), products[chunk].tolist(), lines, strict=True
                    )
                ),
            )
        first += len(lines)
    for array in (features, codes, row_products):
        if isinstance(array, np.memmap):
            array.flush()
    with store.transaction() as connection:
        set_num_rows(connection, count)
    return category_ranges(names[order])
