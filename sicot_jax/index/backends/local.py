"""A version folder as a `ProductIndex`: codes searched in a memory map, re-ranked by features,
cards from SQLite.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sicot_jax.errors import InputError
from sicot_jax.index.backends.base import (
    CANDIDATES,
    WIDEST,
    IndexUnavailable,
    Neighbours,
    Neighbour,
    ActiveProducts,
)
from sicot_jax.index.storage import inverted_lists as lists
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.binary_codes import BinaryEncoder
from sicot_jax.index.storage.inverted_lists import Lists
from sicot_jax.index.storage.products import ProductStore, Product
from sicot_jax.index.storage.vectors import VectorFiles, cosines, import_faiss, unit


@dataclasses.dataclass(frozen=True)
class View:
    """One moment of the index; never changed. Arrays have a line for each photo.

    later: category -> places and codes of its photos that lie outside its range: they came after
      the build, or their product's category was changed; `moved` marks those in the range that they
      have left.
    """

    features: np.ndarray  # float16 [N, D]
    codes: np.ndarray  # uint8 [N, bits / 8]
    owners: np.ndarray  # int32 [N]
    gone: np.ndarray  # bool [N]
    moved: np.ndarray  # bool [N]
    later: dict[str, tuple[np.ndarray, np.ndarray]]
    offered: ActiveProducts
    counts: dict[str, int]


class LocalIndex:
    """The version in `folder`. InputError where it is none, split, or damaged."""

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, layout.read_unsharded_manifest(folder)
        self._faiss = import_faiss()
        self.codebook = BinaryEncoder.load(folder / layout.BINARY_ENCODER)
        self._vectors = VectorFiles(folder, self.manifest.width, self.manifest.bits)
        listed = layout.POSTING_LISTS in self.manifest.sha256
        self._lists = Lists(folder, self.manifest.num_photos, self.manifest.width) if listed else None
        self.cards = ProductStore(folder / layout.PRODUCTS)
        # SQLite tells of changes to the connection that asks: one alone for that, under a lock.
        self._watch, self._watching = ProductStore(folder / layout.PRODUCTS, shared=True), threading.Lock()
        self._built = self._categories()
        self._seen = self._watch.changes()
        self._view = self._look()

    def refresh(self) -> bool:
        with self._watching, _reading():
            seen = self._watch.changes()
            if seen == self._seen:
                return False
            self._view, self._seen = self._look(), seen
            return True

    def _categories(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Names, and the category of each product, as they were at the build: photos lie in order
        of their categories.
        """
        owners = self._vectors.memmap(layout.ROW_PRODUCTS, self.manifest.num_photos)
        names = tuple(name for name in self.manifest.category_ranges if name)
        category = np.full(int(owners.max(initial=-1)) + 1, len(names))
        for number, name in enumerate(names):
            category[owners[slice(*self.manifest.category_ranges[name])]] = number
        return names, category

    def _look(self) -> View:
        state = self._watch.state(self.manifest.width)
        features, codes, owners = (
            self._vectors.memmap(name, state.places)
            for name in (layout.FEATURES, layout.CODES, layout.ROW_PRODUCTS)
        )
        gone, moved = np.zeros(state.places, bool), np.zeros(state.places, bool)
        gone[state.withdrawn_places] = True
        if len(state.withdrawn_products):
            gone |= np.isin(owners, state.withdrawn_products)
        later: dict[str, list[int]] = {}
        for place, category in self._watch.connection.execute(
            "SELECT place, category FROM photos JOIN products USING (product) WHERE place >= ? AND place < ? "
            "UNION ALL SELECT place, category FROM moved CROSS JOIN photos USING (product) JOIN products USING (product) "
            "WHERE place < ? ORDER BY place",  # CROSS: few have moved, so begin with them
            (self.manifest.num_photos, state.places, self.manifest.num_photos),
        ):
            later.setdefault(category, []).append(place)
            moved[place] = True
        named = self._named(owners, later)
        offered = ActiveProducts(
            state.withdrawn_products, state.row_products, state.kernel, state.bias, *named
        )
        lines = {name: np.array(places) for name, places in later.items()}
        outside = {name: (places, codes[places]) for name, places in lines.items()}
        return View(features, codes, owners, gone, moved, outside, offered, self._watch.counts())

    def _named(
        self, owners: np.ndarray, later: dict[str, list[int]]
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """Names and categories of now."""
        names, built = self._built
        of_now = (*names, *(name for name in later if name and name not in set(names)))
        number = {name: position for position, name in enumerate(of_now)}
        category = np.full(
            max(self._watch.ends()[1], len(built)), len(of_now)
        )  # photos need no card to be searched
        category[: len(built)] = np.where(built == len(names), len(of_now), built)
        for name, places in later.items():
            category[owners[places]] = number.get(name, len(of_now))
        return of_now, category

    def active_products(self) -> ActiveProducts:
        return self._view.offered

    def nearest(
        self,
        embeddings: np.ndarray,
        k: int,
        *,
        photos: int = 0,
        category: str | None = None,
        candidates: int = 0,
    ) -> list[Neighbours]:
        """As `ProductIndex` says. `candidates`: photos that are put in order by their features; up
        to 16 times as many are looked at where they belong to fewer than k products.
        """
        view = self._view
        queries = unit(embeddings)
        codes = self.codebook.encode(queries)
        first, last = (
            (0, len(view.codes))
            if category is None
            else self.manifest.categories.get(category, [0, 0])
        )
        outside = None if category is None else view.later.get(category)
        size = last - first + (len(outside[0]) if outside else 0)
        wanted = max(candidates or CANDIDATES, k, photos)
        most = min(wanted * WIDEST, size)
        found: list[Neighbours] = []
        for query, code in zip(queries, codes, strict=True):
            count, hits = min(wanted, size), Neighbours([], [])
            while size and (k or photos):
                places = self._closest(view, query, code, first, last, count)
                if category is not None:
                    places = places[~view.moved[places]]
                if outside:
                    places = np.concatenate(
                        [places, outside[0][self._nearest_codes(code, outside[1], count)]]
                    )
                hits = _ranked(view, query, places[~view.gone[places]], k, photos)
                if len(hits.products) == k or count == most:
                    break
                count = min(count * 4, most)
            found.append(hits)
        return found

    def _closest(
        self, view: View, query: np.ndarray, code: np.ndarray, first: int, last: int, count: int
    ) -> np.ndarray:
        """Lines of the range nearest by code: of all of it, or, where it is large, of the lists
        that are nearest and of what came after the build.
        """
        if self._lists is None or last - first < max(lists.FROM, lists.SPARE * count):
            return self._nearest_codes(code, view.codes[first:last], count) + first
        built = min(last, self.manifest.num_photos)
        lines = np.concatenate(
            [self._lists.near(query, first, built, lists.SPARE * count), np.arange(built, last)]
        )
        return lines[self._nearest_codes(code, _gathered(view.codes, lines), count)]

    def _nearest_codes(self, code: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
        """Lines of the `count` codes nearest by Hamming distance."""
        if not len(codes):
            return np.zeros(0, np.int64)
        self._faiss.omp_set_num_threads(
            1
        )  # of this thread: a request has one, more of them would wait for each other
        return self._faiss.knn_hamming(code[None], codes, min(count, len(codes)), variant="hc")[1][
            0
        ]

    def products(self, numbers: Sequence[int]) -> list[Product | None]:
        with _reading():
            return self.cards.products(numbers)

    def product(self, sku: str) -> Product | None:
        with _reading():
            return self.cards.product(sku)

    def count_photos(self, number: int) -> int:
        with _reading():
            return self.cards.count_photos(number)

    def picture(self, place: int) -> bytes | None:
        with _reading():
            return self.cards.picture(place)

    def counts(self) -> dict[str, int]:
        return self._view.counts

    def close(self) -> None:
        self.cards.close()
        self._watch.close()


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, InputError) as error:  # a thread's first read opens the file
        raise IndexUnavailable(f"cards: {error}") from error


def _gathered(codes: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """Eight bytes at a time where codes have as many: twice as fast."""
    words = codes.view(np.uint64) if codes.shape[1] % 8 == 0 else codes
    return words.take(lines, axis=0).view(np.uint8)


def _ranked(view: View, query: np.ndarray, places: np.ndarray, k: int, photos: int) -> Near:
    """The k products with the photos of largest cosine among `places`, and the first of those
    photos.
    """
    places = np.sort(places)  # one way through the map
    similarity = cosines(view.features, places, query)
    order = np.argsort(-similarity, kind="stable")
    owners = view.owners[places[order]]
    _, first = np.unique(owners, return_index=True)

    def neighbours(ranks: np.ndarray) -> list[Neighbour]:
        at = order[ranks]
        lines = zip(
            owners[ranks].tolist(), places[at].tolist(), similarity[at].tolist(), strict=True
        )
        return [Neighbour(*line) for line in lines]

    return Neighbours(neighbours(np.sort(first)[:k]), neighbours(np.arange(min(photos, len(order)))))
