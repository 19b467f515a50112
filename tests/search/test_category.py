"""Category prediction: fusion of classifier and neighbour votes, and its fit."""

import json

import numpy as np
import pytest
from helpers.damage import damaged_bytes, damaged_json, result_or_one_line
from hypothesis import given
from hypothesis import strategies as st

from sicot_jax.errors import InputError
from sicot_jax.search import category
from sicot_jax.search.category import CategoryFitData, CategoryFusion, fit_category_fusion


def fusion(weights, temperature=0.05, exponent=0.5, confident_from=None, default=0.5):
    names = tuple(f"kind {number}" for number in range(len(weights)))
    return CategoryFusion(
        names, np.array(weights), default, temperature, exponent, confident_from, 10
    )


def test_sums_by_category_by_hand():
    """Category 3 means none: that value is left out."""
    result = category.sum_by_category(np.array([0.1, 0.2, 0.3, 0.4]), np.array([1, 0, 1, 3]), 3)
    np.testing.assert_allclose(result, [0.2, 0.4, 0], rtol=1e-12)


def test_the_neighbour_vote_by_hand():
    """T = 0.1: a photo whose cosine is 0.1 lower than the nearest has the weight 1 / e. Photos of
    category 3 (none) do not vote, whatever their cosine.
    """
    similarity = np.array([[0.9, 0.8, 0.8, 2.0], [0.5, 0.4, 0.3, 0.2]])
    result = category.neighbour_vote(similarity, np.array([[2, 0, 2, 3], [3] * 4]), 3, 0.1)
    one, less = 1.0, np.exp(-1)
    total = one + 2 * less
    np.testing.assert_allclose(
        result, [[less / total, 0, (one + less) / total], [0, 0, 0]], rtol=1e-12
    )


def test_a_vote_without_photos_is_zero():
    assert category.neighbour_vote(np.zeros((1, 0)), np.zeros((1, 0), int), 2, 0.1).tolist() == [
        [0, 0]
    ]


def test_fusion_by_hand():
    """(0.5 x 0.6 + 0.5 x 0.2) : (1 x 0.4 + 0 x 0.8) = 0.4 : 0.4. Where one branch is all zeros the
    other decides. Halving the category mass changes nothing.
    """
    fused = fusion([0.5, 1.0])
    m, s = np.array([[0.6, 0.4], [0, 0]]), np.array([[0.2, 0.8], [0.5, 0.5]])
    np.testing.assert_allclose(fused(m, s), [[0.5, 0.5], [1, 0]], rtol=1e-12)
    np.testing.assert_allclose(fused(m / 2, s), fused(m, s), rtol=1e-12)
    assert fused(m * 0, s * 0).tolist() == [[0, 0], [0, 0]]


def test_log_factors_by_hand():
    """B = 1/2: the square root of p / m; 0 where either is all zeros."""
    m, p = np.array([[0.6, 0.2], [0, 0], [0.5, 0.5]]), np.array([[0.5, 0.5], [0.5, 0.5], [0, 0]])
    result = fusion([0.5, 0.5]).log_factors(m, p)
    np.testing.assert_allclose(
        result, [[0.5 * np.log(0.5 / 0.75), 0.5 * np.log(0.5 / 0.25)], [0, 0], [0, 0]], rtol=1e-12
    )


def test_unseen_categories_get_the_default_weight():
    """Weights follow the names, in any order."""
    fused = fusion([0.2, 0.9], default=0.6)
    assert fused.for_categories(("kind 1", "new", "kind 0")).classifier_weights.tolist() == [
        0.9,
        0.6,
        0.2,
    ]
    assert fused.for_categories(fused.names) is fused


def random_photos(rng, photos, classifier_accuracy, vote_accuracy, kinds=4, nearest=30):
    """(classifier posterior, cosines and categories of neighbours, true category), where classifier
    and each neighbour are right with the given probabilities per category.
    """
    truth = rng.integers(0, kinds, photos)
    wrong = (truth + rng.integers(1, kinds, photos)) % kinds
    predicted = np.where(rng.random(photos) < np.array(classifier_accuracy)[truth], truth, wrong)
    m = np.full((photos, kinds), 0.1 / kinds)
    m[np.arange(photos), predicted] += 0.9
    others = (truth[:, None] + rng.integers(1, kinds, (photos, nearest))) % kinds
    voted = np.where(
        rng.random((photos, nearest)) < np.array(vote_accuracy)[truth][:, None],
        truth[:, None],
        others,
    )
    similarity = -np.sort(-rng.uniform(0.5, 0.9, (photos, nearest)), 1)
    return m, similarity, voted, truth


