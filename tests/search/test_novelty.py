"""How usual a photo is for a catalogue."""

import numpy as np
import pytest

from sicot_jax.search import novelty as typicality
from sicot_jax.search.novelty import Typicality


def test_a_distance_by_hand():
    """One direction of variance 4, variance 1/4 beside it: (3 - 1)^2 / 4 + (2^2 + 1^2) / (1/4); two
    of three are as far.
    """
    made = Typicality(
        np.array([1.0, 0, 0]),
        np.array([[1.0], [0], [0]]),
        np.array([4.0]),
        0.25,
        np.array([5.0, 21.0, 30.0]),
    )
    assert made.distance(np.array([[3.0, 2, 1]])) == pytest.approx([21])
    assert made.share(np.array([3.0, 2, 1])) == pytest.approx(3 / 4)
    assert made.share(np.array([1.0, 0, 0])) == 1
    assert made.share(np.array([100.0, 0, 0])) == pytest.approx(30 / 99**2 * 4 / 4)


@pytest.mark.parametrize("width", [5, 64, 300])
def test_photos_of_the_catalogue_are_spread_over_all_shares(width):
    """And others, of another length, direction or level, are at the end. More numbers than photos
    are fitted too.
    """
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(width, width)) * np.geomspace(1, 1e-3, width)
    photos = np.maximum(rng.normal(size=(1200, width)) @ mix + 1, 0)
    made = typicality.fit(photos[:400])
    shares = np.array([made.share(x) for x in photos[400:]])
    assert np.quantile(shares, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.08)
    for other in (4 * photos[400:500], photos[400:500][:, ::-1], photos[400:500] + 3):
        assert np.mean([made.share(x) < 0.05 for x in other]) > 0.9


def test_the_same_photo_again_and_again():
    made = typicality.fit(np.ones((50, 8)))
    assert made.share(np.ones(8)) == 1
    assert made.share(np.full(8, 2.0)) == pytest.approx(0, abs=1e-12)
    assert typicality.fit(np.zeros((50, 8))).share(np.zeros(8)) == 1


def test_photos_of_the_fit_count_as_new_ones():
    """By hand: the other half's Gaussian, and the rank among the photos of one's own half but
    oneself.
    """
    embeddings = np.random.default_rng(0).normal(size=(40, 3)) * [1, 2, 3]
    shares = typicality.shares_of_fitted(embeddings)
    turned = embeddings.reshape(20, 2, 3)[:, ::-1].reshape(40, 3)
    for half, made in ((0, typicality.fit(turned)), (1, typicality.fit(embeddings))):
        distances = made.distance(embeddings[half::2])
        order = np.argsort(-distances)
        expected = np.empty(20)
        expected[order] = np.arange(1, 21) / 20  # (1 + those farther) / (1 + others)
        expected[order[0]] *= distances[order[1]] / distances[order[0]]
        np.testing.assert_allclose(shares[half::2], expected, rtol=1e-9)
    assert typicality.shares_of_fitted(embeddings[:39]).shape == (39,)
