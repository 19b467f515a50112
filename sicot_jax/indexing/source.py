"""The catalogue that an index is built from, its products matched to the model's classes."""

from __future__ import annotations

import dataclasses

import numpy as np

from sicot_jax.catalog.catalog import Catalog, ClassTable
from sicot_jax.errors import InputError
from sicot_jax.index.storage.vectors import category_ranges


@dataclasses.dataclass(frozen=True)
class IndexSource:
    """Products and training photos of a catalogue, in the order of the index.

    Attributes:
      catalog: the catalogue.
      class_table: products of the model's classes.
      product_ids: product id of each product of the catalogue, int64 [products]; ids below
        `num_classes` are class ids of the model.
      photos: indices of the training photos to index, ordered by category and product, int64 [N].
    """

    catalog: Catalog
    class_table: ClassTable
    product_ids: np.ndarray
    photos: np.ndarray

    @property
    def num_classes(self) -> int:
        """Classes of the model."""
        return len(self.class_table)

    @property
    def labels(self) -> np.ndarray:
        """Product of each photo as the catalogue numbers them, int [N]."""
        return np.asarray(self.catalog.splits["train"].labels)[self.photos]

    @property
    def row_products(self) -> np.ndarray:
        """Product id of each photo, int64 [N]."""
        return self.product_ids[self.labels]

    @property
    def category_ranges(self) -> dict[str, list[int]]:
        """Category -> [first row, last row + 1]."""
        return category_ranges(np.asarray(self.catalog.classes.category, str)[self.labels])


def match_catalog(catalog: Catalog, table: ClassTable) -> IndexSource:
    """Matches the products of a catalogue to the model's classes by SKU.

    Products that the model has no class for get the ids after its classes.

    Args:
      catalog: the run's catalogue, or a later version of it.
      table: products of the run's classes.

    Returns:
      What to index.

    Raises:
      InputError: no training photo of a product that is not discontinued.
    """
    products = catalog.classes
    class_ids = {sku: number for number, sku in enumerate(table.sku)}
    product_ids, next_id = np.empty(len(products), np.int64), len(class_ids)
    for product in range(len(products)):
        class_id = class_ids.get(products.sku[product])
        product_ids[product] = next_id if class_id is None else class_id
        next_id += class_id is None
    labels = np.asarray(catalog.splits["train"].labels)
    category = np.unique(np.asarray(products.category, str), return_inverse=True)[1]
    photos = np.lexsort((np.arange(len(labels)), labels, category[labels]))
    photos = photos[~np.asarray(products.discontinued, bool)[labels[photos]]]
    if not len(photos):
        raise InputError(
            f"{catalog.name}: no training photo of a product that is sold, wanted some to index; "
            "import with more"
        )
    return IndexSource(catalog, table, product_ids, photos)
