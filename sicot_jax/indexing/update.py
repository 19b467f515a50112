"""Products and photos that come and go, without a rebuild. A piece is one commit: what was stopped
can be given again.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.util
import itertools
import math
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sicot_jax.catalog.importing.manifest import read_folders, read_manifest
from sicot_jax.catalog.importing.manifest_rows import DroppedRow, ManifestRow
from sicot_jax.catalog.importing.photos import FolderPhotos, Prepared, prepare_all
from sicot_jax.catalog.importing.settings import ImportSettings
from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout
from sicot_jax.index.storage import products as cards_of
from sicot_jax.index.storage.binary_codes import BinaryEncoder
from sicot_jax.index.storage.products import PICTURES, QUALITY, SHARPNESS, ProductStore
from sicot_jax.index.storage.vectors import VectorFiles, unit
from sicot_jax.indexing import new_products as rows
from sicot_jax.recognizer import Engine, jax_engine, onnx_engine
from sicot_jax.search.ranking_features import picture_sharpness
from sicot_jax.weights import bundle as folders

_PIECE = 256  # photos of one commit
_BATCH = 32


@dataclasses.dataclass
class Change:
    """What an addition came to. `dropped`: rows that could not be used, a line each."""

    new_products: int = 0
    new_photos: int = 0
    known_photos: int = 0
    dropped: list[str] = dataclasses.field(default_factory=list)

    def summary(self) -> str:
        known = f", {self.known_photos} photos were there" if self.known_photos else ""
        dropped = f", {len(self.dropped)} rows dropped" if self.dropped else ""
        return f"{self.new_products} products and {self.new_photos} photos new{known}{dropped}"


@contextlib.contextmanager
def _opened(index: Path) -> Iterator[tuple[Path, layout.IndexManifest, ProductStore]]:
    with layout.write_lock(index):
        folder = layout.current_version(index)
        manifest = layout.read_unsharded_manifest(folder)
        with contextlib.closing(ProductStore(folder / layout.PRODUCTS, writable=True)) as cards:
            yield folder, manifest, cards


def add(index: Path, source: Path) -> Change:
    """Products and photos of a manifest, or of a folder with one folder per SKU. A product that is
    there gets the photos that it lacks, and what the manifest says of it; one that was withdrawn is
    offered again.

    A product that the model has no class for gets a row of the classifier from its photos. Rows
    that cannot be used are dropped and told. InputError: no such source, nothing in it that can be
    used.
    """
    change = Change()
    with _opened(index) as (folder, manifest, cards):
        listed = read_folders(source) if source.is_dir() else read_manifest(source)
        root = source if source.is_dir() else source.parent
        adding = _Adding(folder, manifest, cards)
        for piece in _batched(listed, _PIECE):
            usable = [row for row in piece if isinstance(row, ManifestRow)]
            change.dropped += [str(row) for row in piece if isinstance(row, DroppedRow) and row.bad]
            photos = prepare_all(
                FolderPhotos(root),
                [r.image for r in usable],
                short_side=ImportSettings().short_side,
                workers=1,
            )
            prepared = list(zip(usable, photos, strict=True))
            change.dropped += [
                f"{row.image}: {photo.error}" for row, photo in prepared if photo.error
            ]
            adding.commit([(row, photo) for row, photo in prepared if not photo.error], change)
        cards.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    if change.dropped and not change.new_photos + change.known_photos:
        raise InputError(
            f"{source}: no row can be used, such as {change.dropped[0]}; nothing was changed"
        )
    return change


def _batched(rows: Iterator, size: int) -> Iterator[tuple]:
    rows = iter(rows)
    while piece := tuple(itertools.islice(rows, size)):
        yield piece


class _Adding:
    """Commits photos with their products."""

    def __init__(self, folder: Path, manifest: layout.IndexManifest, cards: ProductStore):
        converted = folders.read_converted(folder / layout.MODEL)
        self.preprocessing, self.classes = converted.preprocessing, converted.model.classes
        self.engine = open_engine(folder)
        self.codebook = BinaryEncoder.load(folder / layout.BINARY_ENCODER)
        self.made_with = rows.load(folder)
        self.vectors, self.cards = VectorFiles(folder, manifest.width, manifest.bits), cards

    def commit(self, photos: Sequence[tuple[ManifestRow, Prepared]], change: Change) -> None:
        places, following = self.cards.ends()
        skus = sorted({row.sku for row, _ in photos})
        there = dict(zip(skus, self.cards.numbers(skus), strict=True))
        numbers = {sku: number for sku, number in there.items() if number is not None}
        new = [sku for sku in skus if sku not in numbers]
        numbers |= {sku: number for number, sku in enumerate(new, max(following, self.classes))}
        change.new_products += len(new)
        seen: set[tuple[int, str]] = set()
        fresh = []
        for row, photo in photos:
            key = numbers[row.sku], photo.image_id
            if key in seen or self._is_there(*key):
                change.known_photos += 1
            else:
                fresh.append((numbers[row.sku], photo))
            seen.add(key)
        features = self._features([photo.image for _, photo in fresh])
        owners = np.array([number for number, _ in fresh], np.int32)
        self.vectors.write(layout.FEATURES, places, features)
        self.vectors.write(layout.CODES, places, self.codebook.encode(features))
        self.vectors.write(layout.ROW_PRODUCTS, places, owners)
        with self.cards.change() as connection:
            cards_of.upsert_products(connection, self._cards(connection, photos, numbers))
            shown = {number: self._pictures(connection, number) for number in set(owners.tolist())}
            for place, (number, photo) in enumerate(fresh, places):
                jpeg = photo.image if shown[number] < PICTURES else None
                if not shown[number]:
                    cards_of.merge_quality(
                        connection, number, {SHARPNESS: picture_sharpness(photo.image)}
                    )
                shown[number] += jpeg is not None
                cards_of.insert_photos(connection, [(place, number, photo.image_id, jpeg)])
            cards_of.set_num_rows(connection, places + len(fresh))
            later = sorted(
                {n for n in numbers.values() if n >= self.classes}
            )  # those without new photos for their titles
            rows.put(connection, self.vectors, self.made_with, later, places + len(fresh))
        change.new_photos += len(fresh)

    def _features(self, photos: Sequence[bytes]) -> np.ndarray:
        """Unit float16 [N, D]."""
        rows = [np.zeros((0, self.vectors.width), np.float16)]
        for first in range(0, len(photos), _BATCH):
            batch = self.preprocessing.batch(photos[first : first + _BATCH])
            rows.append(unit(self.engine(batch).embedding).astype(np.float16))
        return np.concatenate(rows)

    def _cards(
        self, connection, photos: Sequence[tuple[ManifestRow, Prepared]], numbers: dict[str, int]
    ):
        """What the rows say of their products; what they leave empty stays as it is."""
        found: dict[str, list[str]] = {}
        for row, _ in photos:
            card = found.setdefault(row.sku, ["", "", ""])
            found[row.sku] = [
                old or new
                for old, new in zip(card, (row.title, row.tags, row.category), strict=True)
            ]
        for sku, card in found.items():
            before = connection.execute(
                "SELECT title, tags, category, quality FROM products WHERE product = ?",
                (numbers[sku],),
            ).fetchone()
            quality = cards_of.parse_quality(before[3]) if before else {}
            title, tags, category = (
                new or old for new, old in zip(card, before or ("", "", ""), strict=False)
            )
            yield numbers[sku], sku, title, tags, category, quality

    def _is_there(self, number: int, image_id: str) -> bool:
        # "+": no look at the product's own photos, of which there may be thousands.
        find = "SELECT 1 FROM photos WHERE image_id = ? AND +product = ? AND NOT withdrawn"
        return self.cards.connection.execute(find, (image_id, number)).fetchone() is not None

    def _pictures(self, connection: sqlite3.Connection, number: int) -> int:
        find = "SELECT count(*) FROM pictures JOIN photos USING (place) WHERE pictures.product = ? AND NOT withdrawn"
        return connection.execute(find, (number,)).fetchone()[0]


def open_engine(folder: Path) -> Engine:
    if (folder / layout.ONNX_MODEL).is_dir() and importlib.util.find_spec("onnxruntime"):
        return onnx_engine(folder / layout.ONNX_MODEL)
    return jax_engine(folders.read_converted(folder / layout.MODEL))


def remove(index: Path, skus: Sequence[str], *, photos: Sequence[str] = ()) -> int:
    """Withdraw products, and single photos by their image_id; how many of both were offered before.

    InputError where one of them was never there; then nothing is changed.
    """
    with _opened(index) as (folder, manifest, cards):
        numbers = cards.numbers(skus)
        if unknown := [sku for sku, number in zip(skus, numbers, strict=True) if number is None]:
            raise InputError(
                f"{index}: no product {unknown[0]!r} ({len(unknown)} of {len(skus)} are unknown); none was removed"
            )
        find = "SELECT 1 FROM photos WHERE image_id = ?"
        for image_id in photos:
            if cards.connection.execute(find, (image_id,)).fetchone() is None:
                raise InputError(f"{index}: no photo {image_id!r}; nothing was removed")
        with cards.change() as connection:
            before = connection.total_changes
            connection.executemany(
                "UPDATE products SET withdrawn = 1 WHERE product = ? AND NOT withdrawn",
                ((n,) for n in numbers),
            )
            connection.executemany(
                "UPDATE photos SET withdrawn = 1 WHERE image_id = ? AND NOT withdrawn",
                ((p,) for p in photos),
            )
            removed = connection.total_changes - before
            if photos:  # rows are made of them
                _make_rows_again(connection, folder, manifest, cards, _owners(connection, photos))
            return removed


def _make_rows_again(
    connection: sqlite3.Connection,
    folder: Path,
    manifest: layout.IndexManifest,
    cards: ProductStore,
    numbers: Sequence[int],
) -> None:
    """Of those of these products that the model has no class for."""
    classes = folders.read_config(folder / layout.MODEL).model.classes
    if later := sorted({number for number in numbers if number >= classes}):
        vectors = VectorFiles(folder, manifest.width, manifest.bits)
        rows.put(connection, vectors, rows.load(folder), later, cards.ends()[0])


def _owners(connection: sqlite3.Connection, photos: Sequence[str]) -> list[int]:
    find = "SELECT DISTINCT product FROM photos WHERE image_id = ?"
    return [row[0] for photo in photos for row in connection.execute(find, (photo,))]


def update(index: Path, source: Path) -> int:
    """Titles, tags, categories and quality of products from a CSV with a column "sku"; how many
    products were changed.

    An empty cell leaves what is there. InputError: a column that no card has, an unknown SKU, a
    number that is none; then nothing is changed.
    """
    with _opened(index) as (folder, manifest, cards):
        changes = _read_updates(source, cards)
        with cards.change() as connection:
            for number, texts, quality in changes:
                for name, value in texts.items():
                    connection.execute(
                        f"UPDATE products SET {name} = ? WHERE product = ?", (value, number)
                    )
                if quality:
                    cards_of.merge_quality(connection, number, quality)
            named = [number for number, texts, _ in changes if {"title", "category"} & set(texts)]
            _make_rows_again(connection, folder, manifest, cards, named)
        return len(changes)


_TEXTS = ("title", "tags", "category")


def _read_updates(source: Path, cards: ProductStore) -> list[tuple[int, dict[str, str], dict[str, float]]]:
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            names = rows.fieldnames or []
            allowed = ("sku", *_TEXTS, *QUALITY)
            if "sku" not in names or (unknown := [name for name in names if name not in allowed]):
                wrong = "no column sku" if "sku" not in names else f"a column {unknown[0]!r}"
                raise InputError(
                    f"{source}: {wrong}, wanted sku and some of {', '.join(allowed[1:])}"
                )
            return [_read_update(f"{source}: line {rows.line_num}", row, cards) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source}: {error}; wanted a CSV in UTF-8 with a column sku") from error


def _read_update(
    where: str, row: dict[str, str], cards: ProductStore
) -> tuple[int, dict[str, str], dict[str, float]]:
    if None in row or None in row.values():
        raise InputError(f"{where}: more or fewer cells than columns; nothing was changed")
    number = cards.numbers([row["sku"].strip()])[0]
    if number is None:
        raise InputError(f"{where}: no product {row['sku']!r}; nothing was changed")
    quality = {}
    for name in QUALITY:
        if row.get(name, "").strip():
            try:
                quality[name] = float(row[name])
            except ValueError:
                quality[name] = math.nan
            if not math.isfinite(quality[name]):
                raise InputError(
                    f"{where}: {name}={row[name]!r}, wanted a number; nothing was changed"
                )
    return number, {name: row[name] for name in _TEXTS if row.get(name, "").strip()}, quality
