"""The interface of a product index, whatever stores it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from sicot_jax.index.storage.layout import IndexManifest
from sicot_jax.index.storage.products import ProductRecord

CANDIDATES = 1000  # photos that codes propose and features put in order
MAX_WIDENING = 16  # times as many candidates where they belong to too few products


class IndexUnavailableError(Exception):
    """The index cannot be read at the moment, and may be again: no database, a locked file."""


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """A photo near a query.

    Attributes:
      product_id: its product.
      row: its row.
      similarity: cosine with the query.
    """

    product_id: int
    row: int
    similarity: float


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Search results of one query, nearest first.

    Attributes:
      products: each product by its nearest photo.
      photos: photos of any product.
    """

    products: list[Neighbour]
    photos: list[Neighbour]


@dataclasses.dataclass(frozen=True)
class ActiveProducts:
    """Which products may be answers, their categories, and class weights of new products.

    Attributes:
      deleted: ids of products that are never returned, sorted, int64.
      new_products: ids of products added after the model was trained, int64 [M].
      kernel: their class weights, made from their photos, float32 [M, D].
      bias: float32 [M].
      category_names: names of the K categories.
      product_category: category of each product by its id, int64 [products]; K for none.
    """

    deleted: np.ndarray
    new_products: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    category_names: tuple[str, ...]
    product_category: np.ndarray


class ProductIndex(Protocol):
    """Search and product records; threads may call all methods at the same time.

    `active_products` and `counts` are those of the last `refresh`; the other methods may see newer
    commits. Every method raises IndexUnavailableError where the index cannot be read at the moment.
    """

    @property
    def manifest(self) -> IndexManifest:
        """What the version was built from."""
        ...

    def nearest(
        self,
        embeddings: np.ndarray,
        k: int,
        *,
        num_photos: int = 0,
        category: str | None = None,
        candidates: int = 0,
    ) -> list[Neighbours]:
        """Finds the products and photos nearest to each query.

        Args:
          embeddings: queries, float [B, D].
          k: products of each query.
          num_photos: photos of each query.
          category: search this category alone.
          candidates: photos that are put in order by their features, 0 for `CANDIDATES`; up to
            `MAX_WIDENING` times as many where they belong to fewer than k products.

        Returns:
          Results of each query, fewer than asked for where there are fewer.
        """
        ...

    def active_products(self) -> ActiveProducts:
        """Returns which products may be answers."""
        ...

    def products(self, product_ids: Sequence[int]) -> list[ProductRecord | None]:
        """Reads records.

        Args:
          product_ids: their ids.

        Returns:
          A record for each id; None for a deleted or unknown product.
        """
        ...

    def product(self, sku: str) -> ProductRecord | None:
        """Reads one record.

        Args:
          sku: its key.

        Returns:
          The record; None for a deleted or unknown product.
        """
        ...

    def count_photos(self, product_id: int) -> int:
        """Returns how many photos of a product are not deleted.

        Args:
          product_id: the product.

        Returns:
          The number of photos.
        """
        ...

    def picture(self, row: int) -> bytes | None:
        """Reads the picture of a photo.

        Args:
          row: row of the photo.

        Returns:
          Encoded image; None where none is kept.
        """
        ...

    def refresh(self) -> bool:
        """Reads what was committed since the last call.

        Returns:
          Whether there was anything new.
        """
        ...

    def counts(self) -> dict[str, int]:
        """Returns how many "products" and "photos" are not deleted."""
        ...

    def close(self) -> None:
        """Releases files and connections."""
        ...
