"""Reads tables of a shop, CSV, Parquet or JSON, as rows of text: no value is taken for a number.

What a program made of a text is undone where that is exact: a whole number in a column of floats
is written without point and exponent, and no number (NaN, null) is an empty text.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import decimal
import difflib
import gzip
import itertools
import json
import math
import mmap
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from sicot_jax.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import csv

TABLE_SUFFIXES = (".csv", ".parquet", ".jsonl", ".json")
_EXACT_FLOAT = 2**53  # a float holds every whole number up to it
_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_SPREADSHEET = (
    "make the column of SKUs text in the spreadsheet, save it as 'CSV UTF-8' with commas, and give "
    "that file"
)
_REMEDIES = {
    **dict.fromkeys((".xlsx", ".xlsm", ".xls", ".ods", ".numbers"), _SPREADSHEET),
    **dict.fromkeys((".tsv", ".tab", ".txt"), "save it as CSV, in UTF-8 with commas"),
    **dict.fromkeys((".zip", ".zst", ".bz2", ".xz", ".7z", ".rar", ".tar", ".tgz"), "unpack it"),
    **dict.fromkeys((".xml", ".html"), "export CSV, Parquet or JSON lines"),
    ".ndjson": "name it .jsonl",
}
# First bytes of files that are no text, whatever their name.
_BINARY = {
    b"PK\x03\x04": ("a spreadsheet or zip file", _SPREADSHEET),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet", _SPREADSHEET),
    b"\x1f\x8b": ("compressed by gzip", "let its name end in .gz"),
    b"PAR1": ("a Parquet file", "let its name end in .parquet"),
}


# A quoted CSV cell as pyarrow reads it: up to the next single quote, or to the end; what follows
# should be nothing.
_QUOTED_CELL = re.compile(
    rb'(?:\A(?:\xef\xbb\xbf)?|[,\r\n])(?P<cell>"[^"]*+(?:""[^"]*+)*+)(?P<end>"?)(?P<after>[^,\r\n]*)'
)
# One physical row and its line end, read by the same rule.
_CELL = rb'(?:"[^"]*+(?:""[^"]*+)*+"?)?+[^,\r\n]*+'
_CSV_ROW = re.compile(rb"(?P<cells>%b(?:,%b)*+)(?:\r\n|\n|\r|\Z)" % (_CELL, _CELL))


class TableError(InputError):
    """A table that cannot be read at all; the message is one line."""


class EmptyTableError(TableError):
    """A table without rows."""


class RowError(ValueError):
    """A single row that cannot be used; the message is `reason: detail`."""


@dataclasses.dataclass(frozen=True, slots=True)
class DroppedRow:
    """A row that is not used.

    Attributes:
      row: location: "line 17" of a text file, "row 17" of a table, or a path.
      reason: kind of problem, with the same words for all rows of one kind.
      detail: what is wrong with this row.
      bad: whether the row counts towards the share of bad rows at which an import stops.
    """

    row: str
    reason: str
    detail: str = ""
    bad: bool = True

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return printable(f"{self.row}: {self.reason}{detail}")


# Location of a row in its source, and its text by column (or why it cannot be used).
RawRow = tuple[str, Mapping[str, str] | DroppedRow]


def printable(text: str, limit: int = 300) -> str:
    """Returns text that is safe for a terminal: one line, control characters replaced by `?`.

    Args:
      text: any text.
      limit: maximum number of characters.

    Returns:
      At most `limit` characters.
    """
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))[:limit]


@dataclasses.dataclass(frozen=True)
class TableColumns:
    """Columns that a reader of tables knows.

    Attributes:
      names: names of all of them.
      required: those that a table must have.
    """

    names: tuple[str, ...]
    required: tuple[str, ...]

    def find(self, path: Path, present: Iterable[str], unused: list[str]) -> dict[str, str]:
        """Finds the known columns of a table and collects the names of the others.

        Args:
          path: the table, for messages.
          present: column names of the file; blanks around them do not count.
          unused: receives the other names, each with the column it may be a misspelling of.

        Returns:
          Known column -> its name in the file.

        Raises:
          TableError: a required column is missing, or a known one occurs twice.
        """
        present = list(present)
        stripped = [column.strip() for column in present]
        if missing := [column for column in self.required if column not in stripped]:
            raise self._missing(path, stripped, missing)
        repeated = [column for column in self.names if stripped.count(column) > 1]
        if repeated:
            raise TableError(
                f"{path} has column {repeated[0]!r} more than once, wanted once; remove one"
            )
        absent = [column for column in self.names if column not in stripped]
        for column in stripped:
            if column not in self.names:
                close = difflib.get_close_matches(column.lower(), absent, 1, 0.7)
                guess = f" (did you mean {close[0]}?)" if close else ""
                unused.append(printable(column, 80) + guess)
        names = dict(zip(stripped, present, strict=True))
        return {column: names[column] for column in self.names if column in names}

    def _missing(self, path: Path, present: list[str], missing: list[str]) -> TableError:
        for delimiter, plural in _OTHER_DELIMITERS.items():
            cells = {
                cell.strip(' "')
                for column in present
                if delimiter in column
                for cell in column.split(delimiter)
            }
            if set(self.required) <= cells:
                return TableError(
                    f"{path} separates columns by {plural}, wanted commas; save it with commas"
                )
        optional = [name for name in self.names if name not in self.required]
        return TableError(
            f"{path} has no column {' and '.join(missing)}; "
            f"found {', '.join(map(repr, present))[:200] or 'none'}, "
            f"wanted {', '.join(self.required)}"
            f"{' and optionally ' if optional else ''}{', '.join(optional)}; "
            "add or rename the column"
        )


def read_table(path: Path, columns: TableColumns, unused: list[str]) -> Iterator[RawRow]:
    """Returns an iterator over the rows of a table, in the order of the file.

    All values are text: `0012` stays `0012`, `NA` stays `NA`.

    Args:
      path: CSV in UTF-8 with a header and commas, Parquet, JSON (an object a line, or an array of
        objects), or one of these compressed by gzip (.csv.gz).
      columns: columns to read.
      unused: receives the names of the others, each with the column it may be a misspelling of;
        complete after the last row.

    Returns:
      Location and text by column of every row; a row that cannot be read has a DroppedRow.

    Raises:
      TableError: (on the call or while iterating) unknown suffix, unreadable, not UTF-8, a column
        missing, no rows.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return _read_gzip(path, columns, unused)
    readers: dict[str, Callable[[Path, TableColumns, list[str]], Iterator[RawRow]]] = {
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".jsonl": _read_json,
        ".json": _read_json,
    }
    reader = readers.get(suffix)
    if reader is None:
        wanted = f"wanted one of {', '.join(TABLE_SUFFIXES)}, or one of them with .gz"
        remedy = _REMEDIES.get(suffix, "convert it to one of them")
        raise TableError(f"{path} ends in {path.suffix!r}, {wanted}; {remedy}")
    if suffix != ".parquet":
        _check_text_file(path)
    return reader(path, columns, unused)


