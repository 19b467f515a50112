"""Numbers of a product's quality, each by hand."""

import dataclasses
import io
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sicot_jax.search.ranking_features import (
    FEATURES,
    SIDE,
    Usual,
    features,
    picture_sharpness,
    sharpness,
)


@dataclasses.dataclass
class Product:
    title: str
    category: str = "shoes"
    quality: dict[str, float] = dataclasses.field(default_factory=dict)


def column(rows, name):
    return rows[:, FEATURES.index(name)]


def test_a_price_is_held_against_the_median_of_its_category():
    products = [Product("", "shoes", {"price": price}) for price in (10.0, 20.0, 40.0)]
    products += [Product("", "hats", {"price": 5.0})]  # too few to say what is usual
    usual = Usual.of(products)
    assert usual.prices == {"shoes": 20.0}
    odd = [Product("", "shoes", {"price": 0.0}), Product("", "shoes", {"price": -3.0}), Product("")]
    price = column(features(np.zeros(7), products + odd, usual), "price")
    np.testing.assert_allclose(price[:3], [-math.log(2), 0, math.log(2)], atol=1e-12)
    assert np.isnan(price[3:]).all()


def test_likeness_and_what_a_shop_tells():
    told = {"sales": 99.0, "conversion": 0.03, "rating": 4.5, "sharpness": math.e - 1}
    rows = features(
        np.array([0.7, 0.9]), [Product("", quality=told), Product("")], Usual({}, frozenset())
    )
    np.testing.assert_allclose(column(rows, "likeness"), [0.7, 0.9])
    np.testing.assert_allclose(column(rows, "behind"), [0.2, 0.0])
    for name, value in (
        ("sales", math.log(100)),
        ("conversion", 0.03),
        ("rating", 4.5),
        ("sharpness", 1.0),
    ):
        np.testing.assert_allclose(column(rows, name), [value, np.nan])
    assert features(np.zeros(0), [], Usual({}, frozenset())).shape == (0, len(FEATURES))


def test_a_title_says_much_in_words_that_others_use_too():
    products = [Product("Red cotton shirt, red"), Product("red shirt XQ-7"), Product("")]
    usual = Usual.of(products)
    assert usual.words == {"red", "shirt"}
    rows = features(np.zeros(3), products, usual)
    np.testing.assert_allclose(column(rows, "words"), [3, 4, 0])  # xq and 7 are two
    np.testing.assert_allclose(column(rows, "known words"), [2 / 3, 2 / 4, np.nan])


def test_sharpness_by_hand():
    """The Laplacian of a point of 3 is -12 there, 3 beside it and 0 elsewhere."""
    grey = np.zeros((5, 5))
    grey[2, 2] = 3
    inner = np.array([[0, 3, 0], [3, -12, 3], [0, 3, 0]])
    assert sharpness(grey) == pytest.approx(inner.var())
    assert inner.var() == pytest.approx((4 * 9 + 144) / 9)
    assert sharpness(np.arange(20.0).reshape(4, 5)) == 0  # a slope has no edge
    assert sharpness(np.ones((2, 9))) == 0


def test_a_blurred_picture_is_less_sharp_whatever_its_size():
    noise = np.random.default_rng(0).integers(0, 256, (40, 30), np.uint8)
    told = []
    for side in (SIDE, 4 * SIDE):
        picture = Image.fromarray(noise).resize((side, side * 4 // 3))
        for shown in (picture, picture.filter(ImageFilter.GaussianBlur(side / 20))):
            out = io.BytesIO()
            shown.save(out, "JPEG", quality=95)
            told.append(picture_sharpness(out.getvalue()))
    assert told[1] < told[0] / 10
    assert told[3] < told[2] / 10
    assert told[2] == pytest.approx(told[0], rel=0.5)
