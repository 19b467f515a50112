"""Builds a catalogue from Fashion Product Images; a class is a brand and an article type."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from sicot_jax.catalog.importing.builder import CatalogBuilder
from sicot_jax.catalog.importing.manifest_rows import (
    DroppedRow,
    ManifestError,
    ManifestRow,
    RawRow,
    check_rows,
)
from sicot_jax.catalog.importing.photos import FolderPhotos, PhotoReader, ZipPhotos

_BRAND = re.compile(r"(.+?) (Men|Women|Unisex|Boys|Girls|Kids)\b")
_REQUIRED_COLUMNS = ("id", "articleType", "productDisplayName")
_TABLES = ("styles.csv", "fashion-dataset/styles.csv", "myntradataset/styles.csv")


def brand_of(title: str) -> str:
    """Returns the words of a title before the first "Men", "Women", ...

    Args:
      title: such as "Puma Men Sports Socks".

    Returns:
      The brand, such as "Puma"; empty where there is none.
    """
    match = _BRAND.match(title)
    return match[1].strip() if match else ""


def parse_styles(path: Path) -> Iterator[dict[str, str] | DroppedRow]:
    """Yields the rows of `styles.csv`.

    The public file has titles with bare commas: surplus fields rejoin the title, where it is the
    last column.

    Args:
      path: the file.

    Yields:
      Text by column name, or why a row cannot be used.

    Raises:
      ManifestError: a column is missing.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        missing = [column for column in _REQUIRED_COLUMNS if column not in header]
        if missing:
            raise ManifestError(
                f"{path} has no column {', '.join(missing)}; found {', '.join(header)[:200]}"
            )
        # Only the last column holds free text, so that is where a bare comma comes from.
        repairable = header[-1] == "productDisplayName"
        for fields in reader:
            if len(fields) > len(header) and repairable:
                fields = [*fields[: len(header) - 1], ",".join(fields[len(header) - 1 :])]
            if len(fields) != len(header):
                detail = f"{len(fields)} fields, wanted {len(header)}"
                yield DroppedRow(f"line {reader.line_num}", "wrong number of fields", detail)
                continue
            yield dict(zip(header, fields, strict=True))


class Builder(CatalogBuilder, skip_registration=True):
    """Reads `styles.csv` and `images.zip` or `images/` as the owner publishes them."""

    name = "fashion_products"
    MIN_PHOTOS = 10

    def rows(self) -> Iterable[ManifestRow | DroppedRow]:
        """Yields the rows of `styles.csv`."""
        table = next(
            (self.source / name for name in _TABLES if (self.source / name).is_file()), None
        )
        if table is None:
            raise ManifestError(
                f"no styles.csv in {self.source}; place the data set there, "
                "see data/fashion_products"
            )
        try:
            yield from check_rows(map(_row, parse_styles(table)))
        except UnicodeDecodeError:
            raise ManifestError(
                f"{table} is not UTF-8; take the file as its owner publishes it"
            ) from None

    def photos(self) -> PhotoReader:
        """Returns a reader of the folder or zip file of photos."""
        for name in _TABLES:
            folder = (self.source / name).parent
            if (folder / "images").is_dir():
                return FolderPhotos(folder)
            if (folder / "images.zip").is_file():
                return ZipPhotos(folder / "images.zip")
        raise ManifestError(f"no images/ or images.zip in {self.source}; place the data set there")


def _row(row: dict[str, str] | DroppedRow) -> RawRow:
    if isinstance(row, DroppedRow):
        return row.row, row
    image = f"images/{row['id']}.jpg"
    title, article = row["productDisplayName"], row["articleType"]
    brand = brand_of(title)
    if not brand:
        return image, DroppedRow(image, "no brand in the title", title[:80], bad=False)
    # Tags stay empty: colour and usage were typed in by an annotator who saw the photo, no seller's
    # title has them.
    return image, {
        "image": image,
        "sku": f"{brand} | {article}",
        "title": title,
        "category": article,
    }
