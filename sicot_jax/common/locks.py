"""Locks between processes, by files."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from sicot_jax.errors import InputError


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
