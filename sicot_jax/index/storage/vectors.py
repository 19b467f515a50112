"""Features and codes of photos: files with a line for each, appended to and mapped into memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout

_PIECE = 1 << 19  # bytes of features


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; those of zeros stay."""
    rows = np.asarray(rows, np.float32)
    return rows / np.maximum(
        np.linalg.norm(rows, axis=-1, keepdims=True), np.finfo(np.float32).tiny
    )


def cosines(features: np.ndarray, lines: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Of some lines [M] of unit float16 features [N, D] with a unit query [D], float32 [M]; -inf
    where one has a NaN.

    By FAISS, which widens halves in the processor's registers: numpy's `astype` takes most of the
    time of a search, and what shifts bits instead multiplies subnormal numbers, of which features
    have many, a hundred times slower than others. In pieces
    that memory is at hand for: for megabytes the system is asked anew each time, which takes longer
      than all the rest.
    """
    faiss = import_faiss()
    faiss.omp_set_num_threads(
        1
    )  # of this thread: a request has one, more of them would wait for each other
    width, query = features.shape[1], np.asarray(query, np.float32)[None]
    found, piece = np.full(len(lines), -np.inf, np.float32), max(1, _PIECE // (2 * width))
    for first in range(0, len(lines), piece):
        rows = np.asarray(features[lines[first : first + piece]])
        table = faiss.IndexScalarQuantizer(
            width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        table.add_sa_codes(rows.view(np.uint8))
        similarity, order = table.search(query, len(rows))
        there = order[0] >= 0  # FAISS leaves out what has no order
        found[first + order[0][there]] = similarity[0][there]
    return found


def import_faiss() -> Any:
    """InputError where it is not there."""
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            "no faiss here to search with; install it: pip install 'sicot_jax[service]'"
        ) from error
    return faiss


class VectorFiles:
    """The three files of a version folder: features [N, D] float16 of length 1, codes [N, bits /
    8], owners [N] int32.

    `places` lines count; there may be more, of a change that did not come to its end.
    """

    def __init__(self, folder: Path, width: int, bits: int):
        self.folder, self.width, self.bits = folder, width, bits
        self._kinds: dict[str, tuple[type, tuple[int, ...]]] = {
            layout.FEATURES: (np.float16, (width,)),
            layout.CODES: (np.uint8, (bits // 8,)),
            layout.ROW_PRODUCTS: (np.int32, ()),
        }

    def line_bytes(self, name: str) -> int:
        dtype, shape = self._kinds[name]
        return int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))

    def mapped(self, name: str, places: int) -> np.ndarray:
        """The first lines of one file, read only. InputError where it has fewer."""
        dtype, shape = self._kinds[name]
        path = self.folder / name
        have = path.stat().st_size // self.line_bytes(name) if path.exists() else 0
        if have < places:
            raise InputError(
                f"{path}: {have} lines, wanted {places}; the index is damaged, build it again"
            )
        return (
            np.memmap(path, dtype, "r", shape=(places, *shape))
            if places
            else np.zeros((0, *shape), dtype)
        )

    def write(self, name: str, at: int, lines: np.ndarray) -> None:
        """Put lines after the first `at`, whatever lies there, onto the disk."""
        dtype, shape = self._kinds[name]
        assert lines.shape[1:] == shape, (name, lines.shape)
        with (self.folder / name).open("r+b" if (self.folder / name).exists() else "wb") as file:
            file.truncate(at * self.line_bytes(name))
            file.seek(0, os.SEEK_END)
            file.write(np.ascontiguousarray(lines, dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
