"""`sicot index verify`: checks the files of a version against each other and their checksums."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from pathlib import Path

import numpy as np

from sicot_jax.common.files import file_sha256
from sicot_jax.errors import InputError
from sicot_jax.index.backends.sharded import shard_folder
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.binary_codes import BinaryEncoder
from sicot_jax.index.storage.inverted_lists import InvertedLists
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.search.category import read_fusion
from sicot_jax.search.ranker import read_ranker
from sicot_jax.search.rejection import read_calibration
from sicot_jax.weights.bundle import read_bundle

_CHUNK = 1 << 16
_LENGTH_TOLERANCE = 0.01  # of a unit embedding in float16


def verify_version(folder: Path, *, checksums: bool = False) -> list[str]:
    """Checks a version.

    Args:
      folder: version folder.
      checksums: read every byte that was built and compare its sha256.

    Returns:
      Faults, a line each; none where the version is sound.
    """
    try:
        manifest = layout.read_index_manifest(folder)
        encoder = BinaryEncoder.load(folder / layout.BINARY_ENCODER)
        read_calibration(folder / layout.REJECTION)
        read_fusion(folder / layout.CATEGORY_FUSION)
        read_ranker(folder / layout.RANKER)
        for name in (layout.MODEL, layout.ONNX_MODEL):
            if name == layout.MODEL or (folder / name).exists():
                read_bundle(folder / name)
    except InputError as error:
        return [str(error)]
    faults = (
        _shard_faults(folder, manifest, checksums)
        if manifest.num_shards
        else _content_faults(folder, manifest, encoder)
    )
    return faults + (_checksum_faults(folder, manifest) if checksums else [])


def _checksum_faults(folder: Path, manifest: layout.IndexManifest) -> list[str]:
    vectors = VectorFiles(folder, manifest.width, manifest.bits)
    faults = []
    for name, digest in manifest.sha256.items():
        appendable = name in layout.APPENDABLE
        length = manifest.num_photos * vectors.row_bytes(name) if appendable else None
        if _prefix_sha256(folder / name, length) != digest:
            faults.append(f"{name}: not as it was built (another sha256)")
    return faults


def _shard_faults(folder: Path, manifest: layout.IndexManifest, checksums: bool) -> list[str]:
    faults, num_photos = [], 0
    for shard in range(manifest.num_shards):
        part = shard_folder(folder, shard)
        shard_faults = verify_version(part, checksums=checksums)
        num_photos += 0 if shard_faults else layout.read_index_manifest(part).num_photos
        faults += [f"{part.name}: {fault}" for fault in shard_faults]
    if not faults and num_photos != manifest.num_photos:
        faults.append(
            f"{layout.MANIFEST}: {manifest.num_photos} photos, the shards have {num_photos}"
        )
    return faults


def _content_faults(
    folder: Path, manifest: layout.IndexManifest, encoder: BinaryEncoder
) -> list[str]:
    faults = []
    if (encoder.width, encoder.bits) != (manifest.width, manifest.bits):
        faults.append(
            f"{layout.BINARY_ENCODER}: for vectors of {encoder.width} and {encoder.bits} bits, the "
            "manifest has others"
        )
    with contextlib.closing(ProductStore(folder / layout.PRODUCTS)) as store:
        try:
            faults += _store_faults(manifest, store)
            faults += _row_faults(
                VectorFiles(folder, manifest.width, manifest.bits), store, encoder
            )
        except (InputError, sqlite3.Error) as error:
            faults.append(f"{layout.PRODUCTS}: {error}")
    if layout.POSTING_LISTS in manifest.sha256:
        try:
            lists = InvertedLists(folder, manifest.num_photos, manifest.width)
            ranges = manifest.category_ranges.values()
            faults += lists.find_faults([(first, last) for first, last in ranges])
        except InputError as error:
            faults.append(str(error))
    return faults


def _store_faults(manifest: layout.IndexManifest, store: ProductStore) -> list[str]:
    """Faults within the product store."""
    faults, connection = [], store.connection
    if (result := connection.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
        faults.append(f"{layout.PRODUCTS}: {result}")
    num_rows = store.state(manifest.width).num_rows
    if num_rows < manifest.num_photos:
        faults.append(f"{layout.PRODUCTS}: {num_rows} photos, built with {manifest.num_photos}")
    count, end = connection.execute("SELECT count(*), max(row) + 1 FROM photos").fetchone()
    if count != num_rows or (end or 0) != num_rows:
        faults.append(
            f"{layout.PRODUCTS}: {count} photos up to row {end}, wanted all of {num_rows}"
        )
    orphans = connection.execute(
        "SELECT count(*) FROM photos LEFT JOIN products USING (product_id) WHERE sku IS NULL"
    ).fetchone()[0]
    if orphans:
        faults.append(f"{layout.PRODUCTS}: {orphans} photos of no product")
    mismatches = connection.execute(
        "SELECT count(*) FROM pictures LEFT JOIN photos USING (row) "
        "WHERE photos.product_id IS NOT pictures.product_id"
    ).fetchone()[0]
    if mismatches:
        faults.append(
            f"{layout.PRODUCTS}: {mismatches} pictures of another product than their photos"
        )
    return faults


def _row_faults(vectors: VectorFiles, store: ProductStore, encoder: BinaryEncoder) -> list[str]:
    """Faults of the photo files, against the store and each other."""
    faults, num_rows = [], store.num_rows()
    features, codes, row_products = (
        vectors.memmap(name, num_rows)
        for name in (layout.FEATURES, layout.CODES, layout.ROW_PRODUCTS)
    )
    for first in range(0, num_rows, _CHUNK):
        chunk = slice(first, first + _CHUNK)
        products = store.connection.execute(
            "SELECT product_id FROM photos WHERE row >= ? AND row < ? ORDER BY row",
            (first, first + _CHUNK),
        )
        if not np.array_equal(row_products[chunk], [line[0] for line in products]):
            faults.append(
                f"{layout.ROW_PRODUCTS}: other products than {layout.PRODUCTS} has, among rows "
                f"from {first}"
            )
        lengths = np.linalg.norm(np.asarray(features[chunk], np.float32), axis=1)
        if not np.all((np.abs(lengths - 1) < _LENGTH_TOLERANCE) | (lengths == 0)):
            faults.append(
                f"{layout.FEATURES}: vectors that are not of length 1, among rows from {first}"
            )
        elif not encoder.matches(features[chunk], codes[chunk]):
            faults.append(
                f"{layout.CODES}: other codes than the features have, among rows from {first}"
            )
    return faults


def _prefix_sha256(path: Path, length: int | None) -> str:
    """Digest of the first bytes of a file; None for all of it."""
    if length is None:
        return file_sha256(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while length and (block := file.read(min(length, 1 << 20))):
            digest.update(block)
            length -= len(block)
    return digest.hexdigest()
