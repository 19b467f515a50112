"""A version folder as a `ProductIndex`: codes, features and product ids in memory maps, SQLite."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sicot_jax.common.linalg import l2_normalize
from sicot_jax.errors import InputError
from sicot_jax.index.backends.approximate_search import (
    nearest_codes,
    rank_photos,
    take_codes,
)
from sicot_jax.index.backends.base import (
    CANDIDATES,
    MAX_WIDENING,
    ActiveProducts,
    IndexUnavailableError,
    Neighbours,
)
from sicot_jax.index.storage import inverted_lists, layout
from sicot_jax.index.storage.binary_codes import BinaryEncoder
from sicot_jax.index.storage.inverted_lists import InvertedLists
from sicot_jax.index.storage.products import ProductRecord, ProductStore
from sicot_jax.index.storage.vectors import VectorFiles, import_faiss

# Photos outside their category's range: added after the build, or of a product that changed its
# category. CROSS JOIN: few products have, so begin with them.
_OUT_OF_RANGE = """
SELECT row, category FROM photos JOIN products USING (product_id)
WHERE row >= :built AND row < :rows
UNION ALL
SELECT row, category FROM recategorized CROSS JOIN photos USING (product_id)
  JOIN products USING (product_id) WHERE row < :built
ORDER BY row"""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One commit of the index; never changed.

    Attributes:
      features: unit embeddings, float16 [N, D].
      codes: uint8 [N, bits / 8].
      row_products: product id of each row, int32 [N].
      deleted: whether a row's photo or product is deleted, bool [N].
      out_of_range: whether a row is not part of its category's range, bool [N].
      extra: category -> rows and codes of its photos outside its range.
      active: products that may be answers.
      counts: products and photos that are not deleted.
    """

    features: np.ndarray
    codes: np.ndarray
    row_products: np.ndarray
    deleted: np.ndarray
    out_of_range: np.ndarray
    extra: dict[str, tuple[np.ndarray, np.ndarray]]
    active: ActiveProducts
    counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Scope:
    """Rows that a search reads: the range [first, last), and others of the same category."""

    first: int
    last: int
    category: str | None
    extra: tuple[np.ndarray, np.ndarray] | None

    @property
    def size(self) -> int:
        return self.last - self.first + (len(self.extra[0]) if self.extra else 0)


