"""Which category a photo shows."""

import numpy as np
import pytest

from sicot_jax.errors import InputError
from sicot_jax.search import category
from sicot_jax.search.category import Fusion


def fusion(weights, temperature=0.05, strength=0.5, sure=None, common=0.5):
    names = tuple(f"kind {number}" for number in range(len(weights)))
    return Fusion(names, np.array(weights), common, temperature, strength, sure, 10)


def test_the_classifier_s_branch_by_hand():
    """Shares of a category's products together; a product without a category (3) has no part."""
    found = category.by_classifier(np.array([0.1, 0.2, 0.3, 0.4]), np.array([1, 0, 1, 3]), 3)
    np.testing.assert_allclose(found, [0.2, 0.4, 0], rtol=1e-12)


def test_the_vote_by_hand():
    """T = 0.1: a photo that is 0.1 farther than the nearest has the weight 1 / e. 3: no photo,
    whatever its cosine says.
    """
    similarity = np.array([[0.9, 0.8, 0.8, 2.0], [0.5, 0.4, 0.3, 0.2]])
    found = category.by_neighbours(similarity, np.array([[2, 0, 2, 3], [3] * 4]), 3, 0.1)
    one, less = 1.0, np.exp(-1)
    total = one + 2 * less
    np.testing.assert_allclose(
        found, [[less / total, 0, (one + less) / total], [0, 0, 0]], rtol=1e-12
    )


def test_no_photo_at_all():
    assert category.by_neighbours(np.zeros((1, 0)), np.zeros((1, 0), int), 2, 0.1).tolist() == [
        [0, 0]
    ]


def test_fusion_by_hand():
    """(0.5 x 0.6 + 0.5 x 0.2) : (1 x 0.4 + 0 x 0.8) = 0.4 : 0.4; where one branch is silent the
    other one decides. Sums of shares that are halved, as half of the products have no category, say
    the same.
    """
    fused = fusion([0.5, 1.0])
    m, s = np.array([[0.6, 0.4], [0, 0]]), np.array([[0.2, 0.8], [0.5, 0.5]])
    np.testing.assert_allclose(fused(m, s), [[0.5, 0.5], [1, 0]], rtol=1e-12)
    np.testing.assert_allclose(fused(m / 2, s), fused(m, s), rtol=1e-12)
    assert fused(m * 0, s * 0).tolist() == [[0, 0], [0, 0]]


def test_factors_by_hand():
    """b = 1/2: the root of p / m; 0 where the classifier or the fusion says nothing."""
    m, p = np.array([[0.6, 0.2], [0, 0], [0.5, 0.5]]), np.array([[0.5, 0.5], [0.5, 0.5], [0, 0]])
    found = fusion([0.5, 0.5]).log_factors(m, p)
    np.testing.assert_allclose(
        found, [[0.5 * np.log(0.5 / 0.75), 0.5 * np.log(0.5 / 0.25)], [0, 0], [0, 0]], rtol=1e-12
    )


def test_other_categories_have_the_common_weight():
    """By name, whatever their order."""
    fused = fusion([0.2, 0.9], common=0.6)
    assert fused.of(("kind 1", "new", "kind 0")).weights.tolist() == [0.9, 0.6, 0.2]
    assert fused.of(fused.names) is fused


def made(rng, photos, good, votes_good, kinds=4, nearest=30):
    """m that is right with certainty `good`[kind], and neighbours of the right category with
    probability `votes_good`[kind].
    """
    truth = rng.integers(0, kinds, photos)
    wrong = (truth + rng.integers(1, kinds, photos)) % kinds
    told = np.where(rng.random(photos) < np.array(good)[truth], truth, wrong)
    m = np.full((photos, kinds), 0.1 / kinds)
    m[np.arange(photos), told] += 0.9
    others = (truth[:, None] + rng.integers(1, kinds, (photos, nearest))) % kinds
    voted = np.where(
        rng.random((photos, nearest)) < np.array(votes_good)[truth][:, None], truth[:, None], others
    )
    similarity = -np.sort(-rng.uniform(0.5, 0.9, (photos, nearest)), 1)
    return m, similarity, voted, truth


@pytest.mark.parametrize(
    ("classifier", "votes", "low", "high"), [(0.95, 0.3, 0.7, 1.0), (0.3, 0.95, 0.0, 0.2)]
)
def test_the_better_branch_has_the_greater_weight(classifier, votes, low, high):
    fused = fitted(made(np.random.default_rng(0), 2000, [classifier] * 4, [votes] * 4))
    assert np.all((fused.weights >= low) & (fused.weights <= high))


def test_a_category_with_photos_enough_has_its_own_weight():
    """Category 0 by the votes, the others by the classifier; with few photos all have the common
    one, or nearly so.
    """
    rng = np.random.default_rng(0)
    parts = [0.4, 0.97, 0.97, 0.97], [0.97, 0.4, 0.4, 0.4]
    own = fitted(made(rng, 4000, *parts)).weights
    assert own[0] < own[1:].min() - 0.2
    few = fitted(made(rng, 8, *parts)).weights
    assert np.ptp(few) < 0.8 * np.ptp(own)
    fused, fresh = fitted(made(rng, 4000, *parts)), made(rng, 4000, *parts)
    m, similarity, voted, truth = fresh
    vote = category.by_neighbours(similarity, voted, 4, fused.temperature)
    right = [np.mean(p.argmax(1) == truth) for p in (fused(m, vote), m, vote)]
    assert right[0] > max(right[1:]) + 0.02


