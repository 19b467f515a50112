"""Predicting directions of photos from title words."""

import numpy as np
import pytest

from sicot_jax.errors import InputError
from sicot_jax.indexing.title_regression import (
    fit_title_regression,
    load_title_regression,
    save_title_regression,
)


def shop(count=200, width=8, seed=0):
    """Products of four colours and three kinds; a direction is the sum of both and a little
    noise.
    """
    rng = np.random.default_rng(seed)
    colours, kinds = rng.normal(size=(2, 4, width))
    chosen = rng.integers(0, 4, count), rng.integers(0, 3, count)
    texts = [
        (f"Nice {['red', 'blue', 'green', 'grey'][c]} thing", f"kind {k}")
        for c, k in zip(*chosen, strict=True)
    ]
    directions = colours[chosen[0]] + kinds[chosen[1]] + 0.1 * rng.normal(size=(count, width))
    return texts, (directions - directions.mean(0)).astype(np.float32)


def test_predicts_directions_of_other_products():
    texts, directions = shop()
    fitted = fit_title_regression(texts[:100], directions[:100], np.full(100, 20))
    predicted = fitted.predict(texts[100:])
    assert predicted.dtype == np.float32
    left = np.square(predicted - directions[100:]).sum() / np.square(directions[100:]).sum()
    assert left < 0.05


def test_by_hand():
    """Two products a word, weights 1: B = b (b . d) / (b . b + 0.3) of centred columns."""
    directions = np.array([[1.0], [1.0], [-1.0], [-1.0]], np.float32)
    fitted = fit_title_regression(
        [("a", ""), ("a", ""), ("b", ""), ("b", "")], directions, np.full(4, 50)
    )
    assert fitted.words == ("a", "b")
    assert fitted.mean.tolist() == [0.5, 0.5]
    # Columns are (+, +, -, -) / 2 and its opposite: Gram [[1, -1], [-1, 1]], so that B = (2, -2) /
    # (2 + 0.3).
    np.testing.assert_allclose(fitted.weights[:, 0], [2 / 2.3, -2 / 2.3], rtol=1e-6)
    np.testing.assert_allclose(
        fitted.predict([("A!", ""), ("other", "")])[:, 0], [2 / 2.3, 0], rtol=1e-6
    )


def test_products_with_few_photos_weigh_less():
    texts = [("a", ""), ("a", ""), ("b", ""), ("b", "")]
    directions = np.array([[1.0], [3.0], [-2.0], [-2.0]], np.float32)
    many, few = (
        fit_title_regression(texts, directions, np.array([n, 20, 20, 20])) for n in (20, 1)
    )
    assert few.predict([("a", "")]) > many.predict([("a", "")])


def test_words_of_one_product_are_ignored():
    fitted = fit_title_regression(
        [("one", ""), ("two", "")], np.ones((2, 3), np.float32), np.ones(2)
    )
    assert fitted.words == ()
    assert fitted.predict([("one", "x")]).tolist() == [[0, 0, 0]]


def test_save_and_load(tmp_path):
    texts, directions = shop(50)
    for fitted in (
        fit_title_regression(texts, directions, np.ones(50)),
        fit_title_regression([], np.zeros((0, 8)), np.zeros(0)),
    ):
        save_title_regression(tmp_path / "titles.npz", fitted)
        read = load_title_regression(tmp_path / "titles.npz")
        assert read.words == fitted.words
        assert np.array_equal(read.weights, fitted.weights)
        assert np.array_equal(read.predict(texts), fitted.predict(texts))
    (tmp_path / "titles.npz").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no title regression"):
        load_title_regression(tmp_path / "titles.npz")
