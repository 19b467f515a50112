"""Codes of an index in Milvus, which proposes photos by Hamming distance; the files put them in
order, and have the cards.

`sicot index publish --database milvus+http://HOST:19530` writes, `sicot serve --database` of the
same address reads. A file (milvus+FILE.db) is Milvus Lite, in the process itself. What is withdrawn
or moved is known from the files at once; a photo that came later is proposed once it is published
too.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.common.files import file_sha256
from sicot_jax.errors import InputError
from sicot_jax.index.backends.base import IndexUnavailable
from sicot_jax.index.backends.local import LocalIndex, View
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles

ADDRESS = "milvus+"  # what the address of such a database begins with
_MOST = 16384  # that Milvus returns of one search
_PIECE = 4096


def publish(index: Path, address: str) -> str:
    """Put the codes of the version in use that are not there into Milvus; what was done.
    InputError: no index, no Milvus.
    """
    folder = layout.current_version(index)
    manifest, (client, broken) = layout.read_unsharded_manifest(folder), _connected(address)
    with contextlib.closing(ProductStore(folder / layout.PRODUCTS)) as cards:
        places = cards.ends()[0]
    codes, name = (
        VectorFiles(folder, manifest.width, manifest.bits).memmap(layout.CODES, places),
        collection(folder),
    )
    try:
        if not client.has_collection(name):
            _create(client, name, manifest.bits)
        there = client.query(
            name, filter="", output_fields=["count(*)"], consistency_level="Strong"
        )[0]["count(*)"]
        for first in range(there, places, _PIECE):
            piece = range(first, min(first + _PIECE, places))
            client.upsert(
                name, [{"place": place, "code": codes[place].tobytes()} for place in piece]
            )
    except broken as error:
        raise InputError(
            f"{address}: {_said(error)}; mend it and give the command again"
        ) from error
    finally:
        client.close()
    return f"{folder.name}: {places - there} codes new, {places} in {name}"


def _create(client: Any, name: str, bits: int) -> None:
    from pymilvus import DataType

    schema, indexes = client.create_schema(), client.prepare_index_params()
    schema.add_field("place", DataType.INT64, is_primary=True)
    schema.add_field("code", DataType.BINARY_VECTOR, dim=bits)
    indexes.add_index("code", index_type="BIN_FLAT", metric_type="HAMMING")
    client.create_collection(name, schema=schema, index_params=indexes)


def collection(folder: Path) -> str:
    """Of a version: versions of the same name in other indexes have other manifests."""
    return f"sicot_{folder.name}_{file_sha256(folder / layout.MANIFEST)[:16]}"


class MilvusIndex(LocalIndex):
    """The version in `folder`, photos proposed by Milvus. InputError where its codes are not there."""

    def __init__(self, folder: Path, address: str):
        super().__init__(folder)
        (self._client, self._broken), self._name = _connected(address), collection(folder)
        try:
            if not self._client.has_collection(self._name):
                raise InputError(
                    f"{address}: has no codes of {folder}; put them there with `sicot index publish --index {folder.parent} "
                    f"--database {ADDRESS}{address}`"
                )
            self._client.load_collection(self._name)
        except self._broken as error:
            raise InputError(f"{address}: {_said(error)}") from error

    def _closest(
        self, view: View, query: np.ndarray, code: np.ndarray, first: int, last: int, count: int
    ) -> np.ndarray:
        if first == last:
            return np.zeros(0, np.int64)
        try:
            found = self._client.search(
                self._name, data=[code.tobytes()], anns_field="code", limit=min(count, _MOST),
                filter=f"place >= {first} and place < {last}", search_params={"metric_type": "HAMMING"},
            )  # fmt: skip
        except self._broken as error:
            raise IndexUnavailable(f"Milvus: {_said(error)}") from error
        return np.array(found[0].ids, np.int64)

    def close(self) -> None:
        super().close()
        self._client.close()


def _connected(address: str) -> tuple[Any, type[Exception]]:
    """A client, and what it raises."""
    try:
        from pymilvus import MilvusClient, MilvusException
    except ImportError as error:
        raise InputError(
            f"no {error.name} here to use Milvus with; install it: pip install 'sicot_jax[milvus]'"
        ) from error
    try:
        return MilvusClient(address), MilvusException
    except MilvusException as error:
        raise InputError(f"{address}: {_said(error)}; start Milvus, or mend the address") from error


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
