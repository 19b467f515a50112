"""From an engine's numbers to an answer."""

import dataclasses

import numpy as np
import pytest
from helpers.index_maker import PRODUCTS, WIDTH, photo, sku

from sicot_jax.index.backends.base import Neighbours, Neighbour, ActiveProducts
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import ProductRecord
from sicot_jax.recognizer import jax_engine
from sicot_jax.search import answer as recognition
from sicot_jax.search.answer import Scores
from sicot_jax.search.category import Fusion, read_fusion
from sicot_jax.search.rejection import Calibration, read_calibration
from sicot_jax.weights import bundle as folders

NOTHING = np.zeros(0, np.int64)


def active_products(deleted=(), new_products=(), kernel=(), bias=(), category_names=(), product_category=(0,) * 40):
    return ActiveProducts(
        np.array(deleted, np.int64), np.array(new_products, np.int64), np.array(kernel, np.float32).reshape(-1, 2),
        np.array(bias, np.float32), category_names, np.array(product_category, np.int64),
    )  # fmt: skip


def test_probabilities_by_hand():
    """Logits 1, 2, 3 and a later product of row (1, 1), bias 1: embedding (0.5, 0.5) gives it 2."""
    later = active_products(new_products=[7], kernel=[[1, 1]], bias=[1])
    numbers, shares = recognition.best_products(
        Scores.of(np.full(2, 0.5, np.float32), np.array([1, 2, 3], np.float32), later), 4
    )
    exact = np.exp([3, 2, 2, 1])
    assert numbers[0] == 2
    assert set(numbers[1:3].tolist()) == {1, 7}
    assert numbers[3] == 0
    np.testing.assert_allclose(shares, exact / exact.sum(), rtol=1e-6)


def test_withdrawn_products_have_no_share():
    later = active_products(deleted=[2, 7], new_products=[7, 9], kernel=[[1, 1], [0, 0]], bias=[100, 0])
    numbers, shares = recognition.best_products(
        Scores.of(np.ones(2, np.float32), np.array([0, 0, 50], np.float32), later), 9
    )
    assert sorted(numbers.tolist()) == [0, 1, 9]
    np.testing.assert_allclose(shares, [1 / 3] * 3, rtol=1e-6)
    none, shares = recognition.best_products(
        Scores.of(np.ones(2), np.zeros(2, np.float32), active_products(deleted=[0, 1])), 3
    )
    assert not len(none)
    assert not len(shares)


def test_a_large_logit_does_not_overflow():
    numbers, shares = recognition.best_products(
        Scores.of(np.ones(2), np.array([1e4, -1e4], np.float32), active_products()), 2
    )
    assert numbers.tolist() == [0, 1]
    assert shares.tolist() == [1, 0]


def test_answers_of_an_index(index):
    """Every product's new photo is recognised and is the most similar; noise is not in the
    catalogue.
    """
    folder = layout.current_version(index)
    opened, engine = (
        LocalIndex(folder),
        jax_engine(folders.read_converted(folder / layout.MODEL)),
    )
    calibration = read_calibration(folder / layout.REJECTION)
    for product in range(PRODUCTS):
        embedding, logits, _ = next(engine(photo(product, 99)[None]).each())
        answer = recognition.answer(opened, calibration, None, embedding, logits, k=2, similar=3)
        assert answer.matches[0].product.sku == sku(product) == answer.similar[0].product.sku
        assert answer.known
        assert answer.certainty > 0.5
        assert [len(answer.matches), len(answer.similar)] == [2, 3]
        other = recognition.answer(
            opened,
            None,
            None,
            embedding,
            logits,
            k=1,
            similar=2,
            category=f"kind {1 - product % 2}",
        )
        assert other.certainty is None
        assert other.known is None
        assert {found.product.product % 2 for found in other.similar} == {1 - product % 2}
    answer = recognition.answer(opened, calibration, None, -embedding, logits, k=1, similar=0)
    assert answer.known is False
    assert answer.similar == []
    opened.close()


