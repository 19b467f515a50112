"""Connection, tables and indexes of a product index in PostgreSQL with pgvector.

    sicot.versions              published versions, in order
    sicot_4_v000001_0a1b2c3d4e  schema of a version: format of the tables, its name, the start of
                                its manifest's sha256

A database holds one index. Product ids and rows are those of the version folder.

The HNSW graph is over distinct codes, in a table to which lines are only added. In a graph over
photos equal codes are an island that a scan does not leave (pgvector 0.8.5): those of many photos
without a picture, and of one photo whose line was updated often.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from sicot_jax.common.files import file_sha256
from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout

FORMAT = 4
MIN_PGVECTOR = (0, 8)  # scans that go on until enough photos pass a filter
# Numbers of an embedding that are sure to fit: a line lies in one page of 8 KiB with its embedding,
# which is read for each candidate, so it is not stored apart (PostgreSQL 18, pgvector 0.8.5).
MAX_WIDTH = 4040
_ADDRESS = "postgresql://USER@HOST/DATABASE"
_TABLES = """
CREATE TABLE state (revision bigint NOT NULL, products bigint NOT NULL, photos bigint NOT NULL);
CREATE TABLE categories (category text NOT NULL, photos bigint NOT NULL);
CREATE TABLE products (
  product_id integer PRIMARY KEY, sku text NOT NULL UNIQUE, title text NOT NULL,
  tags text NOT NULL, category text NOT NULL, quality jsonb NOT NULL, deleted boolean NOT NULL)
  WITH (fillfactor = 50);
CREATE TABLE photos (
  row integer PRIMARY KEY, product_id integer NOT NULL, image_id text NOT NULL,
  deleted boolean NOT NULL, code bit({bits}) NOT NULL, feature halfvec({width}) NOT NULL);
ALTER TABLE photos ALTER feature SET STORAGE plain;
CREATE TABLE codes (code bit({bits}) PRIMARY KEY);
CREATE TABLE pictures (
  row integer PRIMARY KEY, product_id integer NOT NULL, jpeg bytea NOT NULL);
CREATE TABLE class_weights (
  product_id integer PRIMARY KEY, kernel bytea NOT NULL, bias real NOT NULL);
