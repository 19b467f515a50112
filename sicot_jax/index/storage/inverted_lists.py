"""Inverted lists of a large index (IVF): rows grouped by centroid, so a search reads few codes.

    centroids.faiss     unit centroids of the lists, float32 [L, D], in an HNSW graph of FAISS
    posting_lists.i32   end of each list, int32 [L + 1] with 0 first; then the rows of all lists,
                        int32 [N], ascending in each

Lists are ordered by category, and each is within one category: the rows of a category's lists are
its range. Only rows of the build are in a list; rows that were added later are compared one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.vectors import VectorFiles, import_faiss

ROWS_PER_LIST = 1000  # on average
# Photos of an index or a category from which lists are probed (docs/results/search.md); below,
# every code is compared.
MIN_ROWS = 300_000
PROBE_FACTOR = 64  # rows that are compared for each candidate
_HNSW_LINKS = 16  # of a centroid in the graph
_FIT_ROWS = 40  # of a list, that its centroid is fitted to
_CHUNK = 1 << 16


def write_lists_if_large(
    folder: Path, vectors: VectorFiles, category_ranges: dict[str, list[int]]
) -> None:
    """Writes the inverted lists of a new version that has at least `MIN_ROWS` photos.

    Args:
      folder: version folder.
      vectors: its photo files.
      category_ranges: category -> [first row, last row + 1].
    """
    num_rows = max((last for _, last in category_ranges.values()), default=0)
    if num_rows >= MIN_ROWS:
        write_inverted_lists(
            folder,
            vectors.memmap(layout.FEATURES, num_rows),
            [(first, last) for first, last in category_ranges.values()],
        )


def write_inverted_lists(
    folder: Path, features: np.ndarray, ranges: Iterable[tuple[int, int]]
) -> None:
    """Clusters the rows of each category and writes centroids and posting lists.

    Centroids by spherical k-means within each range; a row belongs to the one of largest cosine.

    Args:
      folder: version folder.
      features: unit embeddings, float16 [N, D].
      ranges: (first row, last row + 1) of each category; together 0 to N without a gap.
    """
    faiss = import_faiss()
    ends, rows = [0], [np.zeros(0, np.int32)]
    graph = faiss.IndexHNSWFlat(features.shape[1], _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    for first, last in sorted(ranges):
        centroids = _fit_centroids(faiss, features[first:last])
        nearest = np.empty(last - first, np.int64)
        for start in range(first, last, _CHUNK):
            chunk = np.asarray(features[start : min(start + _CHUNK, last)], np.float32)
            _, indices = faiss.knn(chunk, centroids, 1, metric=faiss.METRIC_INNER_PRODUCT)
            nearest[start - first : start - first + len(chunk)] = indices[:, 0]
        rows.append((first + np.argsort(nearest, kind="stable")).astype(np.int32))
        # Without empty lists: they would be probed in place of others.
        filled, sizes = np.unique(nearest, return_counts=True)
        ends += (first + np.cumsum(sizes)).tolist()
        graph.add(centroids[filled])
    faiss.write_index(graph, str(folder / layout.CENTROIDS))
    np.concatenate([np.array(ends, np.int32), *rows]).tofile(folder / layout.POSTING_LISTS)


def _fit_centroids(faiss: Any, features: np.ndarray) -> np.ndarray:
    """Unit float32 [lists, D], at most one for each distinct photo of the sample.

    Many photos may be equal ("no picture yet"): k-means would begin many lists with them, whose
    centroids are equal, and an HNSW graph cannot be left from equal ones.
    """
    count, rng = max(round(len(features) / ROWS_PER_LIST), 1), np.random.default_rng(0)
    rows = np.sort(rng.choice(len(features), min(_FIT_ROWS * count, len(features)), replace=False))
    whole_rows = np.ascontiguousarray(features[rows]).view(f"V{features[0].nbytes}")
    sample = np.unique(whole_rows).view(features.dtype).reshape(-1, features.shape[1])
    sample = rng.permutation(sample).astype(np.float32)
    kmeans = faiss.Kmeans(
        features.shape[1],
        min(count, len(sample)),
        niter=10,
        spherical=True,
        seed=1,
        min_points_per_centroid=1,
        max_points_per_centroid=_FIT_ROWS,
    )
    kmeans.train(sample)
    return kmeans.centroids


class InvertedLists:
    """Inverted lists of a version, mapped into memory."""

    def __init__(self, folder: Path, num_rows: int, width: int):
        """Maps the files.

        Args:
          folder: version folder.
          num_rows: rows at the build.
          width: D.

        Raises:
          InputError: a file is missing, damaged, or of another size.
        """
        self._faiss = import_faiss()
        try:
            # Both mapped: worker processes share them.
            self._graph = self._faiss.read_index(
                str(folder / layout.CENTROIDS), self._faiss.IO_FLAG_MMAP_IFC
            )
            stored = np.memmap(folder / layout.POSTING_LISTS, np.int32, "r")
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{folder / layout.CENTROIDS}: no inverted lists ({type(error).__name__}); "
                "build the index again"
            ) from error
        count = self._graph.ntotal
        self._ends, self._rows = np.array(stored[: count + 1]), stored[count + 1 :]
        if (
            self._graph.d != width
            or len(self._rows) != num_rows
            or self._ends[-1:].tolist() != [num_rows]
        ):
            raise InputError(
                f"{folder / layout.POSTING_LISTS}: {len(self._rows)} rows in {count} lists of "
                f"{self._graph.d} numbers, wanted {num_rows} of {width}; build the index again"
            )
        vectors = self._faiss.downcast_index(self._graph.storage).get_xb()
        self._centroids = self._faiss.rev_swig_ptr(vectors, count * width).reshape(count, width)

    @property
    def num_rows(self) -> int:
        """Rows in all lists."""
        return len(self._rows)

    def probe(self, query: np.ndarray, first: int, last: int, num_rows: int) -> np.ndarray:
        """Returns the rows of the lists whose centroids are nearest to a query.

        Args:
          query: unit embedding, float32 [D].
          first: first row of the categories that are searched.
          last: their last row + 1.
          num_rows: about how many rows are wanted.

        Returns:
          Rows, int32.
        """
        start, end = np.searchsorted(self._ends, [first, last])
        count = min(-(-num_rows * (end - start) // max(last - first, 1)), end - start)
        while True:
            lists = self._nearest(query, int(start), int(end), int(count))
            num_rows_probed = int((self._ends[lists + 1] - self._ends[lists]).sum())
            # Lists of an index may be empty, or one hold most rows.
            if num_rows_probed >= min(num_rows, last - first) // 2 or count == end - start:
                break
            count = min(2 * count, end - start)
        return np.concatenate([self._rows[self._ends[n] : self._ends[n + 1]] for n in lists])

    def _nearest(self, query: np.ndarray, start: int, end: int, count: int) -> np.ndarray:
        faiss = self._faiss
        faiss.omp_set_num_threads(1)
        # A category has few lists, and a graph cannot be entered for them alone.
        if end - start == self._graph.ntotal:
            parameters = faiss.SearchParametersHNSW(efSearch=2 * count)
            indices = self._graph.search(query[None], count, params=parameters)[1][0]
            if indices[-1] >= 0:
                return indices
            # Equal centroids, which older indexes have, are an island that no search leaves.
        metric = faiss.METRIC_INNER_PRODUCT
        return (
            start + faiss.knn(query[None], self._centroids[start:end], count, metric=metric)[1][0]
        )

    def find_faults(self, ranges: Sequence[tuple[int, int]]) -> list[str]:
        """Checks that the lists of every category hold each of its rows once.

        Args:
          ranges: (first row, last row + 1) of each category.

        Returns:
          One line for a fault; none where the lists are sound.
        """
        if np.any(np.diff(self._ends) < 0) or not {0, *(last for _, last in ranges)} <= set(
            self._ends.tolist()
        ):
            return [
                f"{layout.POSTING_LISTS}: list ends out of order, or lists that span categories"
            ]
        for first, last in ranges:
            if not np.array_equal(np.sort(self._rows[first:last]), np.arange(first, last)):
                return [
                    f"{layout.POSTING_LISTS}: rows {first} to {last} are not each in one list "
                    "of their category"
                ]
        return []
