"""Rows of the classifier for products that came after the model, from the features of their photos."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import numpy as np

from sicot_jax.imprint import PHOTOS, Imprint, mean_directions
from sicot_jax.index import cards as cards_of
from sicot_jax.index import layout
from sicot_jax.index.cards import Cards
from sicot_jax.index.vectors import Vectors

_PIECE = 4096


def put(
    connection: sqlite3.Connection, vectors: Vectors, imprint: Imprint, products: Sequence[int], places: int
) -> None:
    """Rows of these products, from their first `PHOTOS` photos that are offered among `places` lines, none without a photo;
    inside a change.
    """
    features = vectors.mapped(layout.FEATURES, places)
    lines: list[int] = []
    owners: list[int] = []
    for number in products:
        found = connection.execute(
            "SELECT place FROM photos WHERE product = ? AND NOT withdrawn AND place < ? ORDER BY place LIMIT ?",
            (number, places, PHOTOS),
        ).fetchall()
        lines += [row[0] for row in found]
        owners += [number] * len(found)
    without = sorted(set(products) - set(owners))
    connection.executemany("DELETE FROM rows WHERE product = ?", ((number,) for number in without))
    if lines:
        numbers, means = mean_directions(np.asarray(features[lines], np.float32), np.array(owners))
        cards_of.put_rows(connection, numbers.tolist(), imprint.rows(means), [imprint.bias] * len(numbers))


def put_all(cards: Cards, vectors: Vectors, imprint: Imprint, classes: int) -> None:
    """Rows of all products that the model has no class for; a commit for every few thousand."""
    places = cards.state(vectors.width).places
    found = cards.connection.execute("SELECT product FROM products WHERE product >= ? ORDER BY product", (classes,))
    later = [row[0] for row in found.fetchall()]
    for first in range(0, len(later), _PIECE):
        with cards.change() as connection:
            put(connection, vectors, imprint, later[first : first + _PIECE], places)