@pytest.mark.parametrize("k", [0, 1])
def test_a_search_needs_no_recognition(index, k):
    opened = LocalIndex(layout.current_version(index))
    answer = recognition.answer(
        opened,
        None,
        None,
        np.ones(WIDTH, np.float32),
        np.ones(PRODUCTS, np.float32),
        k=k,
        similar=1,
    )
    assert len(answer.matches) == k
    assert len(answer.similar) == 1
    opened.close()


class Many:
    """An index of 40 products, of which `missing` have no card any more."""

    def __init__(self, missing=()):
        self.missing, self.reads = missing, 0

    def active_products(self):
        return active_products()

    def nearest(self, embeddings, k, *, num_photos=0, category=None, candidates=0):
        return [
            Neighbours(
                *(
                    [Neighbour(number, number, 1 - number / 100) for number in range(n)]
                    for n in (k, num_photos)
                )
            )
        ]

    def products(self, numbers):
        self.reads += 1
        return [
            None if n in self.missing else ProductRecord(n, f"sku-{n}", "", "", "", {}, [])
            for n in numbers
        ]


def test_how_sure_an_answer_is_does_not_depend_on_what_else_is_asked_for():
    """The product is the 15th nearest: 10 are looked at, however many are shown."""
    logits = np.zeros(40, np.float32)
    logits[14] = 9
    calibration = Calibration([0.0, 0.0, -10.0], 1.0, 0.5, 0.95, 0.95, 0.2, 100, [], None)
    sure = {
        recognition.answer(
            Many(), calibration, None, np.ones(2), logits, k=1, similar=similar
        ).certainty
        for similar in (0, 10, 20, 40)
    }
    assert len(sure) == 1


def test_a_product_that_is_withdrawn_meanwhile_is_no_answer():
    """The view still has it, the cards do not: its share and its certainty are the next one's."""
    logits = np.zeros(40, np.float32)
    logits[[3, 5]] = [9, 7]
    calibration = Calibration([1.0, 0.0, 0.0], 0.0, 0.5, 0.95, 0.95, 0.2, 100, [], None)
    answer = recognition.answer(Many({3}), calibration, None, np.ones(2), logits, k=2, similar=3)
    without = logits.copy()
    without[3] = -np.inf
    assert [match.product.sku for match in answer.matches] == ["sku-5", "sku-0"]
    share = np.exp(7) / np.exp(without).sum()
    assert answer.matches[0].score == pytest.approx(share, rel=1e-5) == answer.certainty
    assert [found.product.sku for found in answer.similar] == ["sku-0", "sku-1", "sku-2"]


def test_cards_are_read_at_once():
    """Of what is recognised and of what is similar; again only where one is gone."""
    logits = np.zeros(40, np.float32)
    logits[3] = 9
    for missing, reads in (set(), 1), ({3}, 2):
        index = Many(missing)
        recognition.answer(index, None, None, np.ones(2), logits, k=5, similar=20)
        assert index.reads == reads


NAMES = ("even", "odd")


def fused(**more):
    return Fusion(**{**dict(names=NAMES, weights=np.array([0.5, 0.5]), common=0.5, temperature=0.1, strength=1.0, sure=None,
                            photos=9), **more})  # fmt: skip


def kinds(**more):
    """Products 0 to 2 of the model, 4 that came later; 3 has no row. Of the categories even, odd,
    even, none, odd.
    """
    return active_products(
        new_products=[4],
        kernel=[[0, 0]],
        bias=[np.log(2)],
        category_names=NAMES,
        product_category=[0, 1, 0, 2, 1],
        **more,
    )


def test_what_is_told_of_a_category_by_hand():
    """Weights 1, 1, 4 and 2: even 5/8, odd 3/8. Photos vote odd 1, even 1/e: with halves of both p.
    Shares times p / m.
    """
    scores = Scores.of(np.zeros(2, np.float32), np.log(np.array([1, 1, 4], np.float32)), kinds())
    photos = [
        Neighbour(1, 0, 0.9),
        Neighbour(0, 1, 0.8),
        Neighbour(3, 2, 0.8),
        Neighbour(99, 3, 0.8),
    ]
    told = recognition.told(fused(), scores, photos)
    m, odd = np.array([5, 3]) / 8, 1 / (1 + np.exp(-1))
    p = 0.5 * m + 0.5 * np.array([1 - odd, odd])
    assert [name for name, _ in told.likely] == ["odd", "even"]
    assert not told.sure
    assert [share for _, share in told.likely] == pytest.approx([p[1], p[0]])
    numbers, shares = recognition.best_products(scores, 4, told)
    wanted = np.array([1, 1, 4, 2]) / 8 * (p / m)[[0, 1, 0, 1]]  # of products 0, 1, 2 and 4
    assert wanted.sum() == pytest.approx(1)
    assert numbers.tolist() == [4, 2, 1, 0]
    np.testing.assert_allclose(shares, wanted[[3, 2, 1, 0]], rtol=1e-6)
    assert recognition.told(fused(strength=0.0), scores, photos).log_factors.tolist() == [0, 0, 0]


