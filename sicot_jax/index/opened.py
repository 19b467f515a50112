"""Which implementation of `ProductIndex` reads a version: its files, in one part or several, or its copy in a database."""

from __future__ import annotations

from pathlib import Path

from sicot_jax.errors import InputError
from sicot_jax.index import layout
from sicot_jax.index.product_index import ProductIndex


def open_index(folder: Path, database: str = "") -> ProductIndex:
    """The version in `folder`; read from `database`, a URL, where one is given. InputError where it cannot be read."""
    if not database and layout.read_manifest(folder).shards:
        from sicot_jax.index.shards import ShardedIndex

        return ShardedIndex(folder)
    if not database:
        from sicot_jax.index.embedded import EmbeddedIndex

        return EmbeddedIndex(folder)
    try:
        from sicot_jax.index.postgres import PostgresIndex
    except ImportError as error:
        raise no_client(error) from error
    return PostgresIndex(folder, database)


def no_client(error: ImportError) -> InputError:
    return InputError(f"no {error.name} here to use a database with; install it: pip install 'sicot_jax[postgres]'")
