"""Codes of an index in Milvus, which proposes photos by Hamming distance; files do all the rest.

`sicot index publish --database milvus+http://HOST:19530` writes, `sicot serve --database` of the
same address reads. A file (milvus+FILE.db) is Milvus Lite, in the process itself. Deletions and
changed categories are read from the files at once; a photo that was added later is proposed once it
is published too. Where Milvus returns too few photos, or a crowd of equal codes, the codes of the
files are compared.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.common.files import file_sha256
from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError
from sicot_jax.index.backends.approximate_search import find_crowds, take_codes
from sicot_jax.index.backends.base import IndexUnavailableError
from sicot_jax.index.backends.local import LocalIndex, Snapshot
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles

ADDRESS_PREFIX = "milvus+"
_MAX_RESULTS = 16384  # that Milvus returns of one search
_UPSERT_ROWS = 4096


def publish_codes(index: Path, address: str) -> str:
    """Copies the codes of the version in use that Milvus lacks.

    Args:
      index: index folder.
      address: address of Milvus, without "milvus+".

    Returns:
      One line that says what was copied.

    Raises:
      InputError: no index, or Milvus cannot be written to.
    """
    folder = layout.current_version(index)
    manifest, (client, milvus_error) = layout.read_unsharded_manifest(folder), _connect(address)
    with contextlib.closing(ProductStore(folder / layout.PRODUCTS)) as store:
        num_rows = store.num_rows()
    vectors = VectorFiles(folder, manifest.width, manifest.bits)
    codes, name = vectors.memmap(layout.CODES, num_rows), collection_name(folder)
    try:
        if not client.has_collection(name):
            _create_collection(client, name, manifest.bits)
        existing = client.query(
            name, filter="", output_fields=["count(*)"], consistency_level="Strong"
        )[0]["count(*)"]
        for first in range(existing, num_rows, _UPSERT_ROWS):
            chunk = range(first, min(first + _UPSERT_ROWS, num_rows))
            client.upsert(name, [{"row": row, "code": codes[row].tobytes()} for row in chunk])
    except milvus_error as error:
        raise InputError(
            f"{address}: {one_line_error(error)}; repair it and run the command again"
        ) from error
    finally:
        client.close()
    return f"{folder.name}: {num_rows - existing} codes new, {num_rows} in {name}"


def _create_collection(client: Any, name: str, bits: int) -> None:
    from pymilvus import DataType

    schema, indexes = client.create_schema(), client.prepare_index_params()
    schema.add_field("row", DataType.INT64, is_primary=True)
    schema.add_field("code", DataType.BINARY_VECTOR, dim=bits)
    indexes.add_index("code", index_type="BIN_FLAT", metric_type="HAMMING")
    client.create_collection(name, schema=schema, index_params=indexes)


def collection_name(folder: Path) -> str:
    """Returns the name of a version's collection.

    It holds a digest of the manifest: other indexes have versions of the same name.

    Args:
      folder: version folder.

    Returns:
      Name of the collection.
    """
    return f"sicot_{folder.name}_{file_sha256(folder / layout.MANIFEST)[:16]}"


class MilvusIndex(LocalIndex):
    """A version whose candidates are proposed by Milvus."""

    def __init__(self, folder: Path, address: str):
        """Opens a version and its collection.

        Args:
          folder: version folder.
          address: address of Milvus, without "milvus+".

        Raises:
          InputError: Milvus cannot be reached, or has no codes of this version.
        """
        super().__init__(folder)
        (self._client, self._milvus_error) = _connect(address)
        self._collection = collection_name(folder)
        try:
            if not self._client.has_collection(self._collection):
                raise InputError(
                    f"{address}: has no codes of {folder}; copy them with `sicot index publish "
                    f"--index {folder.parent} --database {ADDRESS_PREFIX}{address}`"
                )
            self._client.load_collection(self._collection)
        except self._milvus_error as error:
            raise InputError(
                f"{address}: {one_line_error(error)}; start Milvus, or correct the address"
            ) from error

    def _propose(
        self,
        snapshot: Snapshot,
        query: np.ndarray,
        code: np.ndarray,
        scope: tuple[int, int],
        count: int,
    ) -> np.ndarray:
        first, last = scope
        wanted = min(count, last - first)
        if not wanted or wanted > _MAX_RESULTS:
            return super()._propose(snapshot, query, code, scope, count)
        try:
            result = self._client.search(
                self._collection,
                data=[code.tobytes()],
                anns_field="code",
                limit=wanted,
                filter=f"row >= {first} and row < {last}",
                search_params={"metric_type": "HAMMING"},
            )
        except self._milvus_error as error:
            raise IndexUnavailableError(f"Milvus: {one_line_error(error)}") from error
        rows = np.array(result[0].ids, np.int64)
        if len(rows) < wanted or len(find_crowds(take_codes(snapshot.codes, rows))):
            return super()._propose(snapshot, query, code, scope, count)
        return rows

    def close(self) -> None:
        """Closes files and connection."""
        super().close()
        self._client.close()


def _connect(address: str) -> tuple[Any, type[Exception]]:
    """A client, and the exception that it raises."""
    try:
        from pymilvus import MilvusClient, MilvusException
    except ImportError as error:
        raise InputError(
            f"no {error.name} here to use Milvus with; install it: pip install 'sicot_jax[milvus]'"
        ) from error
    try:
        return MilvusClient(address), MilvusException
    except MilvusException as error:
        raise InputError(
            f"{address}: {one_line_error(error)}; start Milvus, or correct the address"
        ) from error
