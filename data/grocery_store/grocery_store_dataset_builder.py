"""Builds a catalogue from the Grocery Store Dataset (Klasson et al., WACV 2019)."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping

from sicot_jax.catalog.importing.builder import CatalogBuilder
from sicot_jax.catalog.importing.manifest_rows import (
    DroppedRow,
    ManifestError,
    ManifestRow,
    RawRow,
    check_rows,
)
from sicot_jax.catalog.importing.photos import FolderPhotos, PhotoReader, ZipPhotos

_SPLIT_FILES = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}
_CLASS = "Class Name (str)"
_CLASS_ID = "Class ID (int)"
_COARSE = "Coarse Class Name (str)"
_DESCRIPTION = "Product Description Path (str)"


class Builder(CatalogBuilder, skip_registration=True):
    """Reads `dataset/`, which the source folder holds or is, or its only zip file."""

    name = "grocery_store"

    def rows(self) -> Iterable[ManifestRow | DroppedRow]:
        """Returns the rows of the three official splits."""
        reader = self.photos()
        try:
            return list(check_rows(_photos(reader, _classes(reader))))
        except (OSError, KeyError, UnicodeDecodeError) as error:
            text = " ".join(str(error).split())
            raise ManifestError(
                f"{self.source} is not the Grocery Store Dataset in its owner's layout ({text})"
            ) from None
        finally:
            if isinstance(reader, ZipPhotos):
                reader.close()

    def photos(self) -> PhotoReader:
        """Returns a reader of the folder or zip file of photos."""
        for root in (self.source, self.source.parent):
            if (root / "dataset" / "classes.csv").is_file():
                return FolderPhotos(root)
        archives = sorted(self.source.glob("*.zip"))
        if len(archives) == 1 and zipfile.is_zipfile(archives[0]):
            return ZipPhotos(archives[0])
        raise ManifestError(
            f"no dataset/classes.csv in {self.source} and {len(archives)} zip files, "
            "wanted one or the other; place the data set there, see data/grocery_store"
        )


def _classes(reader: PhotoReader) -> dict[str, dict[str, str]]:
    """Returns class id -> SKU, title and category."""
    classes = {}
    for row in csv.DictReader(io.StringIO(_text(reader, "classes.csv"))):
        name, coarse = row[_CLASS], row[_COARSE]
        description = " ".join(_text(reader, row[_DESCRIPTION].strip().lstrip("/")).split())
        title = ". ".join((f"{name} {coarse}".replace("-", " "), _first_sentence(description)))
        classes[row[_CLASS_ID].strip()] = {"sku": name, "title": title, "category": coarse}
    return classes


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]


def _photos(reader: PhotoReader, classes: Mapping[str, Mapping[str, str]]) -> Iterator[RawRow]:
    for split, name in _SPLIT_FILES.items():
        for number, line in enumerate(_text(reader, name).splitlines(), start=1):
            image, class_id = [part.strip() for part in line.split(",")][:2]
            if class_id not in classes:
                yield image, DroppedRow(f"{name} line {number}", "unknown class id", class_id)
                continue
            yield (
                image,
                {"image": f"dataset/{image}", **classes[class_id], "role": "query", "split": split},
            )


def _text(reader: PhotoReader, name: str) -> str:
    return reader.read(f"dataset/{name}").decode("utf-8-sig")
