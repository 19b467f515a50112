"""`sicot index verify`: whether a version is as it was written, and fits together."""

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
from sicot_jax.index.storage.inverted_lists import Lists
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.search.category import read_fusion
from sicot_jax.search.ranker import read_ranker
from sicot_jax.search.rejection import read_calibration
from sicot_jax.weights import bundle as folders

_LINES = 1 << 16


def verify(folder: Path, *, checksums: bool = False) -> list[str]:
    """What is wrong with a version, a line each; none where nothing is. `checksums`: every byte
    that was built is read.
    """
    try:
        manifest = layout.read_index_manifest(folder)
        codebook = BinaryEncoder.load(folder / layout.BINARY_ENCODER)
        read_calibration(folder / layout.REJECTION)
        read_fusion(folder / layout.CATEGORY_FUSION)
        read_ranker(folder / layout.RANKER)
        for name in (layout.MODEL, layout.ONNX_MODEL):
            if name == layout.MODEL or (folder / name).exists():
                folders.read_converted(folder / name)
    except InputError as error:
        return [str(error)]
    faults = (
        _of_shards(folder, manifest, checksums)
        if manifest.num_shards
        else _of_lines(folder, manifest, codebook)
    )
    if checksums:
        vectors = VectorFiles(folder, manifest.width, manifest.bits)
        for name, digest in manifest.sha256.items():
            length = manifest.num_photos * vectors.line_bytes(name) if name in layout.APPENDABLE else None
            if _sha256(folder / name, length) != digest:
                faults.append(f"{name}: not as it was built (another sha256)")
    return faults


def _of_shards(folder: Path, manifest: layout.IndexManifest, checksums: bool) -> list[str]:
    faults, photos = [], 0
    for shard in range(manifest.num_shards):
        part = shard_folder(folder, shard)
        found = verify(part, checksums=checksums)
        photos += 0 if found else layout.read_index_manifest(part).photos
        faults += [f"{part.name}: {fault}" for fault in found]
    if not faults and photos != manifest.num_photos:
        faults.append(f"{layout.MANIFEST}: {manifest.num_photos} photos, the shards have {photos}")
    return faults


def _of_lines(folder: Path, manifest: layout.IndexManifest, codebook: BinaryEncoder) -> list[str]:
    faults = []
    if (codebook.width, codebook.bits) != (manifest.width, manifest.bits):
        faults.append(
            f"{layout.BINARY_ENCODER}: for vectors of {codebook.width} and {codebook.bits} bits, the manifest has others"
        )
    with contextlib.closing(ProductStore(folder / layout.PRODUCTS)) as cards:
        try:
            faults += _of_cards(folder, manifest, cards, codebook)
        except (InputError, sqlite3.Error) as error:
            faults.append(f"{layout.PRODUCTS}: {error}")
    if layout.POSTING_LISTS in manifest.sha256:
        try:
            lists = Lists(folder, manifest.num_photos, manifest.width)
            faults += lists.faults([(first, last) for first, last in manifest.categories.values()])
        except InputError as error:
            faults.append(str(error))
    return faults


def _of_cards(
    folder: Path, manifest: layout.IndexManifest, cards: ProductStore, codebook: BinaryEncoder
) -> list[str]:
    faults, connection = [], cards.connection
    if (found := connection.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
        faults.append(f"{layout.PRODUCTS}: {found}")
    state, vectors = cards.state(manifest.width), VectorFiles(folder, manifest.width, manifest.bits)
    features, codes, owners = (
        vectors.memmap(name, state.places)
        for name in (layout.FEATURES, layout.CODES, layout.ROW_PRODUCTS)
    )
    if state.places < manifest.num_photos:
        faults.append(f"{layout.PRODUCTS}: {state.places} photos, built with {manifest.num_photos}")
    photos = connection.execute("SELECT count(*), max(place) + 1 FROM photos").fetchone()
    if photos[0] != state.places or (photos[1] or 0) != state.places:
        faults.append(
            f"{layout.PRODUCTS}: {photos[0]} photos up to place {photos[1]}, wanted all of {state.places}"
        )
    orphans = connection.execute(
        "SELECT count(*) FROM photos LEFT JOIN products USING (product) WHERE sku IS NULL"
    )
    if count := orphans.fetchone()[0]:
        faults.append(f"{layout.PRODUCTS}: {count} photos of no product")
    others = connection.execute(
        "SELECT count(*) FROM pictures LEFT JOIN photos USING (place) WHERE photos.product IS NOT pictures.product"
    )
    if count := others.fetchone()[0]:
        faults.append(f"{layout.PRODUCTS}: {count} pictures of another product than their photos")
    for first in range(0, state.places, _LINES):
        part = slice(first, first + _LINES)
        rows = connection.execute(
            "SELECT product FROM photos WHERE place >= ? AND place < ? ORDER BY place",
            (first, first + _LINES),
        )
        if not np.array_equal(owners[part], [row[0] for row in rows]):
            faults.append(
                f"{layout.ROW_PRODUCTS}: other products than {layout.PRODUCTS} has, among lines from {first}"
            )
        lengths = np.linalg.norm(np.asarray(features[part], np.float32), axis=1)
        if not np.all((np.abs(lengths - 1) < 0.01) | (lengths == 0)):
            faults.append(
                f"{layout.FEATURES}: vectors that are not of length 1, among lines from {first}"
            )
        elif not codebook.agrees(features[part], codes[part]):
            faults.append(
                f"{layout.CODES}: other codes than the features have, among lines from {first}"
            )
    return faults


def _sha256(path: Path, length: int | None) -> str:
    if length is None:
        return file_sha256(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while length and (block := file.read(min(length, 1 << 20))):
            digest.update(block)
            length -= len(block)
    return digest.hexdigest()
