"""Wraps a catalogue so that all photos are decoded and have one size."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np

from sicot_jax.catalog.catalog import Catalog, Record, Split
from sicot_jax.config.preprocessing import Preprocessing


def resize_catalog(catalog: Catalog, preprocessing: Preprocessing) -> Catalog:
    """Returns the catalogue with decoded photos of one size, ready for `write_array_file`.

    Other photos are other data: the data hash is computed of the catalogue's and of how the photos
    are resized.

    Args:
      catalog: photos of any size, encoded or decoded.
      preprocessing: its resize_height, resize_width and fit are used.

    Returns:
      A catalogue whose records are resized when they are read; boxes follow their photos.
    """
    fields = {
        name: getattr(preprocessing, name) for name in ("resize_height", "resize_width", "fit")
    }
    return dataclasses.replace(
        catalog,
        data_hash=hashlib.sha256(json.dumps([catalog.data_hash, fields]).encode()).hexdigest(),
        splits={
            name: _ResizedSplit(split, preprocessing) for name, split in catalog.splits.items()
        },
        resized_by=fields,
    )


class _ResizedSplit:
    def __init__(self, split: Split, preprocessing: Preprocessing) -> None:
        self.labels, self._split, self._preprocessing = split.labels, split, preprocessing

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> Record:
        record = self._split[index]
        photo = record["image"]
        if not isinstance(photo, np.ndarray):
            from sicot_jax.common.image import decode_photo

            photo = decode_photo(photo)
        box = _resized_box(record["box"], photo.shape[0], photo.shape[1], self._preprocessing)
        return Record(**{**record, "image": self._preprocessing.load(photo), "box": box})  # type: ignore[typeddict-item]


def _resized_box(
    box: np.ndarray, height: int, width: int, preprocessing: Preprocessing
) -> np.ndarray:
    """Returns the box as fractions of the resized photo, float32 [4].

    All zero where it was unknown, or where the crop leaves nothing of it.
    """
    # New aspect ratio divided by the old one.
    wider = preprocessing.resize_width / preprocessing.resize_height * height / width
    match preprocessing.fit:
        case "crop":
            visible = np.minimum(1, [wider, 1 / wider])
        case "pad":
            visible = np.maximum(1, [wider, 1 / wider])
        case "stretch":
            visible = np.ones(2)
    corners = np.clip((np.reshape(box, (2, 2)) - 0.5) / visible + 0.5, 0, 1)
    empty = np.any(corners[1] <= corners[0])
    return np.zeros(4, np.float32) if empty else corners.reshape(4).astype(np.float32)
