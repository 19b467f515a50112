"""Features of the ranker, each computed by hand."""

import dataclasses
import io
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sicot_jax.search.ranker import ndcg, ndcg_per_list
from sicot_jax.search.ranking_features import (
    FEATURES,
    MIN_PRICE_RATIO,
    SHARPNESS_SIDE,
    CatalogStatistics,
    image_sharpness,
    laplacian_variance,
    ranking_features,
)


@dataclasses.dataclass
class Product:
    title: str
    category: str = "shoes"
    quality: dict[str, float] = dataclasses.field(default_factory=dict)


def column(rows, name):
    return rows[:, FEATURES.index(name)]


def test_prices_are_relative_to_the_median_of_the_category():
    products = [Product("", "shoes", {"price": price}) for price in (10.0, 20.0, 40.0)]
    products += [Product("", "hats", {"price": 5.0})]  # too few for a median
    catalog_statistics = CatalogStatistics.from_products(products)
    assert catalog_statistics.median_prices == {"shoes": 20.0}
    odd = [Product("", "shoes", {"price": 0.0}), Product("", "shoes", {"price": -3.0}), Product("")]
    price = column(ranking_features(np.zeros(7), products + odd, catalog_statistics), "price")
    np.testing.assert_allclose(price[:3], [-math.log(2), 0, math.log(2)], atol=1e-12)
    assert price[4] == math.log(MIN_PRICE_RATIO)  # free, not unknown
    assert np.isnan(price[[3, 5, 6]]).all()


def test_similarity_and_numbers_of_the_shop():
    quality = {"sales": 99.0, "conversion": 0.03, "rating": 4.5, "sharpness": math.e - 1}
    rows = ranking_features(
        np.array([0.7, 0.9]),
        [Product("", quality=quality), Product("")],
        CatalogStatistics({}, frozenset()),
    )
    np.testing.assert_allclose(column(rows, "similarity"), [0.7, 0.9])
    np.testing.assert_allclose(column(rows, "similarity gap"), [0.2, 0.0])
    for name, value in (
        ("sales", math.log(100)),
        ("conversion", 0.03),
        ("rating", 4.5),
        ("sharpness", 1.0),
    ):
        np.testing.assert_allclose(column(rows, name), [value, np.nan])
    assert ranking_features(np.zeros(0), [], CatalogStatistics({}, frozenset())).shape == (
        0,
        len(FEATURES),
    )


def test_no_sale_is_not_unknown():
    products = [Product("", quality={"sales": sales}) for sales in (0.0, 1.0, -2.0)]
    rows = ranking_features(
        np.zeros(4), [*products, Product("")], CatalogStatistics({}, frozenset())
    )
    np.testing.assert_allclose(column(rows, "sales"), [0, math.log(2), 0, np.nan])


def test_title_words_and_the_share_that_other_titles_use():
    products = [Product("Red cotton shirt, red"), Product("red shirt XQ-7"), Product("")]
    catalog_statistics = CatalogStatistics.from_products(products)
    assert catalog_statistics.common_words == {"red", "shirt"}
    rows = ranking_features(np.zeros(3), products, catalog_statistics)
    np.testing.assert_allclose(column(rows, "title words"), [3, 4, 0])  # xq and 7 are two
    np.testing.assert_allclose(column(rows, "common words"), [2 / 3, 2 / 4, np.nan])


def test_laplacian_variance_by_hand():
    """The Laplacian of a point of 3 is -12 there, 3 at its neighbours and 0 elsewhere."""
    grey = np.zeros((5, 5))
    grey[2, 2] = 3
    inner = np.array([[0, 3, 0], [3, -12, 3], [0, 3, 0]])
    assert laplacian_variance(grey) == pytest.approx(inner.var())
    assert inner.var() == pytest.approx((4 * 9 + 144) / 9)
    assert laplacian_variance(np.arange(20.0).reshape(4, 5)) == 0  # a slope has no edge
    assert laplacian_variance(np.ones((2, 9))) == 0


def test_a_blurred_image_is_less_sharp_at_any_size():
    noise = np.random.default_rng(0).integers(0, 256, (40, 30), np.uint8)
    measured = []
    for side in (SHARPNESS_SIDE, 4 * SHARPNESS_SIDE):
        picture = Image.fromarray(noise).resize((side, side * 4 // 3))
        for shown in (picture, picture.filter(ImageFilter.GaussianBlur(side / 20))):
            out = io.BytesIO()
            shown.save(out, "JPEG", quality=95)
            measured.append(image_sharpness(out.getvalue()))
    assert measured[1] < measured[0] / 10
    assert measured[3] < measured[2] / 10
    assert measured[2] == pytest.approx(measured[0], rel=0.5)


def test_ndcg_by_hand():
    """Gains 1, 0, 3 in this order: 1 + 0 + 3 / 2 of at most 3 + 1 / log2(3)."""
    assert ndcg([1, 0, 3]) == pytest.approx(2.5 / (3 + 1 / math.log2(3)))
    assert ndcg([3, 1, 0]) == 1
    assert ndcg([1, 0, 3], k=1) == pytest.approx(1 / 3)
    assert math.isnan(ndcg([0, 0]))


def test_lists_are_sorted_by_score_and_lists_without_gains_left_out():
    gains = np.array([1.0, 0, 3, 0, 0, 5, 4])
    scores, list_id = np.array([3.0, 2, 1, 1, 1, 0, 0]), np.array([0, 0, 0, 1, 1, 2, 2])
    expected = [2.5 / (3 + 1 / math.log2(3)), 1]
    np.testing.assert_allclose(ndcg_per_list(scores, list_id, gains), expected)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_equal_to_scikit_learn(k):
    """On lists of two and more products, of which one has a gain."""
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for length in (2, 5, 30):
        gains = rng.integers(0, 4, length) + np.eye(length)[0]
        shown = -np.arange(length)
        expected = metrics.ndcg_score(gains[None], shown[None], k=k)
        assert ndcg(gains, k) == pytest.approx(expected, rel=1e-12)