def _check_text_file(path: Path) -> None:
    with path.open("rb") as file:
        begin = file.read(4)
    for magic, (kind, remedy) in _BINARY.items():
        if begin.startswith(magic):
            raise TableError(f"{path} is {kind}, wanted text as its name says; {remedy}")


def _read_gzip(path: Path, columns: TableColumns, unused: list[str]) -> Iterator[RawRow]:
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, path.stem)
        try:
            with gzip.open(path) as packed, plain.open("wb") as file:
                shutil.copyfileobj(packed, file)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise TableError(
                f"{path} cannot be unpacked ({printable(str(error), 100)}), wanted a whole gzip "
                "file; copy it again"
            ) from None
        try:
            yield from read_table(plain, columns, unused)
        except TableError as error:  # names the file that the user knows
            raise TableError(str(error).replace(str(plain), str(path))) from None


def _read_csv(path: Path, columns: TableColumns, unused: list[str]) -> Iterator[RawRow]:
    import pyarrow as pa
    from pyarrow import csv

    _check_utf8(path)
    _check_quotes(path)
    broken: dict[int, str] = {}

    def skip(row: csv.InvalidRow) -> str:
        wanted = f"wanted {row.expected_columns}; quote fields that contain commas"
        broken[row.number - _first_row(path)] = f"{row.actual_columns} fields, {wanted}"
        return "skip"

    # Values may hold line breaks inside quotes. One thread: the parser numbers rows only then.
    parse = csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip)
    read = csv.ReadOptions(use_threads=False, skip_rows=_first_row(path))
    try:
        with csv.open_csv(path, read_options=read, parse_options=parse) as header:
            known = columns.find(path, header.schema.names, unused)
        broken.clear()
        convert = csv.ConvertOptions(
            column_types=dict.fromkeys(known.values(), pa.string()),
            include_columns=list(known.values()),
            strings_can_be_null=False,
        )
        with csv.open_csv(
            path, read_options=read, parse_options=parse, convert_options=convert
        ) as reader:
            yield from _numbered_rows(path, _renamed(reader, list(known)), broken)
    except pa.ArrowInvalid as error:
        raise arrow_error(path, error) from None
    except (UnicodeDecodeError, pa.ArrowKeyError):
        raise encoding_error(path) from None


