"""File names, the manifest, the version in use and the write lock of an index folder.

INDEX/current       name of the version in use, replaced atomically
INDEX/v000001/      a version: the files named below
INDEX/.building/    the next version while it is being written
INDEX/.lock         held by the one process that writes
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sicot_jax.common.files import (
    atomic_file,
    file_lock,
    file_sha256,
    read_json,
    sync_to_disk,
    write_json,
)
from sicot_jax.common.json_types import check_field_types
from sicot_jax.errors import InputError

FORMAT = 6
CURRENT, BUILDING, LOCK = "current", ".building", ".lock"
MANIFEST = "manifest.json"
PRODUCTS = "products.sqlite"
# One row per photo.
FEATURES, CODES, ROW_PRODUCTS = "features.f16", "codes.u8", "row_products.i32"
BINARY_ENCODER, IMPRINT, TITLE_REGRESSION = (
    "binary_encoder.npz",
    "imprint.npz",
    "title_regression.npz",
)
REJECTION, CATEGORY_FUSION, RANKER = "rejection.json", "category_fusion.json", "ranker.json"
CENTROIDS, POSTING_LISTS = "centroids.faiss", "posting_lists.i32"  # of a large index only
PROGRESS = "progress.json"  # of an unfinished build
# Folders of `sicot convert`: weights, and an ONNX graph where it could be made.
MODEL, ONNX_MODEL = "model", "onnx"
APPENDABLE = (FEATURES, CODES, ROW_PRODUCTS)  # grow when photos are added
# Written once by the build; the ranker is replaced by `sicot index rank`.
FITTED = (BINARY_ENCODER, IMPRINT, TITLE_REGRESSION, REJECTION, CATEGORY_FUSION, RANKER)
# Depend on the order of the rows: written again whenever rows are reordered.
INVERTED_LISTS = (CENTROIDS, POSTING_LISTS)
_VERSION = re.compile(r"v(\d{6})")
_Index = TypeVar("_Index")


@dataclasses.dataclass(frozen=True)
class IndexManifest:
    """What a version was built from; `manifest.json`.

    Counts are those at the build. Later additions and deletions are recorded in the product store.

    Attributes:
      model_sha256: digest of the recogniser's weights.
      run: name of the run folder.
      results_sha256: digest of the run's `results.json`; "" where the run has none.
      data_hash: hash of the catalogue.
      width: D, numbers of an embedding.
      bits: bits of a binary code.
      code_kind: how codes are made, one of `binary_codes.CODE_KINDS`.
      num_photos: rows of the photo files at the build.
      num_products: active products at the build.
      category_ranges: category -> [first row, last row + 1] of its photos at the build.
      sha256: file name -> digest; of appendable files, of the first `num_photos` rows.
      created: time of the build, UTC, ISO 8601.
      version: version of the software.
      num_shards: parts of a sharded version; 0 where it is not sharded.
      format: version of the file format.
    """

    model_sha256: str
    run: str
    results_sha256: str
    data_hash: str
    width: int
    bits: int
    code_kind: str
    num_photos: int
    num_products: int
    category_ranges: dict[str, list[int]]
    sha256: dict[str, str]
    created: str
    version: str
    num_shards: int = 0
    format: int = FORMAT


def write_index_manifest(folder: Path, manifest: IndexManifest) -> None:
    """Writes `manifest.json` atomically.

    Args:
      folder: version folder.
      manifest: what to write.
    """
    write_json(folder / MANIFEST, dataclasses.asdict(manifest))


def read_index_manifest(folder: Path) -> IndexManifest:
    """Reads `manifest.json` of a version.

    Args:
      folder: version folder.

    Returns:
      The manifest.

    Raises:
      InputError: the file is missing, damaged or of another format.
    """
    stored: dict[str, Any] = read_json(folder / MANIFEST, "the manifest of a product index")
    if stored.get("format") != FORMAT:
        raise InputError(
            f"{folder / MANIFEST}: format {stored.get('format')!r:.40}, this version reads "
            f"{FORMAT}; build the index again"
        )
    try:
        check_field_types(IndexManifest, stored)
        return IndexManifest(**stored)
    except TypeError as error:
        raise InputError(
            f"{folder / MANIFEST}: unexpected fields ({error}); build the index again"
        ) from error


def read_unsharded_manifest(folder: Path) -> IndexManifest:
    """Reads the manifest of a version that may be changed: one that is not sharded.

    Args:
      folder: version folder.

    Returns:
      The manifest.

    Raises:
      InputError: as `read_index_manifest`, or the version is sharded; shards are written by
        `sicot index split` alone.
    """
    manifest = read_index_manifest(folder)
    if manifest.num_shards:
        raise InputError(
            f"{folder.parent}: is split into {manifest.num_shards} shards; change the index that "
            "it was split from, and split again"
        )
    return manifest


def current_version(index: Path) -> Path:
    """Returns the folder of the version in use.

    Args:
      index: index folder.

    Returns:
      Version folder.

    Raises:
      InputError: `index` is no index, or has no version yet.
    """
    try:
        name = (index / CURRENT).read_text(errors="replace").strip()
    except OSError as error:
        raise InputError(
            f"{index}: no product index there; make one with `sicot index build --out {index}`"
        ) from error
    if not _VERSION.fullmatch(name) or not (index / name).is_dir():
        raise InputError(
            f"{index / CURRENT}: names {name[:40]!r}, wanted a version in {index}; "
            "build the index again"
        )
    return index / name


def open_current(index: Path, open_version: Callable[[Path], _Index]) -> _Index:
    """Opens the version in use, and the next one where it was replaced while being opened.

    Args:
      index: index folder.
      open_version: opens a version folder.

    Returns:
      What `open_version` returned.

    Raises:
      InputError: no version in use, or `open_version` fails on it.
    """
    folder = current_version(index)
    try:
        return open_version(folder)
    except (OSError, InputError):
        if (newer := current_version(index)) == folder:
            raise
        return open_version(newer)


@contextlib.contextmanager
def write_lock(index: Path, *, create: bool = False) -> Iterator[None]:
    """Holds the index for writing.

    Args:
      index: index folder.
      create: make the folder where there is none.

    Yields:
      None, while the lock is held.

    Raises:
      InputError: another process holds the lock, or there is no index.
    """
    if create:
        index.mkdir(parents=True, exist_ok=True)
    elif not index.is_dir():
        current_version(index)  # raises
    refusal = InputError(f"{index}: another process is changing it; wait for it to end")
    with file_lock(index / LOCK, refusal):
        yield


def publish_version(index: Path, folder: Path) -> Path:
    """Makes a finished folder the version in use; call it under `write_lock`.

    The version before it is kept, older ones are removed.

    Args:
      index: index folder.
      folder: the finished version, in `index`.

    Returns:
      Folder of the published version.
    """
    versions = sorted(entry.name for entry in index.iterdir() if _VERSION.fullmatch(entry.name))
    before = (index / CURRENT).read_text().strip() if (index / CURRENT).exists() else ""
    number = int(_VERSION.fullmatch(versions[-1])[1]) + 1 if versions else 1  # type: ignore[index]
    published = index / f"v{number:06d}"
    for path in sorted(folder.rglob("*")):
        sync_to_disk(path)
    sync_to_disk(folder)
    folder.rename(published)
    with atomic_file(index / CURRENT, durable=True) as temporary:
        temporary.write_text(published.name + "\n")
    for name in versions:
        if name != before:
            shutil.rmtree(index / name, ignore_errors=True)
    return published


def file_digests(folder: Path) -> dict[str, str]:
    """Returns digests of the files of a version that is being written.

    The ranker is left out: it may be replaced, and holds its digest.

    Args:
      folder: version folder.

    Returns:
      File name -> sha256, of the files that exist.
    """
    names = [
        name
        for name in (*APPENDABLE, *FITTED, *INVERTED_LISTS)
        if name != RANKER and (folder / name).exists()
    ]
    return {name: file_sha256(folder / name) for name in names}