"""
# After the load: many times faster than row by row. A hash takes categories of any length.
_INDEXES = """
CREATE INDEX nearest_codes ON codes USING hnsw (code bit_hamming_ops);
CREATE INDEX photos_of_code ON photos (code, row);
CREATE INDEX photos_of_product ON photos (product_id);
CREATE INDEX pictures_of_product ON pictures (product_id);
CREATE INDEX deleted_products ON products (product_id) WHERE deleted;
CREATE INDEX products_of_category ON products USING hash (category);
ANALYZE products; ANALYZE photos; ANALYZE codes; ANALYZE pictures; ANALYZE class_weights;
"""
_GRAPH_BYTES = 760  # of a code in the HNSW index while it is made, without its code


def connection_parameters(url: str) -> dict[str, Any]:
    """Parses the address of a database.

    Args:
      url: postgresql://USER@HOST/DATABASE.

    Returns:
      Parameters of libpq and `psycopg.connect`.

    Raises:
      InputError: the address cannot be read; the message never holds it, as it may hold a password.
    """
    invalid = InputError(
        f"the database's address cannot be read, wanted {_ADDRESS} (in a password @ : / ? # % are "
        "%40 %3A %2F %3F %23 %25, or leave it to PGPASSWORD or ~/.pgpass)"
    )
    try:
        parts = urlsplit(url)
        # What follows an @ of a password would be taken for the host, and be shown in errors.
        if (
            parts.scheme not in ("postgresql", "postgres")
            or url.count("@") > parts.netloc.count("@")
            or "@" in (parts.netloc.rpartition("@")[0])
        ):
            raise invalid
        parsed: dict[str, Any] = {**conninfo_to_dict(url)}
    except (ValueError, psycopg.Error):
        raise invalid from None  # the error's text may hold the password
    # A machine that is down is noticed within seconds, not when TCP gives up.
    return {
        "connect_timeout": 5,
        "tcp_user_timeout": 10_000,
        "application_name": "sicot",
        **parsed,
        "autocommit": True,
    }


def safe_address(parameters: dict[str, Any]) -> str:
    """Returns the address without user and password, for messages.

    Args:
      parameters: parameters from `connection_parameters`.

    Returns:
      postgresql://HOST/DATABASE.
    """
    return f"postgresql://{parameters.get('host') or 'localhost'}/{parameters.get('dbname') or ''}"


def connect(parameters: dict[str, Any]) -> psycopg.Connection:
    """Opens a connection.

    Args:
      parameters: parameters from `connection_parameters`.

    Returns:
      The connection.

    Raises:
      InputError: the database cannot be reached, or refuses the user.
    """
    try:
        # Without prepared statements: the best plan depends on the query.
        return psycopg.connect(**parameters, prepare_threshold=None)
    except psycopg.Error as error:
        raise InputError(
            f"{safe_address(parameters)}: {one_line_error(error, 300)}; start the database, or "
            "give another address with --database"
        ) from None


def schema_name(folder: Path) -> str:
    """Returns the name of a version's schema.

    Args:
      folder: version folder.

    Returns:
      Name of the schema.
    """
    return f"sicot_{FORMAT}_{folder.name}_{file_sha256(folder / layout.MANIFEST)[:10]}"


def use_schema(connection: psycopg.Connection, schema: str) -> None:
    """Makes names those of this version and of pgvector.

    Args:
      connection: connection to set up.
      schema: schema of the version.

    Raises:
      InputError: pgvector is missing or too old.
    """
    extension = _pgvector(connection)
    if extension is None or tuple(map(int, extension[1].split(".")[:2])) < MIN_PGVECTOR:
        raise _wrong_pgvector(connection, extension[1] if extension else "none")
    path = sql.SQL(", ").join([sql.Identifier(schema), sql.Identifier(extension[0])])
    connection.execute("SELECT set_config('search_path', %s, false)", [path.as_string(connection)])


def create_extension(connection: psycopg.Connection) -> None:
    """Creates the extension pgvector where it is missing.

    Args:
      connection: connection to the database.

    Raises:
      InputError: the server has no pgvector, or does not let this user create it.
    """
    if _pgvector(connection) is None:
        try:
            connection.execute("CREATE EXTENSION vector")
        except psycopg.Error as error:
            raise _wrong_pgvector(connection, f"none ({one_line_error(error, 300)})") from error


def _wrong_pgvector(connection: psycopg.Connection, version: str) -> InputError:
    return InputError(
        f"{connection.info.dbname}: extension pgvector: {version}, wanted "
        f"{'.'.join(map(str, MIN_PGVECTOR))} or later; install it on the server, then let its "
        "administrator CREATE EXTENSION vector, or ALTER EXTENSION vector UPDATE"
    )


def _pgvector(connection: psycopg.Connection) -> tuple | None:
    """Schema and version of the extension."""
    return connection.execute(
        "SELECT nspname, extversion FROM pg_extension e "
        "JOIN pg_namespace n ON n.oid = extnamespace WHERE extname = 'vector'"
    ).fetchone()


def create_tables(
    connection: psycopg.Connection, schema: str, manifest: layout.IndexManifest
) -> None:
    """Creates the schema of a version, empty and without indexes.

    Args:
      connection: inside a transaction.
      schema: its name.
      manifest: manifest of the version.

    Raises:
      InputError: embeddings of more than `MAX_WIDTH` numbers.
    """
    if manifest.width > MAX_WIDTH:
        raise InputError(
            f"embeddings of {manifest.width} numbers, wanted at most {MAX_WIDTH}, as many as a "
            f"line of PostgreSQL holds; train with --config.model.embedding_width={MAX_WIDTH}, "
            "or serve from files (copies, workers) or Milvus, which have no such limit"
        )
    connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
    connection.execute(_TABLES.format(bits=manifest.bits, width=manifest.width).encode())
    connection.execute("INSERT INTO state VALUES (0, 0, 0)")


def vacuum(connection: psycopg.Connection) -> None:
    """Frees lines that were replaced or deleted, and refreshes what the planner knows.

    Each night may replace all products (prices); the server's own vacuum comes when it likes.

    Args:
      connection: outside a transaction; its names are those of a version.
    """
    connection.execute(
        "VACUUM (ANALYZE, SKIP_LOCKED) products, photos, codes, pictures, class_weights, "
        "categories, state"
    )


def create_indexes(
    connection: psycopg.Connection, manifest: layout.IndexManifest, num_codes: int
) -> None:
    """Creates the indexes of a loaded version.

    The HNSW graph has to fit into memory while it is made, else that takes many times as long.

    Args:
      connection: inside a transaction.
      manifest: manifest of the version.
      num_codes: distinct codes.
    """
    needed = f"{min(num_codes * (_GRAPH_BYTES + manifest.bits // 8) // 2**20 + 4, 4096)}MB"
    connection.execute(
        "SELECT set_config('maintenance_work_mem', %(needed)s, true) WHERE "
        "pg_size_bytes(%(needed)s) > pg_size_bytes(current_setting('maintenance_work_mem'))",
        {"needed": needed},
    )
    connection.execute(_INDEXES.encode())
