"""Measures search in a product index: recall of re-ranked codes, time of a query, memory.

Command:  python -m benchmarks.vector_search --index INDEX
          (1 GiB of memory and disk for a million vectors)
Without:  python -m benchmarks.vector_search --kinds clustered gaussian
          (no index needed: --width 128)
Smaller:  python -m benchmarks.vector_search --index INDEX --sizes 10000
Needs:    faiss; for "measured" an index of real photos (docs/results/search.md used one of a
  Fashion run).

Vectors: features of the index, each drawn at random and moved by noise of the covariance that
features have within a product there ("measured"); products around the centres of 60 categories,
whose sizes fall as 1 / rank, both with noise in 24 directions, nothing below 0 ("clustered"); or
directions without any structure ("gaussian", the worst case). Queries are made in the same way and
are not among them. Every vector is a product, the index's code answers, k = 10. Recall: how many of
the ten nearest by float32 cosine are among the answer's ten; "largest": of the largest category, by
queries of it. Either every code is scanned, or those of inverted lists. Resident: memory of the
process, and the pages of codes, row products and lists that it has read; not those of features.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.timing import print_machine, print_table
from sicot_jax.common.linalg import l2_normalize
from sicot_jax.index.backends.base import ProductIndex
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import layout
from sicot_jax.index.storage import products as store_module
from sicot_jax.index.storage.binary_codes import PCA, fit_binary_encoder
from sicot_jax.index.storage.inverted_lists import write_inverted_lists
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles

K = 10
KINDS = ("measured", "clustered", "gaussian")
_BLOCK_ROWS = 1 << 16


def anonymous_bytes() -> int:
    """Returns the bytes of this process's memory that no file backs."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


