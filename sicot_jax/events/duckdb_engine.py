"""DuckDB over files of events: more rows than memory holds, spilling into a scratch folder."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError
from sicot_jax.events.store import EVENT_FIELDS, EVENTS_FILE, export_events, is_parquet

if TYPE_CHECKING:
    import duckdb

_MIN_MEMORY_MB = 200
_MEMORY_MB_PER_THREAD = 80  # 31 are too little for 5 million events, 62 are enough


@contextlib.contextmanager
def open_duckdb(
    folder: Path, *, memory_mb: int, threads: int
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Opens a database for the block.

    Args:
      folder: folder for the database and for what does not fit in memory.
      memory_mb: working memory, MB.
      threads: threads to use; 0 for as many as there are cores and the memory has room for.

    Yields:
      The connection.

    Raises:
      InputError: DuckDB is not installed, the memory is too little, or a file or the disk fails in
        the block.
    """
    try:
        import duckdb
    except ImportError as error:
        raise InputError(
            "no duckdb here to read events with; install it: pip install 'sicot_jax[events]'"
        ) from error
    if memory_mb < _MIN_MEMORY_MB:
        raise InputError(f"--memory-mb {memory_mb}, wanted at least {_MIN_MEMORY_MB}")
    if "?" in str(folder):
        raise InputError(
            f"{folder.parent}: DuckDB takes what follows a ? in the path of its files for options; "
            "give an --out without one"
        )
    threads = threads or min(_num_cores(), max(1, memory_mb // _MEMORY_MB_PER_THREAD))
    config: dict[str, Any] = {
        "memory_limit": f"{memory_mb}MB",
        "temp_directory": str(folder / "spilled"),
        "threads": threads,
    }
    database = duckdb.connect(str(folder / "work.duckdb"), config=config)
    try:
        database.execute("SET TimeZone = 'UTC'")  # of times without a zone
        database.execute("SET enable_progress_bar = false")
        yield database
    except duckdb.OutOfMemoryException as error:
        raise InputError(
            f"--memory-mb {memory_mb} is too little for these events with {threads} threads; give "
            "more, or fewer --threads"
        ) from error
    except duckdb.IOException as error:
        raise InputError(
            f"{one_line_error(error, 300)}; check the files and the space on disk"
        ) from error
    except duckdb.Error as error:
        raise InputError(f"{one_line_error(error, 300)}; check what the files hold") from error
    except RuntimeError as error:
        if str(error) != "Query interrupted":
            raise
        raise KeyboardInterrupt from error  # DuckDB replaces the signal's exception
    finally:
        database.close()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sql_literal(value: object) -> str:
    """Quotes a text for a statement.

    Args:
      value: text, or what has one.

    Returns:
      The text in single quotes.
    """
    return "'" + str(value).replace("'", "''") + "'"


def sql_files(path: Path, pattern: str = "") -> str:
    """Returns the arguments of DuckDB's readers that name files.

    DuckDB takes every path as a pattern, and a folder called NAME=VALUE as a column that replaces
    the files' own.

    Args:
      path: a file; a folder where there is a pattern.
      pattern: pattern of the files' names in it, such as "*.parquet".

    Returns:
      The path as it is, quoted, and what keeps it one.
    """
    text = re.sub(r"[*?\[]", r"[\g<0>]", str(path)) + (f"/{pattern}" if pattern else "")
    return f"{sql_literal(text)}, hive_partitioning=false"


def sql_name(name: str) -> str:
    """Quotes the name of a column for a statement.

    Args:
      name: any text.

    Returns:
      The name in double quotes.
    """
    return '"' + name.replace('"', '""') + '"'


def sku_key_sql(text: str) -> str:
    """Returns what `common.sku.normalize_sku` does as an SQL expression.

    Args:
      text: SQL expression of a text.

    Returns:
      Expression of its one spelling; NULL for NULL.
    """
    # Of text in ASCII the bytes are as many as the characters.
    blanks = "'[\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{202F}\\x{205F}\\x{3000}]', ' ', 'g'"
    composed = f"regexp_replace(nfc_normalize({text}), {blanks})"
    return f"trim(CASE WHEN strlen({text}) = length({text}) THEN {text} ELSE {composed} END)"


def events_as_parquet(path: Path, folder: Path) -> Path:
    """Returns a Parquet file of events, copied from a service's file where needed.

    Args:
      path: Parquet file of events, folder of `sicot events import`, or SQLite file of a service.
      folder: folder for a copy.

    Returns:
      Path of the Parquet file.

    Raises:
      InputError: no such file, or one of another kind.
    """
    path = path / EVENTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise InputError(
            f"{path}: no such file, wanted events: Parquet, a folder of sicot events import, a "
            "service's file"
        )
    if not is_parquet(path):
        copy = folder / f"{path.name}.parquet"
        export_events(path, copy)
        return copy
    from pyarrow import parquet

    columns = parquet.read_schema(path).names
    if missing := [field for field in EVENT_FIELDS if field not in columns]:
        raise InputError(
            f"{path}: no column {', '.join(missing)}, wanted those of an event; sicot events "
            "import makes them"
        )
    return path
