"""Tens of millions of binary codes: FAISS's IVF with an HNSW graph over its lists, against looking at every code.

Command:  python -m benchmarks.codes --index INDEX                (2.6 GB of memory and 20 minutes for 30 million codes)
Smaller:  python -m benchmarks.codes --index INDEX --codes 1000000 --lists 1024
Needs:    faiss; an index of real photos (docs/service.md used one of a Fashion run).

Codes: of vectors made as benchmarks/search.py makes its "measured" ones, by the codebook fitted to them. Recall@k: how
many of the k that are found are as near as the k-th nearest of all (equal distances are common, and any of them will do).
Memory: what the process holds more after the index is built than before; the lists have a copy of the codes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.search import Measured, resident
from benchmarks.timing import print_machine, print_table
from sicot_jax.index.codebooks import fit_codebook

BITS = 256
_LINES = 1 << 18
_PER_LIST = 40  # codes that the centre of a list is made from


def main() -> None:
    import faiss

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True, help="index of real photos")
    parser.add_argument("--codes", type=int, default=30_000_000)
    parser.add_argument("--lists", type=int, default=8192)
    parser.add_argument("--probes", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--queries", type=int, default=200)
    options = parser.parse_args()
    print_machine()
    made, rng = Measured(options.index), np.random.default_rng(0)
    queries = made(options.queries, np.random.default_rng([0, 1]))
    codebook = fit_codebook(made(50_000, rng), BITS)
    asked = codebook.encode(queries)
    codes = np.empty((options.codes, BITS // 8), np.uint8)
    for first in range(0, options.codes, _LINES):
        piece = codes[first : first + _LINES]
        piece[:] = codebook.encode(made(len(piece), rng))
    before = resident() / 2**20
    start = time.perf_counter()
    quantiser = faiss.IndexBinaryHNSW(BITS, 32)
    index = faiss.IndexBinaryIVF(quantiser, BITS, options.lists)
    sample = rng.choice(options.codes, min(_PER_LIST * options.lists, options.codes), replace=False)
    index.train(codes[np.sort(sample)])
    trained = time.perf_counter()
    for first in range(0, options.codes, _LINES):
        index.add(codes[first : first + _LINES])
    built = time.perf_counter()
    memory = resident() / 2**20 - before
    faiss.omp_set_num_threads(1)
    rows = []
    flat = _asked(lambda code, k: faiss.knn_hamming(code[None], codes, k, variant="hc")[0][0], asked)
    limits = {k: [found[k - 1] for found in flat[1]] for k in (10, 1000)}
    rows.append(["every code", "", "1.000", "1.000", *_times(flat[0])])
    for probes in options.probes:
        index.nprobe = probes
        times, found = _asked(lambda code, k: index.search(code[None], k)[0][0], asked)
        recall = [
            np.mean([(distances[:k] <= limit).mean() for distances, limit in zip(found, limits[k], strict=True)])
            for k in (10, 1000)
        ]
        rows.append(["IVF + HNSW", str(probes), *(f"{value:.3f}" for value in recall), *_times(times)])
    header = ["search", "lists looked at", "recall@10", "recall@1000", "p50, ms", "p95, ms"]
    title = f"{options.codes:,} codes of {BITS} bits, {options.lists} lists, one thread, the 1,000 nearest of a query"
    print_table(title, header, rows)
    print(
        f"\nBuilt in {trained - start:.0f} s (centres) and {built - trained:.0f} s (codes); {memory:,.0f} MiB, "
        f"{memory * 2**20 / options.codes:.1f} bytes a code"
    )


def _asked(search, asked: np.ndarray) -> tuple[list[float], list[np.ndarray]]:
    """Milliseconds of each query, and the distances of what it found; -1 becomes too far."""
    times, found = [], []
    for code in asked:
        start = time.perf_counter()
        distances = search(code, 1000)
        times.append((time.perf_counter() - start) * 1e3)
        found.append(np.where(distances < 0, BITS + 1, distances))
    return times, found


def _times(milliseconds: list[float]) -> list[str]:
    return [f"{statistics.median(milliseconds):.2f}", f"{statistics.quantiles(milliseconds, n=20)[-1]:.2f}"]


if __name__ == "__main__":
    main()
