"""The shards of a split index as one `ProductIndex`.

    INDEX/v000001/              recogniser, fitted files, a manifest with the number of shards
    INDEX/v000001/shard-0/ ...  a version of some products: product p is in shard p mod N, with
                                all of its photos

Shards keep their products' ids; row r of shard s is row r N + s of the index. A shard may be served
alone, on a separate machine. `indexing/split.py` writes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sicot_jax.index.backends.base import ActiveProducts, Neighbour, Neighbours
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import ProductRecord


def shard_folder(folder: Path, shard: int) -> Path:
    """Returns the folder of a shard.

    Args:
      folder: version folder.
      shard: number of the shard, from 0.

    Returns:
      Version folder of the shard.
    """
    return folder / f"shard-{shard}"


class ShardedIndex:
    """All shards of a version, opened for search."""

    def __init__(self, folder: Path):
        """Opens the shards.

        Args:
          folder: version folder.

        Raises:
          InputError: a shard cannot be read.
        """
        self.folder, self.manifest = folder, layout.read_index_manifest(folder)
        self.shards = [
            LocalIndex(shard_folder(folder, shard)) for shard in range(self.manifest.num_shards)
        ]
        self._active = _merge_active([shard.active_products() for shard in self.shards])

    def nearest(
        self,
        embeddings: np.ndarray,
        k: int,
        *,
        num_photos: int = 0,
        category: str | None = None,
        candidates: int = 0,
    ) -> list[Neighbours]:
        """Finds the products and photos nearest to each query; see `ProductIndex.nearest`.

        Each shard puts as many candidates in order as one index would: together they propose what
        one index proposes (except for photos of equal distance), and more.

        Args:
          embeddings: queries, float [B, D].
          k: products of each query.
          num_photos: photos of each query.
          category: search this category alone.
          candidates: photos that each shard puts in order by their features, 0 for `CANDIDATES`.

        Returns:
          Results of each query.
        """
        by_shard = [
            shard.nearest(
                embeddings, k, num_photos=num_photos, category=category, candidates=candidates
            )
            for shard in self.shards
        ]
        return [
            Neighbours(
                self._merge([result.products for result in results], k),
                self._merge([result.photos for result in results], num_photos),
            )
            for results in zip(*by_shard, strict=True)
        ]

    def _merge(self, by_shard: Sequence[Sequence[Neighbour]], count: int) -> list[Neighbour]:
        merged = [
            dataclasses.replace(neighbour, row=self._global_row(shard, neighbour.row))
            for shard, neighbours in enumerate(by_shard)
            for neighbour in neighbours
        ]
        return sorted(merged, key=lambda neighbour: (-neighbour.similarity, neighbour.row))[:count]

    def _global_row(self, shard: int, row: int) -> int:
        return row * len(self.shards) + shard

    def _shard_of(self, number: int) -> LocalIndex:
        """The shard of a product id or a row."""
        return self.shards[number % len(self.shards)]

    def _with_global_rows(self, record: ProductRecord | None, shard: int) -> ProductRecord | None:
        if record is None:
            return None
        rows = [self._global_row(shard, row) for row in record.picture_rows]
        return dataclasses.replace(record, picture_rows=rows)

    def active_products(self) -> ActiveProducts:
        """Returns which products may be answers."""
        return self._active

    def products(self, product_ids: Sequence[int]) -> list[ProductRecord | None]:
        """Reads records.

        Args:
          product_ids: their ids.

        Returns:
          A record for each id; None for a deleted or unknown product.
        """
        records: dict[int, ProductRecord | None] = {}
        for number, shard in enumerate(self.shards):
            ids = [int(p) for p in product_ids if p % len(self.shards) == number]
            for product_id, record in zip(ids, shard.products(ids), strict=True):
                records[product_id] = self._with_global_rows(record, number)
        return [records[int(product_id)] for product_id in product_ids]

    def product(self, sku: str) -> ProductRecord | None:
        """Reads one record.

        Args:
          sku: its key.

        Returns:
          The record; None for a deleted or unknown product.
        """
        records = (
            self._with_global_rows(shard.product(sku), number)
            for number, shard in enumerate(self.shards)
        )
        return next((record for record in records if record is not None), None)

    def count_photos(self, product_id: int) -> int:
        """Returns how many photos of a product are not deleted.

        Args:
          product_id: the product.

        Returns:
          The number of photos.
        """
        return self._shard_of(product_id).count_photos(product_id)

    def picture(self, row: int) -> bytes | None:
        """Reads the picture of a photo.

        Args:
          row: row of the photo.

        Returns:
          Encoded image; None where none is kept.
        """
        return self._shard_of(row).picture(row // len(self.shards))

    def refresh(self) -> bool:
        """Reads what was committed since the last call.

        Returns:
          Whether there was anything new.
        """
        changed = [shard.refresh() for shard in self.shards]
        if any(changed):
            self._active = _merge_active([shard.active_products() for shard in self.shards])
        return any(changed)

    def counts(self) -> dict[str, int]:
        """Returns how many "products" and "photos" are not deleted."""
        counts = [shard.counts() for shard in self.shards]
        return {name: sum(count[name] for count in counts) for name in counts[0]}

    def close(self) -> None:
        """Closes all shards."""
        for shard in self.shards:
            shard.close()


def _merge_active(shards: Sequence[ActiveProducts]) -> ActiveProducts:
    """Of shards where product p is of shard p mod N."""
    new_products = np.concatenate([shard.new_products for shard in shards])
    order = np.argsort(new_products)
    names = tuple(sorted({name for shard in shards for name in shard.category_names}))
    category = np.full(max(len(shard.product_category) for shard in shards), len(names))
    for number, shard in enumerate(shards):
        merged = np.array([*(names.index(name) for name in shard.category_names), len(names)])
        products = slice(number, len(shard.product_category), len(shards))
        category[products] = merged[shard.product_category[products]]
    return ActiveProducts(
        np.sort(np.concatenate([shard.deleted for shard in shards])),
        new_products[order],
        np.concatenate([shard.kernel for shard in shards])[order],
        np.concatenate([shard.bias for shard in shards])[order],
        names,
        category,
    )
