"""Compares searches for the nearest binary codes: exhaustive, inverted lists, FAISS's IVF.

Command:  python -m benchmarks.binary_codes --index INDEX --codes 1000000
          (1.5 GiB of memory, 0.5 GiB of disk)
Large:    python -m benchmarks.binary_codes --index INDEX --codes 30000000 --faiss-lists 8192
          (9 GiB of disk)
Without:  python -m benchmarks.binary_codes         (clustered vectors, no index needed)
Needs:    faiss; for measured vectors an index of real photos (docs/results/search.md used one
          of a Fashion run).

Vectors and codes are those of benchmarks/vector_search.py. Inverted lists: of each category, as an
index has them, and of all photos together. FAISS's IVF stores codes in the order of its lists,
whose centres are codes themselves. Of the 1,000 candidates: how many are as near by code as the
1,000th nearest of all (equal distances are common, and any of them will do), and how many of the
ten nearest by float32 cosine are among them, which is recall@10 after re-ranking.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from benchmarks import vector_search
from benchmarks.timing import print_machine, print_table
from sicot_jax.index.backends.approximate_search import nearest_codes
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import inverted_lists, layout

BITS = 256
NUM_CANDIDATES = 1000
_BLOCK_ROWS = 1 << 18
_TRAINING_CODES_PER_LIST = 40


@dataclasses.dataclass(frozen=True)
class Queries:
    """Queries with what exact searches find.

    Attributes:
      features: [Q, D].
      codes: uint8 [Q, bits / 8].
      code_limits: [Q], distance by code of the 1,000th nearest.
      exact_rows: int64 [Q, K], nearest rows by cosine.
    """

    features: np.ndarray
    codes: np.ndarray
    code_limits: list[int]
    exact_rows: np.ndarray


def result_cells(
    stored_codes: np.ndarray,
    queries: Queries,
    results: tuple[list[float], list[np.ndarray]],
) -> list[str]:
    """Returns both recalls, and the median and 95th percentile of a query's milliseconds."""
    times, proposed = results
    by_code = np.mean(
        [
            (_hamming_distances(stored_codes, rows, code) <= limit).sum() / NUM_CANDIDATES
            for rows, code, limit in zip(proposed, queries.codes, queries.code_limits, strict=True)
        ]
    )
    exact = np.mean(
        [
            len(set(rows) & set(nearest)) / vector_search.K
            for rows, nearest in zip(proposed, queries.exact_rows, strict=True)
        ]
    )
    quantiles = statistics.median(times), statistics.quantiles(times, n=20)[-1]
    return [f"{by_code:.3f}", f"{exact:.3f}", *(f"{value:.2f}" for value in quantiles)]