def _numbered_rows(
    path: Path, batches: Iterable[pa.RecordBatch], broken: Mapping[int, str]
) -> Iterator[RawRow]:
    """Merges parsed rows with `broken`, the rows pyarrow skipped by number (the header is 1)."""
    rows = itertools.islice(_row_lines(path), _first_row(path), None)
    lines = enumerate(rows, start=1)
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


def _first_row(path: Path) -> int:
    """1 where the first row is Excel's `sep=,`, which says how columns are separated; else 0."""
    with path.open("rb") as file:
        begin = file.read(16).removeprefix(codecs.BOM_UTF8)
    return int(re.match(rb'"?sep=.?"?[\r\n]', begin) is not None)


def _renamed(batches: Iterable[pa.RecordBatch], names: list[str]) -> Iterator[pa.RecordBatch]:
    return (batch.rename_columns(names) for batch in batches)


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
        raise TableError(
            f"{path}: the quote that begins in line {line} is not closed where its cell "
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


def _read_parquet(path: Path, columns: TableColumns, unused: list[str]) -> Iterator[RawRow]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            known = columns.find(path, file.schema_arrow.names, unused)
            for batch in file.iter_batches(columns=list(known.values())):
                texts = [_text_column(path, name, batch.column(name)) for name in known.values()]
                for values in zip(*texts, strict=True):
                    number += 1
                    yield f"row {number}", dict(zip(known, values, strict=True))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # whichever part is damaged
        raise arrow_error(path, error) from None
    if number == 0:
        raise no_rows_error(path)


def _text_column(path: Path, name: str, column: pa.Array) -> list[str]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
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
        if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            # Above, whole numbers are not exact in the type: they keep their exponent.
            exact: float = {16: 2**11, 32: 2**24, 64: _EXACT_FLOAT}.get(kind.bit_width, math.inf)
            return [_number_text(value, exact) for value in column.to_pylist()]
        return column.cast(pa.string()).fill_null("").to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise TableError(
            f"{path}: column {name} is {printable(str(kind), 80)}, "
            "wanted text, numbers or a list of them; convert it"
        ) from None


def _number_text(value: float | decimal.Decimal | None, exact: float) -> str:
    """Returns a number as the text that it was: 4006381333931.0 as 4006381333931."""
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value) or value != int(value):
        return str(value)
    integer = int(value)
    return str(integer) if abs(integer) <= exact else f"{value:.16e}"


