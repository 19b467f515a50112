"""Stops a change of many products at once: a feed that was cut off, or columns that moved."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sicot_jax.catalog.importing.manifest import read_source
from sicot_jax.catalog.importing.manifest_rows import ManifestRow
from sicot_jax.common.text import pluralize
from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import ProductStore, parse_quality

if TYPE_CHECKING:
    from sicot_jax.indexing.embed import IndexSource

MAX_CHANGE_SHARE = 0.2
_FEW = 5  # products that may always change, if they are not more than a third of all
_MAX_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class ProductState:
    """What is compared of a product.

    Attributes:
      title: text.
      category: name, "" for none.
      price: its price; None where it is unknown.
    """

    title: str
    category: str
    price: float | None = None


class MassChanges:
    """Counts the products of an index by kind of change."""

    def __init__(self, total: int):
        """Begins to count.

        Args:
          total: products that are not deleted before the change.
        """
        self.total = total
        self._skus: dict[str, list[str]] = {}
        self._photos = (0, 0)

    def compare(self, sku: str, before: ProductState, after: ProductState | None) -> None:
        """Counts one product.

        Args:
          sku: its key.
          before: as the version in use has it.
          after: as it will be; None where it is withdrawn.
        """
        if after is None:
            self._count("be withdrawn", sku)
            return
        if before.title.split() != after.title.split() and before.title.strip():
            self._count("be renamed" if after.title.strip() else "lose the title", sku)
        if before.category and not after.category:
            self._count("lose the category", sku)
        if after.price == 0 and before.price != 0:
            self._count("get the price 0", sku)

    def compare_photos(self, before: int, after: int) -> None:
        """Counts photos.

        Args:
          before: photos that the version in use has of products that stay.
          after: photos of the next one.
        """
        self._photos = before, after

    def _count(self, kind: str, sku: str) -> None:
        self._skus.setdefault(kind, []).append(sku)

    def check(self, source: Path, max_share: float) -> None:
        """Refuses more changes of a kind than are allowed.

        Args:
          source: where the changes come from, for the message.
          max_share: share of all products that may change in the same way; a few always may, unless
            the share is 0.

        Raises:
          InputError: more than that, or no share.
        """
        if not 0 <= max_share <= 1:
            raise InputError(f"--max-change-share {max_share}, wanted a share from 0 to 1")
        few = max(1, min(_FEW, self.total // 3)) if max_share else 0
        allowed = max(max_share * self.total, few)
        refusals = [
            f"{len(skus)} of {pluralize(self.total, 'product')} would {kind}, such as "
            f"{', '.join(map(repr, skus[:_MAX_EXAMPLES]))}"
            for kind, skus in self._skus.items()
            if len(skus) > allowed
        ]
        photos, left = self._photos
        if photos - left > max_share * photos:
            refusals.append(
                f"{photos - left} of {pluralize(photos, 'photo')} of products that stay would go"
            )
        if refusals:
            raise InputError(
                f"{source}: {'; '.join(refusals)}; at most {max_share:.0%} may at once, and the "
                "index stays as it is; check whether the source is complete, or give "
                "--max-change-share 1 once if this is right"
            )


def check_new_version(index: Path, source: IndexSource, max_share: float) -> None:
    """Compares the products of the version in use with those of the next one.

    Args:
      index: index folder; without a version in use nothing is compared.
      source: what the next version is built from.
      max_share: as for `MassChanges.check`.

    Raises:
      InputError: too many products would be withdrawn, renamed, or lose title or category.
    """
    products = source.catalog.classes
    after = {
        products.sku[c]: ProductState(products.title[c], products.category[c])
        for c in range(len(products))
        if not products.discontinued[c]
    }
    photos = Counter(products.sku[c] for c in source.labels.tolist())
    _compare(index, lambda sku, _: after.get(sku), photos, Path(source.catalog.name), max_share)


def check_source(index: Path, source: Path, max_share: float) -> None:
    """Compares the products of the version in use with a source that is not imported yet.

    Args:
      index: index folder; without a version in use nothing is compared.
      source: manifest, or a folder with one folder per SKU.
      max_share: as for `MassChanges.check`.

    Raises:
      InputError: as `check_new_version`.
      TableError: the manifest cannot be read.
    """
    titles: defaultdict[str, list[str]] = defaultdict(list)
    category: dict[str, str] = {}
    photos: Counter[str] = Counter()
    for row in read_source(source):
        if isinstance(row, ManifestRow):
            if row.title not in titles[row.sku]:
                titles[row.sku].append(row.title)
            category[row.sku] = category.get(row.sku) or row.category
            photos[row.sku] += 1

    def state(sku: str, before: ProductState) -> ProductState:
        # Rows of one product may differ; an import chooses one of their titles.
        same = [title for title in titles[sku] if title.split() == before.title.split()]
        return ProductState((same or titles[sku])[0], category[sku], before.price)

    _compare(
        index,
        lambda sku, before: state(sku, before) if sku in photos else None,
        photos,
        source,
        max_share,
    )


def check_imported_version(index: Path, folder: Path, source: Path, max_share: float) -> None:
    """Compares the products of the version in use with those of an imported one.

    Args:
      index: index folder; without a version in use nothing is compared.
      folder: folder of the imported version.
      source: where it comes from, for the message.
      max_share: as for `MassChanges.check`.

    Raises:
      InputError: as `check_new_version`.
    """
    after, photos = _read_states(folder / layout.PRODUCTS)
    _compare(index, lambda sku, _: after.get(sku), photos, source, max_share)


def check_added_rows(
    store: ProductStore, rows: Iterable[ManifestRow], source: Path, max_share: float
) -> None:
    """Compares the texts of products with those that rows to be added give them.

    Args:
      store: products of the index.
      rows: the rows; what they leave empty stays as it is.
      source: where they come from, for the message.
      max_share: as for `MassChanges.check`.

    Raises:
      InputError: too many products would be renamed.
    """
    texts: dict[str, tuple[str, str]] = {}
    for row in rows:
        title, category = texts.get(row.sku, ("", ""))
        texts[row.sku] = title or row.title, category or row.category
    changes, skus = MassChanges(store.counts()["products"]), list(texts)
    known = zip(skus, store.product_ids(skus), strict=True)
    ids = {product: sku for sku, product in known if product is not None}
    for record in store.products(list(ids)):
        if record is not None:  # a deleted product is restored
            title, category = texts[record.sku]
            before = ProductState(record.title, record.category)
            after = ProductState(title or record.title, category or record.category)
            changes.compare(record.sku, before, after)
    changes.check(source, max_share)


def _compare(
    index: Path,
    after: Callable[[str, ProductState], ProductState | None],
    photos_after: Mapping[str, int],
    source: Path,
    max_share: float,
) -> None:
    if not (index / layout.CURRENT).exists():
        return
    try:
        before, photos = _read_states(layout.current_version(index) / layout.PRODUCTS)
    except (InputError, sqlite3.Error) as error:
        print(f"changes are not compared with the version in use: {error}", file=sys.stderr)
        return
    changes = MassChanges(len(before))
    kept = 0
    for sku, state in before.items():
        changes.compare(sku, state, new := after(sku, state))
        kept += photos.get(sku, 0) if new is not None else 0
    remaining = sum(number for sku, number in photos_after.items() if sku in before)
    changes.compare_photos(kept, remaining)
    changes.check(source, max_share)


def _read_states(path: Path) -> tuple[dict[str, ProductState], dict[str, int]]:
    """Products by SKU, and the number of photos of each; none of them deleted."""
    query = "SELECT sku, title, category, quality FROM products WHERE NOT deleted"
    photos = (
        "SELECT sku, count(*) FROM photos JOIN products USING (product_id) "
        "WHERE NOT photos.deleted AND NOT products.deleted GROUP BY product_id"
    )
    with contextlib.closing(ProductStore(path)) as store:
        states = {
            sku: ProductState(title, category, parse_quality(quality).get("price"))
            for sku, title, category, quality in store.connection.execute(query)
        }
        return states, dict(store.connection.execute(photos).fetchall())
