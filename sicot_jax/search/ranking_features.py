"""How good a product is, beyond its likeness to a photo, as numbers that a ranker reads. NaN where
nothing is known.

likeness      cosine of the photo and the product's nearest one behind        how much less that is
than the most alike product's of the same list sales         log(1 + sales) conversion    share of
those who looked that bought, as the shop has it rating        as the shop has it price
log(price / median price of the product's category) sharpness     log(1 + variance of the Laplacian
of the product's first picture) (Pech-Pacheco et al. 2000) words         different words of the
title known words   share of them that titles of other products have too
"""

from __future__ import annotations

import dataclasses
import io
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from sicot_jax.catalog.tokenizer import split_words

FEATURES = (
    "likeness",
    "behind",
    "sales",
    "conversion",
    "rating",
    "price",
    "sharpness",
    "words",
    "known words",
)
_UNKNOWN = float("nan")
FEWEST = 3  # prices of a category that make a median
# pixels of a picture's short side when its sharpness is told: about as small as it is shown,
# whatever was sent
SIDE = 128


class Described(Protocol):
    """A product, such as an index's card; `quality`: some of price, sales, conversion, rating,
    sharpness.
    """

    @property
    def title(self) -> str: ...
    @property
    def category(self) -> str: ...
    @property
    def quality(self) -> Mapping[str, float]: ...


@dataclasses.dataclass(frozen=True)
class Usual:
    """What a catalogue's products are held against. prices: medians by category; words: of at least
    two titles.
    """

    prices: dict[str, float]
    words: frozenset[str]

    @classmethod
    def of(cls, products: Iterable[Described]) -> Usual:
        prices, titles = defaultdict[str, list[float]](list), Counter[str]()
        for product in products:
            titles.update(set(split_words(product.title)))
            if product.quality.get("price", 0) > 0:
                prices[product.category].append(product.quality["price"])
        medians = {
            name: statistics.median(some) for name, some in prices.items() if len(some) >= FEWEST
        }
        return cls(medians, frozenset(word for word, count in titles.items() if count > 1))


def features(likeness: np.ndarray, products: Sequence[Described], usual: Usual) -> np.ndarray:
    """Of one list: cosines [N] and its products -> float64 [N, `FEATURES`]."""
    rows = np.empty((len(products), len(FEATURES)))
    rows[:, 0] = likeness
    rows[:, 1] = np.max(rows[:, 0], initial=-np.inf) - rows[:, 0]
    if len(products):
        rows[:, 2:] = [_of_product(product, usual) for product in products]
    with np.errstate(divide="ignore", invalid="ignore"):
        rows[:, 2] = np.log1p(np.maximum(rows[:, 2], 0))
        rows[:, 5] = np.log(rows[:, 5])
        rows[:, 6] = np.log1p(rows[:, 6])
    rows[~np.isfinite(rows)] = np.nan
    return rows


def _of_product(product: Described, usual: Usual) -> tuple[float, ...]:
    """Before logarithms."""
    found, named = product.quality, set(split_words(product.title))
    return (
        found.get("sales", _UNKNOWN),
        found.get("conversion", _UNKNOWN),
        found.get("rating", _UNKNOWN),
        found.get("price", _UNKNOWN) / usual.prices.get(product.category, _UNKNOWN),
        found.get("sharpness", _UNKNOWN),
        len(named),
        len(named & usual.words) / len(named) if named else _UNKNOWN,
    )


def sharpness(grey: np.ndarray) -> float:
    """Variance of the Laplacian (up + down + left + right - 4 x middle) of grey values [H, W],
    borders left out; 0 where there is nothing but borders.
    """
    grey = np.asarray(grey, np.float64)
    if min(grey.shape) < 3:
        return 0.0
    middle = grey[1:-1, 1:-1]
    return float(
        np.var(grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * middle)
    )


def picture_sharpness(picture: bytes) -> float:
    """Of an encoded picture, its short side at `SIDE` pixels and grey values from 0 to 255."""
    with Image.open(io.BytesIO(picture)) as opened:
        opened.draft("L", (2 * SIDE, 2 * SIDE))  # a JPEG is decoded no larger than needed
        grey = opened.convert("L")
    scale = SIDE / min(grey.size)
    size = tuple(max(round(scale * length), 1) for length in grey.size)
    return sharpness(np.asarray(grey.resize((size[0], size[1]), Image.Resampling.BILINEAR)))
