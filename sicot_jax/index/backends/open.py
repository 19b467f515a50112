"""Opens a version as a `ProductIndex` and publishes it to a database, by the kind of storage."""

from __future__ import annotations

from pathlib import Path

from sicot_jax.errors import InputError
from sicot_jax.index.backends import milvus
from sicot_jax.index.backends.base import ProductIndex
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.backends.sharded import ShardedIndex
from sicot_jax.index.storage import layout


def open_index(folder: Path, database: str = "") -> ProductIndex:
    """Opens a version for search.

    Args:
      folder: version folder.
      database: URL of the database that it was published to; "" reads the files.

    Returns:
      The index.

    Raises:
      InputError: the version or its copy cannot be read.
    """
    if not database and layout.read_index_manifest(folder).num_shards:
        return ShardedIndex(folder)
    if not database:
        return LocalIndex(folder)
    if database.startswith(milvus.ADDRESS_PREFIX):
        return milvus.MilvusIndex(folder, database.removeprefix(milvus.ADDRESS_PREFIX))
    try:
        from sicot_jax.index.backends.postgres import PostgresIndex
    except ImportError as error:
        raise _no_client(error) from error
    return PostgresIndex(folder, database)


def publish_index(index: Path, database: str) -> str:
    """Copies to a database what it lacks of the version in use.

    Args:
      index: index folder.
      database: URL, postgresql://USER@HOST/DATABASE or milvus+http://HOST:PORT.

    Returns:
      One line that says what was copied.

    Raises:
      InputError: no index, or the database cannot be written to.
    """
    if database.startswith(milvus.ADDRESS_PREFIX):
        return milvus.publish_codes(index, database.removeprefix(milvus.ADDRESS_PREFIX))
    try:
        from sicot_jax.index.backends.postgres_publish import publish_to_postgres
    except ImportError as error:
        raise _no_client(error) from error
    return publish_to_postgres(index, database).summary()


def _no_client(error: ImportError) -> InputError:
    return InputError(
        f"no {error.name} here to use a database with; install it: "
        "pip install 'sicot_jax[postgres]'"
    )
