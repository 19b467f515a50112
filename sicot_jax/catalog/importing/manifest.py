"""What a catalogue is imported from: a manifest (CSV, Parquet, JSONL) or one folder per SKU."""

from __future__ import annotations

import codecs
import dataclasses
import difflib
import json
import math
import mmap
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sicot_jax.catalog.catalog import SPLITS
from sicot_jax.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("image", "sku", "title", "tags", "category", "box", "role", "split")
REQUIRED = ("image", "sku")
ROLES = ("catalogue", "query")
SUFFIXES = (".csv", ".parquet", ".jsonl")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_SKU_LENGTH = 256
MAX_TEXT_LENGTH = 20_000
NO_BOX = (0.0, 0.0, 0.0, 0.0)
_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}

# A line break in a SKU would shift a one-name-a-line table, a lone surrogate cannot be written as
# UTF-8, and an invisible character (zero-width space, byte order mark, bidi override) would make a
# second class that looks the same.
_REFUSED_CATEGORIES = ("Cc", "Zl", "Zp", "Cs", "Cf")

# A quoted CSV cell as pyarrow reads it: up to the next single quote, or to the end; what follows
# should be nothing.
_QUOTED_CELL = re.compile(
    rb'(?:\A(?:\xef\xbb\xbf)?|[,\r\n])(?P<cell>"[^"]*+(?:""[^"]*+)*+)(?P<end>"?)(?P<after>[^,\r\n]*)'
)
# One physical row and its line end, read by the same rule.
_CELL = rb'(?:"[^"]*+(?:""[^"]*+)*+"?)?+[^,\r\n]*+'
_CSV_ROW = re.compile(rb"(?P<cells>%b(?:,%b)*+)(?:\r\n|\n|\r|\Z)" % (_CELL, _CELL))


class ManifestError(InputError):
    """The source as a whole cannot be read; the message is one line."""


class RowError(ValueError):
    """One row cannot be used."""


@dataclasses.dataclass(frozen=True, slots=True)
class ManifestRow:
    """One photo of one SKU. `image` is as written in the source; `box` fractions of the upright
    photo, or all zero.
    """

    image: str
    sku: str
    title: str = ""
    tags: str = ""
    category: str = ""
    box: tuple[float, float, float, float] = NO_BOX
    role: str = "catalogue"
    split: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class DroppedRow:
    """A row that is not imported. `bad` rows count towards the limit at which an import stops."""

    row: str  # where: "line 17" of a file, "row 17" of a table without lines, or a path
    reason: str  # the kind, the same words for all rows of one kind
    detail: str = ""
    bad: bool = True

    def __str__(self) -> str:
        return printable(
            f"{self.row}: {self.reason}" + (f" ({self.detail})" if self.detail else "")
        )


def printable(text: str, limit: int = 300) -> str:
    """`text` on one line of at most `limit` characters, safe for a terminal: control characters
    become `?`.
    """
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))[:limit]


def read_manifest(
    path: Path, unused: list[str] | None = None
) -> Iterator[ManifestRow | DroppedRow]:
    """Rows of a manifest file; all values are text (SKU `0012` stays `0012`, `NA` stays `NA`).

    `unused` receives the names of other columns, each with the one it may be a misspelling of;
    whole after the last row. Raises ManifestError (on the call or while iterating): no such file,
    unknown suffix, unreadable, not UTF-8, a column missing, no rows. A row that cannot be used
    comes as a DroppedRow.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(
            f"manifest {path} not found; wanted a file or a folder with one folder per SKU"
        )
    readers: dict[
        str, Callable[[Path, list[str]], Iterator[tuple[str, Mapping[str, str] | DroppedRow]]]
    ] = {
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".jsonl": _read_jsonl,
    }
    if path.suffix.lower() not in readers:
        raise ManifestError(
            f"manifest {path} ends in {path.suffix!r}, wanted one of {', '.join(SUFFIXES)}; rename it"
        )
    return check_rows(readers[path.suffix.lower()](path, [] if unused is None else unused))


def read_folders(root: Path) -> Iterator[ManifestRow | DroppedRow]:
    """Rows of a folder with one folder per SKU: folder name = SKU, title empty, `image` relative to
    `root`.

    Photos may lie deeper inside a SKU's folder; hidden files are passed over, other files are named
    as dropped. Raises ManifestError where `root` holds no folder.
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
    return check_rows(_walk(root, folders))


def _walk(
    root: Path, folders: Iterable[Path]
) -> Iterator[tuple[str, Mapping[str, str] | DroppedRow]]:
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


