"""A version folder as a `ProductIndex`: codes searched in a memory map, re-ranked by features, cards from SQLite."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.errors import InputError
from sicot_jax.index import layout
from sicot_jax.index.cards import Cards, Product
from sicot_jax.index.product_index import Neighbour, Offered
from sicot_jax.index.vectors import Codebook, Vectors, unit

CANDIDATES = 200  # photos that codes propose and features put in order


@dataclasses.dataclass(frozen=True)
class View:
    """One moment of the index; never changed. Arrays have a line for each photo."""

    features: np.ndarray  # float16 [N, D]
    codes: np.ndarray  # uint8 [N, bits / 8]
    owners: np.ndarray  # int32 [N]
    gone: np.ndarray  # bool [N]
    later: dict[str, np.ndarray]  # category -> places of photos that came after the build
    offered: Offered


class EmbeddedIndex:
    """The version in `folder`. InputError where it is none, or damaged."""

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, layout.read_manifest(folder)
        self._faiss = _import_faiss()
        self.codebook = Codebook.load(folder / layout.CODEBOOK)
        self._vectors = Vectors(folder, self.manifest.width, self.manifest.bits)
        self.cards = Cards(folder / layout.CARDS)
        # SQLite tells of changes to the connection that asks: one alone for that, under a lock.
        self._watch, self._watching = Cards(folder / layout.CARDS), threading.Lock()
        self._seen = self._watch.changes()
        self._view = self._look()

    def refresh(self) -> bool:
        with self._watching:
            seen = self._watch.changes()
            if seen == self._seen:
                return False
            self._view, self._seen = self._look(), seen
            return True

    def _look(self) -> View:
        state = self._watch.state(self.manifest.width)
        features, codes, owners = (
            self._vectors.mapped(name, state.places) for name in (layout.FEATURES, layout.CODES, layout.OWNERS)
        )
        gone = np.zeros(state.places, bool)
        gone[state.withdrawn_places] = True
        if len(state.withdrawn_products):
            gone |= np.isin(owners, state.withdrawn_products)
        later: dict[str, list[int]] = {}
        for place, category in self._watch.connection.execute(
            "SELECT place, category FROM photos JOIN products USING (product) WHERE place >= ? AND place < ? ORDER BY place",
            (self.manifest.photos, state.places),
        ):
            later.setdefault(category, []).append(place)
        offered = Offered(state.withdrawn_products, state.row_products, state.kernel, state.bias)
        return View(features, codes, owners, gone, {name: np.array(places) for name, places in later.items()}, offered)

    def offered(self) -> Offered:
        return self._view.offered

    def nearest(
        self, embeddings: np.ndarray, k: int, *, category: str | None = None, candidates: int = 0
    ) -> list[list[Neighbour]]:
        """As `ProductIndex` says. `candidates`: photos that are put in order by their features; more are looked at where
        they belong to fewer than k products.
        """
        view = self._view
        queries = unit(embeddings)
        codes = self.codebook.encode(queries)
        parts = [(0, len(view.codes))] if category is None else self._parts(view, category)
        size = sum(stop - start for start, stop in parts)
        wanted = max(candidates or CANDIDATES, k)
        found: list[list[Neighbour]] = []
        for query, code in zip(queries, codes, strict=True):
            count, hits = min(wanted, size), []
            while size:
                places = self._closest_codes(view, code, parts, count)
                hits = _ranked(view, query, places[~view.gone[places]], k)
                if len(hits) == k or count == size:
                    break
                count = min(count * 4, size)
            found.append(hits)
        return found

    def _parts(self, view: View, category: str) -> list[tuple[int, int]]:
        first, last = self.manifest.categories.get(category, (0, 0))
        later = view.later.get(category, np.zeros(0, np.int64)).tolist()
        return [(first, last)] * (first < last) + [(place, place + 1) for place in later]

    def _closest_codes(self, view: View, code: np.ndarray, parts: Sequence[tuple[int, int]], count: int) -> np.ndarray:
        """Places of the `count` codes nearest by Hamming distance."""
        found, distances = [], []
        for start, stop in parts:
            some = view.codes[start:stop]
            near, places = self._faiss.knn_hamming(code[None], some, min(count, len(some)), variant="hc")
            found.append(places[0] + start)
            distances.append(near[0])
        if len(found) == 1:
            return found[0]
        places, near = np.concatenate(found), np.concatenate(distances)
        return places[np.argsort(near, kind="stable")[:count]]

    def products(self, numbers: Sequence[int]) -> list[Product | None]:
        return self.cards.products(numbers)

    def product(self, sku: str) -> Product | None:
        return self.cards.product(sku)

    def picture(self, place: int) -> bytes | None:
        return self.cards.picture(place)

    def counts(self) -> dict[str, int]:
        return self.cards.counts()

    def close(self) -> None:
        self.cards.close()
        self._watch.close()


def _ranked(view: View, query: np.ndarray, places: np.ndarray, k: int) -> list[Neighbour]:
    """The k products with the photos of largest cosine among `places`."""
    places = np.sort(places)  # one way through the map
    similarity = np.asarray(view.features[places], np.float32) @ query
    order = np.argsort(-similarity, kind="stable")
    owners = view.owners[places[order]]
    _, first = np.unique(owners, return_index=True)
    best = order[np.sort(first)[:k]]
    return [
        Neighbour(int(view.owners[p]), int(p), float(s)) for p, s in zip(places[best], similarity[best], strict=True)
    ]


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise InputError("no faiss here to search with; install it: pip install 'sicot_jax[service]'") from error
    faiss.omp_set_num_threads(1)  # a request a thread: more of them would wait for each other
    return faiss
