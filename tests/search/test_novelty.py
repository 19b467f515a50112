"""The out-of-distribution score of a photo."""

import numpy as np
import pytest

from sicot_jax.search.novelty import (
    NUM_COMPONENTS,
    NoveltyDetector,
    cross_fitted_p_values,
    fit_novelty_detector,
)


def test_a_distance_by_hand():
    """Component variance 4, residual variance 1/4: d^2 = (3 - 1)^2 / 4 + (2^2 + 1^2) / (1/4)."""
    detector = NoveltyDetector(
        np.array([1.0, 0, 0]),
        np.array([[1.0], [0], [0]]),
        np.array([4.0]),
        0.25,
        np.array([5.0, 21.0, 30.0]),
    )
    assert detector.squared_distances(np.array([[3.0, 2, 1]])) == pytest.approx([21])
    assert detector.p_value(np.array([3.0, 2, 1])) == pytest.approx(3 / 4)
    assert detector.p_value(np.array([1.0, 0, 0])) == 1
    assert detector.p_value(np.array([100.0, 0, 0])) == pytest.approx(30 / 99**2 * 4 / 4)


@pytest.mark.parametrize("width", [5, 64, 300])
def test_p_values_of_the_catalogue_are_uniform_and_those_of_others_small(width):
    """Others are embeddings of another length, direction or mean. One width has more dimensions
    than photos.
    """
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(width, width)) * np.geomspace(1, 1e-3, width)
    photos = np.maximum(rng.normal(size=(1200, width)) @ mix + 1, 0)
    detector = fit_novelty_detector(photos[:400])
    p_values = np.array([detector.p_value(x) for x in photos[400:]])
    assert np.quantile(p_values, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.08)
    for other in (4 * photos[400:500], photos[400:500][:, ::-1], photos[400:500] + 3):
        assert np.mean([detector.p_value(x) < 0.05 for x in other]) > 0.9


def test_identical_photos_have_no_variance_and_are_fitted():
    detector = fit_novelty_detector(np.ones((50, 8)))
    assert detector.p_value(np.ones(8)) == 1
    assert detector.p_value(np.full(8, 2.0)) == pytest.approx(0, abs=1e-12)
    assert fit_novelty_detector(np.zeros((50, 8))).p_value(np.zeros(8)) == 1


def test_fitted_photos_are_scored_as_new_ones():
    """By hand: distance to the Gaussian of the other half, ranked among the other photos of the
    same half.
    """
    embeddings = np.random.default_rng(0).normal(size=(40, 3)) * [1, 2, 3]
    p_values = cross_fitted_p_values(embeddings)
    swapped = embeddings.reshape(20, 2, 3)[:, ::-1].reshape(40, 3)
    for half, detector in (
        (0, fit_novelty_detector(swapped)),
        (1, fit_novelty_detector(embeddings)),
    ):
        distances = detector.squared_distances(embeddings[half::2])
        order = np.argsort(-distances)
        expected = np.empty(20)
        expected[order] = np.arange(1, 21) / 20  # (1 + those farther) / (1 + others)
        expected[order[0]] *= distances[order[1]] / distances[order[0]]
        np.testing.assert_allclose(p_values[half::2], expected, rtol=1e-9)
    assert cross_fitted_p_values(embeddings[:39]).shape == (39,)


def test_distances_equal_those_of_probabilistic_pca():
    """Precision matrix of scikit-learn's PCA, fitted to the same half of the photos."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    photos = np.random.default_rng(0).normal(size=(400, 30)) * np.geomspace(3, 0.1, 30)
    detector = fit_novelty_detector(photos)
    pca = decomposition.PCA(NUM_COMPONENTS, svd_solver="full").fit(photos[::2])
    centred = photos[1::2] - pca.mean_
    expected = np.einsum("nd,de,ne->n", centred, pca.get_precision(), centred)
    np.testing.assert_allclose(detector.squared_distances(photos[1::2]), expected, rtol=1e-8)
