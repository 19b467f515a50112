"""`sicot index split`: an index in several parts, each an index version of its own, that answer as
one.

OUT/v000001/               the recogniser, what was fitted, a manifest that says how many parts
there are OUT/v000001/shard-0/ ...   a whole version of some products: product p lies in part p mod
N, with all of its photos

Parts have their products' numbers; place p of part s is place p N + s of the whole. A part may be
served alone, on a machine of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sicot_jax.common.files import new_folder
from sicot_jax.errors import InputError
from sicot_jax.index.backends.base import Neighbours, Neighbour, ActiveProducts
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import inverted_lists as lists
from sicot_jax.index.storage import layout
from sicot_jax.index.storage import products as cards_of
from sicot_jax.index.storage.products import ProductStore, Product
from sicot_jax.index.storage.vectors import VectorFiles

_LINES = 1 << 16


def shard_folder(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard}"


def split(index: Path, out: Path, shards: int) -> Path:
    """The version of the new index `out`: what the version in use of `index` offers, in so many
    parts.

    Withdrawn photos are gone, categories are ranges again. InputError: fewer than two parts, or
    `index` is split already.
    """
    if shards < 2:
        raise InputError(f"--shards {shards}, wanted 2 or more")
    with layout.write_lock(index), new_folder(out) as new:
        folder = layout.current_version(index)
        manifest = layout.read_unsharded_manifest(folder)
        version = new / layout.BUILDING
        _copy_fitted(folder, version, shutil.copy2)
        made = [_part(folder, version, manifest, shard, shards) for shard in range(shards)]
        photos, products = (
            sum(getattr(part, name) for part in made) for name in ("photos", "products")
        )
        fitted = {name: digest for name, digest in manifest.sha256.items() if name in layout.FITTED}
        layout.write_index_manifest(
            version,
            dataclasses.replace(
                manifest,
                photos=photos,
                products=products,
                categories={},
                sha256=fitted,
                shards=shards,
            ),
        )
        with layout.write_lock(new):
            layout.publish_version(new, version)
    return layout.current_version(out)


def _copy_fitted(folder: Path, to: Path, copy) -> None:
    """What does not depend on the lines; `copy` of one file."""
    to.mkdir()
    for name in (*layout.FITTED, layout.MODEL, layout.ONNX_MODEL):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, to / name, copy_function=copy)
        elif (folder / name).exists():
            copy(folder / name, to / name)


def _part(
    folder: Path, version: Path, manifest: layout.IndexManifest, shard: int, shards: int
) -> layout.IndexManifest:
    part = shard_folder(version, shard)
    _copy_fitted(version, part, os.link)  # never written again: one file on the disk
    with contextlib.closing(ProductStore.create(part / layout.PRODUCTS)) as cards:
        lines, owners, categories = _copy_cards(folder, cards, shard, shards)
        cards.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        counts = cards.counts()
    whole, vectors = (VectorFiles(each, manifest.width, manifest.bits) for each in (folder, part))
    vectors.write(layout.ROW_PRODUCTS, 0, owners)
    for name in (layout.FEATURES, layout.CODES):
        stored = whole.memmap(name, int(lines.max(initial=-1)) + 1)
        vectors.write(name, 0, stored[:0])
        for first in range(0, len(lines), _LINES):
            vectors.write(name, first, stored[lines[first : first + _LINES]])
    lists.write_lists_if_large(part, vectors, categories)
    made = dataclasses.replace(
        manifest, **counts, categories=categories, sha256=layout.file_digests(part)
    )  # type: ignore[arg-type]
    layout.write_index_manifest(part, made)
    return made


def _copy_cards(
    folder: Path, cards: ProductStore, shard: int, shards: int
) -> tuple[np.ndarray, np.ndarray, dict[str, list[int]]]:
    """The part's products, photos, pictures and rows, by category and product. Their lines in the
    whole, int64, their owners, int32, and where each category is.
    """
    connection, mine = cards.connection, (shards, shard)
    connection.execute(
        "ATTACH ? AS whole", ((folder / layout.PRODUCTS).absolute().as_uri() + "?mode=ro",)
    )
    with cards.change():
        connection.execute(
            "INSERT INTO products SELECT * FROM whole.products WHERE product % ? = ?", mine
        )
        connection.execute("INSERT INTO rows SELECT * FROM whole.rows WHERE product % ? = ?", mine)
        connection.execute(
            "CREATE TEMP TABLE kept AS SELECT photos.place AS line, category, product, image_id, "
            "row_number() OVER (ORDER BY category, product, photos.place) - 1 AS place "
            "FROM whole.photos JOIN whole.products USING (product) "
            "WHERE NOT photos.withdrawn AND NOT products.withdrawn AND product % ? = ? "
            "AND photos.place < (SELECT value FROM whole.state WHERE name = 'places')",
            mine,
        )
        connection.execute(
            "INSERT INTO photos (place, product, image_id) SELECT place, product, image_id FROM kept"
        )
        connection.execute(
            "INSERT INTO pictures SELECT kept.place, kept.product, jpeg FROM kept "
            "JOIN whole.pictures ON whole.pictures.place = kept.line"
        )
        found = connection.execute("SELECT line, product FROM kept ORDER BY place")
        stored = np.fromiter(found, np.dtype([("line", np.int64), ("product", np.int32)]))
        cards_of.set_num_rows(connection, len(stored))
        ranges = connection.execute(
            "SELECT category, min(place), max(place) + 1 FROM kept GROUP BY 1 ORDER BY 2"
        ).fetchall()
    connection.execute("DETACH whole")
    return stored["line"], stored["product"], {name: [first, last] for name, first, last in ranges}


class ShardedIndex:
    """The parts in `folder` as one `ProductIndex`. InputError where one cannot be read."""

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, layout.read_index_manifest(folder)
        self.parts = [
            LocalIndex(shard_folder(folder, shard)) for shard in range(self.manifest.num_shards)
        ]
        self._offered = _merged([part.active_products() for part in self.parts])

    def nearest(
        self,
        embeddings: np.ndarray,
        k: int,
        *,
        photos: int = 0,
        category: str | None = None,
        candidates: int = 0,
    ) -> list[Neighbours]:
        """As `ProductIndex` says. Each part puts as many candidates in order as one index would:
        together they propose what one index proposes (but for photos of equal distance), and more.
        """
        of_parts = [
            part.nearest(embeddings, k, photos=photos, category=category, candidates=candidates)
            for part in self.parts
        ]
        return [
            Neighbours(
                self._best([n.products for n in near], k),
                self._best([n.photos for n in near], photos),
            )
            for near in zip(*of_parts, strict=True)
        ]

    def _best(self, of_parts: Sequence[Sequence[Neighbour]], count: int) -> list[Neighbour]:
        found = [
            dataclasses.replace(neighbour, place=self._place(shard, neighbour.place))
            for shard, neighbours in enumerate(of_parts)
            for neighbour in neighbours
        ]
        return sorted(found, key=lambda neighbour: (-neighbour.similarity, neighbour.place))[:count]

    def _place(self, shard: int, place: int) -> int:
        return place * len(self.parts) + shard

    def _of(self, number: int) -> tuple[LocalIndex, int]:
        """The part of a product or a place, and which part it is."""
        shard = number % len(self.parts)
        return self.parts[shard], shard

    def _card(self, product: Product | None, shard: int) -> Product | None:
        if product is None:
            return None
        return dataclasses.replace(
            product, pictures=[self._place(shard, place) for place in product.pictures]
        )

    def active_products(self) -> ActiveProducts:
        return self._offered

    def products(self, numbers: Sequence[int]) -> list[Product | None]:
        cards: dict[int, Product | None] = {}
        for shard, part in enumerate(self.parts):
            own = [int(number) for number in numbers if number % len(self.parts) == shard]
            cards |= {
                n: self._card(card, shard) for n, card in zip(own, part.products(own), strict=True)
            }
        return [cards[int(number)] for number in numbers]

    def product(self, sku: str) -> Product | None:
        found = (self._card(part.product(sku), shard) for shard, part in enumerate(self.parts))
        return next((card for card in found if card is not None), None)

    def count_photos(self, number: int) -> int:
        return self._of(number)[0].count_photos(number)

    def picture(self, place: int) -> bytes | None:
        return self._of(place)[0].picture(place // len(self.parts))

    def refresh(self) -> bool:
        seen = [part.refresh() for part in self.parts]
        if any(seen):
            self._offered = _merged([part.active_products() for part in self.parts])
        return any(seen)

    def counts(self) -> dict[str, int]:
        counts = [part.counts() for part in self.parts]
        return {name: sum(count[name] for count in counts) for name in counts[0]}

    def close(self) -> None:
        for part in self.parts:
            part.close()


def _merged(parts: Sequence[ActiveProducts]) -> ActiveProducts:
    """Of parts where product p is of part p mod N."""
    products = np.concatenate([part.products for part in parts])
    order = np.argsort(products)
    names = tuple(sorted({name for part in parts for name in part.names}))
    category = np.full(max(len(part.category) for part in parts), len(names))
    for shard, part in enumerate(parts):
        number = np.array([*(names.index(name) for name in part.names), len(names)])
        own = slice(shard, len(part.category), len(parts))
        category[own] = number[part.category[own]]
    return ActiveProducts(
        np.sort(np.concatenate([part.withdrawn for part in parts])),
        products[order],
        np.concatenate([part.kernel for part in parts])[order],
        np.concatenate([part.bias for part in parts])[order],
        names,
        category,
    )
