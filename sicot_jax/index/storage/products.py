"""`cards.sqlite`: products and their photos. A commit here is what makes an index's change visible.

Product numbers below the model's class count are class ids; later products have the numbers after.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import threading
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.errors import InputError

PICTURES = 4  # of a product that are kept to be shown
QUALITY = ("price", "sales", "conversion", "rating")  # numbers that a shop may bring along
SHARPNESS = "sharpness"  # beside them: of the first picture, by search/quality
# In a trigger "OR IGNORE" gives way to what the statement says that set it off, and an upsert says
# "fail".
_SCHEMA = """
CREATE TABLE state (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE products (
  product INTEGER PRIMARY KEY, sku TEXT NOT NULL UNIQUE, title TEXT NOT NULL, tags TEXT NOT NULL, category TEXT NOT NULL,
  quality TEXT NOT NULL DEFAULT '{}', withdrawn INTEGER NOT NULL DEFAULT 0);
CREATE TABLE photos (
  place INTEGER PRIMARY KEY, product INTEGER NOT NULL REFERENCES products, image_id TEXT NOT NULL,
  withdrawn INTEGER NOT NULL DEFAULT 0);
CREATE INDEX photos_of_product ON photos (product);
CREATE INDEX photos_by_id ON photos (image_id);
CREATE TABLE pictures (place INTEGER PRIMARY KEY, product INTEGER NOT NULL REFERENCES products, jpeg BLOB NOT NULL);
CREATE INDEX pictures_of_product ON pictures (product);
CREATE TABLE rows (product INTEGER PRIMARY KEY, kernel BLOB NOT NULL, bias REAL NOT NULL);
CREATE TABLE moved (product INTEGER PRIMARY KEY);
CREATE TRIGGER category_changed AFTER UPDATE OF category ON products WHEN old.category <> new.category
  BEGIN INSERT INTO moved SELECT new.product WHERE NOT EXISTS (SELECT 1 FROM moved WHERE product = new.product); END;
CREATE INDEX withdrawn_products ON products (product) WHERE withdrawn;
CREATE INDEX withdrawn_photos ON photos (place) WHERE withdrawn;
"""
# Few photos of a product can be shown, and there may be thousands of it: its card is read without a
# look at those.
_CARD = """
SELECT product, sku, title, tags, category, quality,
  (SELECT json_group_array(place) FROM pictures JOIN photos USING (place)
   WHERE pictures.product = products.product AND NOT photos.withdrawn)
FROM products WHERE NOT withdrawn AND """
_BY_NUMBER = "product IN (SELECT value FROM json_each(?))"
_PIECE = 1000  # cards of a statement, where all are read


@dataclasses.dataclass(frozen=True)
class Product:
    """A card. `pictures`: places of those of its photos that can be shown, at most `PICTURES` that
    are offered.
    """

    product: int
    sku: str
    title: str
    tags: str
    category: str
    quality: dict[str, float]
    pictures: list[int]


@dataclasses.dataclass(frozen=True)
class State:
    """What one moment's commit says: lines of the files that count, and what is withdrawn, sorted
    int64.
    """

    places: int
    withdrawn_products: np.ndarray
    withdrawn_places: np.ndarray
    row_products: np.ndarray  # int64 [M], with an imprinted row
    kernel: np.ndarray  # float32 [M, D]
    bias: np.ndarray  # float32 [M]


class Cards:
    """One file, a connection for each thread that reads; `shared`: one for all, whose users see to
    it that they take turns. Write inside `with cards.change():` alone.

    Whoever drops the last reference closes it, so that no thread loses the connection that it reads
    from.
    """

    def __init__(self, path: Path, *, writable: bool = False, shared: bool = False):
        self.path, self._writable, self._lock = path, writable, threading.Lock()
        self._of_thread: Any = types.SimpleNamespace() if shared else threading.local()
        self._opened: list[sqlite3.Connection] = []

    @classmethod
    def create(cls, path: Path) -> Cards:
        """A new file without products."""
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_SCHEMA)
        connection.execute("INSERT INTO state VALUES ('places', 0)")
        connection.commit()
        connection.close()
        return cls(path, writable=True)

    @property
    def connection(self) -> sqlite3.Connection:
        """InputError where the file cannot be opened."""
        found = getattr(self._of_thread, "connection", None)
        if found is None:
            mode = "rw" if self._writable else "ro"
            try:
                # The thread that closes it may be another one.
                found = sqlite3.connect(
                    f"{self.path.absolute().as_uri()}?mode={mode}",
                    uri=True,
                    check_same_thread=False,
                    timeout=30,
                )
                found.execute("PRAGMA synchronous = FULL")
                found.execute("SELECT count(*) FROM state")
            except sqlite3.Error as error:
                raise InputError(
                    f"{self.path}: {error}; readers too must be able to write beside it (SQLite's log), else build it again"
                ) from error
            self._of_thread.connection = found
            with self._lock:
                self._opened.append(found)
        return found

    def close(self) -> None:
        """Where no other thread reads any more."""
        for connection in self._opened:
            connection.close()
        self._opened.clear()
        self._of_thread.__dict__.clear()

    def __del__(self) -> None:
        for connection in self._opened:
            connection.close()

    def changes(self) -> int:
        """A number that differs after another process's commit; of this thread's connection,
        comparable with its own alone.
        """
        return self.connection.execute("PRAGMA data_version").fetchone()[0]

    def ends(self) -> tuple[int, int]:
        """Lines of the files that count, and the number after the last product's."""
        places = self.connection.execute(
            "SELECT value FROM state WHERE name = 'places'"
        ).fetchone()[0]
        return places, self.connection.execute(
            "SELECT coalesce(max(product) + 1, 0) FROM products"
        ).fetchone()[0]

    def change(self) -> sqlite3.Connection:
        """As a context: one transaction, undone by an exception."""
        self.connection.execute("BEGIN IMMEDIATE")
        return self.connection

    def state(self, width: int) -> State:
        """All of it from one transaction; `width` of the rows."""
        connection = self.connection
        with connection:
            connection.execute("BEGIN")
            places, _ = self.ends()
            gone = _integers(connection, "SELECT product FROM products WHERE withdrawn ORDER BY 1")
            places_gone = _integers(
                connection, "SELECT place FROM photos WHERE withdrawn ORDER BY 1"
            )
            rows = connection.execute(
                "SELECT product, kernel, bias FROM rows ORDER BY product"
            ).fetchall()
        kernel = np.frombuffer(b"".join(row[1] for row in rows), np.float32).reshape(
            len(rows), width
        )
        numbers = np.array([row[0] for row in rows], np.int64)
        return State(
            places,
            gone,
            places_gone,
            numbers,
            kernel,
            np.array([row[2] for row in rows], np.float32),
        )

    def counts(self) -> dict[str, int]:
        """Products and photos that are offered."""
        return {
            name: self.connection.execute(
                f"SELECT count(*) FROM {name} WHERE NOT withdrawn"
            ).fetchone()[0]
            for name in ("products", "photos")
        }

    def numbers(self, skus: Sequence[str]) -> list[int | None]:
        """Product numbers; None for a SKU that there is not, withdrawn ones have theirs."""
        find = "SELECT product FROM products WHERE sku = ?"
        rows = (self.connection.execute(find, (sku,)).fetchone() for sku in skus)
        return [row[0] if row else None for row in rows]

    def products(self, numbers: Sequence[int]) -> list[Product | None]:
        """Cards; None for one that there is not, or not any more. One statement, so that all are of
        one moment.
        """
        wanted = json.dumps([int(number) for number in numbers])
        found = {
            row[0]: _product(row) for row in self.connection.execute(_CARD + _BY_NUMBER, (wanted,))
        }
        return [found.get(int(number)) for number in numbers]

    def product(self, sku: str) -> Product | None:
        row = self.connection.execute(_CARD + "sku = ?", (sku,)).fetchone()
        return _product(row) if row else None

    def photos_of(self, number: int) -> int:
        """How many are offered of a product."""
        count = "SELECT count(*) FROM photos WHERE product = ? AND NOT withdrawn"
        return self.connection.execute(count, (number,)).fetchone()[0]

    def picture(self, place: int) -> bytes | None:
        row = self.connection.execute(
            "SELECT jpeg FROM pictures WHERE place = ?", (place,)
        ).fetchone()
        return row[0] if row else None

    def all_products(self) -> Iterator[Product]:
        """Every card that is offered, by number."""
        numbers = _integers(
            self.connection, "SELECT product FROM products WHERE NOT withdrawn ORDER BY 1"
        )
        for first in range(0, len(numbers), _PIECE):
            found = self.products(numbers[first : first + _PIECE].tolist())
            yield from (product for product in found if product is not None)


def _product(row: tuple) -> Product:
    number, sku, title, tags, category, quality, pictures = row
    return Product(
        number, sku, title, tags, category, json.loads(quality), sorted(json.loads(pictures))
    )


def put_products(
    connection: sqlite3.Connection,
    products: Iterable[tuple[int, str, str, str, str, dict[str, float]]],
) -> None:
    """(number, SKU, title, tags, category, quality); a card that is there is replaced, and offered
    again.
    """
    connection.executemany(
        "INSERT INTO products (product, sku, title, tags, category, quality) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (product) DO UPDATE SET title = excluded.title, tags = excluded.tags, category = excluded.category, "
        "quality = excluded.quality, withdrawn = 0",
        (
            (number, sku, title, tags, category, json.dumps(q))
            for number, sku, title, tags, category, q in products
        ),
    )


def put_photos(
    connection: sqlite3.Connection, photos: Iterable[tuple[int, int, str, bytes | None]]
) -> None:
    """(place, product, image_id, JPEG or None)."""
    for place, product, image_id, jpeg in photos:
        connection.execute(
            "INSERT INTO photos (place, product, image_id) VALUES (?, ?, ?)",
            (place, product, image_id),
        )
        if jpeg is not None:
            connection.execute(
                "INSERT OR REPLACE INTO pictures VALUES (?, ?, ?)", (place, product, jpeg)
            )


def put_rows(
    connection: sqlite3.Connection,
    products: Sequence[int],
    kernel: np.ndarray,
    bias: Sequence[float],
) -> None:
    """Imprinted rows of the classifier, float32 [M, D]."""
    rows = (
        (int(p), row.astype(np.float32).tobytes(), float(b))
        for p, row, b in zip(products, kernel, bias, strict=True)
    )
    connection.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", rows)


def read_quality(stored: str) -> dict[str, float]:
    return json.loads(stored)


def put_quality(connection: sqlite3.Connection, product: int, quality: dict[str, float]) -> None:
    """Numbers of a product, beside the others that it has."""
    merged = "UPDATE products SET quality = json_patch(quality, ?) WHERE product = ?"
    connection.execute(merged, (json.dumps(quality), product))


def set_places(connection: sqlite3.Connection, places: int) -> None:
    """How many lines of the files count."""
    connection.execute("UPDATE state SET value = ? WHERE name = 'places'", (places,))


def _integers(connection: sqlite3.Connection, query: str) -> np.ndarray:
    return np.fromiter((row[0] for row in connection.execute(query)), np.int64)