class LocalIndex:
    """The files of one version, opened for search."""

    def __init__(self, folder: Path):
        """Opens a version.

        Args:
          folder: version folder.

        Raises:
          InputError: there is no version, or it is sharded or damaged.
        """
        self.folder, self.manifest = folder, layout.read_unsharded_manifest(folder)
        import_faiss()  # where there is none, said before the first search
        self.encoder = BinaryEncoder.load(folder / layout.BINARY_ENCODER)
        self._vectors = VectorFiles(folder, self.manifest.width, self.manifest.bits)
        self._lists = (
            InvertedLists(folder, self.manifest.num_photos, self.manifest.width)
            if layout.POSTING_LISTS in self.manifest.sha256
            else None
        )
        self.store = ProductStore(folder / layout.PRODUCTS)
        # SQLite counts commits for each connection: one connection asks, under a lock.
        self._watch = ProductStore(folder / layout.PRODUCTS, shared=True)
        self._refreshing = threading.Lock()
        self._built = self._built_categories()
        self._data_version = self._watch.data_version()
        self._snapshot = self._read_snapshot()

    def refresh(self) -> bool:
        """Reads what was committed since the last call.

        Returns:
          Whether there was anything new.
        """
        with self._refreshing, _reading():
            data_version = self._watch.data_version()
            if data_version == self._data_version:
                return False
            self._snapshot, self._data_version = self._read_snapshot(), data_version
            return True

    def _built_categories(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Category names and the category of each product, as they were at the build."""
        row_products = self._vectors.memmap(layout.ROW_PRODUCTS, self.manifest.num_photos)
        names = tuple(name for name in self.manifest.category_ranges if name)
        category = np.full(int(row_products.max(initial=-1)) + 1, len(names))
        for number, name in enumerate(names):
            category[row_products[slice(*self.manifest.category_ranges[name])]] = number
        return names, category

    def _read_snapshot(self) -> Snapshot:
        state = self._watch.state(self.manifest.width)
        features, codes, row_products = (
            self._vectors.memmap(name, state.num_rows)
            for name in (layout.FEATURES, layout.CODES, layout.ROW_PRODUCTS)
        )
        deleted = np.zeros(state.num_rows, bool)
        deleted[state.deleted_rows] = True
        if len(state.deleted_products):
            deleted |= np.isin(row_products, state.deleted_products)
        out_of_range = np.zeros(state.num_rows, bool)
        rows_of: dict[str, list[int]] = {}
        for row, category in self._watch.connection.execute(
            _OUT_OF_RANGE, {"built": self.manifest.num_photos, "rows": state.num_rows}
        ):
            rows_of.setdefault(category, []).append(row)
            out_of_range[row] = True
        arrays = {name: np.array(rows) for name, rows in rows_of.items()}
        active = ActiveProducts(
            state.deleted_products,
            state.new_products,
            state.kernel,
            state.bias,
            *self._categories(row_products, rows_of),
        )
        return Snapshot(
            features,
            codes,
            row_products,
            deleted,
            out_of_range,
            {name: (rows, codes[rows]) for name, rows in arrays.items()},
            active,
            self._watch.counts(),
        )

    def _categories(
        self, row_products: np.ndarray, rows_of: dict[str, list[int]]
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """Category names and the category of each product, as they are now."""
        built_names, built = self._built
        names = (
            *built_names,
            *(name for name in rows_of if name and name not in set(built_names)),
        )
        number = {name: position for position, name in enumerate(names)}
        # Photos can be searched before their product has a record.
        category = np.full(max(self._watch.next_product_id(), len(built)), len(names))
        category[: len(built)] = np.where(built == len(built_names), len(names), built)
        for name, rows in rows_of.items():
            category[row_products[rows]] = number.get(name, len(names))
        return names, category

    def active_products(self) -> ActiveProducts:
        """Returns which products may be answers."""
        return self._snapshot.active

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

        Args:
          embeddings: queries, float [B, D].
          k: products of each query.
          num_photos: photos of each query.
          category: search this category alone.
          candidates: photos that are put in order by their features, 0 for `CANDIDATES`.

        Returns:
          Results of each query.
        """
        snapshot = self._snapshot
        queries = l2_normalize(np.asarray(embeddings, np.float32))
        codes = self.encoder.encode(queries)
        scope = self._scope(snapshot, category)
        count = max(candidates or CANDIDATES, k, num_photos)
        results: list[Neighbours] = []
        for query, code in zip(queries, codes, strict=True):
            if scope.size and (k or num_photos):
                results.append(self._search(snapshot, query, code, scope, (k, num_photos, count)))
            else:
                results.append(Neighbours([], []))
        return results

    def _scope(self, snapshot: Snapshot, category: str | None) -> _Scope:
        if category is None:
            return _Scope(0, len(snapshot.codes), None, None)
        first, last = self.manifest.category_ranges.get(category, [0, 0])
        return _Scope(first, last, category, snapshot.extra.get(category))

    def _search(
        self,
        snapshot: Snapshot,
        query: np.ndarray,
        code: np.ndarray,
        scope: _Scope,
        counts: tuple[int, int, int],
    ) -> Neighbours:
        """Widens the candidates of one query until they belong to k products.

        And until a quarter of them is not deleted. `counts`: products, photos and candidates.
        """
        k, num_photos, candidates = counts
        most = min(candidates * MAX_WIDENING, scope.size)
        count = min(candidates, scope.size)
        while True:
            rows = self._propose(snapshot, query, code, (scope.first, scope.last), count)
            if scope.category is not None:
                rows = rows[~snapshot.out_of_range[rows]]
            if scope.extra:
                extra_rows, extra_codes = scope.extra
                rows = np.append(rows, _nearest(snapshot, code, extra_rows, extra_codes, count))
            rows = rows[~snapshot.deleted[rows]]
            if count == most or len(rows) >= candidates // 4:
                result = rank_photos(
                    snapshot.features, snapshot.row_products, query, rows, (k, num_photos)
                )
                if len(result.products) == k or count == most:
                    return result
            count = min(count * 4, most)

    def _propose(
        self,
        snapshot: Snapshot,
        query: np.ndarray,
        code: np.ndarray,
        scope: tuple[int, int],
        count: int,
    ) -> np.ndarray:
        """Rows in [first, last) nearest by code.

        Of a large range only the nearest inverted lists and rows added after the build are read.
        """
        first, last = scope
        probed = inverted_lists.PROBE_FACTOR * count
        if self._lists is None or last - first < max(inverted_lists.MIN_ROWS, probed):
            codes, deleted = snapshot.codes[first:last], snapshot.deleted[first:last]
            return nearest_codes(code, codes, count, deleted.take) + first
        built = min(last, self.manifest.num_photos)
        rows = np.concatenate(
            [self._lists.probe(query, first, built, probed), np.arange(built, last)]
        )
        return _nearest(snapshot, code, rows, take_codes(snapshot.codes, rows), count)

    def products(self, product_ids: Sequence[int]) -> list[ProductRecord | None]:
        """Reads records.

        Args:
          product_ids: their ids.

        Returns:
          A record for each id; None for a deleted or unknown product.
        """
        with _reading():
            return self.store.products(product_ids)

    def product(self, sku: str) -> ProductRecord | None:
        """Reads one record.

        Args:
          sku: its key.

        Returns:
          The record; None for a deleted or unknown product.
        """
        with _reading():
            return self.store.product(sku)

    def count_photos(self, product_id: int) -> int:
        """Returns how many photos of a product are not deleted.

        Args:
          product_id: the product.

        Returns:
          The number of photos.
        """
        with _reading():
            return self.store.count_photos(product_id)

    def picture(self, row: int) -> bytes | None:
        """Reads the picture of a photo.

        Args:
          row: row of the photo.

        Returns:
          Encoded image; None where none is kept.
        """
        with _reading():
            return self.store.picture(row)

    def counts(self) -> dict[str, int]:
        """Returns how many "products" and "photos" are not deleted."""
        return self._snapshot.counts

    def close(self) -> None:
        """Closes the product store."""
        self.store.close()
        self._watch.close()


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, InputError) as error:  # a thread's first read opens the file
        raise IndexUnavailableError(f"product store: {error}") from error


def _nearest(
    snapshot: Snapshot, code: np.ndarray, rows: np.ndarray, codes: np.ndarray, count: int
) -> np.ndarray:
    """Those of some rows, whose codes these are, that are nearest by code."""
    return rows[nearest_codes(code, codes, count, lambda at: snapshot.deleted[rows[at]])]
