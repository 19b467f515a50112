"""What recognition asks of an index, wherever it lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from sicot_jax.index.storage.layout import Manifest
from sicot_jax.index.storage.products import Product

CANDIDATES = 1000  # photos that codes propose and features put in order
WIDEST = 16  # times as many where they are of too few products


class IndexUnavailable(Exception):
    """The index cannot be read at the moment, and may be again: its database is gone, its file is
    locked.
    """


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """A photo (`place`) near a query, of which product, and their cosine."""

    product: int
    place: int
    similarity: float


@dataclasses.dataclass(frozen=True)
class Near:
    """Of a query, nearest first. products: each by its nearest photo; photos: whosever they are."""

    products: list[Neighbour]
    photos: list[Neighbour]


@dataclasses.dataclass(frozen=True)
class ActiveProducts:
    """Which classes may be answers. withdrawn: numbers of products that may not, sorted int64. For
    products that came after the model, `products` int64 [M], rows of the classifier made from their
    photos: kernel float32 [M, D], bias float32 [M].

    names [K]: of categories; category: that of each product by its number, int64, K where it has
    none.
    """

    withdrawn: np.ndarray
    products: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    names: tuple[str, ...]
    category: np.ndarray


class ProductIndex(Protocol):
    """Threads may call all of it at the same time. IndexUnavailable where it cannot be read at the
    moment.

    `offered` and `counts` are of the last `refresh`; what the others see may be newer.
    """

    @property
    def manifest(self) -> Manifest: ...

    def nearest(
        self,
        embeddings: np.ndarray,
        k: int,
        *,
        photos: int = 0,
        category: str | None = None,
        candidates: int = 0,
    ) -> list[Neighbours]:
        """The k products and the photos nearest to each of embeddings [B, D], fewer where there are
        fewer.
        """
        ...

    def active_products(self) -> ActiveProducts: ...

    def products(self, numbers: Sequence[int]) -> list[Product | None]:
        """ProductStore; None for one that is not offered."""
        ...

    def product(self, sku: str) -> Product | None: ...

    def count_photos(self, number: int) -> int:
        """How many are offered of a product."""
        ...

    def picture(self, place: int) -> bytes | None: ...

    def refresh(self) -> bool:
        """See what was committed since; whether there was anything."""
        ...

    def counts(self) -> dict[str, int]:
        """Products and photos that are offered."""
        ...

    def close(self) -> None: ...