def test_categories_that_are_alike_have_one_weight():
    fused = fitted(made(np.random.default_rng(0), 1000, [0.8] * 4, [0.32] * 4))
    assert 0 < fused.common < 1
    assert fused.weights.tolist() == [fused.common] * 4


def test_one_branch_alone_where_the_other_adds_nothing():
    """Votes that say nothing: the likelihood of a classifier that is too sure of itself (80 of 100
    are right, by 0.925) gains by them, its ranks do not.
    """
    m, similarity, voted, truth = made(
        np.random.default_rng(0), 500, [0.8] * 4, [1.0] * 4, nearest=28
    )
    fused = fitted((m, similarity * 0 + 0.5, voted * 0 + np.arange(28) % 4, truth))
    assert fused.common == 1


def fitted(photos):
    """Each of a product of its own."""
    return category.fit(*photos, np.arange(len(photos[0])), "abcd")


def test_simplest_by_hand():
    """Of (0, 1), (1, 1) and (1, 0) the middle one is best; the first lacks 0.5, its error is 0.5 /
    root of 2 = 0.354.
    """
    own, values = np.arange(2), np.array([[0, 1], [1, 1], [1, 0]])
    assert category.simplest(values, own) == 1
    assert category.simplest(np.array([[0.9, 1], [1, 0.8], [0.9, 1]]), own) == 0
    assert category.simplest(np.array([[0.9, 0.9], [1.2, 0.8]]), own) == 0
    assert category.simplest(np.zeros((3, 1)), own[:1]) == 0
    assert category.simplest(np.array([[1, 1], [1, 1 + 1e-12]]), own) == 0


def test_ranks_by_hand():
    """First; behind one; one of two equal ones behind none, so 1.5."""
    told = np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.4, 0.4, 0.2]])
    np.testing.assert_allclose(category._reciprocal(told, np.array([0, 1, 0])), [1, 1 / 2, 1 / 1.5])


def test_photos_of_a_product_are_one_draw():
    """By hand: a gain of 0.3 on average, with deviations (0.5, 0.5, -0.5, -0.5): an error of sqrt(4
    x 0.25) / 4 = 0.25 where they are of four products, of sqrt(1 + 1) / 4 = 0.354 where they are of
    two.
    """
    values = np.array([[0, 0, 0, 0], [0.8, 0.8, -0.2, -0.2]])
    assert category.simplest(values, np.arange(4)) == 1
    assert category.simplest(values, np.array([7, 7, 9, 9])) == 0


def test_the_temperature_of_the_vote_where_the_classifier_decides():
    """The nearest photo is of another category, the other 29 are right: T = 0.1, although every T
    does as well.
    """
    m, similarity, voted, truth = made(np.random.default_rng(0), 200, [1.0] * 4, [1.0] * 4)
    voted[:, 0] = (truth + 1) % 4
    similarity = np.tile(np.append(0.9, np.full(29, 0.8)), (200, 1))
    fused = fitted((m * 0 + np.eye(4)[truth], similarity, voted, truth))
    assert fused.common == 1
    assert fused.temperature == 0.1


def test_strength_is_the_least_that_is_as_good():
    """By hand, of four photos: ranks 1 instead of 2 from b = 0.5 on gain 0.5 of each. Where half of
    them gain it and one loses, 0.125 is no more than its standard error, the deviation of (0.5,
    0.5, -0.5, 0) by the root of 4, 0.207: b = 0.
    """
    later = category.STRENGTHS >= 0.5
    every = np.where(later[:, None], 1.0, np.full(4, 0.5))
    assert category.strength(every, np.arange(4)) == 0.5
    some = np.where(later[:, None], [1.0, 1.0, 0.5, 0.5], [0.5, 0.5, 1.0, 0.5])
    assert category.strength(some, np.arange(4)) == 0
    assert category.strength(np.tile(some, 100), np.arange(400)) == 0.5
    assert category.strength(np.zeros((11, 0)), np.zeros(0, int)) == 0


def test_sure_is_where_99_of_100_are_right():
    """By hand: wrong are the 150th photo, the 200th, the 250th and so on: 2 of 249, then 3 of less
    than 300, 4 of 300.
    """
    probability, right = np.linspace(1, 0.5, 400), np.ones(400, bool)
    right[149::50] = False
    assert category._sure(probability, right, 20) == probability[248]
    assert category._sure(probability, np.zeros(400, bool), 20) is None


def test_a_few_sure_photos_are_not_enough():
    probability, right = np.linspace(1, 0.5, 400), np.arange(400) < 19
    assert category._sure(probability, right, 20) is None
    assert category._sure(probability, np.arange(400) < 20, 20) == probability[19]


def test_equal_probabilities_are_sure_together():
    probability, right = np.array([0.9] * 50 + [0.8] * 50), np.arange(100) < 75
    assert category._sure(probability, right, 20) == 0.9


def test_a_fit_to_no_photo():
    none = np.zeros((0, 30))
    fused = category.fit(
        np.zeros((0, 3)), none, none.astype(int), np.zeros(0, int), np.zeros(0, int), "abc"
    )
    assert fused.weights.tolist() == [0.5] * 3
    assert fused.sure is None


def test_a_file(tmp_path):
    path, written = tmp_path / "categories.json", fusion([0.25, 1.0], sure=0.75)
    category.write_fusion(path, written)
    read = category.read_fusion(path)
    assert {**vars(read), "weights": 0} == {**vars(written), "weights": 0}
    assert np.array_equal(read.weights, written.weights)
    assert category.read_fusion(tmp_path / "nothing.json") is None
    for text, said in (
        ('{"format": 9}', "another format"),
        ('{"format": 1}', "not as it was written"),
        ("x", "wanted the cat"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            category.read_fusion(path)
