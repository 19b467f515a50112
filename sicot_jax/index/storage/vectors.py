"""Photo embeddings, binary codes and product ids: files with one row per photo."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.common.linalg import l2_normalize
from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout

_CHUNK_BYTES = 1 << 19  # of features


def unit_features(embeddings: np.ndarray, image_ids: Sequence[str]) -> np.ndarray:
    """Makes embeddings what an index stores.

    Args:
      embeddings: float [N, D].
      image_ids: photo of each, [N].

    Returns:
      Unit embeddings, float16 [N, D]; zeros stay.

    Raises:
      InputError: an embedding has a NaN or an infinite number.
    """
    embeddings = np.asarray(embeddings)
    check_finite(embeddings, image_ids)
    return l2_normalize(embeddings).astype(np.float16)


def check_finite(embeddings: np.ndarray, image_ids: Sequence[str]) -> None:
    """Raises InputError where an embedding has a NaN or an infinite number; names its photo.

    Args:
      embeddings: float [N, D].
      image_ids: photo of each, [N].
    """
    finite = np.isfinite(embeddings).all(axis=1)
    if not finite.all():
        number = int(np.argmin(finite))
        raise InputError(
            f"photo {image_ids[number]}: its embedding has numbers that are NaN or infinite, as "
            f"{np.count_nonzero(~finite)} of {len(finite)} here; wanted finite ones: check the "
            "network's weights and build the index again, or leave the photo out"
        )


def cosine_similarities(features: np.ndarray, rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Returns cosines of some rows of the features with a query.

    FAISS widens halves in the processor's registers: numpy's `astype` would take most of the time
    of a search. Features are read in chunks that the allocator can reuse; for megabytes the system
    is asked again each time, which takes longer than all the rest.

    Args:
      features: unit embeddings, float16 [N, D].
      rows: int [M].
      query: unit embedding, float [D].

    Returns:
      Similarities, float32 [M]; -inf where a row or the query has a NaN.
    """
    faiss = import_faiss()
    # Of this thread: a request has one thread, more would wait for each other.
    faiss.omp_set_num_threads(1)
    width, query = features.shape[1], np.asarray(query, np.float32)[None]
    similarity, step = np.full(len(rows), -np.inf, np.float32), max(1, _CHUNK_BYTES // (2 * width))
    for first in range(0, len(rows), step):
        chunk = np.asarray(features[rows[first : first + step]])
        table = faiss.IndexScalarQuantizer(
            width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        table.add_sa_codes(chunk.view(np.uint8))
        values, order = table.search(query, len(chunk))
        ranked = order[0] >= 0  # FAISS leaves out NaN
        similarity[first + order[0][ranked]] = values[0][ranked]
    return similarity


def import_faiss() -> Any:
    """Returns the module `faiss`; raises InputError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            "no faiss here to search with; install it: pip install 'sicot_jax[service]'"
        ) from error
    return faiss


class VectorFiles:
    """The photo files of a version: features, codes and the product of each row.

    Features are float16 [N, D] of length 1, codes uint8 [N, bits / 8], products int32 [N]. The
    product store says how many rows count; a file may have more, from a change that was stopped.
    """

    def __init__(self, folder: Path, width: int, bits: int):
        """Describes the files of a version.

        Args:
          folder: version folder.
          width: D.
          bits: bits of a code.
        """
        self.folder, self.width, self.bits = folder, width, bits
        self._kinds: dict[str, tuple[type, tuple[int, ...]]] = {
            layout.FEATURES: (np.float16, (width,)),
            layout.CODES: (np.uint8, (bits // 8,)),
            layout.ROW_PRODUCTS: (np.int32, ()),
        }

    def row_bytes(self, name: str) -> int:
        """Returns the size of one row.

        Args:
          name: one of `layout.APPENDABLE`.

        Returns:
          Bytes.
        """
        dtype, shape = self._kinds[name]
        return int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))

    def memmap(self, name: str, num_rows: int, *, writable: bool = False) -> np.ndarray:
        """Maps the first rows of a file into memory.

        Args:
          name: one of `layout.APPENDABLE`.
          num_rows: how many rows.
          writable: whether assignments change the file.

        Returns:
          The rows, of the file's dtype and shape.

        Raises:
          InputError: the file has fewer rows.
        """
        dtype, shape = self._kinds[name]
        path = self.folder / name
        existing = path.stat().st_size // self.row_bytes(name) if path.exists() else 0
        if existing < num_rows:
            raise InputError(
                f"{path}: {existing} rows, wanted {num_rows}; the index is damaged, build it again"
            )
        if not num_rows:
            return np.zeros((0, *shape), dtype)
        return np.memmap(path, dtype, "r+" if writable else "r", shape=(num_rows, *shape))

    def allocate(self, num_rows: int) -> None:
        """Creates all files with rows of zeros, and replaces existing ones.

        Args:
          num_rows: how many rows.
        """
        for name in self._kinds:
            with (self.folder / name).open("wb") as file:
                file.truncate(num_rows * self.row_bytes(name))

    def write_rows(self, name: str, start: int, rows: np.ndarray) -> None:
        """Writes rows to the disk and cuts the file off after them.

        Args:
          name: one of `layout.APPENDABLE`.
          start: how many rows before them are kept.
          rows: what to write, of the file's shape.
        """
        dtype, shape = self._kinds[name]
        assert rows.shape[1:] == shape, (name, rows.shape)
        with (self.folder / name).open("r+b" if (self.folder / name).exists() else "wb") as file:
            file.truncate(start * self.row_bytes(name))
            file.seek(0, os.SEEK_END)
            file.write(np.ascontiguousarray(rows, dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())


def category_ranges(names: np.ndarray) -> dict[str, list[int]]:
    """Finds the range of each category among rows that are ordered by category.

    Args:
      names: category of each row, str [N], sorted.

    Returns:
      Category -> [first row, last row + 1].
    """
    categories, first = np.unique(names, return_index=True)
    ends = [*first[1:].tolist(), len(names)]
    return {
        str(name): [int(start), int(end)]
        for name, start, end in zip(categories, first, ends, strict=True)
    }
