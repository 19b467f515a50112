"""`products.sqlite`: product records, their photos and pictures, and class weights of new products.

A commit here makes a change of the index visible. Product ids below the model's number of classes
are class ids; products that were added later have the ids after them.
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
QUALITY = ("price", "sales", "conversion", "rating")  # numbers that a shop may provide
SHARPNESS = "sharpness"  # computed from the first picture, stored with them
# In a trigger "OR IGNORE" gives way to the conflict clause of the outer statement, and an upsert
# has "fail"; hence WHERE NOT EXISTS.
_SCHEMA = """
CREATE TABLE state (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE products (
  product_id INTEGER PRIMARY KEY, sku TEXT NOT NULL UNIQUE, title TEXT NOT NULL,
  tags TEXT NOT NULL, category TEXT NOT NULL, quality TEXT NOT NULL DEFAULT '{}',
  deleted INTEGER NOT NULL DEFAULT 0);
CREATE TABLE photos (
  row INTEGER PRIMARY KEY, product_id INTEGER NOT NULL REFERENCES products,
  image_id TEXT NOT NULL, deleted INTEGER NOT NULL DEFAULT 0);
CREATE INDEX photos_of_product ON photos (product_id);
CREATE INDEX photos_by_id ON photos (image_id);
CREATE TABLE pictures (
  row INTEGER PRIMARY KEY, product_id INTEGER NOT NULL REFERENCES products, jpeg BLOB NOT NULL);
CREATE INDEX pictures_of_product ON pictures (product_id);
CREATE TABLE class_weights (
  product_id INTEGER PRIMARY KEY, kernel BLOB NOT NULL, bias REAL NOT NULL);
CREATE TABLE recategorized (product_id INTEGER PRIMARY KEY);
CREATE TRIGGER category_changed AFTER UPDATE OF category ON products
  WHEN old.category <> new.category
  BEGIN
    INSERT INTO recategorized SELECT new.product_id
    WHERE NOT EXISTS (SELECT 1 FROM recategorized WHERE product_id = new.product_id);
  END;
CREATE INDEX deleted_products ON products (product_id) WHERE deleted;
CREATE INDEX deleted_photos ON photos (row) WHERE deleted;
"""
# Joins from the few pictures of a product, not from its photos, of which there may be thousands.
_RECORD = """
SELECT product_id, sku, title, tags, category, quality,
  (SELECT json_group_array(row) FROM pictures JOIN photos USING (row)
   WHERE pictures.product_id = products.product_id AND NOT photos.deleted)
FROM products WHERE NOT deleted AND """
_BY_ID = "product_id IN (SELECT value FROM json_each(?))"
_RECORDS_PER_STATEMENT = 1000


@dataclasses.dataclass(frozen=True)
class ProductRecord:
    """A product as the index stores it.

    Attributes:
      product_id: its number in the index.
      sku: the shop's key.
      title: text.
      tags: text.
      category: name, "" for none.
      quality: some of `QUALITY` and `SHARPNESS`.
      picture_rows: rows of its photos that have a picture and are not deleted, at most `PICTURES`.
    """

    product_id: int
    sku: str
    title: str
    tags: str
    category: str
    quality: dict[str, float]
    picture_rows: list[int]


@dataclasses.dataclass(frozen=True)
class StoreState:
    """One commit of the store, as arrays.

    Attributes:
      num_rows: committed rows of the photo files.
      deleted_products: sorted product ids, int64 [P].
      deleted_rows: sorted rows of deleted photos, int64 [R].
      new_products: products with imprinted class weights, int64 [M].
      kernel: their weights, float32 [M, D].
      bias: float32 [M].
    """

    num_rows: int
    deleted_products: np.ndarray
    deleted_rows: np.ndarray
    new_products: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray


class ProductStore:
    """`products.sqlite`, read by any number of threads and written by one process.

    Write only inside `with store.transaction():`. The file is closed with the last reference, so
    that no thread loses the connection that it reads from.
    """

    def __init__(self, path: Path, *, writable: bool = False, shared: bool = False):
        """Prepares to open the file at the first read.

        Args:
          path: the file.
          writable: whether it may be written to.
          shared: one connection for all threads, which must take turns; else one for each.
        """
        self.path, self._writable, self._lock = path, writable, threading.Lock()
        self._of_thread: Any = types.SimpleNamespace() if shared else threading.local()
        self._connections: list[sqlite3.Connection] = []

    @classmethod
    def create(cls, path: Path) -> ProductStore:
        """Creates a file without products.

        Args:
          path: the new file.

        Returns:
          The store, writable.
        """
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_SCHEMA)
        connection.execute("INSERT INTO state VALUES ('num_rows', 0)")
        connection.commit()
        connection.close()
        return cls(path, writable=True)

    @property
    def connection(self) -> sqlite3.Connection:
        """This thread's connection; raises InputError where the file cannot be opened."""
        connection = getattr(self._of_thread, "connection", None)
        if connection is None:
            mode = "rw" if self._writable else "ro"
            try:
                # The thread that closes it may be another one.
                connection = sqlite3.connect(
                    f"{self.path.absolute().as_uri()}?mode={mode}",
                    uri=True,
                    check_same_thread=False,
                    timeout=30,
                )
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("SELECT count(*) FROM state")
            except sqlite3.Error as error:
                raise InputError(
                    f"{self.path}: {error}; readers too must be able to write SQLite's log in its "
                    "folder, else build the index again"
                ) from error
            self._of_thread.connection = connection
            with self._lock:
                self._connections.append(connection)
        return connection

    def close(self) -> None:
        """Closes all connections; no other thread may be reading."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self._of_thread.__dict__.clear()

    def __del__(self) -> None:
        for connection in self._connections:
            connection.close()

    def data_version(self) -> int:
        """Returns a number that differs after another process's commit.

        Returns:
          The number; comparable only with earlier ones of the same thread's connection.
        """
        return self.connection.execute("PRAGMA data_version").fetchone()[0]

    def num_rows(self) -> int:
        """Returns the number of committed rows of the photo files.

        Later rows are leftovers of a killed write and are ignored.

        Returns:
          Rows from 0 that are valid.
        """
        return self.connection.execute(
            "SELECT value FROM state WHERE name = 'num_rows'"
        ).fetchone()[0]

    def next_product_id(self) -> int:
        """Returns the id after the largest one."""
        return self.connection.execute(
            "SELECT coalesce(max(product_id) + 1, 0) FROM products"
        ).fetchone()[0]

    def transaction(self) -> sqlite3.Connection:
        """Begins a write transaction.

        Returns:
          The connection, as a context that commits, or rolls back after an exception.
        """
        self.connection.execute("BEGIN IMMEDIATE")
        return self.connection

    def state(self, width: int) -> StoreState:
        """Reads deletions and class weights in one transaction.

        Args:
          width: D of the class weights.

        Returns:
          The state of one commit.
        """
        connection = self.connection
        with connection:
            connection.execute("BEGIN")
            num_rows = self.num_rows()
            deleted_products = _integers(
                connection, "SELECT product_id FROM products WHERE deleted ORDER BY 1"
            )
            deleted_rows = _integers(connection, "SELECT row FROM photos WHERE deleted ORDER BY 1")
            weights = connection.execute(
                "SELECT product_id, kernel, bias FROM class_weights ORDER BY product_id"
            ).fetchall()
        kernel = np.frombuffer(b"".join(line[1] for line in weights), np.float32)
        return StoreState(
            num_rows,
            deleted_products,
            deleted_rows,
            np.array([line[0] for line in weights], np.int64),
            kernel.reshape(len(weights), width),
            np.array([line[2] for line in weights], np.float32),
        )

    def counts(self) -> dict[str, int]:
        """Returns how many "products" and "photos" are not deleted."""
        return {
            table: self.connection.execute(
                f"SELECT count(*) FROM {table} WHERE NOT deleted"
            ).fetchone()[0]
            for table in ("products", "photos")
        }

    def product_ids(self, skus: Sequence[str]) -> list[int | None]:
        """Looks up product ids, of deleted products too.

        Args:
          skus: keys.

        Returns:
          An id for each key; None for an unknown one.
        """
        query = "SELECT product_id FROM products WHERE sku = ?"
        matches = (self.connection.execute(query, (sku,)).fetchone() for sku in skus)
        return [match[0] if match else None for match in matches]

    def products(self, product_ids: Sequence[int]) -> list[ProductRecord | None]:
        """Reads records in one statement, so that all are of one commit.

        Args:
          product_ids: their ids.

        Returns:
          A record for each id; None for a deleted or unknown product.
        """
        ids = json.dumps([int(product_id) for product_id in product_ids])
        records = {
            line[0]: _record(line) for line in self.connection.execute(_RECORD + _BY_ID, (ids,))
        }
        return [records.get(int(product_id)) for product_id in product_ids]

    def product(self, sku: str) -> ProductRecord | None:
        """Reads one record.

        Args:
          sku: its key.

        Returns:
          The record; None for a deleted or unknown product.
        """
        line = self.connection.execute(_RECORD + "sku = ?", (sku,)).fetchone()
        return _record(line) if line else None

    def count_photos(self, product_id: int) -> int:
        """Returns how many photos of a product are not deleted.

        Args:
          product_id: the product.

        Returns:
          The number of photos.
        """
        query = "SELECT count(*) FROM photos WHERE product_id = ? AND NOT deleted"
        return self.connection.execute(query, (product_id,)).fetchone()[0]

    def picture(self, row: int) -> bytes | None:
        """Reads the picture of a photo.

        Args:
          row: row of the photo.

        Returns:
          Encoded image; None where none is kept.
        """
        line = self.connection.execute("SELECT jpeg FROM pictures WHERE row = ?", (row,)).fetchone()
        return line[0] if line else None

    def all_products(self) -> Iterator[ProductRecord]:
        """Reads all records that are not deleted.

        Yields:
          The records, by id.
        """
        ids = _integers(
            self.connection, "SELECT product_id FROM products WHERE NOT deleted ORDER BY 1"
        )
        for first in range(0, len(ids), _RECORDS_PER_STATEMENT):
            records = self.products(ids[first : first + _RECORDS_PER_STATEMENT].tolist())
            yield from (record for record in records if record is not None)


def upsert_products(
    connection: sqlite3.Connection,
    products: Iterable[tuple[int, str, str, str, str, dict[str, float]]],
) -> None:
    """Inserts product records, or replaces them and undoes their deletion.

    Args:
      connection: connection of a transaction.
      products: (product id, SKU, title, tags, category, quality).
    """
    connection.executemany(
        "INSERT INTO products (product_id, sku, title, tags, category, quality) "
        "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (product_id) DO UPDATE SET title = excluded.title, "
        "tags = excluded.tags, category = excluded.category, quality = excluded.quality, "
        "deleted = 0",
        (
            (product_id, sku, title, tags, category, json.dumps(quality))
            for product_id, sku, title, tags, category, quality in products
        ),
    )


def delete_products(connection: sqlite3.Connection, product_ids: Iterable[int]) -> None:
    """Marks products as deleted.

    Args:
      connection: connection of a transaction.
      product_ids: their ids.
    """
    connection.executemany(
        "UPDATE products SET deleted = 1 WHERE product_id = ? AND NOT deleted",
        ((product_id,) for product_id in product_ids),
    )


def insert_photos(
    connection: sqlite3.Connection, photos: Iterable[tuple[int, int, str, bytes | None]]
) -> None:
    """Inserts photos.

    Args:
      connection: connection of a transaction.
      photos: (row, product id, image id, encoded picture or None).
    """
    for row, product_id, image_id, jpeg in photos:
        connection.execute(
            "INSERT INTO photos (row, product_id, image_id) VALUES (?, ?, ?)",
            (row, product_id, image_id),
        )
        if jpeg is not None:
            connection.execute(
                "INSERT OR REPLACE INTO pictures VALUES (?, ?, ?)", (row, product_id, jpeg)
            )


def upsert_class_weights(
    connection: sqlite3.Connection,
    product_ids: Sequence[int],
    kernel: np.ndarray,
    bias: Sequence[float],
) -> None:
    """Inserts or replaces class weights of new products.

    Args:
      connection: connection of a transaction.
      product_ids: the products, [M].
      kernel: float [M, D].
      bias: [M].
    """
    lines = (
        (int(product_id), weights.astype(np.float32).tobytes(), float(offset))
        for product_id, weights, offset in zip(product_ids, kernel, bias, strict=True)
    )
    connection.executemany("INSERT OR REPLACE INTO class_weights VALUES (?, ?, ?)", lines)


def parse_quality(stored: str) -> dict[str, float]:
    """Parses the JSON of a product's quality signals (price, sales, ...).

    Args:
      stored: value of the column `quality`.

    Returns:
      Name -> number.
    """
    return json.loads(stored)


def merge_quality(
    connection: sqlite3.Connection, product_id: int, quality: dict[str, float]
) -> None:
    """Adds quality numbers to those that a product has.

    Args:
      connection: connection of a transaction.
      product_id: the product.
      quality: name -> number.
    """
    update = "UPDATE products SET quality = json_patch(quality, ?) WHERE product_id = ?"
    connection.execute(update, (json.dumps(quality), product_id))


def set_num_rows(connection: sqlite3.Connection, num_rows: int) -> None:
    """Sets how many rows of the photo files count.

    Args:
      connection: connection of a transaction.
      num_rows: the number of rows.
    """
    connection.execute("UPDATE state SET value = ? WHERE name = 'num_rows'", (num_rows,))


def _record(line: tuple) -> ProductRecord:
    product_id, sku, title, tags, category, quality, rows = line
    return ProductRecord(
        product_id, sku, title, tags, category, parse_quality(quality), sorted(json.loads(rows))
    )


def _integers(connection: sqlite3.Connection, query: str) -> np.ndarray:
    return np.fromiter((line[0] for line in connection.execute(query)), np.int64)
