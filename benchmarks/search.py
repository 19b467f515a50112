"""Search in a product index: recall of codes re-ranked by features against exact search, and time of a query.

Command:  python -m benchmarks.search --index INDEX                     (1 GiB of memory and disk for a million vectors)
Smaller:  python -m benchmarks.search --index INDEX --sizes 10000
Needs:    faiss; an index of real photos (docs/service.md used one of a Fashion run).

Vectors: features of the index, each drawn at random and moved by noise of the covariance that features have within a product
there ("measured"), or directions without any structure ("gaussian", the worst case). Queries are made in the same way and are
not among them. Every vector is a product, the index's own code answers, k = 10. Recall: how many of the ten nearest by float32
cosine are among the answer's ten.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.timing import print_machine, print_table
from sicot_jax.index import cards as cards_of
from sicot_jax.index import layout
from sicot_jax.index.cards import Cards
from sicot_jax.index.codebooks import fit_codebook
from sicot_jax.index.embedded import EmbeddedIndex
from sicot_jax.index.product_index import ProductIndex
from sicot_jax.index.vectors import Vectors, unit

K = 10
_LINES = 1 << 16


def resident() -> int:
    """Bytes of this process's memory that no file backs."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


class Measured:
    """Vectors like those of an index."""

    def __init__(self, index: Path):
        folder = layout.current_version(index)
        manifest = layout.read_manifest(folder)
        vectors = Vectors(folder, manifest.width, manifest.bits)
        self.features = np.asarray(vectors.mapped(layout.FEATURES, manifest.photos), np.float32)
        owners = vectors.mapped(layout.OWNERS, manifest.photos)
        _, product, counts = np.unique(owners, return_inverse=True, return_counts=True)
        means = np.zeros((len(counts), manifest.width), np.float32)
        np.add.at(means, product, self.features)
        some = counts[product] > 1
        apart = (self.features - (means / counts[:, None])[product])[some]
        covariance = apart.T @ apart / (some.sum() - (counts > 1).sum())
        values, directions = np.linalg.eigh(covariance)
        self.spread = (directions * np.sqrt(np.maximum(values, 0))).T.astype(np.float32)

    def __call__(self, count: int, rng: np.random.Generator) -> np.ndarray:
        return self.beside(rng.integers(len(self.features), size=count), rng)

    def beside(self, lines: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Of these lines of the index, a vector each."""
        chosen = self.features[lines]
        noise = rng.standard_normal(chosen.shape, np.float32) @ self.spread
        return unit(np.maximum(chosen + noise, 0))  # embeddings are >= 0


class Gaussian:
    def __init__(self, width: int):
        self.width = width

    def __call__(self, count: int, rng: np.random.Generator) -> np.ndarray:
        return unit(rng.standard_normal((count, self.width), np.float32))


def write(folder: Path, made, size: int, bits: int, manifest: layout.Manifest) -> np.ndarray:
    """A version without a model, every vector a product; the vectors as stored, float16."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    vectors = Vectors(folder, manifest.width, bits)
    codebook = None
    cards = Cards.create(folder / layout.CARDS)
    for first in range(0, size, _LINES):
        rows = made(min(_LINES, size - first), rng).astype(np.float16)
        codebook = codebook or fit_codebook(rows, bits)
        vectors.write(layout.FEATURES, first, rows)
        vectors.write(layout.CODES, first, codebook.encode(rows))
        vectors.write(layout.OWNERS, first, np.arange(first, first + len(rows), dtype=np.int32))
    codebook.save(folder / layout.CODEBOOK)
    with cards.change() as connection:
        cards_of.set_places(connection, size)
    cards.close()
    kept = dataclasses.replace(manifest, bits=bits, photos=size, products=size, categories={}, sha256={})
    layout.write_manifest(folder, kept)
    return vectors.mapped(layout.FEATURES, size)


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
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True, help="index of real photos")
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes)
    parser.add_argument("--bits", type=int, nargs="+", default=[256])
    parser.add_argument("--candidates", type=int, nargs="+", default=[100, 200, 400, 1000])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", default=["measured", "gaussian"], choices=("measured", "gaussian"))
    return parser


@dataclasses.dataclass(frozen=True)
class Written:
    """A version in `folder`/v000001, and the lines nearest to each query. cells: of the table."""

    folder: Path
    size: int
    queries: np.ndarray
    wanted: np.ndarray
    cells: list[str]

    @property
    def version(self) -> Path:
        return self.folder / "v000001"


def every(options: argparse.Namespace) -> Iterator[Written]:
    """Of all kinds, sizes and bits, one at a time; gone when the next one is asked for."""
    manifest = layout.read_manifest(layout.current_version(options.index))
    for kind, size, bits in itertools.product(options.kinds, options.sizes, options.bits):
        made = Measured(options.index) if kind == "measured" else Gaussian(manifest.width)
        queries = made(options.queries, np.random.default_rng([0, 1]))
        with tempfile.TemporaryDirectory() as folder:
            # A time of its own: a database tells versions apart by their manifests.
            new = dataclasses.replace(manifest, created=f"{time.time_ns()}")
            features = write(Path(folder, "v000001"), made, size, bits, new)
            wanted = exact(features, queries)
            del features
            yield Written(Path(folder), size, queries, wanted, [kind, f"{size:,}", str(bits)])


def asked(index: ProductIndex, written: Written, candidates: int) -> list[str]:
    """Cells: candidates, recall@10, and the median and 95th percentile of a query's milliseconds."""
    recall, milliseconds = [], []
    for query, lines in zip(written.queries, written.wanted, strict=True):
        start = time.perf_counter()
        found = index.nearest(query[None], K, candidates=candidates)[0].products
        milliseconds.append((time.perf_counter() - start) * 1e3)
        recall.append(len({n.place for n in found} & set(lines.tolist())) / K)
    times = statistics.median(milliseconds), statistics.quantiles(milliseconds, n=20)[-1]
    return [str(candidates), f"{np.mean(recall):.3f}", *(f"{value:.2f}" for value in times)]


HEADER = ["vectors", "number", "bits", "candidates", "recall@10", "p50, ms", "p95, ms"]


def title(options: argparse.Namespace) -> str:
    width = layout.read_manifest(layout.current_version(options.index)).width
    return f"{width} numbers a vector, {options.queries} queries, k = {K}"


def main() -> None:
    options = arguments(__doc__ or "", [10_000, 100_000, 1_000_000]).parse_args()
    print_machine()
    rows = []
    for written in every(options):
        gc.collect()
        before = resident()
        index = EmbeddedIndex(written.version)
        for candidates in options.candidates:
            cells = [*written.cells, *asked(index, written, candidates)]
            rows.append([*cells, f"{(resident() - before) / written.size:.0f}"])
        index.close()
    print_table(title(options), [*HEADER, "resident bytes a vector"], rows)


if __name__ == "__main__":
    main()