@pytest.mark.parametrize(
    ("classifier", "votes", "low", "high"), [(0.95, 0.3, 0.7, 1.0), (0.3, 0.95, 0.0, 0.2)]
)
def test_the_more_accurate_branch_gets_the_greater_weight(classifier, votes, low, high):
    fused = fitted(random_photos(np.random.default_rng(0), 2000, [classifier] * 4, [votes] * 4))
    assert np.all((fused.classifier_weights >= low) & (fused.classifier_weights <= high))


def test_a_category_with_enough_photos_has_a_separate_weight():
    """Category 0 follows the votes, the others the classifier; with few photos all weights are
    nearly the shared one.
    """
    rng = np.random.default_rng(0)
    parts = [0.4, 0.97, 0.97, 0.97], [0.97, 0.4, 0.4, 0.4]
    many = fitted(random_photos(rng, 4000, *parts)).classifier_weights
    assert many[0] < many[1:].min() - 0.2
    few = fitted(random_photos(rng, 8, *parts)).classifier_weights
    assert np.ptp(few) < 0.8 * np.ptp(many)
    fused, unseen = fitted(random_photos(rng, 4000, *parts)), random_photos(rng, 4000, *parts)
    m, similarity, voted, truth = unseen
    vote = category.neighbour_vote(similarity, voted, 4, fused.temperature)
    right = [np.mean(p.argmax(1) == truth) for p in (fused(m, vote), m, vote)]
    assert right[0] > max(right[1:]) + 0.02


def test_categories_of_equal_accuracy_share_one_weight():
    fused = fitted(random_photos(np.random.default_rng(0), 1000, [0.8] * 4, [0.32] * 4))
    assert 0 < fused.default_weight < 1
    assert fused.classifier_weights.tolist() == [fused.default_weight] * 4


def test_a_branch_that_carries_no_signal_gets_no_weight():
    """Uniform votes raise the likelihood of an overconfident classifier (80 of 100 are right, at
    probability 0.925), but not its ranks.
    """
    m, similarity, voted, truth = random_photos(
        np.random.default_rng(0), 500, [0.8] * 4, [1.0] * 4, nearest=28
    )
    fused = fitted((m, similarity * 0 + 0.5, voted * 0 + np.arange(28) % 4, truth))
    assert fused.default_weight == 1


def fitted(photos):
    """A fusion fitted to photos that each show another product."""
    return fit_category_fusion(CategoryFitData(*photos, np.arange(len(photos[0])), "abcd"))


def test_the_one_standard_error_rule_by_hand():
    """Of (0, 1), (1, 1) and (1, 0) the middle one is best; the first is worse by 0.5, more than its
    standard error 0.5 / sqrt(2) = 0.354.
    """
    products, values = np.arange(2), np.array([[0, 1], [1, 1], [1, 0]])
    assert category.one_standard_error_choice(values, products) == 1
    assert (
        category.one_standard_error_choice(np.array([[0.9, 1], [1, 0.8], [0.9, 1]]), products) == 0
    )
    assert category.one_standard_error_choice(np.array([[0.9, 0.9], [1.2, 0.8]]), products) == 0
    assert category.one_standard_error_choice(np.zeros((3, 1)), products[:1]) == 0
    assert category.one_standard_error_choice(np.array([[1, 1], [1, 1 + 1e-12]]), products) == 0


def test_reciprocal_ranks_by_hand():
    """Rank 1; rank 2; one of two ties for ranks 1 and 2, so 1.5."""
    posterior = np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.4, 0.4, 0.2]])
    np.testing.assert_allclose(
        category._reciprocal_ranks(posterior, np.array([0, 1, 0])), [1, 1 / 2, 1 / 1.5]
    )


def test_photos_of_a_product_are_one_cluster():
    """A mean gain of 0.3 with deviations (0.5, 0.5, -0.5, -0.5): the standard error is
    sqrt(4 x 0.25) / 4 = 0.25 for four products, sqrt(1 + 1) / 4 = 0.354 for two.
    """
    values = np.array([[0, 0, 0, 0], [0.8, 0.8, -0.2, -0.2]])
    assert category.one_standard_error_choice(values, np.arange(4)) == 1
    assert category.one_standard_error_choice(values, np.array([7, 7, 9, 9])) == 0


