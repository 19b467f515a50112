"""A version in PostgreSQL as a `ProductIndex`: an HNSW graph over codes, order by features."""

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

from sicot_jax.common.linalg import l2_normalize
from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError
from sicot_jax.index.backends import postgres_schema
from sicot_jax.index.backends.base import (
    CANDIDATES,
    MAX_WIDENING,
    ActiveProducts,
    IndexUnavailableError,
    Neighbour,
    Neighbours,
)
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.binary_codes import BinaryEncoder
from sicot_jax.index.storage.products import ProductRecord

_EXACT = 4 * CANDIDATES  # photos up to which all are compared instead of using the graph
_MAX_EF_SEARCH = 1000  # that pgvector takes
_SETTINGS = {
    "statement_timeout": "5s",
    # Scan on until enough photos pass the filter of category; features give the order.
    "hnsw.iterative_scan": "relaxed_order",
    "hnsw.max_scan_tuples": "200000",
    "hnsw.scan_mem_multiplier": "16",
    "jit": "off",  # takes longer than the query
}
# A vector, not a halfvec: the query keeps its precision. The inner product: lengths are 1, and a
# query of zeros has no cosine.
_PHOTOS = """
  SELECT product_id, row, -(feature::vector <#> %(query)s::vector) AS similarity, {number} AS n
  FROM photos WHERE NOT deleted AND {of_products}"""
_ALL_PRODUCTS = (
    "NOT EXISTS (SELECT FROM products WHERE products.product_id = photos.product_id AND deleted)"
)
_OF_CATEGORY = (
    "EXISTS (SELECT FROM products WHERE products.product_id = photos.product_id AND NOT deleted "
    "AND category = %(category)s)"
)
# Photos of the nearest codes, `most` of each. LIMIT keeps PostgreSQL from joining them before it
# asks the graph.
_NEAR = """
  SELECT photo.* FROM codes nearest CROSS JOIN LATERAL (
    {photos} AND photos.code = nearest.code ORDER BY row LIMIT {most}) photo
  ORDER BY nearest.{distance} LIMIT {count}"""
# The same, of so many codes that have any.
_NEAR_CODES = """
  SELECT photo.* FROM (
    SELECT product_ids, rows, similarities FROM {codes} nearest CROSS JOIN LATERAL (
      SELECT array_agg(product_id) product_ids, array_agg(row) AS rows,
        array_agg(similarity) similarities
      FROM ({photos} AND photos.code = nearest.code ORDER BY row LIMIT {most}) one) of_code
    WHERE of_code.rows IS NOT NULL {order} LIMIT {count}) near_codes,
  unnest(product_ids, rows, similarities) WITH ORDINALITY photo (product_id, row, similarity, n)"""
# n: number of a photo among those of its code. Each line says what was compared: photos, codes, and
# photos of the code that has most.
_SEARCH = """
WITH near AS MATERIALIZED ({near}),
sizes AS MATERIALIZED (
  SELECT count(*) AS photos, count(*) FILTER (WHERE n = 1) AS codes, max(n) AS largest FROM near)
(SELECT product_id, row, similarity, photos, codes, largest, true
 FROM (SELECT DISTINCT ON (product_id) * FROM near
       ORDER BY product_id, similarity DESC, row) best, sizes
 ORDER BY similarity DESC, row LIMIT %(k)s)
UNION ALL (SELECT product_id, row, similarity, photos, codes, largest, false
 FROM near, sizes ORDER BY similarity DESC, row LIMIT %(photos)s)
"""
_RECORD = """
SELECT product_id, sku, title, tags, category, quality,
  ARRAY(SELECT row FROM pictures JOIN photos USING (row)
        WHERE pictures.product_id = products.product_id AND NOT photos.deleted ORDER BY row)
FROM products WHERE NOT deleted AND """


