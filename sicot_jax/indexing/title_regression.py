"""What the title of a product foretells of its photos' direction, learned from the titles of known
products.

    t = (b - mean of b) B,  b = unit(words of title and category, 0 or 1)  [W],  B by ridge
    regression  [W, D]

from the directions m - g of known products (sicot_jax/imprint), each by min(photos, 20) / 20. What
that is worth: docs/service.md.
"""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sicot_jax.catalog.tokenizer import split_words
from sicot_jax.errors import InputError
from sicot_jax.index.storage.vectors import unit

KNOWN = 4096  # products that are learned from
WORDS = 2048  # the most frequent ones that at least two of them have
PENALTY = 0.3
_ENOUGH = 20  # photos, from which on a product counts in full


@dataclasses.dataclass(frozen=True, eq=False)
class Titles:
    """words [W], mean of b [W] and B [W, D], float32; W = 0: nothing is foretold."""

    words: tuple[str, ...]
    mean: np.ndarray
    weights: np.ndarray

    def directions(self, texts: Sequence[tuple[str, str]]) -> np.ndarray:
        """(title, category) of products -> t float32 [K, D]; of titles without a known word that of
        the category, or 0.
        """
        rows = _rows(self.words, texts)
        told = rows.any(1, keepdims=True)
        return ((rows - self.mean) * told) @ self.weights


def fit(texts: Sequence[tuple[str, str]], directions: np.ndarray, photos: np.ndarray) -> Titles:
    """From known products: (title, category), m - g float32 [K, D], and how many photos there are
    of each, int [K].
    """
    count = Counter(word for text in texts for word in _words(*text))
    words = tuple(sorted(word for word, products in count.most_common(WORDS) if products > 1))
    rows = _rows(words, texts).astype(np.float64)
    mean = rows.mean(0) if len(rows) else np.zeros(len(words))
    weighted = (rows - mean) * (np.minimum(photos, _ENOUGH) / _ENOUGH)[:, None]
    weights = np.linalg.solve(
        (rows - mean).T @ weighted + PENALTY * np.eye(len(words)), weighted.T @ directions
    )
    return Titles(words, mean.astype(np.float32), weights.astype(np.float32))


def _words(title: str, category: str) -> set[str]:
    return {*split_words(title), *([f"category: {category}"] if category else [])}


def _rows(words: Sequence[str], texts: Sequence[tuple[str, str]]) -> np.ndarray:
    number = {word: column for column, word in enumerate(words)}
    found = np.zeros((len(texts), len(words)), np.float32)
    for row, text in zip(found, texts, strict=True):
        row[[number[word] for word in _words(*text) if word in number]] = 1
    return unit(found)


def save(path: Path, titles: Titles) -> None:
    words = np.frombuffer("\n".join(titles.words).encode(), np.uint8)
    np.savez(path, words=words, mean=titles.mean, weights=titles.weights)


def load(path: Path) -> Titles:
    """InputError where the file is none."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            words = stored["words"].tobytes().decode()
            return Titles(
                tuple(words.split("\n")) if words else (), stored["mean"], stored["weights"]
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path}: no words of titles ({type(error).__name__}); build the index again"
        ) from error
