"""Checksums of all files of a folder, kept in it as a file that `sha256sum --check` reads too."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sicot_jax.common.files import file_sha256

CHECKSUM_FILE = "checksums.sha256"
_THREADS = 4


def write_checksums(folder: Path) -> None:
    """Writes the checksums of a complete folder into it.

    Args:
      folder: a folder that no file will be added to.
    """
    (folder / CHECKSUM_FILE).write_bytes(_checksums(folder))


def describe_damage(folder: Path) -> str:
    """Returns how a folder differs from its checksums; reads every byte of it.

    Args:
      folder: a folder that `write_checksums` was called for.

    Returns:
      The first file that is missing, changed or new; "" where every byte is as it was. Files that
      file browsers add (.DS_Store, Thumbs.db) do not count.
    """
    try:
        stored, actual = (folder / CHECKSUM_FILE).read_bytes(), _checksums(folder)
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    if stored == actual:
        return ""
    # What follows 64 digits and two blanks in a line is the path.
    stored_lines, actual_lines = {*stored.splitlines()}, {*actual.splitlines()}
    changed = [line[66:].decode(errors="replace") for line in stored_lines - actual_lines]
    added = [line[66:].decode() for line in actual_lines - stored_lines]
    paths = changed + [path for path in added if not _is_foreign(path)]
    if not paths:
        return ""
    return f"{min(paths) or CHECKSUM_FILE!r} is not as it was written"


def _is_foreign(path: str) -> bool:
    """Whether a file browser, or a file system that synchronises, may have added a file."""
    name = path.rpartition("/")[2]
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")


def _checksums(folder: Path) -> bytes:
    paths = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_dir() and path.name != CHECKSUM_FILE
    )
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda path: file_sha256(folder / path), paths)
        return "".join(map("{}  {}\n".format, digests, paths)).encode()