@dataclasses.dataclass(frozen=True)
class DatabaseSnapshot:
    """One revision of the database's copy; never changed.

    Attributes:
      revision: its number.
      active: products that may be answers.
      counts: products and photos that are not deleted.
      category_sizes: category -> photos that are not deleted.
    """

    revision: int
    active: ActiveProducts
    counts: dict[str, int]
    category_sizes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Found:
    """Answer to one statement, and what was compared: photos, codes, photos of the largest code."""

    neighbours: Neighbours
    photos: int
    codes: int
    largest: int


class PostgresIndex:
    """The copy of a version in a database; of the version folder only small files are read.

    Searches and records are of the last commit, `active_products` and `counts` of the last
    `refresh`. Methods raise IndexUnavailableError while the database cannot be read; connections
    recover by themselves.
    """

    def __init__(self, folder: Path, url: str):
        """Connects to the database.

        Args:
          folder: version folder.
          url: address of the database.

        Raises:
          InputError: no such database, or it has no copy of this version.
        """
        self.folder, self.manifest = folder, layout.read_index_manifest(folder)
        self.encoder = BinaryEncoder.load(folder / layout.BINARY_ENCODER)
        parameters = postgres_schema.connection_parameters(url)
        self._schema = postgres_schema.schema_name(folder)
        with contextlib.closing(postgres_schema.connect(parameters)) as connection:
            self._snapshot = self._first_snapshot(
                connection, postgres_schema.safe_address(parameters)
            )
        self._refreshing = threading.Lock()
        self._pool = ConnectionPool(
            kwargs={**parameters, "prepare_threshold": None},
            configure=self._configure(),
            check=ConnectionPool.check_connection,
            open=True,
            timeout=1,
            reconnect_timeout=1,
            min_size=1,
            max_size=(os.cpu_count() or 1) + 4,
        )
        weakref.finalize(self, self._pool.close, 1.0)

    def _configure(self) -> Callable[[psycopg.Connection], None]:
        schema = self._schema  # not self, which has to be freed with its last reference

        def configure(connection: psycopg.Connection) -> None:
            postgres_schema.use_schema(connection, schema)
            for name, value in _SETTINGS.items():
                connection.execute("SELECT set_config(%s, %s, false)", [name, value])

        return configure

    def _first_snapshot(self, connection: psycopg.Connection, address: str) -> DatabaseSnapshot:
        try:
            _read_revision(connection, self._schema)  # without a copy all else is missing too
            postgres_schema.use_schema(connection, self._schema)
            return _read_snapshot(connection, self._schema, self.manifest.width)
        except psycopg.errors.UndefinedTable:
            raise InputError(
                f"{address}: has no copy of {self.folder}; make it with `sicot index publish "
                f"--index {self.folder.parent}`"
            ) from None
        except psycopg.Error as error:
            raise InputError(
                f"{address}: {one_line_error(error, 300)}; wanted a copy that this user may read"
            ) from error

    @contextlib.contextmanager
    def _connection(self) -> Iterator[psycopg.Connection]:
        try:
            with self._pool.connection() as connection:
                yield connection
        except psycopg.Error as error:
            raise IndexUnavailableError(f"database: {one_line_error(error, 300)}") from error

    def refresh(self) -> bool:
        """Reads what was published since the last call.

        Returns:
          Whether there was anything new.
        """
        with self._refreshing, self._connection() as connection:
            if _read_revision(connection, self._schema) == self._snapshot.revision:
                return False
            self._snapshot = _read_snapshot(connection, self._schema, self.manifest.width)
            return True

    def active_products(self) -> ActiveProducts:
        """Returns which products may be answers."""
        return self._snapshot.active

    def counts(self) -> dict[str, int]:
        """Returns how many "products" and "photos" are not deleted."""
        return self._snapshot.counts

    def nearest(
        self,
        embeddings: np.ndarray,
        k: int,
        *,
        num_photos: int = 0,
        category: str | None = None,
        candidates: int = 0,
    ) -> list[Neighbours]:
        """Finds the products and photos nearest to each query; see `ProductIndex.nearest`.

        Args:
          embeddings: queries, float [B, D].
          k: products of each query.
          num_photos: photos of each query.
          category: search this category alone.
          candidates: photos that are put in order by their features, 0 for `CANDIDATES`.

        Returns:
          Results of each query.
        """
        queries = l2_normalize(np.asarray(embeddings, np.float32))
        if not (k or num_photos) or "\0" in (category or ""):  # no text of PostgreSQL has NUL
            return [Neighbours([], []) for _ in queries]
        codes = np.unpackbits(self.encoder.encode(queries), axis=1, bitorder="little")
        sizes = self._snapshot.category_sizes
        size = sum(sizes.values()) if category is None else sizes.get(category, 0)
        count = max(candidates or CANDIDATES, k, num_photos)
        results: list[Neighbours] = []
        with self._connection() as connection:
            for query, code in zip(queries, codes, strict=True):
                values = {
                    "k": k,
                    "photos": num_photos,
                    "category": category,
                    "query": f"[{','.join(map(str, query.tolist()))}]",
                    "code": (code + ord("0")).tobytes().decode(),
                }
                results.append(self._search(connection, values, size, count))
        return results

    def _search(
        self, connection: psycopg.Connection, values: dict[str, Any], size: int, candidates: int
    ) -> Neighbours:
        """Widens the candidates of one query until they belong to k products.

        Of few photos (`size`) all are compared.
        """
        if size <= _EXACT:
            return self._execute(connection, values, "all", size).neighbours
        count, most = candidates, min(candidates * MAX_WIDENING, size)
        while True:
            result = self._execute(connection, values, "photos", count)
            compared = result.photos
            if result.largest == _most_of_code(count):  # a crowd: it may have thousands more
                result = self._execute(connection, values, "codes", count)
                compared = result.codes
            if compared < count:
                break
            if len(result.neighbours.products) == values["k"] or count >= most:
                return result.neighbours
            count = min(count * 4, most)
        # The graph ended too early, or there are no more codes. Where it ends early in a category,
        # that is a small one.
        scope = "all codes" if values["category"] is None else "all"
        return self._execute(connection, values, scope, count).neighbours

    def _execute(
        self, connection: psycopg.Connection, values: dict[str, Any], scope: str, count: int
    ) -> _Found:
        """Searches among the `count` nearest "photos" or "codes" that the graph finds.

        Or among the nearest of "all codes", compared one by one, or of "all" photos.
        """
        category = values["category"]
        near = _PHOTOS.format(
            of_products=_ALL_PRODUCTS if category is None else _OF_CATEGORY,
            number="row_number() OVER (ORDER BY row)" if scope == "photos" else "1",
        )
        if scope != "all":
            distance = f"code <~> %(code)s::bit({self.manifest.bits})"
            # OFFSET: sorted before photos are looked up.
            all_codes = f"(SELECT code FROM codes ORDER BY ({distance}) + 0 OFFSET 0)"
            near = (_NEAR if scope == "photos" else _NEAR_CODES).format(
                photos=near,
                distance=distance,
                codes=all_codes if scope == "all codes" else "codes",
                order="" if scope == "all codes" else f"ORDER BY nearest.{distance}",
                most=_most_of_code(count) if scope == "photos" else MAX_WIDENING * count,
                count=count,
            )
        with connection.pipeline():  # one round trip
            ef_search = str(min(max(count, 1), _MAX_EF_SEARCH))
            connection.execute("SELECT set_config('hnsw.ef_search', %s, false)", [ef_search])
            lines = connection.execute(_SEARCH.format(near=near).encode(), values).fetchall()
        lines.sort(key=lambda line: (-line[2], line[1]))  # a union has no order
        products, photos = (
            [Neighbour(*line[:3]) for line in lines if line[6] == of_product]
            for of_product in (True, False)
        )
        return _Found(Neighbours(products, photos), *(lines[0][3:6] if lines else (0, 0, 0)))

    def products(self, product_ids: Sequence[int]) -> list[ProductRecord | None]:
        """Reads records.

        Args:
          product_ids: their ids.

        Returns:
          A record for each id; None for a deleted or unknown product.
        """
        with self._connection() as connection:
            lines = connection.execute(
                _RECORD + "product_id = ANY(%s)", [list(map(int, product_ids))]
            ).fetchall()
        records = {line[0]: ProductRecord(*line) for line in lines}
        return [records.get(int(product_id)) for product_id in product_ids]

    def product(self, sku: str) -> ProductRecord | None:
        """Reads one record.

        Args:
          sku: its key.

        Returns:
          The record; None for a deleted or unknown product.
        """
        if "\0" in sku:
            return None
        with self._connection() as connection:
            line = connection.execute(_RECORD + "sku = %s", [sku]).fetchone()
        return ProductRecord(*line) if line else None

    def count_photos(self, product_id: int) -> int:
        """Returns how many photos of a product are not deleted.

        Args:
          product_id: the product.

        Returns:
          The number of photos.
        """
        with self._connection() as connection:
            query = "SELECT count(*) FROM photos WHERE product_id = %s AND NOT deleted"
            return connection.execute(query, [product_id]).fetchall()[0][0]

    def picture(self, row: int) -> bytes | None:
        """Reads the picture of a photo.

        Args:
          row: row of the photo.

        Returns:
          Encoded image; None where none is kept.
        """
        with self._connection() as connection:
            line = connection.execute("SELECT jpeg FROM pictures WHERE row = %s", [row]).fetchone()
        return bytes(line[0]) if line else None

    def close(self) -> None:
        """Closes the connections."""
        self._pool.close()


