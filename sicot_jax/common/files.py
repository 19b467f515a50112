"""Files written whole or not at all: JSON, new folders, checksums. Nothing heavy is imported here."""

from __future__ import annotations

import contextlib
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


def read_json(path: Path, wanted: str) -> dict[str, Any]:
    """InputError where the file is missing, no JSON, or no table."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: {type(error).__name__}, wanted {wanted}; check the folder"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no table, wanted {wanted}; check the folder")
    return value


def write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` at the end of the block, or vanishes with an exception or
    SIGTERM. InputError where `out` is.
    """
    check_new(out)
    missing = [parent for parent in out.parents if not parent.exists()]
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
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
def work_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` for what is not whole yet; it vanishes with the block, whatever ends
    it, SIGTERM too. InputError where none can be made.
    """
    folder = out.with_name(f".{out.name}.{os.getpid()}.partial")
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


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return

    def leave(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_new(out: Path) -> None:
    """InputError where there is something already."""
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists; give another --out, or remove it")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
