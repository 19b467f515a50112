"""Builds a catalogue from 1,000 of the 5,000 classes of WebVision 2.0: web photos with titles."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
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
from sicot_jax.catalog.importing.splits import order_key

CLASS_SEED = 0
_SOURCES = ("google", "flickr")
_VAL_PHOTOS = "val_images_resized"


def choose_classes(synsets: Iterable[str], count: int) -> set[str]:
    """Returns the first synsets by hash of (CLASS_SEED, synset).

    Args:
      synsets: WordNet ids, in any order.
      count: how many to choose.

    Returns:
      `count` synsets; they do not depend on the seed of the import.
    """
    return set(
        sorted(set(synsets), key=lambda synset: order_key(CLASS_SEED, synset, "class"))[:count]
    )


class Builder(CatalogBuilder, skip_registration=True):
    """Reads the folder into which the owners' archives are unpacked."""

    name = "webvision1k"
    OFFICIAL_TEST = True
    NUM_CLASSES = 5000
    NUM_CHOSEN = 1000

    def rows(self) -> Iterable[ManifestRow | DroppedRow]:
        """Yields the rows of the training lists and of the official validation list."""
        path = self.require("info/synsets.txt")
        synsets = [[*line.split(maxsplit=1), ""][:2] for line in _lines(path) if line]
        if len(synsets) < self.NUM_CLASSES:
            raise ManifestError(
                f"{path} names {len(synsets)} classes, wanted {self.NUM_CLASSES}; "
                "place WebVision 2.0 there, not 1.0"
            )
        chosen = choose_classes((synset for synset, _ in synsets), self.NUM_CHOSEN)
        # A label is a line of synsets.txt, the first being 0; None where the class is not chosen.
        classes = {
            str(label): {"sku": synset, "category": names} if synset in chosen else None
            for label, (synset, names) in enumerate(synsets)
        }
        yield from check_rows(self._photos(classes))

    def photos(self) -> PhotoReader:
        """Returns a reader of the source folder."""
        self.require(_VAL_PHOTOS)
        return FolderPhotos(self.source)

    def _photos(self, classes: Mapping[str, Mapping[str, str] | None]) -> Iterator[RawRow]:
        for source in _SOURCES:
            files = self.require(f"info/train_filelist_{source}.txt")
            texts = self.require(f"info/train_meta_list_{source}.txt")
            for number, (line, text) in enumerate(
                zip_longest(_lines(files), _lines(texts)), start=1
            ):
                if line is None or text is None:
                    raise ManifestError(
                        f"{files} and {texts.name} differ in length, "
                        "wanted one line a photo in both; copy them again"
                    )
                yield from _photo(
                    f"{files.name} line {number}",
                    line,
                    classes,
                    functools.partial(_read_texts, self.source, text),
                )
        files = self.require("val_filelist.txt", "info/val_filelist.txt")
        for number, line in enumerate(_lines(files), start=1):
            location = f"{files.name} line {number}"
            yield from _photo(
                location, f"{_VAL_PHOTOS}/{line}", classes, functools.partial(dict, split="test")
            )


def _photo(
    location: str,
    line: str,
    classes: Mapping[str, Mapping[str, str] | None],
    read_metadata: Callable[[], dict[str, str]],
) -> Iterator[RawRow]:
    """Yields the row of a line `PATH LABEL`, or none where the class is not chosen."""
    image, _, label = line.rpartition(" ")
    if label not in classes:
        yield location, DroppedRow(location, "unknown class", label[:80])
    elif (values := classes[label]) is not None:
        try:
            yield location, {"image": image, **values, **read_metadata()}
        except (
            OSError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            detail = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
            yield location, DroppedRow(location, "no metadata", detail)


def _read_texts(folder: Path, line: str) -> dict[str, str]:
    """Returns title and tags of the photo whose metadata is entry `FILE NUMBER`."""
    file, _, number = line.rpartition(" ")
    entry = _metadata(folder / file)[number]
    title, tags = entry.get("title"), entry.get("tags")
    return {
        "title": title if isinstance(title, str) else "",
        "tags": " ".join(map(str, tags)) if isinstance(tags, list) else "",
    }


@functools.lru_cache(maxsize=4)  # the photos of a file follow one another
def _metadata(file: Path) -> dict[str, Any]:
    return {
        str(number): entry for number, entry in enumerate(json.loads(file.read_bytes()), start=1)
    }


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        try:
            yield from map(str.strip, file)
        except UnicodeDecodeError:
            raise ManifestError(
                f"{path} is not UTF-8; take the file as its owners publish it"
            ) from None