def check_rows(
    rows: Iterable[tuple[str, Mapping[str, str] | DroppedRow]],
) -> Iterator[ManifestRow | DroppedRow]:
    """(where, column -> text) to checked rows; a bad row and a second row of the same image and SKU
    are dropped.
    """
    seen: set[tuple[str, str]] = set()
    for where, values in rows:
        if isinstance(values, DroppedRow):
            yield values
            continue
        try:
            row = parse_row(values)
        except RowError as error:
            reason, _, detail = str(error).partition(": ")
            yield DroppedRow(where, reason, detail)
            continue
        key = (os.path.normpath(row.image), row.sku)
        if key in seen:
            yield DroppedRow(
                where, "duplicate row", f"image {row.image!r} of SKU {row.sku!r} came before"
            )
            continue
        seen.add(key)
        yield row


def parse_row(values: Mapping[str, str]) -> ManifestRow:
    """Check one row. Raises RowError whose text is `reason: detail`."""
    for column, value in values.items():
        if len(value) > MAX_TEXT_LENGTH:
            raise RowError(
                f"text too long: column {column}, {len(value)} characters, at most {MAX_TEXT_LENGTH}"
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowError(f"text is not valid Unicode: column {column}, {value!a:.80}") from None
    raw_sku = unicodedata.normalize(
        "NFC", values.get("sku", "")
    )  # an accent in one character or in two: the same SKU
    if any(unicodedata.category(char) in _REFUSED_CATEGORIES for char in raw_sku):
        raise RowError(f"SKU with a line break, tab or invisible character: {raw_sku!a:.80}")
    image, sku = values.get("image", "").strip(), raw_sku.strip()
    if not sku:
        raise RowError(f"empty SKU: image {image!r}")
    if len(sku) > MAX_SKU_LENGTH:
        raise RowError(f"SKU too long: {len(sku)} characters, at most {MAX_SKU_LENGTH}")
    if not image or "\0" in image:
        raise RowError(f"no image path: SKU {sku!r}")
    role = values.get("role", "").strip() or "catalogue"
    if role not in ROLES:
        raise RowError(f"unknown role: {role!r}, wanted {' or '.join(ROLES)}")
    split = values.get("split", "").strip()
    if split and split not in SPLITS:
        raise RowError(f"unknown split: {split!r}, wanted {', '.join(SPLITS)} or empty")
    return ManifestRow(
        image=image,
        sku=sku,
        title=values.get("title", ""),
        tags=values.get("tags", ""),
        category=values.get("category", ""),
        box=_parse_box(values.get("box", "")),
        role=role,
        split=split,
    )


def _parse_box(text: str) -> tuple[float, float, float, float]:
    parts = text.replace(",", " ").split()
    if not parts:
        return NO_BOX
    wanted = "wanted 'x_min y_min x_max y_max' as fractions, 0 <= min < max <= 1"
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        raise RowError(f"bad box: {text!r:.80}, {wanted}") from None
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise RowError(f"bad box: {text!r:.80}, {wanted}")
    x_min, y_min, x_max, y_max = numbers
    if not (0 <= x_min < x_max <= 1 and 0 <= y_min < y_max <= 1):
        raise RowError(f"bad box: {text!r:.80}, {wanted}")
    return x_min, y_min, x_max, y_max


def _check_columns(path: Path, columns: Iterable[str], unused: list[str]) -> list[str]:
    found = list(columns)
    missing = [column for column in REQUIRED if column not in found]
    if missing:
        for delimiter, plural in _OTHER_DELIMITERS.items():
            if set(REQUIRED) <= {
                cell.strip(' "') for column in found for cell in column.split(delimiter)
            }:
                raise ManifestError(
                    f"manifest {path} separates columns by {plural}, wanted commas; save it with commas"
                )
        raise ManifestError(
            f"manifest {path} has no column {' and '.join(missing)}; found {', '.join(map(repr, found))[:200]}, "
            f"wanted {', '.join(REQUIRED)} and optionally {', '.join(COLUMNS[2:])}; add or rename the column"
        )
    repeated = [column for column in COLUMNS if found.count(column) > 1]
    if repeated:
        raise ManifestError(
            f"manifest {path} has column {repeated[0]!r} more than once, wanted once; remove one"
        )
    for column in found:
        if column not in COLUMNS:
            close = difflib.get_close_matches(
                column.strip().lower(), [c for c in COLUMNS if c not in found], 1, 0.7
            )
            unused.append(printable(column, 80) + (f" (did you mean {close[0]}?)" if close else ""))
    return [column for column in COLUMNS if column in found]


def _first_bad_line(path: Path) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"line {number}"
    return "its first bytes"


def _check_utf8(path: Path) -> None:
    """pyarrow's handler of invalid rows prints a traceback on bytes that are no text: refuse them
    before.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise _encoding_error(path) from None


def _check_quotes(path: Path) -> None:
    """Refuse an unclosed quote, which would swallow the rows after it into one cell.

    Such a cell holds line breaks and is never closed, or is closed by the opening quote of a later
    cell, with text after it; where that text starts with a comma, an odd number of quotes tells.
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
            f"manifest {path}: the quote that begins in line {line} is not closed where its cell ends; "
            f'close it, or write " inside a quoted cell as ""'
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


def _encoding_error(path: Path) -> ManifestError:
    return ManifestError(
        f"manifest {path} is not UTF-8 ({_first_bad_line(path)}); save it again as UTF-8"
    )


def _csv_lines(path: Path) -> Iterator[int]:
    """The line in which each row begins, the header's first; empty lines are no rows."""
    line = 1
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = len(codecs.BOM_UTF8) if data[:3] == codecs.BOM_UTF8 else 0
        for match in _CSV_ROW.finditer(data, start):
            if match["cells"]:
                yield line
            line += len(match[0].splitlines())


def _read_csv(
    path: Path, unused: list[str]
) -> Iterator[tuple[str, Mapping[str, str] | DroppedRow]]:
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
            known = _check_columns(path, header.schema.names, unused)
        broken.clear()
        convert = csv.ConvertOptions(
            column_types=dict.fromkeys(known, pa.string()),
            include_columns=known,
            strings_can_be_null=False,
        )
        with csv.open_csv(
            path, read_options=read, parse_options=parse, convert_options=convert
        ) as reader:
            yield from _csv_rows(path, reader, broken)
    except pa.ArrowInvalid as error:
        raise _arrow_error(path, error) from None
    except (UnicodeDecodeError, pa.ArrowKeyError):
        raise _encoding_error(path) from None


def _arrow_error(path: Path, error: Exception) -> ManifestError:
    text = printable(str(error), 200)
    if "UTF8" in text or "UTF-8" in text:
        return _encoding_error(path)
    return ManifestError(
        f"manifest {path} cannot be read ({text}); check that it is a {path.suffix[1:]} file"
    )


def _csv_rows(
    path: Path, batches: Iterable[pa.RecordBatch], broken: Mapping[int, str]
) -> Iterator[tuple[str, Mapping[str, str] | DroppedRow]]:
    """Rows in the order of the file: those the parser skipped, `broken` by number (the header is
    1), in their places.
    """
    lines = enumerate(_csv_lines(path), start=1)
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
        raise _no_rows(path)


def _wrong_fields(line: int, detail: str) -> tuple[str, DroppedRow]:
    return f"line {line}", DroppedRow(f"line {line}", "wrong number of fields", detail)


def _no_rows(path: Path) -> ManifestError:
    return ManifestError(
        f"manifest {path} has no rows, wanted at least one photo; check the export that wrote it"
    )


def _read_parquet(
    path: Path, unused: list[str]
) -> Iterator[tuple[str, Mapping[str, str] | DroppedRow]]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            known = _check_columns(path, file.schema_arrow.names, unused)
            for batch in file.iter_batches(columns=known):
                columns = [_text_column(path, column, batch.column(column)) for column in known]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield f"row {number}", dict(zip(known, values, strict=True))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise _arrow_error(path, error) from None
    if number == 0:
        raise _no_rows(path)


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
            f"manifest {path}: column {name} is {printable(str(kind), 80)}, wanted text, numbers or a list of them; convert it"
        ) from None


def _read_jsonl(
    path: Path, unused: list[str]
) -> Iterator[tuple[str, Mapping[str, str] | DroppedRow]]:
    found: set[str] = set()
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    # Numbers keep the characters they were written with.
                    values = json.loads(line, parse_int=str, parse_float=str)
                    if not isinstance(values, dict):
                        raise RowError("not an object")
                    found.update(values)
                    row = {column: _text(values[column]) for column in COLUMNS if column in values}
                except (ValueError, RecursionError) as error:
                    yield (
                        f"line {number}",
                        DroppedRow(f"line {number}", "unreadable JSON line", str(error)[:120]),
                    )
                    continue
                yield f"line {number}", row
    except UnicodeDecodeError:
        raise _encoding_error(path) from None
    if number == 0:
        raise _no_rows(path)
    _check_columns(path, sorted(found), unused)


def _text(value: object) -> str:
    """A JSON value as text: null is empty, a list of tags or box numbers is joined with spaces."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    raise RowError(f"a value is {type(value).__name__}, wanted text")
