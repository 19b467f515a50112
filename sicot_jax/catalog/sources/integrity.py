"""Checksums of an imported catalogue's files, and the open files that its shards need.

TFDS and ArrayRecord notice a damaged shard while they read it; one of another catalogue with as
many records they read without a word.
"""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Callable, Iterable
from pathlib import Path

from sicot_jax.common.files import file_sha256, read_json, write_json
from sicot_jax.errors import InputError

CHECKSUMS_FILE = "checksums.json"
_REPORTS = ("report.json", "report.md")  # for people, who may edit them
# An ArrayRecord file begins with its first chunk, whose header holds a hash of the records, and
# ends with the table of all chunks.
_EDGE_BYTES = 1 << 16
_OTHER_OPEN_FILES = 256  # besides shards: libraries, sockets, checkpoints, logs


def write_catalog_checksums(folder: Path) -> None:
    """Writes `checksums.json` of a complete version folder.

    Args:
      folder: the version folder.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    left_out = (CHECKSUMS_FILE, *_REPORTS)
    digests = {name: _digest(folder / name) for name in names if name not in left_out}
    write_json(folder / CHECKSUMS_FILE, digests)


def check_tables(folder: Path) -> None:
    """Raises InputError unless the files of a version, but for the shards, are as written.

    Args:
      folder: a version folder; one without `checksums.json` is of an earlier release, and passes.

    Raises:
      InputError: a file is missing or another one.
    """
    _check(folder, lambda name: not _is_shard(name))


def check_shards(folder: Path, names: Iterable[str]) -> None:
    """Raises InputError unless shards are as written, by size, beginning and end.

    Args:
      folder: a version folder; one without `checksums.json` is of an earlier release, and passes.
      names: names of the shards.

    Raises:
      InputError: a shard is missing or another one.
    """
    _check(folder, set(names).__contains__)


def _check(folder: Path, is_chosen: Callable[[str], bool]) -> None:
    path = folder / CHECKSUMS_FILE
    if not path.exists():
        return
    stored = read_json(path, "the checksums of a catalogue")
    for name in filter(is_chosen, stored):
        try:
            digest = _digest(folder / name)
        except OSError as error:
            digest = str(error.strerror)
        if digest != stored[name]:
            state = "missing" if not (folder / name).exists() else "not as it was imported"
            raise InputError(
                f"{folder / name}: {state}; restore it from a copy, or import the catalogue again"
            )


def _is_shard(name: str) -> bool:
    return ".array_record" in name


def _digest(path: Path) -> str:
    if not _is_shard(path.name):
        return file_sha256(path)
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(str(size).encode())
        for start in (0, max(0, size - _EDGE_BYTES)):
            file.seek(start)
            digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()


def allow_open_files(shards: int) -> None:
    """Lets this process and those it starts open so many shards at once, up to the hard limit.

    A reader keeps every shard open that it has read a record of.

    Args:
      shards: number of shards that may be open.

    Raises:
      InputError: the system's hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = shards + _OTHER_OPEN_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(
            f"the catalogue has {shards} shards, a process may open {hard} files, wanted "
            f"{needed}; raise the limit (ulimit -n {needed}, docker run --ulimit nofile={needed})"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
