"""Checks rows of an import source: columns, text values, SKUs, boxes and duplicates."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sicot_jax.catalog.catalog import SPLITS
from sicot_jax.errors import InputError

COLUMNS = ("image", "sku", "title", "tags", "category", "box", "role", "split")
REQUIRED_COLUMNS = ("image", "sku")
ROLES = ("catalogue", "query")
MAX_SKU_LENGTH = 256
MAX_TEXT_LENGTH = 20_000
NO_BOX = (0.0, 0.0, 0.0, 0.0)
_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}

# A line break in a SKU would shift a one-name-a-line table, a lone surrogate cannot be written as
# UTF-8, and an invisible character (zero-width space, byte order mark, bidi override) would make a
# second class that looks the same.
_REFUSED_CATEGORIES = ("Cc", "Zl", "Zp", "Cs", "Cf")


class ManifestError(InputError):
    """An import source that cannot be read at all; the message is one line."""


class RowError(ValueError):
    """A single row that cannot be used; the message is `reason: detail`."""


@dataclasses.dataclass(frozen=True, slots=True)
class ManifestRow:
    """One photo of one SKU.

    Attributes:
      image: path of the photo, as written in the source.
      sku: product number; SKUs become classes.
      title: product title, may be empty.
      tags: further words, may be empty.
      category: product category, may be empty.
      box: (x_min, y_min, x_max, y_max) as fractions of the upright photo; all zero if unknown.
      role: "catalogue" or "query".
      split: one of SPLITS, or empty to let the import choose.
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
    """A row that is not imported.

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


def check_rows(rows: Iterable[RawRow]) -> Iterator[ManifestRow | DroppedRow]:
    """Yields checked rows; unusable rows and repeated (image, SKU) pairs are dropped.

    Args:
      rows: location and column values of every row.

    Yields:
      One ManifestRow or DroppedRow per row, in the same order.
    """
    seen: set[tuple[str, str]] = set()
    for location, values in rows:
        if isinstance(values, DroppedRow):
            yield values
            continue
        try:
            row = parse_row(values)
        except RowError as error:
            reason, _, detail = str(error).partition(": ")
            yield DroppedRow(location, reason, detail)
            continue
        key = (os.path.normpath(row.image), row.sku)
        if key in seen:
            detail = f"image {row.image!r} of SKU {row.sku!r} came before"
            yield DroppedRow(location, "duplicate row", detail)
            continue
        seen.add(key)
        yield row


def parse_row(values: Mapping[str, str]) -> ManifestRow:
    """Returns the checked row of one photo.

    Args:
      values: text by column name; columns may be missing.

    Returns:
      The row, with its SKU in Unicode form NFC.

    Raises:
      RowError: a value that cannot be used; the message is `reason: detail`.
    """
    _check_text(values)
    image, sku = values.get("image", "").strip(), _parse_sku(values)
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


def _check_text(values: Mapping[str, str]) -> None:
    for column, value in values.items():
        if len(value) > MAX_TEXT_LENGTH:
            size = f"{len(value)} characters, at most {MAX_TEXT_LENGTH}"
            raise RowError(f"text too long: column {column}, {size}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowError(f"text is not valid Unicode: column {column}, {value!a:.80}") from None


def _parse_sku(values: Mapping[str, str]) -> str:
    # An accent in one character or in two: the same SKU.
    raw = unicodedata.normalize("NFC", values.get("sku", ""))
    if any(unicodedata.category(char) in _REFUSED_CATEGORIES for char in raw):
        raise RowError(f"SKU with a line break, tab or invisible character: {raw!a:.80}")
    sku = raw.strip()
    if not sku:
        raise RowError(f"empty SKU: image {values.get('image', '').strip()!r}")
    if len(sku) > MAX_SKU_LENGTH:
        raise RowError(f"SKU too long: {len(sku)} characters, at most {MAX_SKU_LENGTH}")
    return sku


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


def check_columns(path: Path, columns: Iterable[str], unused: list[str]) -> list[str]:
    """Returns the known columns of a manifest and collects the names of the others.

    Args:
      path: manifest file, for messages.
      columns: column names of the file.
      unused: receives the other names, each with the column it may be a misspelling of.

    Returns:
      Names from COLUMNS that the file has.

    Raises:
      ManifestError: a required column is missing, or a known one occurs twice.
    """
    present = list(columns)
    missing = [column for column in REQUIRED_COLUMNS if column not in present]
    if missing:
        raise _missing_columns(path, present, missing)
    repeated = [column for column in COLUMNS if present.count(column) > 1]
    if repeated:
        raise ManifestError(
            f"manifest {path} has column {repeated[0]!r} more than once, wanted once; remove one"
        )
    absent = [column for column in COLUMNS if column not in present]
    for column in present:
        if column not in COLUMNS:
            close = difflib.get_close_matches(column.strip().lower(), absent, 1, 0.7)
            unused.append(printable(column, 80) + (f" (did you mean {close[0]}?)" if close else ""))
    return [column for column in COLUMNS if column in present]


def _missing_columns(path: Path, present: list[str], missing: list[str]) -> ManifestError:
    for delimiter, plural in _OTHER_DELIMITERS.items():
        cells = {cell.strip(' "') for column in present for cell in column.split(delimiter)}
        if set(REQUIRED_COLUMNS) <= cells:
            return ManifestError(
                f"manifest {path} separates columns by {plural}, wanted commas; save it with commas"
            )
    return ManifestError(
        f"manifest {path} has no column {' and '.join(missing)}; "
        f"found {', '.join(map(repr, present))[:200]}, "
        f"wanted {', '.join(REQUIRED_COLUMNS)} and optionally {', '.join(COLUMNS[2:])}; "
        "add or rename the column"
    )


def no_rows_error(path: Path) -> ManifestError:
    """Returns the error of a manifest without rows.

    Args:
      path: manifest file.

    Returns:
      An exception to raise.
    """
    return ManifestError(
        f"manifest {path} has no rows, wanted at least one photo; check the export that wrote it"
    )


def encoding_error(path: Path) -> ManifestError:
    """Returns the error of a manifest that is not UTF-8, naming its first bad line.

    Args:
      path: manifest file.

    Returns:
      An exception to raise.
    """
    return ManifestError(
        f"manifest {path} is not UTF-8 ({_first_bad_line(path)}); save it again as UTF-8"
    )


def _first_bad_line(path: Path) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"line {number}"
    return "its first bytes"


def arrow_error(path: Path, error: Exception) -> ManifestError:
    """Returns pyarrow's error as one line that names the file.

    Args:
      path: manifest file.
      error: what pyarrow raised.

    Returns:
      An exception to raise.
    """
    text = printable(str(error), 200)
    if "UTF8" in text or "UTF-8" in text:
        return encoding_error(path)
    return ManifestError(
        f"manifest {path} cannot be read ({text}); check that it is a {path.suffix[1:]} file"
    )
