"""Finds near-identical photos: resized or newly compressed copies of one picture."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import sparse

SIDE = 8
FINGERPRINT_BYTES = SIDE * SIDE * 3
# Root mean square of the difference, levels of 0 to 255. Of 1,300 photos of the grocery and fashion
# data sets, copies at three quarters of the size and quality 90 differ by at most 1.6, different
# pictures by at least 4.5.
MAX_DIFFERENCE = 2.0
_BLOCK = 1024


def photo_fingerprint(photo: Image.Image) -> bytes:
    """Returns a photo's fingerprint: its pixels at SIDE x SIDE, whatever its size; 0.1 ms.

    A hash of grey gradients would not tell a shirt from the same shirt in another colour.

    Args:
      photo: photo of mode RGB; one of about 256 pixels a side is enough and fast.

    Returns:
      FINGERPRINT_BYTES bytes.
    """
    return photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR).tobytes()


def near_identical(fingerprints: np.ndarray) -> np.ndarray:
    """Groups near-identical photos; a copy of a copy is of the same group.

    Pairs are compared whose mean levels differ by at most MAX_DIFFERENCE, as those of copies must:
    the mean differs by no more than the root mean square. Of different pictures that is one pair in
    twenty or thirty.

    Args:
      fingerprints: fingerprints of N photos, uint8 [N, FINGERPRINT_BYTES].

    Returns:
      Group of each photo, int32 [N].
    """
    count = len(fingerprints)
    order = np.argsort(fingerprints.mean(1), kind="stable")
    values = fingerprints[order].astype(np.float32)
    means, squares = values.mean(1), np.square(values).sum(1)
    limit = MAX_DIFFERENCE**2 * values.shape[1]
    groups = np.arange(count, dtype=np.int32)
    for start in range(0, count, _BLOCK):
        last = means[min(start + _BLOCK, count) - 1]
        # A hair more, for the rounding of means.
        end = int(np.searchsorted(means, last + MAX_DIFFERENCE + 1e-3, side="right"))
        block, later = slice(start, start + _BLOCK), slice(start, end)
        products = values[block] @ values[later].T
        distances = squares[block, None] + squares[later] - 2 * products
        rows, others = np.nonzero(distances <= limit)
        links = (
            np.concatenate([rows + start, np.arange(count)]),
            np.concatenate([others + start, groups]),
        )
        graph = sparse.coo_array((np.ones(len(links[0]), bool), links), (count, count))
        components = sparse.csgraph.connected_components(graph, directed=False)[1]
        # The first photo of each component stands for it in the next block.
        groups = np.unique(components, return_index=True)[1].astype(np.int32)[components]
    found = np.empty(count, np.int32)
    found[order] = groups
    return found
