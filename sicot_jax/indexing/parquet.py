"""`sicot index export` and `import`: all of an index as Parquet, for other systems and for another
machine.

products.parquet   sku, title, tags, category, and the quality fields, sharpness with them (null
where there is none) photos.parquet     sku, image_id, embedding (list of D float32, length 1), code
(bits / 8 bytes), picture (JPEG, or null)
the other files    as in a version: the recogniser, codebook, imprint, calibration, manifest
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.common import files
from sicot_jax.errors import InputError
from sicot_jax.index.storage import inverted_lists as lists
from sicot_jax.index.storage import layout
from sicot_jax.index.storage import products as cards_of
from sicot_jax.index.storage.binary_codes import BinaryEncoder
from sicot_jax.index.storage.products import QUALITY, SHARPNESS, ProductStore
from sicot_jax.index.storage.vectors import VectorFiles, unit
from sicot_jax.indexing import new_products as rows
from sicot_jax.indexing.verify import verify
from sicot_jax.weights import bundle as folders

PRODUCTS, PHOTOS = "products.parquet", "photos.parquet"
_NUMBERS = (*QUALITY, SHARPNESS)
_ROWS = 4096  # of a row group
_ALONG = (*layout.FITTED, layout.MANIFEST, layout.MODEL, layout.ONNX_MODEL)


def export_index(index: Path, out: Path) -> dict[str, int]:
    """What the version in use offers, into the new folder `out`; counts of products and photos.
    InputError where `out` is.
    """
    import pyarrow as pa
    from pyarrow import parquet

    folder = layout.current_version(index)
    manifest, counts = layout.read_unsharded_manifest(folder), {"products": 0, "photos": 0}
    texts = [(name, pa.string()) for name in ("sku", "title", "tags", "category")]
    of_products = pa.schema([*texts, *((name, pa.float64()) for name in _NUMBERS)])
    of_photos = pa.schema(
        [
            ("sku", pa.string()),
            ("image_id", pa.string()),
            ("embedding", pa.list_(pa.float32(), manifest.width)),
            ("code", pa.binary(manifest.bits // 8)),
            ("picture", pa.binary()),
        ]
    )
    with files.new_folder(out) as new, contextlib.closing(ProductStore(folder / layout.PRODUCTS)) as cards:
        for name in _ALONG:
            if (folder / name).is_dir():
                shutil.copytree(folder / name, new / name)
            elif (folder / name).exists():
                shutil.copy(folder / name, new / name)
        with parquet.ParquetWriter(new / PRODUCTS, of_products) as writer:
            for piece in _pieces(_products(cards)):
                writer.write_table(pa.Table.from_pylist(piece, of_products))
                counts["products"] += len(piece)
        with parquet.ParquetWriter(new / PHOTOS, of_photos) as writer:
            for piece in _pieces(_photos(folder, manifest, cards)):
                writer.write_table(pa.Table.from_pylist(piece, of_photos))
                counts["photos"] += len(piece)
    return counts


def _products(cards: ProductStore) -> Iterator[dict[str, Any]]:
    for product in cards.all_products():
        described = {name: getattr(product, name) for name in ("sku", "title", "tags", "category")}
        yield described | {name: product.quality.get(name) for name in _NUMBERS}


def _photos(folder: Path, manifest: layout.IndexManifest, cards: ProductStore) -> Iterator[dict[str, Any]]:
    vectors, places = (
        VectorFiles(folder, manifest.width, manifest.bits),
        cards.state(manifest.width).places,
    )
    features, codes = (vectors.memmap(name, places) for name in (layout.FEATURES, layout.CODES))
    found = cards.connection.execute(
        "SELECT photos.place, sku, image_id, jpeg FROM photos JOIN products USING (product) LEFT JOIN pictures USING (place) "
        "WHERE NOT photos.withdrawn AND NOT products.withdrawn AND photos.place < ? ORDER BY photos.place",
        (places,),
    )
    for place, sku, image_id, jpeg in found:
        embedding = np.asarray(features[place], np.float32)
        yield {
            "sku": sku, "image_id": image_id, "embedding": embedding, "code": codes[place].tobytes(), "picture": jpeg,
        }  # fmt: skip


def _pieces(rows_: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    piece: list[dict[str, Any]] = []
    for row in rows_:
        piece.append(row)
        if len(piece) == _ROWS:
            yield piece
            piece = []
    if piece:
        yield piece


def import_index(source: Path, index: Path) -> Path:
    """The folder of the new version in `index`, made of what `export_index` wrote: withdrawn lines
    are gone, categories are ranges again.

    InputError: no such export, a file that is not as it was written, photos of no product; the
      version in use stays.
    """
    manifest = layout.read_index_manifest(source)
    products, photos = _read(source / PRODUCTS), _read(source / PHOTOS)
    with layout.write_lock(index, create=True):
        folder = index / layout.BUILDING
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in _ALONG:
            if (source / name).is_dir():
                shutil.copytree(source / name, folder / name)
            elif (source / name).exists():
                shutil.copy(source / name, folder / name)
        converted = folders.read_converted(folder / layout.MODEL)
        table = folders.read_classes(folder / layout.MODEL, converted.model)
        codebook = BinaryEncoder.load(folder / layout.BINARY_ENCODER)
        if codebook.bits != manifest.bits or codebook.width != manifest.width:
            raise InputError(
                f"{source / layout.BINARY_ENCODER}: of another width than the manifest; export again"
            )
        cards, vectors = (
            ProductStore.create(folder / layout.PRODUCTS),
            VectorFiles(folder, manifest.width, manifest.bits),
        )
        with contextlib.closing(cards):
            numbers, category = _put_products(products, list(table.sku), cards)
            categories = _put_photos(photos, numbers, category, codebook, cards, vectors)
            rows.put_all(cards, vectors, rows.load(folder), converted.model.classes)
            places = cards.state(manifest.width).places
            lists.write_lists_if_large(folder, vectors, categories)
            cards.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        counted = {
            "photos": places,
            "products": len(numbers),
            "categories": categories,
            "sha256": layout.file_digests(folder),
        }
        layout.write_index_manifest(folder, dataclasses.replace(manifest, **counted))  # type: ignore[arg-type]
        if faults := verify(folder):
            raise InputError(f"{source}: {faults[0]}; export again")
        return layout.publish_version(index, folder)


def _read(path: Path) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{path}: {' '.join(str(error).split())[:120]}; wanted a file of `sicot index export`"
        ) from error


def _batches(file: Any, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
    import pyarrow as pa

    try:
        for batch in file.iter_batches(_ROWS, columns=columns):
            yield batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"a Parquet file cannot be read: {' '.join(str(error).split())[:120]}; export again"
        ) from error


def _put_products(
    file: Any, known: list[str], cards: ProductStore
) -> tuple[dict[str, int], dict[str, str]]:
    """SKU -> number and SKU -> category; classes of the model that are not there are withdrawn."""
    number_of = {sku: number for number, sku in enumerate(known)}
    numbers: dict[str, int] = {}
    category: dict[str, str] = {}
    following = len(known)
    with cards.change() as connection:
        for piece in _batches(file, ["sku", "title", "tags", "category", *_NUMBERS]):
            found = []
            for row in piece:
                number = number_of.get(row["sku"], following)
                following += number == following
                numbers[row["sku"]], category[row["sku"]] = number, row["category"]
                quality = {name: row[name] for name in _NUMBERS if row.get(name) is not None}
                found.append(
                    (number, row["sku"], row["title"], row["tags"], row["category"], quality)
                )
            cards_of.upsert_products(connection, found)
        gone: list[tuple[int, str, str, str, str, dict[str, float]]] = [
            (number, sku, "", "", "", {}) for sku, number in number_of.items() if sku not in numbers
        ]
        cards_of.upsert_products(connection, gone)
        connection.executemany(
            "UPDATE products SET withdrawn = 1 WHERE product = ?", ((row[0],) for row in gone)
        )
    return numbers, category


def _put_photos(
    file: Any,
    numbers: dict[str, int],
    category: dict[str, str],
    codebook: BinaryEncoder,
    cards: ProductStore,
    vectors: VectorFiles,
) -> dict[str, list[int]]:
    """All lines and their cards, by category and product; where each category is."""
    skus = [row["sku"] for piece in _batches(file, ["sku"]) for row in piece]
    if lost := [sku for sku in skus if sku not in numbers]:
        raise InputError(
            f"{PHOTOS}: a photo of {lost[0]!r}, which is not in {PRODUCTS}; export again"
        )
    owners = np.array([numbers[sku] for sku in skus], np.int64)
    kinds = np.array([category[sku] for sku in skus], str)
    order = np.lexsort((np.arange(len(skus)), owners, kinds))
    place = np.empty(len(skus), np.int64)
    place[order] = np.arange(len(skus))
    for name, dtype, shape in (
        (layout.FEATURES, np.float16, (vectors.width,)), (layout.CODES, np.uint8, (vectors.bits // 8,)),
        (layout.ROW_PRODUCTS, np.int32, ()),
    ):  # fmt: skip
        np.zeros(0, dtype).tofile(vectors.folder / name)
        if len(skus):
            np.memmap(vectors.folder / name, dtype, "w+", shape=(len(skus), *shape)).flush()
    done = 0
    for piece in _batches(file, ["image_id", "embedding", "picture"]):
        at = place[done : done + len(piece)]
        features = unit(np.array([row["embedding"] for row in piece], np.float32)).astype(
            np.float16
        )
        _assign(vectors, layout.FEATURES, at, features, len(skus))
        _assign(vectors, layout.CODES, at, codebook.encode(features), len(skus))
        _assign(vectors, layout.ROW_PRODUCTS, at, owners[done : done + len(piece)], len(skus))
        with cards.change() as connection:
            cards_of.insert_photos(
                connection,
                (
                    (int(p), int(owner), row["image_id"], row["picture"])
                    for p, owner, row in zip(
                        at, owners[done : done + len(piece)], piece, strict=True
                    )
                ),
            )
        done += len(piece)
    with cards.change() as connection:
        cards_of.set_num_rows(connection, len(skus))
    names, first = np.unique(kinds[order], return_index=True)
    ends = [*first[1:].tolist(), len(skus)]
    return {
        str(name): [int(start), int(end)]
        for name, start, end in zip(names, first, ends, strict=True)
    }


def _assign(vectors: VectorFiles, name: str, at: np.ndarray, lines: np.ndarray, places: int) -> None:
    stored = np.memmap(
        vectors.folder / name, lines.dtype if name != layout.ROW_PRODUCTS else np.int32, "r+"
    )
    stored.reshape(places, *lines.shape[1:])[at] = lines
    stored.flush()
