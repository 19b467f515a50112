"""Where an index lies in a PostgreSQL database with pgvector; what its writer (`publish`) and
readers (`postgres`) share.

sicot.versions              the versions that are there, in the order in which they were published
sicot_1_v000001_0a1b2c3d4e  a version: format of the tables, its name, the start of its manifest's
  sha256

A database holds one index. Numbers of products and places of photos are those of the version
folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from sicot_jax.common.files import file_sha256
from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout

FORMAT = 2
PGVECTOR = (0, 8)  # scans that go on until enough lines pass a filter
_ADDRESS = "postgresql://USER@HOST/DATABASE"
_TABLES = """
CREATE TABLE state (revision bigint NOT NULL, products bigint NOT NULL, photos bigint NOT NULL);
CREATE TABLE categories (category text NOT NULL, photos bigint NOT NULL);
CREATE TABLE products (
  product integer PRIMARY KEY, sku text NOT NULL UNIQUE, title text NOT NULL, tags text NOT NULL, category text NOT NULL,
  quality jsonb NOT NULL, withdrawn boolean NOT NULL);
CREATE TABLE photos (
  place integer PRIMARY KEY, product integer NOT NULL, image_id text NOT NULL, withdrawn boolean NOT NULL,
  code bit({bits}) NOT NULL, feature halfvec({width}) NOT NULL);
ALTER TABLE photos ALTER feature SET STORAGE plain;
CREATE TABLE pictures (place integer PRIMARY KEY, product integer NOT NULL, jpeg bytea NOT NULL);
CREATE TABLE rows (product integer PRIMARY KEY, kernel bytea NOT NULL, bias real NOT NULL);
"""
# After the load: many times faster than line by line. A hash takes categories of any length.
_INDEXES = """
CREATE INDEX photos_by_code ON photos USING hnsw (code bit_hamming_ops);
CREATE INDEX photos_of_product ON photos (product);
CREATE INDEX pictures_of_product ON pictures (product);
CREATE INDEX products_of_category ON products USING hash (category);
ANALYZE products; ANALYZE photos; ANALYZE pictures; ANALYZE rows;
"""
_GRAPH_BYTES = 760  # of a photo in the HNSW index while it is made, beside its code


def parameters(url: str) -> dict[str, Any]:
    """libpq's parameters of a URL. InputError, which never tells the URL, where it is none."""
    wrong = InputError(
        f"the database's address cannot be read, wanted {_ADDRESS} (in a password @ : / ? # % are %40 %3A %2F %3F %23 %25, or "
        "leave it to PGPASSWORD or ~/.pgpass)"
    )
    try:
        parts = urlsplit(url)
        # What follows a password's own @ would be taken for the host, and be told in errors.
        if (
            parts.scheme not in ("postgresql", "postgres")
            or url.count("@") > parts.netloc.count("@")
            or "@" in (parts.netloc.rpartition("@")[0])
        ):
            raise wrong
        found: dict[str, Any] = {**conninfo_to_dict(url)}
    except (ValueError, psycopg.Error):
        raise wrong from None  # the error's text may hold the password
    # A machine that is gone is noticed within seconds, not when TCP gives up.
    return {
        "connect_timeout": 5,
        "tcp_user_timeout": 10_000,
        "application_name": "sicot",
        **found,
        "autocommit": True,
    }


def shown(settings: dict[str, Any]) -> str:
    """The address as errors tell it."""
    return f"postgresql://{settings.get('host') or 'localhost'}/{settings.get('dbname') or ''}"


def said(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def connect(settings: dict[str, Any]) -> psycopg.Connection:
    """InputError where the database cannot be reached, or lets nobody in."""
    try:
        return psycopg.connect(
            **settings, prepare_threshold=None
        )  # a plan for each query: what is best depends on it
    except psycopg.Error as error:
        raise InputError(
            f"{shown(settings)}: {said(error)}; start the database, or give another address with --database"
        ) from None


def schema_of(folder: Path) -> str:
    """The name of a version's schema."""
    return f"sicot_{FORMAT}_{folder.name}_{file_sha256(folder / layout.MANIFEST)[:10]}"


def use_schema(connection: psycopg.Connection, schema: str) -> None:
    """Names are those of this version and of pgvector from now on. InputError without pgvector, or
    with one that is too old.
    """
    row = _pgvector(connection)
    if row is None or tuple(map(int, row[1].split(".")[:2])) < PGVECTOR:
        raise _wrong_pgvector(connection, row[1] if row else "none")
    path = sql.SQL(", ").join([sql.Identifier(schema), sql.Identifier(row[0])]).as_string()
    connection.execute("SELECT set_config('search_path', %s, false)", [path])


def create_extension(connection: psycopg.Connection) -> None:
    """pgvector, where it is not there. InputError where the server has none, or does not let this
    user.
    """
    if _pgvector(connection) is None:
        try:
            connection.execute("CREATE EXTENSION vector")
        except psycopg.Error as error:
            raise _wrong_pgvector(connection, f"none ({said(error)})") from error


def _wrong_pgvector(connection: psycopg.Connection, found: str) -> InputError:
    return InputError(
        f"{connection.info.dbname}: extension pgvector: {found}, wanted {'.'.join(map(str, PGVECTOR))} or later; install it on "
        "the server, then let its administrator CREATE EXTENSION vector, or ALTER EXTENSION vector UPDATE"
    )


def _pgvector(connection: psycopg.Connection) -> tuple | None:
    """Its schema and version."""
    return connection.execute(
        "SELECT nspname, extversion FROM pg_extension e JOIN pg_namespace n ON n.oid = extnamespace WHERE extname = 'vector'"
    ).fetchone()


def create_tables(connection: psycopg.Connection, schema: str, manifest: layout.IndexManifest) -> None:
    """An empty version, without its indexes."""
    connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
    connection.execute(_TABLES.format(bits=manifest.bits, width=manifest.width).encode())
    connection.execute("INSERT INTO state VALUES (0, 0, 0)")


def create_indexes(connection: psycopg.Connection, manifest: layout.IndexManifest, photos: int) -> None:
    """Inside a transaction. The graph has to fit into memory while it is made, else that takes many
    times as long.
    """
    needed = f"{min(photos * (_GRAPH_BYTES + manifest.bits // 8) // 2**20 + 4, 4096)}MB"
    connection.execute(
        "SELECT set_config('maintenance_work_mem', %(needed)s, true) "
        "WHERE pg_size_bytes(%(needed)s) > pg_size_bytes(current_setting('maintenance_work_mem'))",
        {"needed": needed},
    )
    connection.execute(_INDEXES.encode())
