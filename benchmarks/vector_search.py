"""Search in a product index: recall of codes re-ranked by features against exact search, and time
of a query.

Command:  python -m benchmarks.vector_search --index INDEX                     (1 GiB of memory and disk
  for a million vectors)
Without:  python -m benchmarks.vector_search --kinds clustered gaussian        (no index needed: --width
  128)
Smaller:  python -m benchmarks.vector_search --index INDEX --sizes 10000
Needs:    faiss; for "measured" an index of real photos (docs/service.md used one of a Fashion run).

VectorFiles: features of the index, each drawn at random and moved by noise of the covariance that
  features have within a product there ("measured"); products around the centres of 60 categories,
  whose sizes fall as 1 / rank, both with noise in 24 directions, nothing below 0 ("clustered"); or
  directions without any structure ("gaussian", the worst case). Queries are made in the same way
  and are not among them. Every vector is a product, the index's own code answers, k = 10. Recall:
  how many of the ten nearest by float32 cosine are among the answer's ten; "largest": of the
  largest category, asked for by queries of it. Every code is looked at, or those of lists
  (index/lists). Resident: memory of the process, and the pages of codes, owners and lists that it
  has touched; not those of the features.
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
from sicot_jax.index.storage import products as cards_of
from sicot_jax.index.storage.binary_codes import PCA, fit_binary_encoder
from sicot_jax.index.storage.inverted_lists import write_inverted_lists
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles

K = 10
KINDS = ("measured", "clustered", "gaussian")
_LINES = 1 << 16


def resident() -> int:
    """Bytes of this process's memory that no file backs."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


