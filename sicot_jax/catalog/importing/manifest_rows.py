"""Checks rows of an import source: text values, SKUs, boxes and duplicates."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping

from sicot_jax.catalog.catalog import SPLITS
from sicot_jax.common.sku import SkuError, SkuReader, normalize_category
from sicot_jax.common.table_files import DroppedRow, RawRow, RowError, TableColumns
from sicot_jax.common.text import pluralize
from sicot_jax.errors import InputError

MANIFEST_COLUMNS = TableColumns(
    ("image", "sku", "title", "tags", "category", "box", "role", "split"), ("image", "sku")
)
ROLES = ("catalogue", "query")
MAX_TEXT_LENGTH = 20_000
NO_BOX = (0.0, 0.0, 0.0, 0.0)


class ManifestError(InputError):
    """An import source that cannot be read at all; the message is one line."""


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


@dataclasses.dataclass
class SourceNotes:
    """What the reader of an import source has to say besides its rows; complete after the last.

    Attributes:
      unused_columns: columns that are not read, each with the column it may be a misspelling of.
      skus: makes the keys, and knows the doubtful ones.
      markup: rows with HTML in a text, which was turned into text.
      markup_example: one of these texts.
      folders: warnings of photos of a folder that may be lost, or under a wrong SKU.
    """

    unused_columns: list[str] = dataclasses.field(default_factory=list)
    skus: SkuReader = dataclasses.field(default_factory=SkuReader)
    markup: int = 0
    markup_example: str = ""
    folders: list[str] = dataclasses.field(default_factory=list)

    def remarks(self) -> list[str]:
        """Returns a line for each kind of thing that was left out or changed, and is no error."""
        lines = []
        if self.unused_columns:
            lines.append(f"unused columns: {', '.join(self.unused_columns)}")
        if self.markup:
            lines.append(
                f"HTML turned into text: {pluralize(self.markup, 'row')}, such as "
                f"{self.markup_example!r:.80}"
            )
        return lines

    def warnings(self) -> list[str]:
        """Returns a line for each kind of doubtful SKUs and of photos that may be lost."""
        return [*self.skus.warnings(), *self.folders]


def check_rows(
    rows: Iterable[RawRow], notes: SourceNotes | None = None
) -> Iterator[ManifestRow | DroppedRow]:
    """Yields checked rows; unusable rows and repeated (image, SKU) pairs are dropped.

    Args:
      rows: location and column values of every row.
      notes: receives doubtful SKUs.

    Yields:
      One ManifestRow or DroppedRow per row, in the same order.
    """
    seen: set[tuple[str, str]] = set()
    skus = SkuReader() if notes is None else notes.skus
    for location, values in rows:
        if isinstance(values, DroppedRow):
            yield values
            continue
        try:
            row = parse_row(values, skus)
        except (RowError, SkuError) as error:
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


def parse_row(values: Mapping[str, str], skus: SkuReader) -> ManifestRow:
    """Returns the checked row of one photo.

    Args:
      values: text by column name; columns may be missing.
      skus: makes the key of its SKU.

    Returns:
      The row.

    Raises:
      RowError: a value that cannot be used; the message is `reason: detail`.
      SkuError: a SKU that cannot be used; the message is `reason: detail`.
    """
    _check_text(values)
    image, sku = values.get("image", "").strip(), skus.key(values.get("sku", ""))
    if not sku:
        raise RowError(f"empty SKU: image {image!r}")
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
        category=normalize_category(values.get("category", "")),
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
