"""Features of similar products that a ranker reads; NaN where a value is unknown.

| feature        | value                                                                     |
| -------------- | ------------------------------------------------------------------------- |
| similarity     | cosine of the query photo and the product's nearest photo                 |
| similarity gap | greatest similarity in the list minus this one                            |
| sales          | log(1 + sales)                                                            |
| conversion     | share of visitors of the product that bought it, as the shop reports it   |
| rating         | as the shop reports it                                                    |
| price          | log(price / median price of the product's category); a free product has   |
|                | `MIN_PRICE_RATIO` of it, a negative price is unknown                      |
| sharpness      | log(1 + Laplacian variance of the first image) (Pech-Pacheco et al. 2000) |
| title words    | number of distinct words of the title                                     |
| common words   | share of them that occur in the titles of other products                  |
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
    "similarity",
    "similarity gap",
    "sales",
    "conversion",
    "rating",
    "price",
    "sharpness",
    "title words",
    "common words",
)
MIN_PRICES = 3  # prices of a category that make a median
MIN_PRICE_RATIO = 1e-3  # of a median price: that of a free product, whose logarithm is none
# Short side, in pixels, of the image whose sharpness is measured: about the size of a thumbnail, so
# that images of different resolution can be compared.
SHARPNESS_SIDE = 128
_UNKNOWN = float("nan")


class DescribedProduct(Protocol):
    """Product whose features can be computed, such as a product record of an index.

    `quality` holds any of price, sales, conversion, rating and sharpness.
    """

    @property
    def title(self) -> str:
        """Title of the product."""
        ...

    @property
    def category(self) -> str:
        """Name of its category."""
        ...

    @property
    def quality(self) -> Mapping[str, float]:
        """Known numbers by name."""
        ...


@dataclasses.dataclass(frozen=True)
class CatalogStatistics:
    """Statistics of a catalogue that features of a product are relative to.

    Attributes:
      median_prices: Median price by category, of categories with `MIN_PRICES` prices.
      common_words: Words that occur in at least two titles.
    """

    median_prices: dict[str, float]
    common_words: frozenset[str]

    @classmethod
    def from_products(cls, products: Iterable[DescribedProduct]) -> CatalogStatistics:
        """Computes the statistics in one pass.

        Args:
          products: All products of the catalogue.

        Returns:
          The statistics.
        """
        prices, titles = defaultdict[str, list[float]](list), Counter[str]()
        for product in products:
            titles.update(set(split_words(product.title)))
            if product.quality.get("price", 0) > 0:
                prices[product.category].append(product.quality["price"])
        medians = {
            category: statistics.median(values)
            for category, values in prices.items()
            if len(values) >= MIN_PRICES
        }
        return cls(medians, frozenset(word for word, count in titles.items() if count > 1))


def ranking_features(
    similarity: np.ndarray,
    products: Sequence[DescribedProduct],
    catalog_statistics: CatalogStatistics,
) -> np.ndarray:
    """Returns the features of the products of one list.

    Args:
      similarity: Cosine of each product to the query photo, float [N].
      products: The products of the list, N of them.
      catalog_statistics: Statistics of their catalogue.

    Returns:
      Features in the order of `FEATURES`, float64 [N, 9]; NaN where unknown.
    """
    features = np.empty((len(products), len(FEATURES)))
    features[:, 0] = similarity
    features[:, 1] = np.max(features[:, 0], initial=-np.inf) - features[:, 0]
    if len(products):
        features[:, 2:] = [_product_values(product, catalog_statistics) for product in products]
    with np.errstate(invalid="ignore"):
        features[:, 2] = np.log1p(np.maximum(features[:, 2], 0))
        ratio = features[:, 5]
        features[:, 5] = np.log(np.where(ratio < 0, _UNKNOWN, np.maximum(ratio, MIN_PRICE_RATIO)))
        features[:, 6] = np.log1p(features[:, 6])
    features[~np.isfinite(features)] = np.nan
    return features


def _product_values(
    product: DescribedProduct, catalog_statistics: CatalogStatistics
) -> tuple[float, ...]:
    """Returns the values of `FEATURES[2:]` before logarithms."""
    quality, title_words = product.quality, set(split_words(product.title))
    median_price = catalog_statistics.median_prices.get(product.category, _UNKNOWN)
    num_common = len(title_words & catalog_statistics.common_words)
    return (
        quality.get("sales", _UNKNOWN),
        quality.get("conversion", _UNKNOWN),
        quality.get("rating", _UNKNOWN),
        quality.get("price", _UNKNOWN) / median_price,
        quality.get("sharpness", _UNKNOWN),
        len(title_words),
        num_common / len(title_words) if title_words else _UNKNOWN,
    )


def laplacian_variance(grey: np.ndarray) -> float:
    """Returns the variance of the Laplacian (four neighbours minus four times the centre).

    Args:
      grey: Grey values, [H, W].

    Returns:
      The variance over all but the border pixels; 0 where an image has no others.
    """
    grey = np.asarray(grey, np.float64)
    if min(grey.shape) < 3:
        return 0.0
    centre = grey[1:-1, 1:-1]
    return float(
        np.var(grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * centre)
    )


def image_sharpness(image: bytes) -> float:
    """Returns the sharpness of an encoded image, scaled to a short side of `SHARPNESS_SIDE`.

    Args:
      image: An encoded image (JPEG, PNG, ...).

    Returns:
      `laplacian_variance` of its grey values from 0 to 255.

    Raises:
      OSError: The bytes are no image.
    """
    with Image.open(io.BytesIO(image)) as opened:
        # A JPEG is decoded no larger than needed.
        opened.draft("L", (2 * SHARPNESS_SIDE, 2 * SHARPNESS_SIDE))
        grey = opened.convert("L")
    scale = SHARPNESS_SIDE / min(grey.size)
    width, height = (max(round(scale * length), 1) for length in grey.size)
    return laplacian_variance(np.asarray(grey.resize((width, height), Image.Resampling.BILINEAR)))
