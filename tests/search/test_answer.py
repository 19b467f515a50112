"""Answers to query photos."""

import dataclasses

import numpy as np
import pytest
from helpers.made_photos import photo, sku
from helpers.small_index import PRODUCTS, WIDTH

from sicot_jax.index.backends.base import ActiveProducts, Neighbour, Neighbours
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import ProductRecord
from sicot_jax.recognizer import jax_engine
from sicot_jax.search.answer import Query, Searcher
from sicot_jax.search.category import read_fusion
from sicot_jax.search.rejection import Calibration, read_calibration
from sicot_jax.weights.bundle import read_bundle


def opened_index(index):
    """The version in use: its folder, the opened index, and the engine of its model."""
    folder = layout.current_version(index)
    engine = jax_engine(read_bundle(folder / layout.MODEL))
    return folder, LocalIndex(folder), engine


def test_answers_of_an_index(index):
    """A new photo of each product is recognised, its product is the most similar one, and noise is
    rejected.
    """
    folder, opened, engine = opened_index(index)
    searcher = Searcher(opened, read_calibration(folder / layout.REJECTION))
    for product in range(PRODUCTS):
        embedding, logits, _ = next(engine(photo(product, 99)[None]).per_photo())
        answer = searcher.answer(Query(embedding, logits, k=2, num_similar=3))
        assert answer.matches[0].product.sku == sku(product) == answer.similar[0].product.sku
        assert answer.known
        assert answer.confidence > 0.5
        assert [len(answer.matches), len(answer.similar)] == [2, 3]
        other_category = f"kind {1 - product % 2}"
        other = Searcher(opened).answer(
            Query(embedding, logits, k=1, num_similar=2, category=other_category)
        )
        assert other.confidence is None
        assert other.known is None
        assert {similar.product.category for similar in other.similar} == {other_category}
    answer = searcher.answer(Query(-embedding, logits, k=1, num_similar=0))
    assert answer.known is False
    assert answer.similar == []
    opened.close()


@pytest.mark.parametrize("k", [0, 1])
def test_a_similarity_search_needs_no_recognition(index, k):
    opened = LocalIndex(layout.current_version(index))
    query = Query(np.ones(WIDTH, np.float32), np.ones(PRODUCTS, np.float32), k=k, num_similar=1)
    answer = Searcher(opened).answer(query)
    assert len(answer.matches) == k
    assert len(answer.similar) == 1
    opened.close()


class FakeIndex:
    """An index of 40 products, of which those in `missing` were deleted after it was opened."""

    def __init__(self, missing=()):
        self.missing, self.reads = missing, 0

    def active_products(self):
        none = np.zeros(0, np.int64)
        return ActiveProducts(
            deleted=none,
            new_products=none,
            kernel=np.zeros((0, 2), np.float32),
            bias=np.zeros(0, np.float32),
            category_names=(),
            product_category=np.zeros(40, np.int64),
        )

    def nearest(self, embeddings, k, *, num_photos=0, category=None, candidates=0):
        products, nearest_photos = (
            [Neighbour(number, number, 1 - number / 100) for number in range(count)]
            for count in (k, num_photos)
        )
        return [Neighbours(products, nearest_photos)]

    def products(self, product_ids):
        self.reads += 1
        return [
            None if n in self.missing else ProductRecord(n, f"sku-{n}", "", "", "", {}, [])
            for n in product_ids
        ]


def test_confidence_does_not_depend_on_the_number_of_similar_products():
    """The product is the 15th nearest; the confidence always comes from 10 neighbours."""
    logits = np.zeros(40, np.float32)
    logits[14] = 9
    calibration = Calibration([0.0, 0.0, -10.0], 1.0, 0.5, 0.95, 0.95, 0.2, 100, [], None)
    searcher = Searcher(FakeIndex(), calibration)
    confidences = {
        searcher.answer(Query(np.ones(2), logits, k=1, num_similar=num_similar)).confidence
        for num_similar in (0, 10, 20, 40)
    }
    assert len(confidences) == 1


def test_a_product_deleted_meanwhile_is_never_an_answer():
    """It is among the active products but has no record: the next product gets its probability and
    its confidence.
    """
    logits = np.zeros(40, np.float32)
    logits[[3, 5]] = [9, 7]
    calibration = Calibration([1.0, 0.0, 0.0], 0.0, 0.5, 0.95, 0.95, 0.2, 100, [], None)
    answer = Searcher(FakeIndex({3}), calibration).answer(
        Query(np.ones(2), logits, k=2, num_similar=3)
    )
    remaining = logits.copy()
    remaining[3] = -np.inf
    assert [match.product.sku for match in answer.matches] == ["sku-5", "sku-0"]
    probability = np.exp(7) / np.exp(remaining).sum()
    assert answer.matches[0].score == pytest.approx(probability, rel=1e-5) == answer.confidence
    assert [similar.product.sku for similar in answer.similar] == ["sku-0", "sku-1", "sku-2"]


def test_product_records_are_read_at_once():
    """Recognised and similar ones in one read; a second read only where a product is missing."""
    logits = np.zeros(40, np.float32)
    logits[3] = 9
    for missing, reads in (set(), 1), ({3}, 2):
        index = FakeIndex(missing)
        Searcher(index).answer(Query(np.ones(2), logits, k=5, num_similar=20))
        assert index.reads == reads


@pytest.mark.parametrize(
    ("confident_from", "category", "any_category", "searched_category"),
    [
        (0.5, None, False, "kind 0"),
        (0.5, None, True, None),
        (None, None, False, None),
        (1.0, None, False, None),
        (0.5, "kind 1", False, "kind 1"),
        (0.5, "kind 1", True, "kind 1"),
    ],
)
def test_which_category_is_searched(
    index, confident_from, category, any_category, searched_category
):
    folder, opened, engine = opened_index(index)
    fusion = read_fusion(folder / layout.CATEGORY_FUSION)
    searcher = Searcher(
        opened, category_fusion=dataclasses.replace(fusion, confident_from=confident_from)
    )
    embedding, logits, _ = next(engine(photo(2, 99)[None]).per_photo())
    query = Query(
        embedding,
        logits,
        k=1,
        num_similar=PRODUCTS,
        category=category,
        any_category=any_category,
    )
    answer = searcher.answer(query)
    assert answer.category.top[0][0] == "kind 0"
    assert 0.5 < answer.category.top[0][1] < 1
    assert answer.searched_category == searched_category
    categories = {similar.product.category for similar in answer.similar}
    assert categories == ({searched_category} if searched_category else {"kind 0", "kind 1"})
    opened.close()
