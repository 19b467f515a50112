"""Reads a CSV manifest strictly: UTF-8, closed quotes, all values as text, exact line numbers."""

from __future__ import annotations

import codecs
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sicot_jax.catalog.importing.manifest_rows import (
    DroppedRow,
    ManifestError,
    RawRow,
    arrow_error,
    check_columns,
    encoding_error,
    no_rows_error,
)

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
