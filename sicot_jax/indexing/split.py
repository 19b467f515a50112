"""`sicot index split`: copies an index into several shards that answer as one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.common.files import atomic_directory
from sicot_jax.errors import InputError
from sicot_jax.index.backends.sharded import shard_folder
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.inverted_lists import write_lists_if_large
from sicot_jax.index.storage.products import ProductStore, set_num_rows
from sicot_jax.index.storage.vectors import VectorFiles

_CHUNK = 1 << 16
# Active photos of the shard in the order of the new rows: by category and product.
_KEPT_PHOTOS = """
CREATE TEMP TABLE kept AS
SELECT photos.row AS old_row, category, product_id, image_id,
  row_number() OVER (ORDER BY category, product_id, photos.row) - 1 AS row
FROM source.photos JOIN source.products USING (product_id)
WHERE NOT photos.deleted AND NOT products.deleted AND product_id % ? = ?
  AND photos.row < (SELECT value FROM source.state WHERE name = 'num_rows')"""


def split_index(index: Path, out: Path, num_shards: int) -> Path:
    """Copies the active products of an index into a new, sharded index.

    Deleted photos are left out, and photos are re-sorted by category.

    Args:
      index: index folder.
      out: folder of the new index.
      num_shards: how many shards.

    Returns:
      Version folder of the new index.

    Raises:
      InputError: fewer than two shards, `out` exists, or `index` is sharded already.
    """
    if num_shards < 2:
        raise InputError(f"--shards {num_shards}, wanted 2 or more")
    with layout.write_lock(index), atomic_directory(out) as new:
        folder = layout.current_version(index)
        manifest = layout.read_unsharded_manifest(folder)
        version = new / layout.BUILDING
        _copy_fitted(folder, version, shutil.copy2)
        shards = [
            _write_shard(folder, version, manifest, shard, num_shards)
            for shard in range(num_shards)
        ]
        fitted = {name: digest for name, digest in manifest.sha256.items() if name in layout.FITTED}
        layout.write_index_manifest(
            version,
            dataclasses.replace(
                manifest,
                num_photos=sum(shard.num_photos for shard in shards),
                num_products=sum(shard.num_products for shard in shards),
                category_ranges={},
                sha256=fitted,
                num_shards=num_shards,
            ),
        )
        with layout.write_lock(new):
            layout.publish_version(new, version)
    return layout.current_version(out)


def _copy_fitted(folder: Path, to: Path, copy: Callable[..., Any]) -> None:
    """Copies what does not depend on the rows; `copy` of one file."""
    to.mkdir()
    for name in (*layout.FITTED, layout.MODEL, layout.ONNX_MODEL):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, to / name, copy_function=copy)
        elif (folder / name).exists():
            copy(folder / name, to / name)


def _write_shard(
    folder: Path, version: Path, manifest: layout.IndexManifest, shard: int, num_shards: int
) -> layout.IndexManifest:
    part = shard_folder(version, shard)
    _copy_fitted(version, part, os.link)  # never written again: one file on the disk
    with contextlib.closing(ProductStore.create(part / layout.PRODUCTS)) as store:
        rows, row_products, ranges = _copy_products(folder, store, shard, num_shards)
        store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        counts = store.counts()
    source, vectors = (VectorFiles(path, manifest.width, manifest.bits) for path in (folder, part))
    vectors.write_rows(layout.ROW_PRODUCTS, 0, row_products)
    for name in (layout.FEATURES, layout.CODES):
        stored = source.memmap(name, int(rows.max(initial=-1)) + 1)
        vectors.write_rows(name, 0, stored[:0])
        for first in range(0, len(rows), _CHUNK):
            vectors.write_rows(name, first, stored[rows[first : first + _CHUNK]])
    write_lists_if_large(part, vectors, ranges)
    shard_manifest = dataclasses.replace(
        manifest,
        num_photos=counts["photos"],
        num_products=counts["products"],
        category_ranges=ranges,
        sha256=layout.file_digests(part),
    )
    layout.write_index_manifest(part, shard_manifest)
    return shard_manifest


def _copy_products(
    folder: Path, store: ProductStore, shard: int, num_shards: int
) -> tuple[np.ndarray, np.ndarray, dict[str, list[int]]]:
    """Copies the shard's products, photos, pictures and class weights.

    Returns the old rows, int64 [N], the product of each, int32 [N], and the range of each category.
    """
    connection, mine = store.connection, (num_shards, shard)
    path = (folder / layout.PRODUCTS).absolute().as_uri() + "?mode=ro"
    connection.execute("ATTACH ? AS source", (path,))
    with store.transaction():
        for table in ("products", "class_weights"):
            connection.execute(
                f"INSERT INTO {table} SELECT * FROM source.{table} WHERE product_id % ? = ?", mine
            )
        connection.execute(_KEPT_PHOTOS, mine)
        connection.execute(
            "INSERT INTO photos (row, product_id, image_id) "
            "SELECT row, product_id, image_id FROM kept"
        )
        connection.execute(
            "INSERT INTO pictures SELECT kept.row, kept.product_id, jpeg FROM kept "
            "JOIN source.pictures ON source.pictures.row = kept.old_row"
        )
        kept = connection.execute("SELECT old_row, product_id FROM kept ORDER BY row")
        rows = np.fromiter(kept, np.dtype([("row", np.int64), ("product_id", np.int32)]))
        set_num_rows(connection, len(rows))
        ranges = connection.execute(
            "SELECT category, min(row), max(row) + 1 FROM kept GROUP BY 1 ORDER BY 2"
        ).fetchall()
    connection.execute("DETACH source")
    return rows["row"], rows["product_id"], {name: [first, last] for name, first, last in ranges}
