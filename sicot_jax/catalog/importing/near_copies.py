"""Finds photos of one SKU that are copies of one picture in other sizes."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sicot_jax.catalog.importing.spool import StoredPhoto
from sicot_jax.common.photo_fingerprint import FINGERPRINT_BYTES, near_identical

# What shop systems append to the name of a resized copy, which may be cropped too: photo-150x150,
# photo_100x, photo-scaled, photo@2x.
_SIZE_IN_NAME = re.compile(r"(?:[-_](?:\d+x\d*|scaled|thumb)|@\dx)$")


def find_near_copies(spool: Path, photos: Sequence[StoredPhoto]) -> list[int | None]:
    """Groups the near-identical photos of each SKU by their pixels, and by the size in their names.

    Args:
      spool: spool file, with the fingerprint of every photo behind it.
      photos: N photos.

    Returns:
      For each photo the first photo of its group; None without another in it.
    """
    by_sku: defaultdict[str, list[int]] = defaultdict(list)
    for i, photo in enumerate(photos):
        by_sku[photo.row.sku].append(i)
    copies: list[int | None] = [None] * len(photos)
    with spool.open("rb") as file:
        for members in by_sku.values():
            if len(members) == 1:
                continue
            fingerprints = np.empty((len(members), FINGERPRINT_BYTES), np.uint8)
            for row, i in zip(fingerprints, members, strict=True):
                file.seek(photos[i].offset + photos[i].size)
                row[:] = np.frombuffer(file.read(FINGERPRINT_BYTES), np.uint8)
            groups = near_identical(fingerprints)
            _merge_named_sizes(groups, [photos[i].row.image for i in members])
            for group in np.flatnonzero(np.bincount(groups) > 1):
                in_group = [members[k] for k in np.flatnonzero(groups == group)]
                for i in in_group:
                    copies[i] = in_group[0]
    return copies


def _merge_named_sizes(groups: np.ndarray, names: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for k, name in enumerate(names):
        stem = _SIZE_IN_NAME.sub("", os.path.splitext(name)[0])
        one, other = groups[first.setdefault(stem, k)], groups[k]
        if one != other:
            groups[groups == other] = one