def _most_of_code(count: int) -> int:
    """Photos of one code among `count` nearest photos; a code that has as many is a crowd."""
    return max(count // 8, 9)


def _read_revision(connection: psycopg.Connection, schema: str) -> int:
    line = connection.execute(
        sql.SQL("SELECT revision FROM {}.state").format(sql.Identifier(schema))
    ).fetchone()
    assert line is not None  # written with the table
    return line[0]


def _categories(products: dict[str, list[int]]) -> tuple[tuple[str, ...], np.ndarray]:
    """Product ids by category -> names, and the category of each product."""
    names = tuple(name for name in products if name)
    size = max((max(ids) for ids in products.values()), default=-1) + 1
    category = np.full(size, len(names))
    for number, name in enumerate(names):
        category[products[name]] = number
    return names, category


def _read_snapshot(connection: psycopg.Connection, schema: str, width: int) -> DatabaseSnapshot:
    with connection.transaction():
        # All reads see one commit.
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        revision = _read_revision(connection, schema)
        products, photos = connection.execute("SELECT products, photos FROM state").fetchall()[0]
        deleted = connection.execute(
            "SELECT product_id FROM products WHERE deleted ORDER BY product_id"
        ).fetchall()
        weights = connection.execute(
            "SELECT product_id, kernel, bias FROM class_weights ORDER BY product_id"
        ).fetchall()
        sizes: dict[str, int] = dict(
            connection.execute("SELECT category, photos FROM categories").fetchall()
        )
        by_category = connection.execute(
            "SELECT category, array_agg(product_id) FROM products GROUP BY 1 ORDER BY 1"
        ).fetchall()
    kernel = np.frombuffer(b"".join(line[1] for line in weights), np.float32)
    active = ActiveProducts(
        np.array([line[0] for line in deleted], np.int64),
        np.array([line[0] for line in weights], np.int64),
        kernel.reshape(len(weights), width),
        np.array([line[2] for line in weights], np.float32),
        *_categories(dict(by_category)),
    )
    return DatabaseSnapshot(revision, active, {"products": products, "photos": photos}, sizes)
