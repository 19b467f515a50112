"""Proposing photos by code in a large index: every code looked at, the index's lists, and FAISS's
own IVF with an HNSW graph.

Command:  python -m benchmarks.binary_codes --index INDEX --codes 1000000         (1.5 GiB of memory, 0.5
  GiB of disk)
Large:    python -m benchmarks.binary_codes --index INDEX --codes 30000000 --faiss-lists 8192          (9
  GiB of disk)
Without:  python -m benchmarks.binary_codes                                       (clustered vectors, no
  index needed)
Needs:    faiss; for measured vectors an index of real photos (docs/service.md used one of a Fashion
  run).

VectorFiles and codes are those of benchmarks/vector_search.py. Lists: of each category, as an index has them,
and of all photos together. FAISS's IVF holds codes in the order of its lists, whose centres are
codes themselves. Of the 1,000 that are proposed: how many are as near by code as the 1,000th
nearest of all (equal distances are common, and any of them will do), and how many of the ten
nearest by float32 cosine are among them, which is recall@10 after re-ranking.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from benchmarks import vector_search as search
from benchmarks.timing import print_machine, print_table
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import inverted_lists as lists
from sicot_jax.index.storage import layout

BITS = 256
_LINES = 1 << 18
_PER_LIST = 40  # codes that the centre of a list is made from


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
        "--spare",
        type=int,
        nargs="+",
        default=[16, 32, 64, 128],
        help="lines looked at, times 1,000",
    )
    parser.add_argument("--queries", type=int, default=200)
    search.add_cpu_argument(parser)
    options = parser.parse_args()
    clock = search.clock_of(options)
    print_machine()
    made = search.Measured(options.index) if options.index else search.Clustered(options.width)
    queries = made(options.queries, np.random.default_rng([0, 1]))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        version = Path(folder, "version")
        features = search.write(version, made, options.codes, BITS, search.manifest_of(options))
        manifest = layout.read_index_manifest(version)
        manifest.sha256[layout.POSTING_LISTS] = ""
        layout.write_index_manifest(version, manifest)
        index = LocalIndex(version)
        codes, asked = index._view.codes, index.codebook.encode(queries)
        wanted = search.exact(features, queries)
        flat = _asked(lambda n: index._nearest_codes(asked[n], codes, 1000), len(asked), clock)
        limits = [
            _apart(codes, lines, code).max() for lines, code in zip(flat[1], asked, strict=True)
        ]

        def cells(found: tuple[list[float], list[np.ndarray]]) -> list[str]:
            """Both recalls, and the median and 95th percentile of a query's milliseconds."""
            times, proposed = found
            each = list(zip(proposed, asked, limits, wanted, strict=True))
            by_code = np.mean(
                [
                    (_apart(codes, lines, code) <= limit).sum() / 1000
                    for lines, code, limit, _ in each
                ]
            )
            exact = np.mean([len(set(lines) & set(best)) / search.K for lines, _, _, best in each])
            spent = statistics.median(times), statistics.quantiles(times, n=20)[-1]
            return [f"{by_code:.3f}", f"{exact:.3f}", *(f"{value:.2f}" for value in spent)]

        rows.append(["every code", f"{options.codes:,}", *cells(flat)])
        for name in ("lists of each category", "lists of all together"):
            for spare in options.spare:
                lists.SPARE = spare
                found = _asked(
                    lambda n, i=index: i._closest(
                        i._view, queries[n], asked[n], 0, len(codes), 1000
                    ),
                    len(asked),
                    clock,
                )
                rows.append([name, f"{spare * 1000:,}", *cells(found)])
            index.close()
            lists.write_inverted_lists(version, features, [(0, options.codes)])
            index = LocalIndex(version)
        ivf = _ivf(codes, options.faiss_lists)
        for spare in options.spare:
            ivf.nprobe = max(round(spare * 1000 * options.faiss_lists / options.codes), 1)
            faiss.downcast_IndexBinary(ivf.quantizer).hnsw.efSearch = 2 * ivf.nprobe
            found = _asked(lambda n: ivf.search(asked[n][None], 1000)[1][0], len(asked), clock)
            rows.append(["FAISS's IVF", f"{spare * 1000:,}", *cells(found)])
    header = [
        "search",
        "codes looked at",
        "of the 1,000 nearest codes",
        "recall@10 after re-ranking",
        "p50, ms",
        "p95, ms",
    ]
    print_table(
        f"{options.codes:,} codes of {BITS} bits, one thread{', CPU time' * options.cpu}, the 1,000 nearest of a query",
        header,
        rows,
    )


def _ivf(codes: np.ndarray, count: int) -> Any:
    start = time.perf_counter()
    index = faiss.IndexBinaryIVF(faiss.IndexBinaryHNSW(BITS, 16), BITS, count)
    index.cp.niter = 10
    sample = np.random.default_rng(0).choice(
        len(codes), min(_PER_LIST * count, len(codes)), replace=False
    )
    index.train(codes[np.sort(sample)])
    trained = time.perf_counter()
    for first in range(0, len(codes), _LINES):
        index.add(codes[first : first + _LINES])
    added = time.perf_counter()
    print(
        f"FAISS's IVF made in {trained - start:.0f} s (centres) and {added - trained:.0f} s (codes)",
        flush=True,
    )
    faiss.omp_set_num_threads(1)
    return index


def _asked(
    propose: Callable[[int], np.ndarray], queries: int, clock: Callable[[], float]
) -> tuple[list[float], list[np.ndarray]]:
    """Milliseconds of each query, and the lines that were proposed."""
    times, found = [], []
    for n in range(queries):
        start = clock()
        lines = propose(n)
        times.append((clock() - start) * 1e3)
        found.append(lines[lines >= 0])
    return times, found


def _apart(codes: np.ndarray, lines: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Hamming distances."""
    return np.bitwise_count(codes[lines] ^ code).sum(1, dtype=np.int64)


if __name__ == "__main__":
    main()