def test_where_the_classifier_decides_the_temperature_is_the_best_of_the_vote():
    """The nearest photo is of another category, the other 29 are right: T = 0.1, although the
    fusion is as good with any T.
    """
    m, similarity, voted, truth = random_photos(np.random.default_rng(0), 200, [1.0] * 4, [1.0] * 4)
    voted[:, 0] = (truth + 1) % 4
    similarity = np.tile(np.append(0.9, np.full(29, 0.8)), (200, 1))
    fused = fitted((m * 0 + np.eye(4)[truth], similarity, voted, truth))
    assert fused.default_weight == 1
    assert fused.temperature == 0.1


def test_the_rescaling_exponent_is_the_smallest_that_is_as_good():
    """By hand, four photos. From b = 0.5 on each has rank 1 instead of 2, a gain of 0.5: b = 0.5.
    Where two gain it and one loses it, the mean gain of 0.125 is within its standard error, the
    deviation of (0.5, 0.5, -0.5, 0) over sqrt(4) = 0.207: b = 0.
    """
    later = category.EXPONENTS >= 0.5
    every = np.where(later[:, None], 1.0, np.full(4, 0.5))
    assert category.fit_rescaling_exponent(every, np.arange(4)) == 0.5
    some = np.where(later[:, None], [1.0, 1.0, 0.5, 0.5], [0.5, 0.5, 1.0, 0.5])
    assert category.fit_rescaling_exponent(some, np.arange(4)) == 0
    assert category.fit_rescaling_exponent(np.tile(some, 100), np.arange(400)) == 0.5
    assert category.fit_rescaling_exponent(np.zeros((11, 0)), np.zeros(0, int)) == 0


def test_the_confidence_threshold_has_99_percent_precision():
    """By hand: the 150th photo is wrong, the 200th, the 250th and so on: 2 of 249 are, then 3 of
    fewer than 300, then 4 of 300.
    """
    probability, right = np.linspace(1, 0.5, 400), np.ones(400, bool)
    right[149::50] = False
    assert category._confidence_threshold(probability, right, 20) == probability[248]
    assert category._confidence_threshold(probability, np.zeros(400, bool), 20) is None


def test_a_confidence_threshold_needs_a_minimum_of_photos():
    probability, right = np.linspace(1, 0.5, 400), np.arange(400) < 19
    assert category._confidence_threshold(probability, right, 20) is None
    assert category._confidence_threshold(probability, np.arange(400) < 20, 20) == probability[19]


def test_equal_probabilities_are_accepted_together():
    probability, right = np.array([0.9] * 50 + [0.8] * 50), np.arange(100) < 75
    assert category._confidence_threshold(probability, right, 20) == 0.9


def test_a_fit_without_photos():
    none = np.zeros((0, 30))
    fused = fit_category_fusion(
        CategoryFitData(
            np.zeros((0, 3)), none, none.astype(int), np.zeros(0, int), np.zeros(0, int), "abc"
        )
    )
    assert fused.classifier_weights.tolist() == [0.5] * 3
    assert fused.confident_from is None


def test_a_fusion_is_read_as_written(tmp_path):
    path, written = tmp_path / "category_fusion.json", fusion([0.25, 1.0], confident_from=0.75)
    category.write_fusion(path, written)
    read = category.read_fusion(path)
    assert {**vars(read), "classifier_weights": 0} == {**vars(written), "classifier_weights": 0}
    assert np.array_equal(read.classifier_weights, written.classifier_weights)
    assert category.read_fusion(tmp_path / "nothing.json") is None
    for text, message in (
        ('{"format": 9}', "another format"),
        ('{"format": 2}', "damaged or incomplete"),
        ("x", "wanted the cat"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            category.read_fusion(path)


STORED = {
    "names": ["hats", "caf\u00e9"],
    "classifier_weights": [0.5, 1.0],
    "default_weight": 0.5,
    "temperature": 0.05,
    "rescaling_exponent": 0.5,
    "confident_from": None,
    "num_photos": 10,
    "format": category.FORMAT,
}


@given(
    damaged_json(STORED).map(str.encode)
    | damaged_bytes(json.dumps(STORED, indent=1).encode())
    | st.binary(max_size=60)
)
def test_a_damaged_fusion_is_an_error_of_one_line_or_works(tmp_path, content):
    path = tmp_path / "category_fusion.json"
    path.write_bytes(json.dumps(STORED).encode())
    assert category.read_fusion(path) is not None
    path.write_bytes(content)
    read = result_or_one_line(lambda: category.read_fusion(path))
    if read is not None:
        assert read.for_categories(("hats", "new")).classifier_weights.shape == (2,)
