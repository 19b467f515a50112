"""Which implementation of `ProductIndex` reads a version: its files, in one part or several, or a
database.
"""

from __future__ import annotations

from pathlib import Path

from sicot_jax.errors import InputError
from sicot_jax.index.backends import milvus
from sicot_jax.index.backends.base import ProductIndex
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.backends.sharded import ShardedIndex
from sicot_jax.index.storage import layout


def open_index(folder: Path, database: str = "") -> ProductIndex:
    """The version in `folder`; read from `database`, a URL, where one is given. InputError where it
    cannot be read.
    """
    if not database and layout.read_index_manifest(folder).shards:
        return ShardedIndex(folder)
    if not database:
        return LocalIndex(folder)
    if database.startswith(milvus.ADDRESS):
        return milvus.MilvusIndex(folder, database.removeprefix(milvus.ADDRESS))
    try:
        from sicot_jax.index.backends.postgres import PostgresIndex
    except ImportError as error:
        raise _no_client(error) from error
    return PostgresIndex(folder, database)


def publish(index: Path, database: str) -> str:
    """Copy what `database` lacks of the version in use; what was done. InputError where that cannot
    be done.
    """
    if database.startswith(milvus.ADDRESS):
        return milvus.publish(index, database.removeprefix(milvus.ADDRESS))
    try:
        from sicot_jax.index.backends.postgres_publish import publish as into_postgres
    except ImportError as error:
        raise _no_client(error) from error
    return into_postgres(index, database).summary()


def _no_client(error: ImportError) -> InputError:
    return InputError(
        f"no {error.name} here to use a database with; install it: pip install 'sicot_jax[postgres]'"
    )
