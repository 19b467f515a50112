"""Predicts the direction of a product's photos from the words of its title, by ridge regression.

    t = (b - mean of b) B,  b = words of title and category, 0 or 1, divided by |b|  [W]

B [W, D] is fitted to the directions m - g of products that the model was trained on
(`classifier/imprint.py`), each with weight min(photos, 20) / 20. Its effect is measured in
docs/results/open_set.md.
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
from sicot_jax.common.linalg import l2_normalize
from sicot_jax.errors import InputError

MAX_FIT_PRODUCTS = 4096
MAX_WORDS = 2048  # the most frequent ones that at least two products have
RIDGE_PENALTY = 0.3
_FULL_WEIGHT_PHOTOS = 20  # from which on a product has weight 1

TitleAndCategory = tuple[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class TitleRegression:
    """Linear map from words to embedding directions; without words it predicts 0.

    Attributes:
      words: the W words, sorted.
      mean: mean of b, float32 [W].
      weights: B, float32 [W, D].
    """

    words: tuple[str, ...]
    mean: np.ndarray
    weights: np.ndarray

    def predict(self, texts: Sequence[TitleAndCategory]) -> np.ndarray:
        """Predicts directions.

        Args:
          texts: (title, category) of K products.

        Returns:
          t, float32 [K, D]; 0 for a product without a known word or category.
        """
        bags = _bags_of_words(self.words, texts)
        has_words = bags.any(1, keepdims=True)
        return ((bags - self.mean) * has_words) @ self.weights


def fit_title_regression(
    texts: Sequence[TitleAndCategory], directions: np.ndarray, num_photos: np.ndarray
) -> TitleRegression:
    """Fits the regression to products that the model was trained on.

    Args:
      texts: (title, category) of K products.
      directions: m - g, float32 [K, D].
      num_photos: photos of each, int [K].

    Returns:
      The regression.
    """
    count = Counter(word for text in texts for word in _words(*text))
    words = tuple(sorted(word for word, products in count.most_common(MAX_WORDS) if products > 1))
    bags = _bags_of_words(words, texts).astype(np.float64)
    mean = bags.mean(0) if len(bags) else np.zeros(len(words))
    product_weight = np.minimum(num_photos, _FULL_WEIGHT_PHOTOS) / _FULL_WEIGHT_PHOTOS
    weighted = (bags - mean) * product_weight[:, None]
    weights = np.linalg.solve(
        (bags - mean).T @ weighted + RIDGE_PENALTY * np.eye(len(words)), weighted.T @ directions
    )
    return TitleRegression(words, mean.astype(np.float32), weights.astype(np.float32))


def _words(title: str, category: str) -> set[str]:
    return {*split_words(title), *([f"category: {category}"] if category else [])}


def _bags_of_words(words: Sequence[str], texts: Sequence[TitleAndCategory]) -> np.ndarray:
    column = {word: number for number, word in enumerate(words)}
    bags = np.zeros((len(texts), len(words)), np.float32)
    for bag, text in zip(bags, texts, strict=True):
        bag[[column[word] for word in _words(*text) if word in column]] = 1
    return l2_normalize(bags)


def save_title_regression(path: Path, regression: TitleRegression) -> None:
    """Writes a title regression to an .npz file.

    Args:
      path: file, .npz.
      regression: what to write.
    """
    words = np.frombuffer("\n".join(regression.words).encode(), np.uint8)
    np.savez(path, words=words, mean=regression.mean, weights=regression.weights)


def load_title_regression(path: Path) -> TitleRegression:
    """Reads a regression.

    Args:
      path: file that `save_title_regression` wrote.

    Returns:
      The regression.

    Raises:
      InputError: the file is missing or damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            words = stored["words"].tobytes().decode()
            return TitleRegression(
                tuple(words.split("\n")) if words else (), stored["mean"], stored["weights"]
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path}: no title regression ({type(error).__name__}); build the index again"
        ) from error
