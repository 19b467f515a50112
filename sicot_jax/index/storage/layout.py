"""What lies where in an index, which version is in use, and who may write.

INDEX/current       the name of the version in use, replaced in one step
INDEX/v000001/      a version: the files named below
INDEX/.building/    the next one, not whole yet
INDEX/.lock         held by the one process that writes
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sicot_jax.common.files import file_sha256, read_json, write_json
from sicot_jax.errors import InputError

FORMAT = 5
CURRENT, BUILDING, LOCK = "current", ".building", ".lock"
MANIFEST, CARDS, FEATURES, CODES, OWNERS = (
    "manifest.json",
    "cards.sqlite",
    "features.f16",
    "codes.u8",
    "owners.i32",
)
CODEBOOK, IMPRINT, TITLES = "codebook.npz", "imprint.npz", "titles.npz"
UNKNOWN, CATEGORIES, RANKER = "unknown.json", "categories.json", "ranker.json"
CENTRES, LISTS = "lists.faiss", "lists.i32"  # of a large index
GROWING = (FEATURES, CODES, OWNERS)  # by additions
FITTED = (
    CODEBOOK,
    IMPRINT,
    TITLES,
    UNKNOWN,
    CATEGORIES,
    RANKER,
)  # by the build, then left; the ranker by `sicot index rank`
SORTED = (
    CENTRES,
    LISTS,
)  # by the build, of the order of its lines: lines in another order need others
PROGRESS = "progress.json"  # of a build that is not whole yet
MODEL, GRAPH = (
    "model",
    "onnx",
)  # folders of `sicot convert`: weights, and an ONNX graph where it could be made
_VERSION = re.compile(r"v(\d{6})")
_Opened = TypeVar("_Opened")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`manifest.json`: what a version was built from. Counts are those at its build; what came and
    went since is in the cards.

    model: sha256 of the recogniser's weights; trained: of the run's results. width, bits: of
      features and codes; codes: how they are made (`codebooks.KINDS`). categories: name -> [first,
      last + 1) of its photos in the files. sha256: of every file, of those that grow the part that
      `photos` lines take. shards: parts that the version is split into (index/shards), 0 where it
      is not.
    """

    model: str
    run: str
    trained: str
    data: str
    width: int
    bits: int
    codes: str
    photos: int
    products: int
    categories: dict[str, list[int]]
    sha256: dict[str, str]
    created: str
    version: str
    shards: int = 0
    format: int = FORMAT


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / MANIFEST, dataclasses.asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """InputError where there is none, or one that this version does not read."""
    stored: dict[str, Any] = read_json(folder / MANIFEST, "the manifest of a product index")
    if stored.get("format") != FORMAT:
        raise InputError(
            f"{folder / MANIFEST}: format {stored.get('format')}, this version reads {FORMAT}; build the index again"
        )
    try:
        return Manifest(**stored)
    except TypeError as error:
        raise InputError(
            f"{folder / MANIFEST}: not as it was written ({error}); build the index again"
        ) from error


def read_whole(folder: Path) -> Manifest:
    """InputError where the version is split: its parts are written by `sicot index split` alone."""
    manifest = read_manifest(folder)
    if manifest.shards:
        raise InputError(
            f"{folder.parent}: is split into {manifest.shards} shards; change the index that it was split from, and split again"
        )
    return manifest


def current_version(index: Path) -> Path:
    """The folder of the version in use. InputError where `index` is no index, or not built yet."""
    try:
        name = (index / CURRENT).read_text().strip()
    except OSError as error:
        raise InputError(
            f"{index}: no product index there; make one with `sicot index build --out {index}`"
        ) from error
    if not _VERSION.fullmatch(name) or not (index / name).is_dir():
        raise InputError(
            f"{index / CURRENT}: names {name[:40]!r}, wanted a version in {index}; build the index again"
        )
    return index / name


def open_current(index: Path, opened: Callable[[Path], _Opened]) -> _Opened:
    """`opened(version folder)`; once more where that version was replaced and removed in between."""
    folder = current_version(index)
    try:
        return opened(folder)
    except (OSError, InputError):
        if (newer := current_version(index)) == folder:
            raise
        return opened(newer)


@contextlib.contextmanager
def alone(index: Path, *, new: bool = False) -> Iterator[None]:
    """Hold the index for writing; `new`: make its folder where there is none. InputError where
    another process holds it.
    """
    if new:
        index.mkdir(parents=True, exist_ok=True)
    elif not index.is_dir():
        current_version(index)  # says that there is none
    with (index / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{index}: another process is changing it; wait for it to end"
            ) from error
        yield


def publish(index: Path, folder: Path) -> Path:
    """Make `folder` the version in use; the one before it stays, older ones go. Under `alone`."""
    versions = sorted(entry.name for entry in index.iterdir() if _VERSION.fullmatch(entry.name))
    before = (index / CURRENT).read_text().strip() if (index / CURRENT).exists() else ""
    number = int(_VERSION.fullmatch(versions[-1])[1]) + 1 if versions else 1  # type: ignore[index]
    published = index / f"v{number:06d}"
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)
    folder.rename(published)
    _point(index, published.name)
    for name in versions:
        if name != before:
            shutil.rmtree(index / name, ignore_errors=True)
    return published


def digests(folder: Path) -> dict[str, str]:
    """sha256 of the files of a version that is being written, those that are there yet; the ranker,
    which may be replaced, has its own in it.
    """
    names = [
        name for name in (*GROWING, *FITTED, *SORTED) if name != RANKER and (folder / name).exists()
    ]
    return {name: file_sha256(folder / name) for name in names}


def _point(index: Path, name: str) -> None:
    partial = index / f"{CURRENT}.tmp"
    with partial.open("w") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(index / CURRENT)
    _sync(index)


def _sync(path: Path) -> None:
    """A file's content, or what was renamed in a folder, survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
