"""A version in PostgreSQL as a `ProductIndex`: an HNSW index over the codes, re-ranked by features
in the same statement.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from psycopg import sql
from psycopg_pool import ConnectionPool

from sicot_jax.errors import InputError
from sicot_jax.index.backends import postgres_schema as database
from sicot_jax.index.backends.base import (
    CANDIDATES,
    WIDEST,
    IndexUnavailable,
    Neighbours,
    Neighbour,
    ActiveProducts,
)
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.binary_codes import BinaryEncoder
from sicot_jax.index.storage.products import Product
from sicot_jax.index.storage.vectors import unit

_EXACT = 4 * CANDIDATES  # photos that are compared all rather than by the graph
_LARGEST = 1000  # that pgvector takes as hnsw.ef_search
_SETTINGS = {
    "statement_timeout": "5s",
    # on until enough photos are offered ones of the category; features give the order
    "hnsw.iterative_scan": "relaxed_order",
    "hnsw.max_scan_tuples": "200000",
    "hnsw.scan_mem_multiplier": "16",
    "jit": "off",  # takes longer than the query
}
# A vector, not a halfvec: the query keeps its precision. The inner product: lengths are 1, and a
# query of zeros has no cosine.
_FIND = """
WITH near AS MATERIALIZED (
  SELECT product, place, -(feature::vector <#> %(query)s::vector) AS similarity
  FROM photos JOIN products USING (product) WHERE NOT photos.withdrawn AND NOT products.withdrawn {category} {nearest})
(SELECT product, place, similarity, (SELECT count(*) FROM near), true
 FROM (SELECT DISTINCT ON (product) * FROM near ORDER BY product, similarity DESC, place) best
 ORDER BY similarity DESC, place LIMIT %(k)s)
UNION ALL (SELECT product, place, similarity, (SELECT count(*) FROM near), false
 FROM near ORDER BY similarity DESC, place LIMIT %(photos)s)
"""
_CARD = """
SELECT product, sku, title, tags, category, quality,
  ARRAY(SELECT place FROM pictures JOIN photos USING (place)
        WHERE pictures.product = products.product AND NOT photos.withdrawn ORDER BY place)
FROM products WHERE NOT withdrawn AND """


@dataclasses.dataclass(frozen=True)
class View:
    """What one revision says; never changed. sizes: category -> photos of it that are offered."""

    revision: int
    offered: ActiveProducts
    counts: dict[str, int]
    sizes: dict[str, int]


class PostgresIndex:
    """The copy of the version in `folder` that `publish` made in a database; of the folder the
    small files alone are read.

    Searches and cards are of the last commit, `offered` and `counts` of the last `refresh`.
    InputError: no such database, or it has not this version. Later IndexUnavailable while the
    database cannot be read; it recovers by itself.
    """

    def __init__(self, folder: Path, url: str):
        self.folder, self.manifest = folder, layout.read_index_manifest(folder)
        self.codebook = BinaryEncoder.load(folder / layout.BINARY_ENCODER)
        settings, self._schema = database.parameters(url), database.schema_of(folder)
        with contextlib.closing(database.connect(settings)) as connection:
            self._view = self._first_look(connection, database.shown(settings))
        self._refreshing = threading.Lock()
        self._pool = ConnectionPool(
            kwargs={**settings, "prepare_threshold": None}, configure=self._configured(),
            check=ConnectionPool.check_connection, open=True, timeout=1, reconnect_timeout=1,
            min_size=1, max_size=(os.cpu_count() or 1) + 4,
        )  # fmt: skip
        weakref.finalize(self, self._pool.close, 1.0)

    def _configured(self) -> Callable[[psycopg.Connection], None]:
        schema = self._schema  # not self, which has to end with its last reference

        def configure(connection: psycopg.Connection) -> None:
            database.use_schema(connection, schema)
            for name, value in _SETTINGS.items():
                connection.execute("SELECT set_config(%s, %s, false)", [name, value])

        return configure

    def _first_look(self, connection: psycopg.Connection, where: str) -> View:
        try:
            _revision(connection, self._schema)  # without a copy all else is missing too
            database.use_schema(connection, self._schema)
            return _look(connection, self._schema, self.manifest.width)
        except psycopg.errors.UndefinedTable:
            raise InputError(
                f"{where}: has no copy of {self.folder}; make it with `sicot index publish --index {self.folder.parent}`"
            ) from None
        except psycopg.Error as error:
            raise InputError(
                f"{where}: {database.said(error)}; wanted a copy that this user may read"
            ) from error

    @contextlib.contextmanager
    def _connection(self) -> Iterator[psycopg.Connection]:
        try:
            with self._pool.connection() as connection:
                yield connection
        except psycopg.Error as error:
            raise IndexUnavailable(f"database: {database.said(error)}") from error

    def refresh(self) -> bool:
        with self._refreshing, self._connection() as connection:
            if _revision(connection, self._schema) == self._view.revision:
                return False
            self._view = _look(connection, self._schema, self.manifest.width)
            return True

    def active_products(self) -> ActiveProducts:
        return self._view.offered

    def counts(self) -> dict[str, int]:
        return self._view.counts

    def nearest(
        self,
        embeddings: np.ndarray,
        k: int,
        *,
        photos: int = 0,
        category: str | None = None,
        candidates: int = 0,
    ) -> list[Neighbours]:
        """As `ProductIndex` says. `candidates`: photos that are put in order by their features; up
        to 16 times as many are looked at where they belong to fewer than k products.
        """
        queries = unit(embeddings)
        if not (k or photos) or "\0" in (category or ""):  # no text of PostgreSQL's has one
            return [Neighbours([], []) for _ in queries]
        codes = np.unpackbits(self.codebook.encode(queries), axis=1, bitorder="little")
        view = self._view
        size = sum(view.sizes.values()) if category is None else view.sizes.get(category, 0)
        wanted = max(candidates or CANDIDATES, k, photos)
        found: list[Neighbours] = []
        with self._connection() as connection:
            for query, code in zip(queries, codes, strict=True):
                values = {
                    "k": k,
                    "photos": photos,
                    "category": category,
                    "query": f"[{','.join(map(str, query.tolist()))}]",
                }
                values["code"] = (code + ord("0")).tobytes().decode()
                found.append(self._found(connection, values, size, wanted))
        return found

    def _found(
        self, connection: psycopg.Connection, values: dict[str, Any], size: int, wanted: int
    ) -> Near:
        """Codes propose `wanted` photos, then up to 16 times as many; where `size` is small, all
        photos are compared.
        """
        count, most, hits, looked = wanted, min(wanted * WIDEST, size), Neighbours([], []), 0
        while size > _EXACT:
            hits, looked = self._ask(connection, values, count)
            if len(hits.products) == values["k"] or count >= most or looked < count:
                break
            count = min(count * 4, most)
        if not looked or (
            len(hits.products) < values["k"] and looked < count
        ):  # the graph may end too early
            hits, _ = self._ask(connection, values, None)
        return hits

    def _ask(
        self, connection: psycopg.Connection, values: dict[str, Any], count: int | None
    ) -> tuple[Neighbours, int]:
        """Products among the `count` photos nearest by code, or among all; and how many photos were
        put in order.
        """
        text = _FIND.format(
            category="AND category = %(category)s" if values["category"] is not None else "",
            nearest=f"ORDER BY code <~> %(code)s::bit({self.manifest.bits}) LIMIT {count}"
            if count
            else "",
        )
        with connection.pipeline():  # one way there and back
            connection.execute(
                "SELECT set_config('hnsw.ef_search', %s, false)", [str(min(count or 1, _LARGEST))]
            )
            rows = connection.execute(text.encode(), values).fetchall()
        rows.sort(key=lambda row: (-row[2], row[1]))  # a union has no order
        products, photos = (
            [Neighbour(*row[:3]) for row in rows if row[4] == of_product]
            for of_product in (True, False)
        )
        return Neighbours(products, photos), rows[0][3] if rows else 0

    def products(self, numbers: Sequence[int]) -> list[Product | None]:
        with self._connection() as connection:
            rows = connection.execute(
                _CARD + "product = ANY(%s)", [list(map(int, numbers))]
            ).fetchall()
        cards = {row[0]: Product(*row) for row in rows}
        return [cards.get(int(number)) for number in numbers]

    def product(self, sku: str) -> Product | None:
        if "\0" in sku:
            return None
        with self._connection() as connection:
            row = connection.execute(_CARD + "sku = %s", [sku]).fetchone()
        return Product(*row) if row else None

    def count_photos(self, number: int) -> int:
        with self._connection() as connection:
            count = "SELECT count(*) FROM photos WHERE product = %s AND NOT withdrawn"
            return connection.execute(count, [number]).fetchall()[0][0]

    def picture(self, place: int) -> bytes | None:
        with self._connection() as connection:
            row = connection.execute(
                "SELECT jpeg FROM pictures WHERE place = %s", [place]
            ).fetchone()
        return bytes(row[0]) if row else None

    def close(self) -> None:
        self._pool.close()


def _revision(connection: psycopg.Connection, schema: str) -> int:
    row = connection.execute(
        sql.SQL("SELECT revision FROM {}.state").format(sql.Identifier(schema))
    ).fetchone()
    assert row is not None  # written with the table
    return row[0]


def _categories(products: dict[str, list[int]]) -> tuple[tuple[str, ...], np.ndarray]:
    """Numbers of products by category -> names, and the category of each product."""
    names = tuple(name for name in products if name)
    category = np.full(
        max((max(numbers) for numbers in products.values()), default=-1) + 1, len(names)
    )
    for number, name in enumerate(names):
        category[products[name]] = number
    return names, category


def _look(connection: psycopg.Connection, schema: str, width: int) -> View:
    with connection.transaction():
        connection.execute(
            "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
        )  # all of one commit
        revision = _revision(connection, schema)
        products, photos = connection.execute("SELECT products, photos FROM state").fetchall()[0]
        gone = connection.execute(
            "SELECT product FROM products WHERE withdrawn ORDER BY product"
        ).fetchall()
        rows = connection.execute(
            "SELECT product, kernel, bias FROM rows ORDER BY product"
        ).fetchall()
        sizes: dict[str, int] = dict(
            connection.execute("SELECT category, photos FROM categories").fetchall()
        )
        named = connection.execute(
            "SELECT category, array_agg(product) FROM products GROUP BY 1 ORDER BY 1"
        ).fetchall()
    offered = ActiveProducts(
        np.array([row[0] for row in gone], np.int64),
        np.array([row[0] for row in rows], np.int64),
        np.frombuffer(b"".join(row[1] for row in rows), np.float32).reshape(len(rows), width),
        np.array([row[2] for row in rows], np.float32),
        *_categories(dict(named)),
    )
    return View(revision, offered, {"products": products, "photos": photos}, sizes)
