"""DuckDB over files of events: more rows than memory holds, what does not fit goes to a folder of
its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError
from sicot_jax.events import store
from sicot_jax.events.store import EVENTS_FILE, is_parquet

if TYPE_CHECKING:
    import duckdb


@contextlib.contextmanager
def connect(folder: Path, *, memory_mb: int, threads: int) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database for the block that holds `memory_mb` of working memory and spills into `folder`.
    threads: 0 as many as there are cores.

    InputError: DuckDB is not installed, too little memory, and what goes wrong with a file or the
      disk in the block.
    """
    try:
        import duckdb
    except ImportError as error:
        raise InputError(
            "no duckdb here to read events with; install it: pip install 'sicot_jax[events]'"
        ) from error
    if memory_mb < 200:
        raise InputError(f"--memory-mb {memory_mb}, wanted at least 200")
    config: dict[str, Any] = {
        "memory_limit": f"{memory_mb}MB",
        "temp_directory": str(folder / "spilled"),
    }
    if threads:
        config["threads"] = threads
    database = duckdb.connect(str(folder / "work.duckdb"), config=config)
    try:
        database.execute("SET TimeZone = 'UTC'")  # of times that name no zone
        database.execute("SET enable_progress_bar = false")
        yield database
    except duckdb.OutOfMemoryException as error:
        raise InputError(
            f"--memory-mb {memory_mb} is too little for these events, give more"
        ) from error
    except duckdb.Error as error:
        raise InputError(
            f"{one_line_error(error, 300)}; check the files and the space on disk"
        ) from error
    except RuntimeError as error:
        if str(error) != "Query interrupted":
            raise
        raise KeyboardInterrupt from error  # which DuckDB takes the signal's own exception away for
    finally:
        database.close()


def literal(text: object) -> str:
    """As a text inside a statement."""
    return "'" + str(text).replace("'", "''") + "'"


def name(text: str) -> str:
    """As the name of a column inside a statement."""
    return '"' + text.replace('"', '""') + '"'


def as_parquet(path: Path, folder: Path) -> Path:
    """The events of `path` as Parquet: such a file, a folder of sicot events import, or the file of
    a service (copied into `folder`).

    InputError: none of these.
    """
    path = path / EVENTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise InputError(
            f"{path}: no such file, wanted events: Parquet, a folder of sicot events import, a service's file"
        )
    if not is_parquet(path):
        store.export_events(path, copied := folder / f"{path.name}.parquet")
        return copied
    from pyarrow import parquet

    found = parquet.read_schema(path).names
    if missing := [field for field in store.FIELDS if field not in found]:
        raise InputError(
            f"{path}: no column {', '.join(missing)}, wanted those of an event; sicot events import makes them"
        )
    return path
