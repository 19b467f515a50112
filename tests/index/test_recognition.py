"""From an engine's numbers to an answer."""

import numpy as np
import pytest
from index_maker import PRODUCTS, WIDTH, photo, sku

from sicot_jax.convert import folder as folders
from sicot_jax.index import layout, recognition
from sicot_jax.index.cards import Product
from sicot_jax.index.embedded import EmbeddedIndex
from sicot_jax.index.product_index import Neighbour, Offered
from sicot_jax.index.unknown import Calibration, read_calibration
from sicot_jax.recognizer import jax_engine

NOTHING = np.zeros(0, np.int64)


def offered(withdrawn=(), products=(), kernel=(), bias=()):
    return Offered(
        np.array(withdrawn, np.int64), np.array(products, np.int64), np.array(kernel, np.float32).reshape(-1, 2),
        np.array(bias, np.float32),
    )  # fmt: skip


def test_probabilities_by_hand():
    """Logits 1, 2, 3 and a later product of row (1, 1), bias 1: embedding (0.5, 0.5) gives it 2."""
    later = offered(products=[7], kernel=[[1, 1]], bias=[1])
    numbers, shares = recognition.best_products(np.full(2, 0.5, np.float32), np.array([1, 2, 3], np.float32), later, 4)
    exact = np.exp([3, 2, 2, 1])
    assert numbers[0] == 2 and set(numbers[1:3].tolist()) == {1, 7} and numbers[3] == 0
    np.testing.assert_allclose(shares, exact / exact.sum(), rtol=1e-6)


def test_withdrawn_products_have_no_share():
    later = offered(withdrawn=[2, 7], products=[7, 9], kernel=[[1, 1], [0, 0]], bias=[100, 0])
    numbers, shares = recognition.best_products(np.ones(2, np.float32), np.array([0, 0, 50], np.float32), later, 9)
    assert sorted(numbers.tolist()) == [0, 1, 9]
    np.testing.assert_allclose(shares, [1 / 3] * 3, rtol=1e-6)
    none, shares = recognition.best_products(np.ones(2), np.zeros(2, np.float32), offered(withdrawn=[0, 1]), 3)
    assert not len(none) and not len(shares)


def test_a_large_logit_does_not_overflow():
    numbers, shares = recognition.best_products(np.ones(2), np.array([1e4, -1e4], np.float32), offered(), 2)
    assert numbers.tolist() == [0, 1] and shares.tolist() == [1, 0]


def test_answers_of_an_index(index):
    """Every product's new photo is recognised and is the most similar; noise is not in the catalogue."""
    folder = layout.current_version(index)
    opened, engine = EmbeddedIndex(folder), jax_engine(folders.read_converted(folder / layout.MODEL))
    calibration = read_calibration(folder / layout.UNKNOWN)
    for product in range(PRODUCTS):
        embedding, logits = (x[0] for x in engine(photo(product, 99)[None]))
        answer = recognition.answer(opened, calibration, embedding, logits, k=2, similar=3)
        assert answer.matches[0].product.sku == sku(product) == answer.similar[0].product.sku
        assert answer.known and answer.certainty > 0.5
        assert [len(answer.matches), len(answer.similar)] == [2, 3]
        other = recognition.answer(opened, None, embedding, logits, k=1, similar=2, category=f"kind {1 - product % 2}")
        assert other.certainty is None and other.known is None
        assert {found.product.product % 2 for found in other.similar} == {1 - product % 2}
    answer = recognition.answer(opened, calibration, -embedding, logits, k=1, similar=0)
    assert answer.known is False and answer.similar == []
    opened.close()


@pytest.mark.parametrize("k", [0, 1])
def test_a_search_needs_no_recognition(index, k):
    opened = EmbeddedIndex(layout.current_version(index))
    answer = recognition.answer(opened, None, np.ones(WIDTH, np.float32), np.ones(PRODUCTS, np.float32), k=k, similar=1)
    assert len(answer.matches) == k and len(answer.similar) == 1
    opened.close()


class Many:
    """An index of 40 products, of which `missing` have no card any more."""

    def __init__(self, missing=()):
        self.missing, self.reads = missing, 0

    def offered(self):
        return offered()

    def nearest(self, embeddings, k, *, category=None, candidates=0):
        return [[Neighbour(number, number, 1 - number / 100) for number in range(k)]]

    def products(self, numbers):
        self.reads += 1
        return [None if n in self.missing else Product(n, f"sku-{n}", "", "", "", {}, []) for n in numbers]


def test_how_sure_an_answer_is_does_not_depend_on_what_else_is_asked_for():
    """The product is the 15th nearest: 10 are looked at, however many are shown."""
    logits = np.zeros(40, np.float32)
    logits[14] = 9
    calibration = Calibration([0.0, 0.0, -10.0], 1.0, 0.5, 0.95, 0.95, 0.2, 100, [], None)
    sure = {
        recognition.answer(Many(), calibration, np.ones(2), logits, k=1, similar=similar).certainty
        for similar in (0, 10, 20, 40)
    }
    assert len(sure) == 1


def test_a_product_that_is_withdrawn_meanwhile_is_no_answer():
    """The view still has it, the cards do not: its share and its certainty are the next one's."""
    logits = np.zeros(40, np.float32)
    logits[[3, 5]] = [9, 7]
    calibration = Calibration([1.0, 0.0, 0.0], 0.0, 0.5, 0.95, 0.95, 0.2, 100, [], None)
    answer = recognition.answer(Many({3}), calibration, np.ones(2), logits, k=2, similar=3)
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
        recognition.answer(index, None, np.ones(2), logits, k=5, similar=20)
        assert index.reads == reads
