"""Files and folders that appear complete or not at all; locks between processes; checksums."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sicot_jax.errors import InputError


@contextlib.contextmanager
def atomic_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Gives a temporary path that replaces `path` at the end of the block.

    Readers see the old file or the complete new one. With an exception the temporary file is
    removed and `path` stays as it was.

    Args:
      path: the file to write; its folder exists.
      durable: also wait until file and folder are on disk, so that they survive a power cut.

    Yields:
      The temporary path, in the same folder and with the same suffix.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        if durable:
            sync_to_disk(temporary)
        temporary.replace(path)
        if durable:
            sync_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on disk.

    Args:
      path: file or folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically.

    Args:
      path: the file.
      text: its content.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def read_json(path: Path, wanted: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: the file.
      wanted: what the file should be, for the message of an error.

    Returns:
      The object.

    Raises:
      InputError: the file is missing, is no JSON, or holds no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: {type(error).__name__}, wanted {wanted}; check the folder"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no table, wanted {wanted}; check the folder")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically.

    Args:
      path: the file.
      value: anything that JSON can hold.
    """
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `out` at the end of the block.

    With an exception or SIGTERM the folder is removed, along with parents that were made for it.

    Args:
      out: the new folder; must not exist.

    Yields:
      The temporary folder, next to `out`.

    Raises:
      InputError: `out` exists, or its parent is no folder.
    """
    check_not_there(out)
    missing = [parent for parent in out.parents if not parent.exists()]
    partial = _partial_name(out)
    try:
        with _sigterm_as_exit():
            partial.mkdir(parents=True)
            yield partial
            partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):  # another process may have put something there
                parent.rmdir()
        if isinstance(error, NotADirectoryError | FileExistsError) and str(partial) in str(error):
            raise InputError(f"{out}: its parent is no folder; give another --out") from error
        raise


@contextlib.contextmanager
def scratch_directory(out: Path) -> Iterator[Path]:
    """Makes a temporary folder next to `out` and removes it at the end, whatever ends the block.

    Args:
      out: the file or folder that is being prepared.

    Yields:
      The temporary folder.

    Raises:
      InputError: no folder can be made there.
    """
    folder = _partial_name(out)
    try:
        with _sigterm_as_exit():
            try:
                folder.mkdir()
            except OSError as error:
                raise InputError(
                    f"{out}: {error.strerror}; wanted a place for a new file, give another --out"
                ) from error
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _partial_name(out: Path) -> Path:
    return out.with_name(f".{out.name}.{os.getpid()}.partial")


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_not_there(out: Path) -> None:
    """Raises InputError where a file, folder or link has that name already.

    Args:
      out: the path.

    Raises:
      InputError: there is something.
    """
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists; give another --out, or remove it")


def relative_note(path: Path) -> str:
    """Returns what to say about a path that was not found: a config may hold it for another folder.

    Args:
      path: the path.

    Returns:
      " (relative to FOLDER)", or "" for an absolute path.
    """
    return "" if path.is_absolute() else f" (relative to {Path.cwd()})"


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file.

    Args:
      path: the file.

    Returns:
      64 hex digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def file_lock(path: Path, refusal: InputError) -> Iterator[None]:
    """Holds an exclusive lock on a file, without waiting for another process that holds it.

    The operating system frees the lock of a process that dies. The file stays: removing it while
    another process opens it would give two locks.

    Args:
      path: the lock file; it is created where there is none.
      refusal: error to raise where another process holds the lock; says who, and what to do.

    Yields:
      None, while the lock is held.

    Raises:
      InputError: `refusal`, or the file system has no locks.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refusal from None
        except OSError as error:
            raise InputError(
                f"{path}: {error.strerror}; wanted a file system with locks, use another folder"
            ) from error
        yield
