"""Lists: photos of a large index sorted by what they look like, so that a search looks at the codes
of a few lists alone.

lists.faiss   the lists' centres, unit float32 [L, D], in an HNSW graph of FAISS lists.i32     where
each list ends, int32 [L + 1] with 0 first; then the lines of all lists, int32 [N], ascending in
each

Lists lie in order of categories, each within one: the lines of a category's lists are those of its
  range. Only what the build knew is in a list; lines that came later are looked at one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.vectors import VectorFiles, import_faiss

LINES = 1000  # of a list, on average
# photos, of an index or a category, from which lists are looked at (docs/search.md); below, every
# code
FROM = 300_000
SPARE = 64  # lines that are looked at for each that is wanted
_LINKS = 16  # of a centre in the graph
_FIT = 40  # lines of a list that its centre is made from
_PIECE = 1 << 16


def write_lists_if_large(folder: Path, vectors: VectorFiles, categories: dict[str, list[int]]) -> None:
    """Lists of a version that is being written, where it has `FROM` photos; else it has none."""
    photos = max((last for _, last in categories.values()), default=0)
    if photos >= FROM:
        write_inverted_lists(
            folder,
            vectors.memmap(layout.FEATURES, photos),
            [(first, last) for first, last in categories.values()],
        )


def write_inverted_lists(folder: Path, features: np.ndarray, ranges: Iterable[tuple[int, int]]) -> None:
    """Of unit features [N, D], whose categories are these ranges of lines: 0 to N without a gap, in
    any order.

    Centres by spherical k-means within each range; a line belongs to the one of largest cosine.
    """
    faiss = import_faiss()
    ends, lines = [0], [np.zeros(0, np.int32)]
    graph = faiss.IndexHNSWFlat(features.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
    for first, last in sorted(ranges):
        centres = _centres(faiss, features[first:last])
        nearest = np.empty(last - first, np.int64)
        for start in range(first, last, _PIECE):
            piece = np.asarray(features[start : min(start + _PIECE, last)], np.float32)
            found = faiss.knn(piece, centres, 1, metric=faiss.METRIC_INNER_PRODUCT)[1][:, 0]
            nearest[start - first : start - first + len(piece)] = found
        lines.append((first + np.argsort(nearest, kind="stable")).astype(np.int32))
        ends += (first + np.cumsum(np.bincount(nearest, minlength=len(centres)))).tolist()
        graph.add(centres)
    faiss.write_index(graph, str(folder / layout.CENTROIDS))
    np.concatenate([np.array(ends, np.int32), *lines]).tofile(folder / layout.POSTING_LISTS)


def _centres(faiss: Any, features: np.ndarray) -> np.ndarray:
    """Unit float32 [lists, D]."""
    count = max(round(len(features) / LINES), 1)
    rng = np.random.default_rng(0)
    some = np.sort(rng.choice(len(features), min(_FIT * count, len(features)), replace=False))
    means = faiss.Kmeans(
        features.shape[1],
        count,
        niter=10,
        spherical=True,
        seed=1,
        min_points_per_centroid=1,
        max_points_per_centroid=_FIT,
    )
    means.train(np.asarray(features[some], np.float32))
    return means.centroids


class Lists:
    """Those in `folder`, of `photos` lines, mapped into memory. InputError where they are not
    whole.
    """

    def __init__(self, folder: Path, photos: int, width: int):
        self._faiss = import_faiss()
        try:
            # Both mapped: worker processes share them.
            self._graph = self._faiss.read_index(
                str(folder / layout.CENTROIDS), self._faiss.IO_FLAG_MMAP_IFC
            )
            stored = np.memmap(folder / layout.POSTING_LISTS, np.int32, "r")
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{folder / layout.CENTROIDS}: no lists ({type(error).__name__}); build the index again"
            ) from error
        count = self._graph.ntotal
        self._ends, self._lines = np.array(stored[: count + 1]), stored[count + 1 :]
        if (
            self._graph.d != width
            or len(self._lines) != photos
            or self._ends[-1:].tolist() != [photos]
        ):
            raise InputError(
                f"{folder / layout.POSTING_LISTS}: {len(self._lines)} lines in {count} lists of {self._graph.d} numbers, wanted "
                f"{photos} of {width}; build the index again"
            )
        held = self._faiss.downcast_index(self._graph.storage).get_xb()
        self._centres = self._faiss.rev_swig_ptr(held, count * width).reshape(count, width)

    def near(self, query: np.ndarray, first: int, last: int, wanted: int) -> np.ndarray:
        """Lines int32 of the lists whose centres are nearest to a unit vector, about as many as
        wanted; of those of the categories from line `first` to `last`.
        """
        start, end = np.searchsorted(self._ends, [first, last])
        count = min(-(-wanted * (end - start) // max(last - first, 1)), end - start)
        chosen = self._nearest(query, int(start), int(end), int(count))
        return np.concatenate([self._lines[self._ends[n] : self._ends[n + 1]] for n in chosen])

    def _nearest(self, query: np.ndarray, start: int, end: int, count: int) -> np.ndarray:
        faiss = self._faiss
        faiss.omp_set_num_threads(1)
        if (
            end - start < self._graph.ntotal
        ):  # a category has few lists, and a graph cannot be entered for them alone
            metric = faiss.METRIC_INNER_PRODUCT
            return (
                start + faiss.knn(query[None], self._centres[start:end], count, metric=metric)[1][0]
            )
        wide = faiss.SearchParametersHNSW(efSearch=2 * count)
        found = self._graph.search(query[None], count, params=wide)[1][0]
        return found[found >= 0]

    def faults(self, ranges: Sequence[tuple[int, int]]) -> list[str]:
        """What is wrong: every category's lists hold each of its lines once, in lists that no line
        lies across.
        """
        if np.any(np.diff(self._ends) < 0) or not {0, *(last for _, last in ranges)} <= set(
            self._ends.tolist()
        ):
            return [f"{layout.POSTING_LISTS}: lists that end nowhere, or lie across categories"]
        for first, last in ranges:
            if not np.array_equal(np.sort(self._lines[first:last]), np.arange(first, last)):
                return [
                    f"{layout.POSTING_LISTS}: lines {first} to {last} are not each in one list of their category"
                ]
        return []
