"""Reads import sources: a manifest (CSV, Parquet, JSONL) or a folder with one folder per SKU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

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


import codecs
import mmap
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import csv


# A quoted CSV cell as pyarrow reads it: up to the next single quote, or to the end; what follows
# should be nothing.
_QUOTED_CELL = re.compile(
    rb'(?:\A(?:\xef\xbb\xbf)?|[,\r\n])(?P<cell>"[^"]*+(?:""[^"]*+)*+)(?P<end>"?)(?P<after>[^,\r\n]*)'
)
# One physical row and its line end, read by the same rule.
_CELL = rb'(?:"[^"]*+(?:""[^"]*+)*+"?)?+[^,\r\n]*+'
_CSV_ROW = re.compile(rb"(?P<cells>%b(?:,%b)*+)(?:\r\n|\n|\r|\Z)" % (_CELL, _CELL))


def read_csv_rows(path: Path, unused: list[str]) -> Iterator[RawRow]:
    """Yields the rows of a CSV manifest in the order of the file.

    Args:
      path: CSV file with a header, separated by commas.
      unused: receives the names of columns that an import does not know.

    Yields:
      ("line N", text by column), or ("line N", DroppedRow) for a wrong number of fields.

    Raises:
      ManifestError: not UTF-8, an unclosed quote, a missing column, no rows, unreadable.
    """
    import pyarrow as pa
    from pyarrow import csv

    _check_utf8(path)
    _check_quotes(path)
    broken: dict[int, str] = {}

    def skip(row: csv.InvalidRow) -> str:
        wanted = f"wanted {row.expected_columns}; quote fields that contain commas"
        broken[row.number] = f"{row.actual_columns} fields, {wanted}"
        return "skip"

    # Values may hold line breaks inside quotes. One thread: the parser numbers rows only then.
    parse = csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip)
    read = csv.ReadOptions(use_threads=False)
    try:
        with csv.open_csv(path, read_options=read, parse_options=parse) as header:
            known = check_columns(path, header.schema.names, unused)
        broken.clear()
        convert = csv.ConvertOptions(
            column_types=dict.fromkeys(known, pa.string()),
            include_columns=known,
            strings_can_be_null=False,
        )
        with csv.open_csv(
            path, read_options=read, parse_options=parse, convert_options=convert
        ) as reader:
            yield from _numbered_rows(path, reader, broken)
    except pa.ArrowInvalid as error:
        raise arrow_error(path, error) from None
    except (UnicodeDecodeError, pa.ArrowKeyError):
        raise encoding_error(path) from None


def _numbered_rows(
    path: Path, batches: Iterable[pa.RecordBatch], broken: Mapping[int, str]
) -> Iterator[RawRow]:
    """Merges parsed rows with `broken`, the rows pyarrow skipped by number (the header is 1)."""
    lines = enumerate(_row_lines(path), start=1)
    _, line = next(lines)
    values = None
    for batch in batches:
        for values in batch.to_pylist():
            for number, line in lines:
                if number not in broken:
                    break
                yield _wrong_fields(line, broken[number])
            yield f"line {line}", values
    for number, line in lines:
        if number in broken:
            yield _wrong_fields(line, broken[number])
    if values is None:
        raise no_rows_error(path)


def _wrong_fields(line: int, detail: str) -> RawRow:
    return f"line {line}", DroppedRow(f"line {line}", "wrong number of fields", detail)


def _row_lines(path: Path) -> Iterator[int]:
    """Yields the line in which each row begins, the header's first; empty lines are no rows."""
    line = 1
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = len(codecs.BOM_UTF8) if data[:3] == codecs.BOM_UTF8 else 0
        for match in _CSV_ROW.finditer(data, start):
            if match["cells"]:
                yield line
            line += len(match[0].splitlines())


def _check_utf8(path: Path) -> None:
    # pyarrow's handler of invalid rows prints a traceback on bytes that are no text: refuse first.
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise encoding_error(path) from None


def _check_quotes(path: Path) -> None:
    """Refuses an unclosed quote, which would swallow the rows after it into one cell.

    Such a cell holds line breaks and is never closed, or is closed by the opening quote of a later
    cell, with text after it; where that text starts with a comma, the number of quotes is odd.
    Quotes inside unquoted cells (15") are characters like any other.
    """
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = _unclosed_quote(data)
            line = None if start is None else data[:start].count(b"\n") + 1
    if line is not None:
        raise ManifestError(
            f"manifest {path}: the quote that begins in line {line} is not closed where its cell "
            f'ends; close it, or write " inside a quoted cell as ""'
        )


def _unclosed_quote(data: mmap.mmap) -> int | None:
    suspect = None
    for match in _QUOTED_CELL.finditer(data):
        cell = match["cell"]
        if b"\n" not in cell and b"\r" not in cell:
            continue
        if not match["end"] or match["after"]:
            return match.start("cell")
        if suspect is None:
            line_end = data.find(b"\n", match.end())
            rest = data[match.end() : line_end if line_end >= 0 else len(data)]
            if rest.count(b'"') % 2:
                suspect = match.start("cell")
    if suspect is None:
        return None
    quotes = sum(
        data[start : start + (1 << 24)].count(b'"') for start in range(0, len(data), 1 << 24)
    )
    return suspect if quotes % 2 else None


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