class MeasuredVectors:
    """Draws vectors like those of an index."""

    def __init__(self, index: Path):
        folder = layout.current_version(index)
        manifest = layout.read_index_manifest(folder)
        vectors = VectorFiles(folder, manifest.width, manifest.bits)
        self.features = np.asarray(vectors.memmap(layout.FEATURES, manifest.num_photos), np.float32)
        row_products = vectors.memmap(layout.ROW_PRODUCTS, manifest.num_photos)
        _, product, counts = np.unique(row_products, return_inverse=True, return_counts=True)
        means = np.zeros((len(counts), manifest.width), np.float32)
        np.add.at(means, product, self.features)
        several_photos = counts[product] > 1
        residuals = (self.features - (means / counts[:, None])[product])[several_photos]
        covariance = residuals.T @ residuals / (several_photos.sum() - (counts > 1).sum())
        values, directions = np.linalg.eigh(covariance)
        self.spread = (directions * np.sqrt(np.maximum(values, 0))).T.astype(np.float32)
        self.ranges = sorted(manifest.category_ranges.values())
        self.shares = np.diff(self.ranges)[:, 0] / len(self.features)

    def __call__(
        self, count: int, rng: np.random.Generator, category: int | None = None
    ) -> np.ndarray:
        first, last = (0, len(self.features)) if category is None else self.ranges[category]
        return self.near_rows(rng.integers(first, last, size=count), rng)

    def near_rows(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns a vector near each of these rows of the index."""
        features = self.features[rows]
        noise = rng.standard_normal(features.shape, np.float32) @ self.spread
        return l2_normalize(np.maximum(features + noise, 0))  # embeddings are >= 0


class ClusteredVectors:
    """Draws vectors of products of categories."""

    shares = (1 / np.arange(1, 61)) / np.sum(1 / np.arange(1, 61))

    def __init__(self, width: int, products: int = 40_000):
        rng, directions = np.random.default_rng(0), 24
        centres = rng.standard_normal((len(self.shares), width))
        self.of_product, self.of_photo = rng.standard_normal((2, directions, width)) / np.sqrt(
            directions
        )
        self.of_photo = np.float32(0.9 * self.of_photo)
        self.category = np.sort(rng.choice(len(self.shares), products, p=self.shares))
        offsets = rng.standard_normal((products, directions)) @ self.of_product
        self.products = np.float32(
            centres[self.category] + offsets + 0.2 * rng.standard_normal((products, width))
        )

    def __call__(
        self, count: int, rng: np.random.Generator, category: int | None = None
    ) -> np.ndarray:
        bounds = (
            (0, len(self.category))
            if category is None
            else np.searchsorted(self.category, [category, category + 1])
        )
        chosen = self.products[rng.integers(*bounds, size=count)]
        noise = rng.standard_normal((count, len(self.of_photo)), np.float32) @ self.of_photo
        return l2_normalize(
            np.maximum(chosen + noise + 0.1 * rng.standard_normal(chosen.shape, np.float32), 0)
        )


class GaussianVectors:
    """Draws vectors without structure."""

    shares = np.ones(1)

    def __init__(self, width: int):
        self.width = width

    def __call__(
        self, count: int, rng: np.random.Generator, category: int | None = None
    ) -> np.ndarray:
        return l2_normalize(rng.standard_normal((count, self.width), np.float32))


def write_version(
    folder: Path, vectors_of_kind, size: int, bits: int, manifest: layout.IndexManifest
) -> np.ndarray:
    """Writes a version without a model, with lists, every vector a product.

    Returns:
      The vectors as stored, float16.
    """
    rng = np.random.default_rng(0)
    folder.mkdir()
    vectors = VectorFiles(folder, manifest.width, bits)
    encoder = fit_binary_encoder(vectors_of_kind(50_000, rng), bits)
    encoder.save(folder / layout.BINARY_ENCODER)
    store = ProductStore.create(folder / layout.PRODUCTS)
    bounds = [0, *np.round(size * np.cumsum(vectors_of_kind.shares)).astype(int).tolist()]
    for category, (start, end) in enumerate(itertools.pairwise(bounds)):
        for first in range(start, end, _BLOCK_ROWS):
            rows = vectors_of_kind(min(_BLOCK_ROWS, end - first), rng, category).astype(np.float16)
            vectors.write_rows(layout.FEATURES, first, rows)
            vectors.write_rows(layout.CODES, first, encoder.encode(rows))
            vectors.write_rows(
                layout.ROW_PRODUCTS, first, np.arange(first, first + len(rows), dtype=np.int32)
            )
    with store.transaction() as connection:
        store_module.set_num_rows(connection, size)
    store.close()
    features = vectors.memmap(layout.FEATURES, size)
    start = time.perf_counter()
    write_inverted_lists(folder, features, itertools.pairwise(bounds))
    print(f"lists of {size:,} built in {time.perf_counter() - start:.1f} s", flush=True)
    categories = {f"{n}": list(bounds) for n, bounds in enumerate(itertools.pairwise(bounds))}
    manifest_written = dataclasses.replace(
        manifest,
        bits=bits,
        num_photos=size,
        num_products=size,
        category_ranges=categories,
        sha256={},
    )
    layout.write_index_manifest(folder, manifest_written)
    return features


def exact_neighbours(features: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Returns the rows of the ten nearest to each query, int64 [Q, 10]."""
    cosines = np.full((len(queries), K), -np.inf, np.float32)
    rows = np.zeros((len(queries), K), np.int64)
    for first in range(0, len(features), _BLOCK_ROWS):
        cosine = queries @ np.asarray(features[first : first + _BLOCK_ROWS], np.float32).T
        nearest_rows = np.argpartition(-cosine, min(K, cosine.shape[1] - 1), 1)[:, :K]
        merged = np.concatenate([cosines, np.take_along_axis(cosine, nearest_rows, 1)], 1)
        order = np.argsort(-merged, 1)[:, :K]
        rows = np.take_along_axis(np.concatenate([rows, nearest_rows + first], 1), order, 1)
        cosines = np.take_along_axis(merged, order, 1)
    return rows


def make_parser(description: str, sizes: list[int]) -> argparse.ArgumentParser:
    """Returns the parser of all searches of such vectors."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", type=Path, help="index of real photos; for measured vectors")
    parser.add_argument("--width", type=int, default=128, help="of vectors where no index is given")
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes)
    parser.add_argument("--bits", type=int, nargs="+", default=[256])
    parser.add_argument("--candidates", type=int, nargs="+", default=[100, 200, 400, 1000])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", default=["measured", "gaussian"], choices=KINDS)
    return parser


def add_cpu_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option to count CPU time, for what runs in one thread of this process."""
    parser.add_argument(
        "--cpu", action="store_true", help="count the thread's CPU time: other jobs run here too"
    )


def choose_clock(options: argparse.Namespace) -> Callable[[], float]:
    """Returns the clock: CPU time of the thread, or wall time."""
    return time.thread_time if options.cpu else time.perf_counter


@dataclasses.dataclass(frozen=True)
class WrittenVersion:
    """A version in `folder`/v000001, with queries and their nearest rows.

    Attributes:
      folder: of the index.
      size: number of vectors.
      queries: [Q, D].
      nearest_rows: int64 [Q, 10], rows nearest to each query.
      cells: of the table.
      largest_category: its name, queries of it, and their nearest rows.
    """

    folder: Path
    size: int
    queries: np.ndarray
    nearest_rows: np.ndarray
    cells: list[str]
    largest_category: tuple[str, np.ndarray, np.ndarray]

    @property
    def version(self) -> Path:
        return self.folder / "v000001"


def base_manifest(options: argparse.Namespace) -> layout.IndexManifest:
    """Returns the manifest of the given index, or an empty one."""
    if options.index:
        return layout.read_index_manifest(layout.current_version(options.index))
    return layout.IndexManifest(
        model_sha256="",
        run="",
        results_sha256="",
        data_hash="",
        width=options.width,
        bits=0,
        code_kind=PCA,
        num_photos=0,
        num_products=0,
        category_ranges={},
        sha256={},
        created="",
        version="",
    )


def written_versions(options: argparse.Namespace) -> Iterator[WrittenVersion]:
    """Yields versions of all kinds, sizes and bits; each is removed when the next is requested."""
    manifest = base_manifest(options)
    for kind, size, bits in itertools.product(options.kinds, options.sizes, options.bits):
        vectors = (
            MeasuredVectors(options.index)
            if kind == "measured"
            else {"clustered": ClusteredVectors, "gaussian": GaussianVectors}[kind](manifest.width)
        )
        queries = vectors(options.queries, np.random.default_rng([0, 1]))
        with tempfile.TemporaryDirectory() as folder:
            # A distinct time: a database tells versions apart by their manifests.
            new_manifest = dataclasses.replace(manifest, created=f"{time.time_ns()}")
            features = write_version(Path(folder, "v000001"), vectors, size, bits, new_manifest)
            nearest_rows = exact_neighbours(features, queries)
            largest = int(np.argmax(vectors.shares))
            first, last = layout.read_index_manifest(Path(folder, "v000001")).category_ranges[
                str(largest)
            ]
            category_queries = vectors(options.queries, np.random.default_rng([0, 2]), largest)
            largest_category = (
                str(largest),
                category_queries,
                exact_neighbours(features[first:last], category_queries) + first,
            )
            del features
            yield WrittenVersion(
                Path(folder),
                size,
                queries,
                nearest_rows,
                [kind, f"{size:,}", str(bits)],
                largest_category,
            )


def query_cells(
    index: ProductIndex,
    written: WrittenVersion,
    candidates: int,
    *,
    largest: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[str]:
    """Returns cells: candidates, recall@10, median and 95th percentile of a query's time."""
    category, queries, nearest_rows = (
        written.largest_category if largest else (None, written.queries, written.nearest_rows)
    )
    recall, milliseconds = [], []
    for query, expected in zip(queries, nearest_rows, strict=True):
        start = clock()
        matches = index.nearest(query[None], K, category=category, candidates=candidates)[
            0
        ].products
        milliseconds.append((clock() - start) * 1e3)
        recall.append(len({n.row for n in matches} & set(expected.tolist())) / K)
    times = statistics.median(milliseconds), statistics.quantiles(milliseconds, n=20)[-1]
    return [str(candidates), f"{np.mean(recall):.3f}", *(f"{value:.2f}" for value in times)]


def mapped_bytes(folder: Path) -> int:
    """Returns the bytes of a version's files, except features, in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = str(folder) in line and not line.endswith(layout.FEATURES)
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


HEADER = ["vectors", "number", "bits", "candidates", "recall@10", "p50, ms", "p95, ms"]


def table_title(options: argparse.Namespace) -> str:
    time_of = ", CPU time" if getattr(options, "cpu", False) else ""
    width = base_manifest(options).width
    return f"{width} numbers a vector, {options.queries} queries, k = {K}{time_of}"


def main() -> None:
    parser = make_parser(__doc__ or "", [10_000, 100_000, 1_000_000])
    add_cpu_argument(parser)
    options = parser.parse_args()
    print_machine()
    rows = []
    for written in written_versions(options):
        manifest = layout.read_index_manifest(written.version)
        with_lists = dataclasses.replace(
            manifest, sha256={layout.POSTING_LISTS: "", layout.CENTROIDS: ""}
        )
        for name, stored_manifest in (("exhaustive", manifest), ("lists", with_lists)):
            layout.write_index_manifest(written.version, stored_manifest)
            gc.collect()
            before = anonymous_bytes()
            index = LocalIndex(written.version)
            for largest, candidates in itertools.product((False, True), options.candidates):
                cells = [*written.cells, "largest" if largest else "all", name]
                cells += query_cells(
                    index, written, candidates, largest=largest, clock=choose_clock(options)
                )
                resident = anonymous_bytes() - before + mapped_bytes(written.version)
                rows.append([*cells, f"{resident / written.size:.0f}"])
            index.close()
            del index
    header = [*HEADER[:3], "category", "search", *HEADER[3:], "resident bytes a vector"]
    print_table(table_title(options), header, rows)


if __name__ == "__main__":
    main()