class Measured:
    """VectorFiles like those of an index."""

    def __init__(self, index: Path):
        folder = layout.current_version(index)
        manifest = layout.read_index_manifest(folder)
        vectors = VectorFiles(folder, manifest.width, manifest.bits)
        self.features = np.asarray(vectors.memmap(layout.FEATURES, manifest.num_photos), np.float32)
        owners = vectors.memmap(layout.ROW_PRODUCTS, manifest.num_photos)
        _, product, counts = np.unique(owners, return_inverse=True, return_counts=True)
        means = np.zeros((len(counts), manifest.width), np.float32)
        np.add.at(means, product, self.features)
        some = counts[product] > 1
        apart = (self.features - (means / counts[:, None])[product])[some]
        covariance = apart.T @ apart / (some.sum() - (counts > 1).sum())
        values, directions = np.linalg.eigh(covariance)
        self.spread = (directions * np.sqrt(np.maximum(values, 0))).T.astype(np.float32)
        self.ranges = sorted(manifest.categories.values())
        self.shares = np.diff(self.ranges)[:, 0] / len(self.features)

    def __call__(
        self, count: int, rng: np.random.Generator, category: int | None = None
    ) -> np.ndarray:
        first, last = (0, len(self.features)) if category is None else self.ranges[category]
        return self.beside(rng.integers(first, last, size=count), rng)

    def beside(self, lines: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Of these lines of the index, a vector each."""
        chosen = self.features[lines]
        noise = rng.standard_normal(chosen.shape, np.float32) @ self.spread
        return l2_normalize(np.maximum(chosen + noise, 0))  # embeddings are >= 0


class Clustered:
    """VectorFiles of products of categories."""

    shares = (1 / np.arange(1, 61)) / np.sum(1 / np.arange(1, 61))

    def __init__(self, width: int, products: int = 40_000):
        rng, directions = np.random.default_rng(0), 24
        centres = rng.standard_normal((len(self.shares), width))
        self.of_product, self.of_photo = rng.standard_normal((2, directions, width)) / np.sqrt(
            directions
        )
        self.of_photo = np.float32(0.9 * self.of_photo)
        self.category = np.sort(rng.choice(len(self.shares), products, p=self.shares))
        moved = rng.standard_normal((products, directions)) @ self.of_product
        self.products = np.float32(
            centres[self.category] + moved + 0.2 * rng.standard_normal((products, width))
        )

    def __call__(
        self, count: int, rng: np.random.Generator, category: int | None = None
    ) -> np.ndarray:
        ends = (
            (0, len(self.category))
            if category is None
            else np.searchsorted(self.category, [category, category + 1])
        )
        chosen = self.products[rng.integers(*ends, size=count)]
        noise = rng.standard_normal((count, len(self.of_photo)), np.float32) @ self.of_photo
        return l2_normalize(
            np.maximum(chosen + noise + 0.1 * rng.standard_normal(chosen.shape, np.float32), 0)
        )


class Gaussian:
    shares = np.ones(1)

    def __init__(self, width: int):
        self.width = width

    def __call__(
        self, count: int, rng: np.random.Generator, category: int | None = None
    ) -> np.ndarray:
        return l2_normalize(rng.standard_normal((count, self.width), np.float32))


def write(folder: Path, made, size: int, bits: int, manifest: layout.IndexManifest) -> np.ndarray:
    """A version without a model, with lists, every vector a product; the vectors as stored,
    float16.
    """
    rng = np.random.default_rng(0)
    folder.mkdir()
    vectors = VectorFiles(folder, manifest.width, bits)
    codebook = fit_binary_encoder(made(50_000, rng), bits)
    codebook.save(folder / layout.BINARY_ENCODER)
    cards = ProductStore.create(folder / layout.PRODUCTS)
    ends = [0, *np.round(size * np.cumsum(made.shares)).astype(int).tolist()]
    for category, (start, end) in enumerate(itertools.pairwise(ends)):
        for first in range(start, end, _LINES):
            rows = made(min(_LINES, end - first), rng, category).astype(np.float16)
            vectors.write(layout.FEATURES, first, rows)
            vectors.write(layout.CODES, first, codebook.encode(rows))
            vectors.write(
                layout.ROW_PRODUCTS, first, np.arange(first, first + len(rows), dtype=np.int32)
            )
    with cards.change() as connection:
        cards_of.set_num_rows(connection, size)
    cards.close()
    features = vectors.memmap(layout.FEATURES, size)
    start = time.perf_counter()
    write_inverted_lists(folder, features, itertools.pairwise(ends))
    print(f"lists of {size:,} made in {time.perf_counter() - start:.1f} s", flush=True)
    categories = {f"{n}": list(ends) for n, ends in enumerate(itertools.pairwise(ends))}
    kept = dataclasses.replace(
        manifest, bits=bits, photos=size, products=size, categories=categories, sha256={}
    )
    layout.write_index_manifest(folder, kept)
    return features


def exact(features: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Lines of the ten nearest to each query, int64 [Q, 10]."""
    best = np.full((len(queries), K), -np.inf, np.float32)
    lines = np.zeros((len(queries), K), np.int64)
    for first in range(0, len(features), _LINES):
        cosine = queries @ np.asarray(features[first : first + _LINES], np.float32).T
        near = np.argpartition(-cosine, min(K, cosine.shape[1] - 1), 1)[:, :K]
        both = np.concatenate([best, np.take_along_axis(cosine, near, 1)], 1)
        order = np.argsort(-both, 1)[:, :K]
        lines = np.take_along_axis(np.concatenate([lines, near + first], 1), order, 1)
        best = np.take_along_axis(both, order, 1)
    return lines


def arguments(description: str, sizes: list[int]) -> argparse.ArgumentParser:
    """What every search of such vectors is told."""
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
    """Of what runs in this process, in one thread, alone."""
    parser.add_argument(
        "--cpu", action="store_true", help="count the thread's CPU time: other jobs run here too"
    )


def clock_of(options: argparse.Namespace) -> Callable[[], float]:
    return time.thread_time if options.cpu else time.perf_counter


@dataclasses.dataclass(frozen=True)
class Written:
    """A version in `folder`/v000001, and the lines nearest to each query, of all and of its largest
    category (`asked_of`, by queries of its own). cells: of the table.
    """

    folder: Path
    size: int
    queries: np.ndarray
    wanted: np.ndarray
    cells: list[str]
    asked_of: tuple[str, np.ndarray, np.ndarray]

    @property
    def version(self) -> Path:
        return self.folder / "v000001"


def manifest_of(options: argparse.Namespace) -> layout.IndexManifest:
    if options.index:
        return layout.read_index_manifest(layout.current_version(options.index))
    return layout.IndexManifest(
        model="", run="", trained="", data="", width=options.width, bits=0, codes=PCA, photos=0, products=0, categories={},
        sha256={}, created="", version="",
    )  # fmt: skip


def every(options: argparse.Namespace) -> Iterator[Written]:
    """Of all kinds, sizes and bits, one at a time; gone when the next one is asked for."""
    manifest = manifest_of(options)
    for kind, size, bits in itertools.product(options.kinds, options.sizes, options.bits):
        made = (
            Measured(options.index)
            if kind == "measured"
            else {"clustered": Clustered, "gaussian": Gaussian}[kind](manifest.width)
        )
        queries = made(options.queries, np.random.default_rng([0, 1]))
        with tempfile.TemporaryDirectory() as folder:
            # A time of its own: a database tells versions apart by their manifests.
            new = dataclasses.replace(manifest, created=f"{time.time_ns()}")
            features = write(Path(folder, "v000001"), made, size, bits, new)
            wanted = exact(features, queries)
            largest = int(np.argmax(made.shares))
            first, last = layout.read_index_manifest(Path(folder, "v000001")).categories[
                str(largest)
            ]
            of_it = made(options.queries, np.random.default_rng([0, 2]), largest)
            asked_of = str(largest), of_it, exact(features[first:last], of_it) + first
            del features
            yield Written(
                Path(folder), size, queries, wanted, [kind, f"{size:,}", str(bits)], asked_of
            )


def asked(
    index: ProductIndex,
    written: Written,
    candidates: int,
    *,
    largest: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[str]:
    """Cells: candidates, recall@10, and the median and 95th percentile of a query's milliseconds."""
    category, queries, wanted = (
        written.asked_of if largest else (None, written.queries, written.wanted)
    )
    recall, milliseconds = [], []
    for query, lines in zip(queries, wanted, strict=True):
        start = clock()
        found = index.nearest(query[None], K, category=category, candidates=candidates)[0].products
        milliseconds.append((clock() - start) * 1e3)
        recall.append(len({n.place for n in found} & set(lines.tolist())) / K)
    times = statistics.median(milliseconds), statistics.quantiles(milliseconds, n=20)[-1]
    return [str(candidates), f"{np.mean(recall):.3f}", *(f"{value:.2f}" for value in times)]


def touched(folder: Path) -> int:
    """Bytes of a version's files, features aside, that lie in this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = str(folder) in line and not line.endswith(layout.FEATURES)
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


HEADER = ["vectors", "number", "bits", "candidates", "recall@10", "p50, ms", "p95, ms"]


def title(options: argparse.Namespace) -> str:
    time_of = ", CPU time" if getattr(options, "cpu", False) else ""
    return f"{manifest_of(options).width} numbers a vector, {options.queries} queries, k = {K}{time_of}"


def main() -> None:
    parser = arguments(__doc__ or "", [10_000, 100_000, 1_000_000])
    add_cpu_argument(parser)
    options = parser.parse_args()
    print_machine()
    rows = []
    for written in every(options):
        manifest = layout.read_index_manifest(written.version)
        listed = dataclasses.replace(
            manifest, sha256={layout.POSTING_LISTS: "", layout.CENTROIDS: ""}
        )
        for name, stored in (("every code", manifest), ("lists", listed)):
            layout.write_index_manifest(written.version, stored)
            gc.collect()
            before = resident()
            index = LocalIndex(written.version)
            for largest, candidates in itertools.product((False, True), options.candidates):
                cells = [*written.cells, "largest" if largest else "all", name]
                cells += asked(index, written, candidates, largest=largest, clock=clock_of(options))
                rows.append(
                    [
                        *cells,
                        f"{(resident() - before + touched(written.version)) / written.size:.0f}",
                    ]
                )
            index.close()
            del index
    header = [*HEADER[:3], "searched", "looked at", *HEADER[3:], "resident bytes a vector"]
    print_table(title(options), header, rows)


if __name__ == "__main__":
    main()
