"""`sicot index publish`: copies the version in use to PostgreSQL, for services that read it there.

All of it is one transaction: a publish that was killed leaves nothing behind. Photos that the
database has are not copied again.
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

from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError
from sicot_jax.index.backends import postgres_schema
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles, check_finite

_LOCK = 0x51C07  # advisory lock of the process that publishes
_CHUNK = 4096
# The version published, and the one before it for services that have not switched yet.
_KEPT_VERSIONS = 2


@dataclasses.dataclass(frozen=True)
class PublishReport:
    """What a publish copied.

    Attributes:
      version: name of the version.
      revision: number of the database's copy, one more after every change.
      new_photos: photos that were copied.
      changes: other lines of products, photos and class weights that differ now.
    """

    version: str
    revision: int
    new_photos: int
    changes: int

    def summary(self) -> str:
        """Returns the report as one line."""
        if not self.new_photos + self.changes:
            return f"{self.version}, revision {self.revision}: is there already"
        return (
            f"{self.version}, revision {self.revision}: {self.new_photos} photos new, "
            f"{self.changes} other changes"
        )


def publish_to_postgres(index: Path, url: str) -> PublishReport:
    """Makes the database's copy of the version in use equal to the version.

    Readers see the changes from the commit on. Versions older than the previous one are dropped.

    Args:
      index: index folder.
      url: address of the database.

    Returns:
      What was copied.

    Raises:
      InputError: no index, no such database, or another process publishes; nothing is changed.
    """
    parameters = postgres_schema.connection_parameters(url)
    address = postgres_schema.safe_address(parameters)
    with contextlib.closing(postgres_schema.connect(parameters)) as connection:
        try:
            with connection.transaction():
                if not _try_lock(connection):
                    raise InputError(
                        f"{address}: another process publishes to it; wait for it to end"
                    )
                _prepare(connection)
                report = layout.open_current(index, lambda folder: _copy(connection, folder))
            if report.new_photos + report.changes:
                postgres_schema.vacuum(connection)
            # A separate transaction: it has to wait for readers of these versions.
            with connection.transaction():
                if _try_lock(connection):
                    _drop_older(connection)
        except psycopg.Error as error:
            raise InputError(
                f"{address}: {one_line_error(error, 300)}; repair it and run the command again"
            ) from error
    return report


def _try_lock(connection: psycopg.Connection) -> bool:
    """Until the end of the transaction."""
    return _fetch_value(connection, "SELECT pg_try_advisory_xact_lock(%s)", [_LOCK])


def _prepare(connection: psycopg.Connection) -> None:
    postgres_schema.create_extension(connection)
    connection.execute("CREATE SCHEMA IF NOT EXISTS sicot")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS sicot.versions "
        "(schema text PRIMARY KEY, published bigint NOT NULL)"
    )


def _copy(connection: psycopg.Connection, folder: Path) -> PublishReport:
    # A nested transaction: nothing remains of a version that is replaced and removed meanwhile.
    with connection.transaction():
        return _copy_version(connection, folder)


def _copy_version(connection: psycopg.Connection, folder: Path) -> PublishReport:
    manifest, schema = layout.read_unsharded_manifest(folder), postgres_schema.schema_name(folder)
    postgres_schema.use_schema(connection, schema)
    count = "SELECT count(*) FROM sicot.versions WHERE schema = %s"
    is_new = not _fetch_value(connection, count, [schema])
    if is_new:
        postgres_schema.create_tables(connection, schema, manifest)
    with contextlib.closing(ProductStore(folder / layout.PRODUCTS)) as store, _one_commit(store):
        num_rows, counts = store.num_rows(), store.counts()
        vectors = VectorFiles(folder, manifest.width, manifest.bits)
        new_photos = _add_photos(connection, store.connection, vectors, num_rows)
        changes = _update(connection, store.connection)
        if is_new or new_photos or changes:
            _update_state(connection, store.connection, counts)
    if is_new:
        num_codes = _fetch_value(connection, "SELECT count(*) FROM codes")
        postgres_schema.create_indexes(connection, manifest, num_codes)
    connection.execute(
        "INSERT INTO sicot.versions SELECT %s, coalesce(max(published), 0) + 1 FROM sicot.versions "
        "ON CONFLICT (schema) DO UPDATE SET published = excluded.published",
        [schema],
    )
    revision = _fetch_value(connection, "SELECT revision FROM state")
    return PublishReport(folder.name, revision, new_photos, changes)


@contextlib.contextmanager
def _one_commit(store: ProductStore) -> Iterator[None]:
    """Makes all reads see one commit, whatever is committed meanwhile."""
    store.connection.execute("BEGIN")
    try:
        yield
    finally:
        store.connection.rollback()


def _add_photos(
    connection: psycopg.Connection, stored: sqlite3.Connection, vectors: VectorFiles, num_rows: int
) -> int:
    """Copies photos that the database lacks, and their pictures; returns how many."""
    first = _fetch_value(connection, "SELECT coalesce(max(row) + 1, 0) FROM photos")
    features, codes = (vectors.memmap(name, num_rows) for name in (layout.FEATURES, layout.CODES))

    def photos() -> Iterator[tuple]:
        cursor = stored.execute(
            "SELECT row, product_id, image_id, deleted FROM photos WHERE row >= ? ORDER BY row",
            (first,),
        )
        while lines := cursor.fetchmany(_CHUNK):
            rows = [line[0] for line in lines]
            check_finite(features[rows], [line[2] for line in lines])
            for line, code, feature in zip(
                lines, code_fields(codes[rows]), feature_fields(features[rows]), strict=True
            ):
                yield *line[:3], bool(line[3]), code, feature

    # Fields of pgvector's types are encoded here, as bytes.
    types = ["int4", "int4", "text", "bool", "bytea", "bytea"]
    added = _copy_in(connection, "photos", photos(), types)
    pictures = stored.execute(
        "SELECT row, product_id, jpeg FROM pictures WHERE row >= ? ORDER BY row", (first,)
    )
    _copy_in(connection, "pictures", pictures, ["int4", "int4", "bytea"])
    connection.execute(
        "INSERT INTO codes SELECT DISTINCT code FROM photos WHERE row >= %s ON CONFLICT DO NOTHING",
        [first],
    )
    return added


def code_fields(codes: np.ndarray) -> list[bytes]:
    """Encodes codes as fields bit(bits) of a binary COPY.

    Args:
      codes: uint8 [N, bits / 8], lowest bit first.

    Returns:
      A field for each code: its length, then the bits, bit 0 in the highest position.
    """
    length = (8 * codes.shape[1]).to_bytes(4, "big")
    return [
        length + line.tobytes()
        for line in np.packbits(np.unpackbits(codes, axis=1, bitorder="little"), axis=1)
    ]


def feature_fields(features: np.ndarray) -> list[bytes]:
    """Encodes embeddings as fields halfvec(D) of a binary COPY.

    Args:
      features: float16 [N, D].

    Returns:
      A field for each embedding: its length, two unused bytes, the numbers.
    """
    length = features.shape[1].to_bytes(2, "big") + bytes(2)
    return [length + line.tobytes() for line in features.astype(">f2")]


def _update(connection: psycopg.Connection, stored: sqlite3.Connection) -> int:
    """Copies records, deletions and class weights that differ; returns how many lines."""
    products = stored.execute(
        "SELECT product_id, sku, title, tags, category, quality, deleted <> 0 FROM products"
    )
    changes = _merge(connection, "products", ((*line[:6], bool(line[6])) for line in products))
    weights = stored.execute("SELECT product_id, kernel, bias FROM class_weights")
    changes += _merge(connection, "class_weights", weights)
    # A deleted photo is never restored.
    deleted = [line[0] for line in stored.execute("SELECT row FROM photos WHERE deleted")]
    changes += connection.execute(
        "UPDATE photos SET deleted = true WHERE row = ANY(%s) AND NOT deleted", [deleted]
    ).rowcount
    return changes


def _update_state(
    connection: psycopg.Connection, stored: sqlite3.Connection, counts: dict[str, int]
) -> None:
    """Writes the next revision and the counts."""
    connection.execute(
        "UPDATE state SET revision = revision + 1, products = %s, photos = %s",
        [counts["products"], counts["photos"]],
    )
    connection.execute("DELETE FROM categories")
    sizes = stored.execute(
        "SELECT category, count(*) FROM photos JOIN products USING (product_id) "
        "WHERE NOT photos.deleted AND NOT products.deleted GROUP BY category"
    )
    _copy_in(connection, "categories", sizes)


def _merge(connection: psycopg.Connection, table: str, lines: Iterable[tuple]) -> int:
    """Makes a table, keyed by product, hold exactly these lines; returns how many differed."""
    name = sql.Identifier(table)
    connection.execute(sql.SQL("CREATE TEMP TABLE incoming (LIKE {}) ON COMMIT DROP").format(name))
    _copy_in(connection, "incoming", lines)
    columns = connection.execute("SELECT * FROM incoming LIMIT 0").description or []
    fields = {
        "table": name,
        "columns": sql.SQL(", ").join(sql.Identifier(column.name) for column in columns),
        "new": sql.SQL(", ").join(sql.Identifier("excluded", column.name) for column in columns),
        "old": sql.SQL(", ").join(sql.Identifier(table, column.name) for column in columns),
    }
    delete = (
        "DELETE FROM {table} WHERE NOT EXISTS "
        "(SELECT FROM incoming WHERE incoming.product_id = {table}.product_id)"
    )
    upsert = (
        "INSERT INTO {table} SELECT * FROM incoming ON CONFLICT (product_id) DO UPDATE "
        "SET ({columns}) = ROW({new}) WHERE ({old}) IS DISTINCT FROM ({new})"
    )
    changes = sum(
        connection.execute(sql.SQL(text).format(**fields)).rowcount for text in (delete, upsert)
    )
    connection.execute("DROP TABLE incoming")
    return changes


def _copy_in(
    connection: psycopg.Connection,
    table: str,
    lines: Iterable[tuple],
    types: list[str] | None = None,
) -> int:
    """Loads lines by COPY, binary where the types of the fields are given; returns how many."""
    text = sql.SQL("COPY {} FROM STDIN" + (" (FORMAT binary)" if types else "")).format(
        sql.Identifier(table)
    )
    with connection.cursor() as cursor:
        with cursor.copy(text) as copy:
            if types:
                copy.set_types(types)
            for line in lines:
                copy.write_row(line)
        return cursor.rowcount


def _drop_older(connection: psycopg.Connection) -> None:
    schemas = connection.execute(
        "SELECT schema FROM sicot.versions ORDER BY published DESC"
    ).fetchall()
    for (schema,) in itertools.islice(schemas, _KEPT_VERSIONS, None):
        connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))
        connection.execute("DELETE FROM sicot.versions WHERE schema = %s", [schema])


def _fetch_value(connection: psycopg.Connection, text: str, values: list | None = None) -> Any:
    line = connection.execute(text.encode(), values).fetchone()
    return line and line[0]
