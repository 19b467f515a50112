"""Builds a catalogue from iMaterialist Product 2019: 2,019 numbered product classes.

The official validation set is the test split.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sicot_jax.catalog.importing.builder import CatalogBuilder
from sicot_jax.catalog.importing.manifest_rows import (
    DroppedRow,
    ManifestError,
    ManifestRow,
    RawRow,
    check_rows,
)
from sicot_jax.catalog.importing.photos import FolderPhotos, PhotoReader

# Folder of photos (and name of its list) -> split; the import divides "train".
_PARTS = {"train": "", "val": "test"}


class Builder(CatalogBuilder, skip_registration=True):
    """Reads `train.json`, `val.json` and the photos downloaded into `train/` and `val/`."""

    name = "imaterialist"
    OFFICIAL_TEST = True

    def rows(self) -> Iterable[ManifestRow | DroppedRow]:
        """Yields the rows of both lists."""
        yield from check_rows(
            row
            for part, split in _PARTS.items()
            for row in _photos(part, split, _images(self.require(f"{part}.json")))
        )

    def photos(self) -> PhotoReader:
        """Returns a reader of the source folder."""
        for part in _PARTS:
            self.require(part)
        return FolderPhotos(self.source)


def _images(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ManifestError(
            f"{path} is no JSON ({' '.join(str(error).split())[:120]}); "
            "take the file as its owner publishes it"
        ) from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise ManifestError(
            f"{path} has no list 'images', wanted one; take the file as its owner publishes it"
        )
    return images


def _photos(part: str, split: str, images: Iterable[Any]) -> Iterator[RawRow]:
    for number, image in enumerate(images, start=1):
        location = f"{part}.json image {number}"
        entry = image if isinstance(image, dict) else {}
        name, label = entry.get("id"), entry.get("class")
        if not isinstance(name, str) or not name or Path(name).name != name:
            yield location, DroppedRow(location, "id is no file name", repr(name)[:80])
        elif type(label) is not int:  # True is an int too
            yield location, DroppedRow(location, "class is no number", repr(label)[:80])
        else:
            yield location, {"image": f"{part}/{name}", "sku": str(label), "split": split}
