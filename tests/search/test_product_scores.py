"""From an engine's logits to product and category probabilities."""

import numpy as np
import pytest

from sicot_jax.index.backends.base import ActiveProducts, Neighbour
from sicot_jax.search.category import CategoryFusion
from sicot_jax.search.product_scores import ProductScores, category_posterior, top_products

NAMES = ("even", "odd")


def active_products(
    deleted=(), new_products=(), kernel=(), bias=(), category_names=(), product_category=(0,) * 40
):
    return ActiveProducts(
        deleted=np.array(deleted, np.int64),
        new_products=np.array(new_products, np.int64),
        kernel=np.array(kernel, np.float32).reshape(-1, 2),
        bias=np.array(bias, np.float32),
        category_names=category_names,
        product_category=np.array(product_category, np.int64),
    )


def scores_of(embedding, logits, active):
    return ProductScores.from_logits(
        np.asarray(embedding, np.float32), np.asarray(logits, np.float32), active
    )


def test_probabilities_by_hand():
    """Logits 1, 2, 3, and a new product of weights (1, 1) and bias 1: embedding (0.5, 0.5) gives it
    the logit 2.
    """
    active = active_products(new_products=[7], kernel=[[1, 1]], bias=[1])
    product_ids, probability = top_products(scores_of([0.5, 0.5], [1, 2, 3], active), 4)
    exact = np.exp([3, 2, 2, 1])
    assert product_ids[0] == 2
    assert set(product_ids[1:3].tolist()) == {1, 7}
    assert product_ids[3] == 0
    np.testing.assert_allclose(probability, exact / exact.sum(), rtol=1e-6)


def test_deleted_products_have_no_probability():
    active = active_products(
        deleted=[2, 7], new_products=[7, 9], kernel=[[1, 1], [0, 0]], bias=[100, 0]
    )
    product_ids, probability = top_products(scores_of([1, 1], [0, 0, 50], active), 9)
    assert sorted(product_ids.tolist()) == [0, 1, 9]
    np.testing.assert_allclose(probability, [1 / 3] * 3, rtol=1e-6)
    none, probability = top_products(scores_of([1, 1], [0, 0], active_products(deleted=[0, 1])), 3)
    assert not len(none)
    assert not len(probability)


def test_a_large_logit_does_not_overflow():
    product_ids, probability = top_products(scores_of([1, 1], [1e4, -1e4], active_products()), 2)
    assert product_ids.tolist() == [0, 1]
    assert probability.tolist() == [1, 0]


def fusion(**changes):
    fields = dict(
        names=NAMES,
        classifier_weights=np.array([0.5, 0.5]),
        default_weight=0.5,
        temperature=0.1,
        rescaling_exponent=1.0,
        confident_from=None,
        num_photos=9,
    )
    return CategoryFusion(**fields | changes)


def even_and_odd(**changes):
    """Products 0 to 2 of the model and the new product 4; product 3 has no classifier row. Their
    categories: even, odd, even, none, odd.
    """
    return active_products(
        new_products=[4],
        kernel=[[0, 0]],
        bias=[np.log(2)],
        category_names=NAMES,
        product_category=[0, 1, 0, 2, 1],
        **changes,
    )


def test_the_category_posterior_by_hand():
    """Probabilities 1/8, 1/8, 4/8 and 2/8: even 5/8, odd 3/8. Photos vote 1 for odd, 1/e for even.
    p is the mean of both; product probabilities are multiplied by p / m.
    """
    scores = scores_of([0, 0], np.log([1, 1, 4]), even_and_odd())
    photos = [
        Neighbour(1, 0, 0.9),
        Neighbour(0, 1, 0.8),
        Neighbour(3, 2, 0.8),
        Neighbour(99, 3, 0.8),
    ]
    posterior = category_posterior(fusion(), scores, photos)
    m, odd = np.array([5, 3]) / 8, 1 / (1 + np.exp(-1))
    p = 0.5 * m + 0.5 * np.array([1 - odd, odd])
    assert [name for name, _ in posterior.top] == ["odd", "even"]
    assert not posterior.confident
    assert [probability for _, probability in posterior.top] == pytest.approx([p[1], p[0]])
    product_ids, probability = top_products(scores, 4, posterior)
    expected = np.array([1, 1, 4, 2]) / 8 * (p / m)[[0, 1, 0, 1]]  # of products 0, 1, 2 and 4
    assert expected.sum() == pytest.approx(1)
    assert product_ids.tolist() == [4, 2, 1, 0]
    np.testing.assert_allclose(probability, expected[[3, 2, 1, 0]], rtol=1e-6)
    unscaled = category_posterior(fusion(rescaling_exponent=0.0), scores, photos)
    assert unscaled.log_factors.tolist() == [0, 0, 0]


def test_a_category_is_confident_only_if_the_nearest_photo_agrees():
    """With a threshold of 0, unless the nearest photo is of another category, of none, or there is
    no photo.
    """
    scores = scores_of([0, 0], [0, 0, 0], even_and_odd())
    always = fusion(confident_from=0.0)
    even, odd, none = (
        Neighbour(product, product, cosine) for product, cosine in ((0, 0.5), (1, 0.9), (3, 0.9))
    )
    for photos, confident in (
        ([even], True),
        ([odd, even], True),
        ([none, even], False),
        ([], False),
    ):
        assert category_posterior(always, scores, photos).confident is confident
    # The classifier alone says odd, with 3/5.
    by_classifier = fusion(confident_from=0.0, classifier_weights=np.ones(2))
    nearer = Neighbour(0, 0, 0.95)
    assert category_posterior(by_classifier, scores, [odd, nearer]).confident
    assert not category_posterior(by_classifier, scores, [nearer, odd]).confident


def test_products_without_a_category_keep_their_probability():
    """Half of the probability has no category: "even", the only category, gains nothing."""
    active = active_products(category_names=("even",), product_category=[1, 0])
    scores = scores_of([0, 0], [0, 0], active)
    posterior = category_posterior(
        fusion(names=("even",), classifier_weights=np.array([0.5])), scores, [Neighbour(1, 0, 0.9)]
    )
    assert posterior.top == [("even", pytest.approx(1))]
    assert top_products(scores, 2, posterior)[1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "active",
    [
        active_products(deleted=[0, 1, 2]),
        even_and_odd(deleted=[0, 1, 2, 4]),
        active_products(),
    ],
)
def test_without_categories_or_active_products_there_is_no_posterior(active):
    assert category_posterior(fusion(), scores_of([0, 0], [0, 0, 0], active), []) is None


def test_excluding_a_product_equals_deleting_it():
    """Also for a new product, and for one without a classifier row."""
    for product in (1, 3, 4):
        scores = scores_of([0, 0], [0, 1, 2], even_and_odd())
        deleted = scores_of([0, 0], [0, 1, 2], even_and_odd(deleted=[product]))
        assert scores.excluding(product).exp_logits.tolist() == deleted.exp_logits.tolist()
