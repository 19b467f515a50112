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

    Every pair is compared, which is meant for the photos of one product.

    Args:
      fingerprints: fingerprints of N photos, uint8 [N, FINGERPRINT_BYTES].

    Returns:
      Group of each photo, int32 [N].
    """
    count, values = len(fingerprints), fingerprints.astype(np.float32)
    squares = np.square(values).sum(1)
    limit = MAX_DIFFERENCE**2 * values.shape[1]
    groups = np.arange(count, dtype=np.int32)
    for start in range(0, count, _BLOCK):
        block = slice(start, start + _BLOCK)
        distances = squares[block, None] + squares - 2 * (values[block] @ values.T)
        rows, others = np.nonzero(distances <= limit)
        links = np.concatenate([rows + start, np.arange(count)]), np.concatenate([others, groups])
        graph = sparse.coo_array((np.ones(len(links[0]), bool), links), (count, count))
        components = sparse.csgraph.connected_components(graph, directed=False)[1]
        # The first photo of each component stands for it in the next block.
        groups = np.unique(components, return_index=True)[1].astype(np.int32)[components]
    return groups
