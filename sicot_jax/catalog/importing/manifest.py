"""Reads import sources: a manifest (CSV, Parquet, JSONL) or a folder with one folder per SKU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sicot_jax.catalog.importing.manifest_csv import read_csv_rows
from sicot_jax.catalog.importing.manifest_rows import (
    COLUMNS,
    DroppedRow,
    ManifestError,
    ManifestRow,
    RawRow,
    RowError,
    arrow_error,
    check_columns,
    check_rows,
    encoding_error,
    no_rows_error,
    printable,
)

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST_SUFFIXES = (".csv", ".parquet", ".jsonl")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_manifest(
    path: Path, unused: list[str] | None = None
) -> Iterator[ManifestRow | DroppedRow]:
    """Returns an iterator over the rows of a manifest file.

    All values are text: SKU `0012` stays `0012`, title `NA` stays `NA`.

    Args:
      path: CSV, Parquet or JSONL file.
      unused: receives the names of unknown columns, each with the column it may be a misspelling
        of; complete after the last row.

    Returns:
      Rows in the order of the file; a row that cannot be used comes as a DroppedRow.

    Raises:
      ManifestError: (on the call or while iterating) no such file, unknown suffix, unreadable, not
        UTF-8, a column missing, no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(
            f"manifest {path} not found; wanted a file or a folder with one folder per SKU"
        )
    readers: dict[str, Callable[[Path, list[str]], Iterator[RawRow]]] = {
        ".csv": read_csv_rows,
        ".parquet": _read_parquet,
        ".jsonl": _read_jsonl,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        wanted = f"wanted one of {', '.join(MANIFEST_SUFFIXES)}"
        raise ManifestError(f"manifest {path} ends in {path.suffix!r}, {wanted}; rename it")
    return check_rows(reader(path, [] if unused is None else unused))


def read_folders(root: Path) -> Iterator[ManifestRow | DroppedRow]:
    """Returns an iterator over the photos of a folder with one folder per SKU.

    The folder name is the SKU, the title is empty. Photos may be deeper inside a SKU's folder;
    hidden files are ignored, other files are reported as dropped.

    Args:
      root: folder of SKU folders.

    Returns:
      Rows whose `image` is relative to `root`.

    Raises:
      ManifestError: `root` is no folder or holds none.
    """
    root = Path(root)
    if not root.is_dir():
        raise ManifestError(f"folder {root} not found; wanted one folder per SKU in it")
    folders = sorted(
        entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if not folders:
        raise ManifestError(
            f"folder {root} has no folders in it; wanted one folder per SKU, each with its photos"
        )
    return check_rows(_walk_folders(root, folders))


def _walk_folders(root: Path, folders: Iterable[Path]) -> Iterator[RawRow]:
    for entry in sorted(root.iterdir()):
        if entry.is_file() and entry.suffix.lower() in PHOTO_SUFFIXES:
            yield entry.name, DroppedRow(entry.name, "photo outside a SKU folder")
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if not file.is_file() or file.name.startswith("."):
                continue
            name = os.fspath(file.relative_to(root))
            if file.suffix.lower() in PHOTO_SUFFIXES:
                yield name, {"image": name, "sku": folder.name}
            else:
                yield name, DroppedRow(name, "no photo file", bad=False)


def _read_parquet(path: Path, unused: list[str]) -> Iterator[RawRow]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            known = check_columns(path, file.schema_arrow.names, unused)
            for batch in file.iter_batches(columns=known):
                columns = [_text_column(path, column, batch.column(column)) for column in known]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield f"row {number}", dict(zip(known, values, strict=True))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # whichever part is damaged
        raise arrow_error(path, error) from None
    if number == 0:
        raise no_rows_error(path)


def _text_column(path: Path, name: str, column: pa.Array) -> list[str]:
    import pyarrow as pa

    kind = column.type
    try:
        if (
            pa.types.is_list(kind)
            or pa.types.is_large_list(kind)
            or pa.types.is_fixed_size_list(kind)
        ):
            column.flatten().cast(pa.string())  # refuses lists of anything but text and numbers
            return [
                " ".join(str(item) for item in value or () if item is not None)
                for value in column.to_pylist()
            ]
        return column.cast(pa.string()).fill_null("").to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ManifestError(
            f"manifest {path}: column {name} is {printable(str(kind), 80)}, "
            "wanted text, numbers or a list of them; convert it"
        ) from None


def _read_jsonl(path: Path, unused: list[str]) -> Iterator[RawRow]:
    columns: set[str] = set()
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"line {number}", _json_row(f"line {number}", line, columns)
    except UnicodeDecodeError:
        raise encoding_error(path) from None
    if number == 0:
        raise no_rows_error(path)
    check_columns(path, sorted(columns), unused)


def _json_row(location: str, line: str, columns: set[str]) -> dict[str, str] | DroppedRow:
    try:
        # Numbers keep the characters they were written with.
        values = json.loads(line, parse_int=str, parse_float=str)
        if not isinstance(values, dict):
            raise RowError("not an object")
        columns.update(values)
        return {column: _json_text(values[column]) for column in COLUMNS if column in values}
    except (ValueError, RecursionError) as error:
        return DroppedRow(location, "unreadable JSON line", str(error)[:120])


def _json_text(value: object) -> str:
    """Returns a JSON value as text: null is empty, a list of strings is joined with spaces."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    raise RowError(f"a value is {type(value).__name__}, wanted text")
