"""Which category a photo shows."""

import numpy as np
import pytest

from sicot_jax.search import category
from sicot_jax.search.category import Fusion


def test_the_classifier_s_branch_by_hand():
    """Shares of a category's products together; a class without a category has no part."""
    shares = np.array([[0.1, 0.2, 0.3, 0.4], [0, 0, 0, 1.0]])
    found = category.by_classifier(shares, np.array([1, 0, 1, -1]), 3)
    np.testing.assert_allclose(found, [[0.2 / 0.6, 0.4 / 0.6, 0], [0, 0, 0]], rtol=1e-12)


def test_the_vote_by_hand():
    """T = 0.1: a photo that is 0.1 farther than the nearest has the weight 1 / e. -1: no photo, whatever its number says."""
    similarity = np.array([[0.9, 0.8, 0.8, 2.0], [0.5, 0.4, 0.3, 0.2]])
    found = category.by_neighbours(similarity, np.array([[2, 0, 2, -1], [-1] * 4]), 3, 0.1)
    one, less = 1.0, np.exp(-1)
    total = one + 2 * less
    np.testing.assert_allclose(found, [[less / total, 0, (one + less) / total], [0, 0, 0]], rtol=1e-12)


def test_no_photo_at_all():
    assert category.by_neighbours(np.zeros((1, 0)), np.zeros((1, 0), int), 2, 0.1).tolist() == [[0, 0]]


def test_fusion_by_hand():
    """(0.5 x 0.6 + 0.5 x 0.2) : (1 x 0.4 + 0 x 0.8) = 0.4 : 0.4; where one branch is silent the other one decides."""
    fused = Fusion(np.array([0.5, 1.0]), 0.05)
    m, s = np.array([[0.6, 0.4], [0, 0]]), np.array([[0.2, 0.8], [0.5, 0.5]])
    np.testing.assert_allclose(fused(m, s), [[0.5, 0.5], [1, 0]], rtol=1e-12)
    assert fused(m * 0, s * 0).tolist() == [[0, 0], [0, 0]]


def made(rng, photos, good, votes_good, kinds=4, nearest=30):
    """m that is right with certainty `good`[kind], and neighbours of the right category with probability `votes_good`[kind]."""
    truth = rng.integers(0, kinds, photos)
    wrong = (truth + rng.integers(1, kinds, photos)) % kinds
    told = np.where(rng.random(photos) < np.array(good)[truth], truth, wrong)
    m = np.full((photos, kinds), 0.1 / kinds)
    m[np.arange(photos), told] += 0.9
    others = (truth[:, None] + rng.integers(1, kinds, (photos, nearest))) % kinds
    voted = np.where(rng.random((photos, nearest)) < np.array(votes_good)[truth][:, None], truth[:, None], others)
    similarity = -np.sort(-rng.uniform(0.5, 0.9, (photos, nearest)), 1)
    return m, similarity, voted, truth


@pytest.mark.parametrize("classifier, votes, low, high", [(0.95, 0.3, 0.7, 1.0), (0.3, 0.95, 0.0, 0.2)])
def test_the_better_branch_has_the_greater_weight(classifier, votes, low, high):
    fused = category.fit(*made(np.random.default_rng(0), 2000, [classifier] * 4, [votes] * 4))
    assert np.all((fused.weights >= low) & (fused.weights <= high))


def test_a_category_with_photos_enough_has_its_own_weight():
    """Category 0 by the votes, the others by the classifier; with few photos all have the common one, or nearly so."""
    rng = np.random.default_rng(0)
    parts = [0.4, 0.97, 0.97, 0.97], [0.97, 0.4, 0.4, 0.4]
    own = category.fit(*made(rng, 4000, *parts)).weights
    assert own[0] < own[1:].min() - 0.2
    m, similarity, voted, truth = made(rng, 8, *parts)
    few = category.fit(m, similarity, voted, truth).weights
    assert np.ptp(few) < 0.8 * np.ptp(own)
    fused, fresh = category.fit(*made(rng, 4000, *parts)), made(rng, 4000, *parts)
    m, similarity, voted, truth = fresh
    vote = category.by_neighbours(similarity, voted, 4, fused.temperature)
    right = [np.mean(p.argmax(1) == truth) for p in (fused(m, vote), m, vote)]
    assert right[0] > max(right[1:]) + 0.02


def test_a_fit_to_no_photo():
    fused = category.fit(np.zeros((0, 3)), np.zeros((0, 30)), np.zeros((0, 30), int), np.zeros(0, int))
    assert fused.weights.tolist() == [0.5] * 3
