"""`sicot index publish`: a copy of the version in use in a PostgreSQL database, for services that
read it from there.

All of it is one transaction: a publish that was killed leaves nothing behind. What is there already
  is not copied again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from sicot_jax.errors import InputError
from sicot_jax.index.backends import postgres_schema as database
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles

_LOCK = 0x51C07  # of the one that publishes, among a database's advisory locks
_LINES = 4096
_KEPT = (
    2  # versions: the one published, and the one before it for services that have not seen it yet
)


@dataclasses.dataclass(frozen=True)
class Published:
    """What a publish came to. changes: lines of products, photos and rows that differ now, new
    photos beside.
    """

    version: str
    revision: int
    new_photos: int
    changes: int

    def summary(self) -> str:
        if not self.new_photos + self.changes:
            return f"{self.version}, revision {self.revision}: is there already"
        return f"{self.version}, revision {self.revision}: {self.new_photos} photos new, {self.changes} other changes"


def publish(index: Path, url: str) -> Published:
    """Make the database's copy of the version in use the same as the version; readers see it from
    the commit on. Versions before the previous one are dropped. InputError: no index, no such
    database, another process publishes; nothing is changed then.
    """
    settings = database.parameters(url)
    with contextlib.closing(database.connect(settings)) as connection:
        try:
            with connection.transaction():
                if not _alone(connection):
                    raise InputError(
                        f"{database.shown(settings)}: another process publishes to it; wait for it to end"
                    )
                _prepare(connection)
                published = layout.open_current(index, lambda folder: _copy(connection, folder))
            # By itself: it has to wait for readers that are at these versions yet.
            with connection.transaction():
                if _alone(connection):
                    _drop_older(connection)
        except psycopg.Error as error:
            raise InputError(
                f"{database.shown(settings)}: {database.said(error)}; mend it and give the command again"
            ) from error
    return published


def _alone(connection: psycopg.Connection) -> bool:
    """Until the end of the transaction."""
    return _one(connection, "SELECT pg_try_advisory_xact_lock(%s)", [_LOCK])


def _prepare(connection: psycopg.Connection) -> None:
    database.create_extension(connection)
    connection.execute("CREATE SCHEMA IF NOT EXISTS sicot")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS sicot.versions (schema text PRIMARY KEY, published bigint NOT NULL)"
    )


def _copy(connection: psycopg.Connection, folder: Path) -> Published:
    # One inside the other: nothing stays of a version that is replaced and removed meanwhile.
    with connection.transaction():
        return _copy_version(connection, folder)


def _copy_version(connection: psycopg.Connection, folder: Path) -> Published:
    manifest, schema = layout.read_unsharded_manifest(folder), database.schema_of(folder)
    database.use_schema(connection, schema)
    new = not _one(connection, "SELECT count(*) FROM sicot.versions WHERE schema = %s", [schema])
    if new:
        database.create_tables(connection, schema, manifest)
    with contextlib.closing(ProductStore(folder / layout.PRODUCTS)) as cards, _moment(cards) as stored:
        places, counts = cards.ends()[0], cards.counts()
        vectors = VectorFiles(folder, manifest.width, manifest.bits)
        new_photos = _add_photos(connection, stored, vectors, places)
        changes = _update(connection, stored)
        if new or new_photos or changes:
            _count(connection, stored, counts)
    if new:
        database.create_indexes(connection, manifest, places)
    connection.execute(
        "INSERT INTO sicot.versions SELECT %s, coalesce(max(published), 0) + 1 FROM sicot.versions "
        "ON CONFLICT (schema) DO UPDATE SET published = excluded.published",
        [schema],
    )
    return Published(
        folder.name, _one(connection, "SELECT revision FROM state"), new_photos, changes
    )


@contextlib.contextmanager
def _moment(cards: ProductStore) -> Iterator[sqlite3.Connection]:
    """All reads are of one moment, whatever is committed meanwhile."""
    cards.connection.execute("BEGIN")
    try:
        yield cards.connection
    finally:
        cards.connection.rollback()


def _add_photos(
    connection: psycopg.Connection, stored: sqlite3.Connection, vectors: VectorFiles, places: int
) -> int:
    """Photos after those that are there, and their pictures; how many."""
    first = _one(connection, "SELECT coalesce(max(place) + 1, 0) FROM photos")
    features, codes = (vectors.memmap(name, places) for name in (layout.FEATURES, layout.CODES))

    def photos() -> Iterator[tuple]:
        found = stored.execute(
            "SELECT place, product, image_id, withdrawn FROM photos WHERE place >= ? ORDER BY place",
            (first,),
        )
        while rows := found.fetchmany(_LINES):
            lines = [row[0] for row in rows]
            for row, code, feature in zip(
                rows, code_fields(codes[lines]), feature_fields(features[lines]), strict=True
            ):
                yield *row[:3], bool(row[3]), code, feature

    kinds = [
        "int4",
        "int4",
        "text",
        "bool",
        "bytea",
        "bytea",
    ]  # pgvector's fields are made here, byte by byte
    added = _load(connection, "photos", photos(), kinds)
    _load(
        connection,
        "pictures",
        stored.execute(
            "SELECT place, product, jpeg FROM pictures WHERE place >= ? ORDER BY place", (first,)
        ),
        ["int4", "int4", "bytea"],
    )
    return added


def code_fields(codes: np.ndarray) -> list[bytes]:
    """Codes uint8 [N, bits / 8] as fields bit(N) of a binary COPY: the length, then bit 0 first, in
    the highest place.
    """
    length = (8 * codes.shape[1]).to_bytes(4, "big")
    return [
        length + line.tobytes()
        for line in np.packbits(np.unpackbits(codes, axis=1, bitorder="little"), axis=1)
    ]


def feature_fields(features: np.ndarray) -> list[bytes]:
    """Features float16 [N, D] as fields halfvec(D) of a binary COPY: the length, two unused bytes,
    the numbers.
    """
    length = features.shape[1].to_bytes(2, "big") + bytes(2)
    return [length + line.tobytes() for line in features.astype(">f2")]


def _update(connection: psycopg.Connection, stored: sqlite3.Connection) -> int:
    """What differs of cards, withdrawn photos and rows; how many lines."""
    products = stored.execute(
        "SELECT product, sku, title, tags, category, quality, withdrawn <> 0 FROM products"
    )
    changes = _merge(connection, "products", ((*row[:6], bool(row[6])) for row in products))
    changes += _merge(connection, "rows", stored.execute("SELECT product, kernel, bias FROM rows"))
    gone = [
        row[0] for row in stored.execute("SELECT place FROM photos WHERE withdrawn")
    ]  # none ever comes back
    changes += connection.execute(
        "UPDATE photos SET withdrawn = true WHERE place = ANY(%s) AND NOT withdrawn", [gone]
    ).rowcount
    return changes


def _count(
    connection: psycopg.Connection, stored: sqlite3.Connection, counts: dict[str, int]
) -> None:
    """The next revision."""
    connection.execute(
        "UPDATE state SET revision = revision + 1, products = %s, photos = %s",
        [counts["products"], counts["photos"]],
    )
    connection.execute("DELETE FROM categories")
    sizes = stored.execute(
        "SELECT category, count(*) FROM photos JOIN products USING (product) "
        "WHERE NOT photos.withdrawn AND NOT products.withdrawn GROUP BY category"
    )
    _load(connection, "categories", sizes)


def _merge(connection: psycopg.Connection, table: str, lines: Iterable[tuple]) -> int:
    """Make a table, whose key is the product, hold these lines; how many differed."""
    name = sql.Identifier(table)
    connection.execute(sql.SQL("CREATE TEMP TABLE incoming (LIKE {}) ON COMMIT DROP").format(name))
    _load(connection, "incoming", lines)
    columns = connection.execute("SELECT * FROM incoming LIMIT 0").description or []
    fields = {
        "table": name,
        "columns": sql.SQL(", ").join(sql.Identifier(column.name) for column in columns),
        "new": sql.SQL(", ").join(sql.Identifier("excluded", column.name) for column in columns),
        "old": sql.SQL(", ").join(sql.Identifier(table, column.name) for column in columns),
    }
    gone = "DELETE FROM {table} WHERE NOT EXISTS (SELECT FROM incoming WHERE incoming.product = {table}.product)"
    put = (
        "INSERT INTO {table} SELECT * FROM incoming ON CONFLICT (product) DO UPDATE SET ({columns}) = ROW({new}) "
        "WHERE ({old}) IS DISTINCT FROM ({new})"
    )
    changes = sum(
        connection.execute(sql.SQL(text).format(**fields)).rowcount for text in (gone, put)
    )
    connection.execute("DROP TABLE incoming")
    return changes


def _load(
    connection: psycopg.Connection,
    table: str,
    lines: Iterable[tuple],
    kinds: list[str] | None = None,
) -> int:
    """COPY, binary where `kinds` of the fields are given; how many lines."""
    text = sql.SQL("COPY {} FROM STDIN" + (" (FORMAT binary)" if kinds else "")).format(
        sql.Identifier(table)
    )
    with connection.cursor() as cursor:
        with cursor.copy(text) as copy:
            if kinds:
                copy.set_types(kinds)
            for line in lines:
                copy.write_row(line)
        return cursor.rowcount


def _drop_older(connection: psycopg.Connection) -> None:
    found = connection.execute(
        "SELECT schema FROM sicot.versions ORDER BY published DESC"
    ).fetchall()
    for (schema,) in itertools.islice(found, _KEPT, None):
        connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))
        connection.execute("DELETE FROM sicot.versions WHERE schema = %s", [schema])


def _one(connection: psycopg.Connection, text: str, values: list | None = None) -> Any:
    row = connection.execute(text.encode(), values).fetchone()
    return row and row[0]