def test_nothing_is_sure_against_the_nearest_photo():
    """Sure from 0 on; unless the nearest is of another category, or of none, or there is none."""
    scores, sure = (
        Scores.of(np.zeros(2, np.float32), np.zeros(3, np.float32), kinds()),
        fused(sure=0.0),
    )
    even, odd, none = (
        Neighbour(product, product, cosine) for product, cosine in ((0, 0.5), (1, 0.9), (3, 0.9))
    )
    for photos, wanted in (([even], True), ([odd, even], True), ([none, even], False), ([], False)):
        assert recognition.told(sure, scores, photos).sure is wanted
    by_classifier, one = fused(sure=0.0, weights=np.ones(2)), Neighbour(0, 0, 0.95)  # odd, with 3/5
    assert recognition.told(by_classifier, scores, [odd, one]).sure
    assert not recognition.told(by_classifier, scores, [one, odd]).sure


def test_products_without_a_category_keep_their_part():
    """Of shares 1/2 without one, 1/2 even: even gains nothing from being the only category told."""
    some = active_products(category_names=("even",), product_category=[1, 0])
    scores = Scores.of(np.zeros(2, np.float32), np.zeros(2, np.float32), some)
    told = recognition.told(
        fused(names=("even",), weights=np.array([0.5])), scores, [Neighbour(1, 0, 0.9)]
    )
    assert told.likely == [("even", pytest.approx(1))]
    assert recognition.best_products(scores, 2, told)[1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "of", [active_products(deleted=[0, 1, 2]), kinds(deleted=[0, 1, 2, 4]), active_products()]
)
def test_nothing_is_told_without_categories_or_products(of):
    assert (
        recognition.told(
            fused(), Scores.of(np.zeros(2, np.float32), np.zeros(3, np.float32), of), []
        )
        is None
    )


def test_without_a_product():
    """As if it had been withdrawn; also one that came later, and one without a row."""
    for product in (1, 3, 4):
        scores = Scores.of(np.zeros(2, np.float32), np.arange(3, dtype=np.float32), kinds())
        gone = Scores.of(
            np.zeros(2, np.float32), np.arange(3, dtype=np.float32), kinds(deleted=[product])
        )
        assert scores.without(product).weights.tolist() == gone.weights.tolist()


@pytest.mark.parametrize(("sure", "category", "any_category", "searched"), [
    (0.5, None, False, "kind 0"), (0.5, None, True, None), (None, None, False, None), (1.0, None, False, None),
    (0.5, "kind 1", False, "kind 1"), (0.5, "kind 1", True, "kind 1"),
])  # fmt: skip
def test_where_similar_products_come_from(index, sure, category, any_category, searched):
    folder = layout.current_version(index)
    opened, engine = (
        LocalIndex(folder),
        jax_engine(folders.read_converted(folder / layout.MODEL)),
    )
    fusion = dataclasses.replace(read_fusion(folder / layout.CATEGORY_FUSION), sure=sure)
    embedding, logits, _ = next(engine(photo(2, 99)[None]).each())
    answer = recognition.answer(
        opened,
        None,
        fusion,
        embedding,
        logits,
        k=1,
        similar=PRODUCTS,
        category=category,
        any_category=any_category,
    )
    assert answer.category.likely[0][0] == "kind 0"
    assert 0.5 < answer.category.likely[0][1] < 1
    assert answer.searched == searched
    found = {scored.product.category for scored in answer.similar}
    assert found == ({searched} if searched else {"kind 0", "kind 1"})
    opened.close()