def _read_json(path: Path, columns: TableColumns, unused: list[str]) -> Iterator[RawRow]:
    present: dict[str, None] = {}
    broken = ""
    try:
        for location, read_value in _json_values(path):
            try:
                values = read_value()
                if not isinstance(values, dict):
                    raise RowError("not an object")
                values = {column.strip(): value for column, value in values.items()}
                present.update(dict.fromkeys(values))
                row = {name: _json_text(values[name]) for name in columns.names if name in values}
                yield location, row
            except (ValueError, RecursionError) as error:
                dropped = DroppedRow(location, "unreadable JSON", printable(str(error), 120))
                broken = broken or str(dropped)
                yield location, dropped
    except UnicodeDecodeError:
        raise encoding_error(path) from None
    if not (present or broken):
        raise no_rows_error(path)
    if not present:
        raise TableError(
            f"{path}: nothing in it can be read, such as {broken}; wanted a JSON object in every "
            "line, or an array of objects"
        )
    columns.find(path, present, unused)


def _json_values(path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields location and reader of every value: of an array, else of every line."""
    with path.open(encoding="utf-8-sig") as file:
        if (array := _json_array(file)) is not None:
            for number, value in enumerate(array, start=1):
                yield f"row {number}", partial(_itself, value)
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", partial(_parse_json, line)


def _json_array(file: TextIO) -> list[object] | None:
    """The values of a file that is one array, or an object with one of objects; None for lines."""
    first = next((line for line in file if line.strip()), "").lstrip()
    if first[:1] not in ("[", "{"):
        return None
    if first[0] == "{":
        with contextlib.suppress(ValueError, RecursionError):
            return _listed_objects(_parse_json(first))  # the first of many lines, or all
    file.seek(0)
    try:
        value = _parse_json(file.read())
    except (ValueError, RecursionError):
        return None  # then each line is read, and has its error
    return value if isinstance(value, list) else _listed_objects(value)


def _listed_objects(value: object) -> list[object] | None:
    """The rows of {"products": [{...}, {...}]}; None for other values, such as a row."""
    values = value.values() if isinstance(value, dict) else ()
    lists = [item for item in values if isinstance(item, list)]
    are_objects = len(lists) == 1 and all(isinstance(item, dict) for item in lists[0])
    return lists[0] if are_objects and lists[0] else None


def _itself(value: object) -> object:
    return value


def _parse_json(text: str) -> object:
    # Numbers keep the characters they were written with, but for whole ones with a point.
    return json.loads(text, parse_int=str, parse_float=_json_number, parse_constant=_json_constant)


def _json_number(token: str) -> str:
    value = float(token)
    return str(int(value)) if abs(value) <= _EXACT_FLOAT and value == int(value) else token


def _json_constant(token: str) -> str | None:
    return None if token == "NaN" else token


def _json_text(value: object) -> str:
    """Returns a JSON value as text: null is empty, a list of strings is joined with spaces."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    raise RowError(f"a value is {type(value).__name__}, wanted text")


def no_rows_error(path: Path) -> EmptyTableError:
    """Returns the error of a table without rows.

    Args:
      path: the table.

    Returns:
      An exception to raise.
    """
    return EmptyTableError(
        f"{path} has no rows, wanted at least one; check the export that wrote it"
    )


def encoding_error(path: Path) -> TableError:
    """Returns the error of a table that is not UTF-8, naming its first bad line.

    Args:
      path: the table.

    Returns:
      An exception to raise.
    """
    return TableError(f"{path} is not UTF-8 ({_first_bad_line(path)}); save it again as UTF-8")


def _first_bad_line(path: Path) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"line {number}"
    return "its first bytes"


def arrow_error(path: Path, error: Exception) -> TableError:
    """Returns pyarrow's error as one line that names the file.

    Args:
      path: the table.
      error: what pyarrow raised.

    Returns:
      An exception to raise.
    """
    text = printable(str(error), 200)
    if "UTF8" in text or "UTF-8" in text:
        return encoding_error(path)
    return TableError(f"{path} cannot be read ({text}); check that it is a {path.suffix[1:]} file")
