"""Import, title regression, ranking features and the exported model split titles alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sicot_jax.catalog.tokenizer import build_tokenizer, split_words
from sicot_jax.indexing.title_regression import fit_title_regression
from sicot_jax.search.ranking_features import FEATURES, CatalogStatistics, ranking_features
from sicot_jax.weights.templates import torch_text

# Letters with and without case, marks, digits, apostrophes, punctuation and white space of many
# scripts, singly and in words.
_AWKWARD = st.text(
    st.one_of(
        st.characters(categories=["L", "M", "N", "P", "S", "Z"]),
        st.sampled_from("aZ09'\u2019\u02bc-_.,/&+ \u00a0\u200b\u0307\u0130\u00df\ufb01\uff26"),
    ),
    max_size=40,
)
_EXAMPLES = (
    "Men's T-Shirt 2XL",
    "\uff26\uff35\uff2c\uff2c width",
    "\u0130stanbul caf\u00e9 CAFE\u0301",
    "\u0930\u0902\u0917\u0940\u0928 \u0915\u092e\u0940\u091c",
    "\u0e1c\u0e49\u0e32\u0e1d\u0e49\u0e32\u0e22",
    "a_b 1.5",
    "\u7ea2\u8272 \u886c\u886b",
    "\u00df \ufb01",
)


@dataclasses.dataclass
class Product:
    title: str
    category: str = ""
    quality: Mapping[str, float] = dataclasses.field(default_factory=dict)


def assert_same_words(title: str) -> None:
    words = split_words(title)
    assert torch_text.split_words(title) == words
    vocabulary = build_tokenizer([title], min_count=1, drop_top_share=0).vocabulary
    assert set(vocabulary[1:]) == set(words)
    # Words of at least two products are kept.
    regression = fit_title_regression(
        [(title, ""), (title, "")], np.ones((2, 1), np.float32), np.ones(2)
    )
    assert set(regression.words) == set(words)
    products = [Product(title), Product(title)]
    statistics = CatalogStatistics.from_products(products)
    assert statistics.common_words == set(words)
    rows = ranking_features(np.zeros(2), products, statistics)
    assert rows[0, FEATURES.index("title words")] == len(set(words))


@settings(max_examples=300, deadline=None)
@given(_AWKWARD)
@example("")
def test_all_four_users_split_awkward_titles_alike(title: str) -> None:
    assert_same_words(title)


def test_all_four_users_split_titles_of_many_scripts_alike() -> None:
    for title in _EXAMPLES:
        assert split_words(title)
        assert_same_words(title)


@settings(max_examples=200, deadline=None)
@given(_AWKWARD)
def test_splitting_the_joined_words_again_changes_nothing(title: str) -> None:
    words = split_words(title)
    assert split_words(" ".join(words)) == words