def compare_searches(version: Path, options: argparse.Namespace) -> list[list[str]]:
    """Writes a version in a new folder and returns a row for each search of it."""
    clock = vector_search.choose_clock(options)
    vectors = (
        vector_search.MeasuredVectors(options.index)
        if options.index
        else vector_search.ClusteredVectors(options.width)
    )
    query_features = vectors(options.queries, np.random.default_rng([0, 1]))
    features = vector_search.write_version(
        version, vectors, options.codes, BITS, vector_search.base_manifest(options)
    )
    manifest = layout.read_index_manifest(version)
    manifest.sha256[layout.POSTING_LISTS] = ""
    layout.write_index_manifest(version, manifest)
    index = LocalIndex(version)
    codes, query_codes = index._snapshot.codes, index.encoder.encode(query_features)
    count = len(query_codes)
    exhaustive = _time_queries(
        lambda n: nearest_codes(query_codes[n], codes, NUM_CANDIDATES, _none_deleted),
        count,
        clock,
    )
    limits = [
        _hamming_distances(codes, rows, code).max()
        for rows, code in zip(exhaustive[1], query_codes, strict=True)
    ]
    exact_rows = vector_search.exact_neighbours(features, query_features)
    queries = Queries(query_features, query_codes, limits, exact_rows)
    rows = [["exhaustive", f"{options.codes:,}", *result_cells(codes, queries, exhaustive)]]
    for name in ("lists per category", "lists of all photos"):
        for thousands in options.scanned:
            inverted_lists.PROBE_FACTOR = thousands
            results = _time_queries(
                lambda n, i=index: i._propose(
                    i._snapshot, query_features[n], query_codes[n], (0, len(codes)), NUM_CANDIDATES
                ),
                count,
                clock,
            )
            rows.append([name, f"{thousands * 1000:,}", *result_cells(codes, queries, results)])
        index.close()
        inverted_lists.write_inverted_lists(version, features, [(0, options.codes)])
        index = LocalIndex(version)
    ivf = _build_faiss_ivf(codes, options.faiss_lists)
    for thousands in options.scanned:
        ivf.nprobe = max(round(thousands * 1000 * options.faiss_lists / options.codes), 1)
        faiss.downcast_IndexBinary(ivf.quantizer).hnsw.efSearch = 2 * ivf.nprobe
        results = _time_queries(
            lambda n: ivf.search(query_codes[n][None], NUM_CANDIDATES)[1][0], count, clock
        )
        rows.append(
            ["FAISS's IVF", f"{thousands * 1000:,}", *result_cells(codes, queries, results)]
        )
    return rows


def _none_deleted(rows: np.ndarray) -> np.ndarray:
    return np.zeros(len(rows), bool)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--index", type=Path, help="index of real photos; else vectors are clustered ones"
    )
    parser.add_argument("--width", type=int, default=128, help="of vectors where no index is given")
    parser.add_argument("--codes", type=int, default=1_000_000)
    parser.add_argument("--faiss-lists", type=int, default=1000)
    parser.add_argument(
        "--scanned",
        type=int,
        nargs="+",
        default=[16, 32, 64, 128],
        help="codes scanned, in thousands",
    )
    parser.add_argument("--queries", type=int, default=200)
    vector_search.add_cpu_argument(parser)
    options = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare_searches(Path(folder, "version"), options)
    header = [
        "search",
        "codes scanned",
        "of the 1,000 nearest codes",
        "recall@10 after re-ranking",
        "p50, ms",
        "p95, ms",
    ]
    print_table(
        f"{options.codes:,} codes of {BITS} bits, one thread{', CPU time' * options.cpu}, the "
        "1,000 nearest of a query",
        header,
        rows,
    )


def _build_faiss_ivf(codes: np.ndarray, count: int) -> Any:
    """Builds FAISS's index."""
    start = time.perf_counter()
    index = faiss.IndexBinaryIVF(faiss.IndexBinaryHNSW(BITS, 16), BITS, count)
    index.cp.niter = 10
    sample = np.random.default_rng(0).choice(
        len(codes), min(_TRAINING_CODES_PER_LIST * count, len(codes)), replace=False
    )
    index.train(codes[np.sort(sample)])
    trained = time.perf_counter()
    for first in range(0, len(codes), _BLOCK_ROWS):
        index.add(codes[first : first + _BLOCK_ROWS])
    added = time.perf_counter()
    print(
        f"FAISS's IVF built in {trained - start:.0f} s (centres) and {added - trained:.0f} s "
        "(codes)",
        flush=True,
    )
    faiss.omp_set_num_threads(1)
    return index


def _time_queries(
    propose: Callable[[int], np.ndarray], queries: int, clock: Callable[[], float]
) -> tuple[list[float], list[np.ndarray]]:
    """Returns the milliseconds of each query, and the rows that were proposed."""
    times, proposed = [], []
    for n in range(queries):
        start = clock()
        rows = propose(n)
        times.append((clock() - start) * 1e3)
        proposed.append(rows[rows >= 0])
    return times, proposed


def _hamming_distances(codes: np.ndarray, rows: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Returns Hamming distances."""
    return np.bitwise_count(codes[rows] ^ code).sum(1, dtype=np.int64)


if __name__ == "__main__":
    main()
