from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sicot_jax.catalog.tokenizer import build_tokenizer, load_tokenizer, split_words
from sicot_jax.errors import InputError
from sicot_jax.indexing.title_regression import fit_title_regression
from sicot_jax.search.ranking_features import FEATURES, CatalogStatistics, ranking_features
from sicot_jax.weights.templates import torch_text


def test_split_words_by_hand():
    assert split_words("Men's  T-Shirt, BLUE_42 (new!)") == [
        "mens",
        "t",
        "shirt",
        "blue",
        "42",
        "new",
    ]
    assert split_words("ＮＩＫＥ ﬁne Café") == ["nike", "fine", "café"]  # noqa: RUF001
    assert split_words("CAFE\u0301") == ["café"]
    assert split_words("हिन्दी ภาษาไทย") == ["हिन्दी", "ภาษาไทย"]
    assert split_words("...") == [] == split_words("")


def test_vocabulary_order_and_trimming():
    texts = ["a b c", "a b c", "a b d", "a e"]  # a 4, b 3, c 2, d 1, e 1
    assert list(build_tokenizer(texts, min_count=2).vocabulary) == ["", "a", "b", "c"]
    # 5 distinct words: floor(0.2 * 5) = 1 dropped at the top, floor(0.19 * 5) = 0
    assert list(build_tokenizer(texts, min_count=1, drop_top_share=0.2).vocabulary) == [
        "",
        "b",
        "c",
        "d",
        "e",
    ]
    assert list(build_tokenizer(texts, min_count=1, drop_top_share=0.19).vocabulary)[:2] == [
        "",
        "a",
    ]
    assert list(build_tokenizer(texts, min_count=1, max_vocabulary=2).vocabulary) == ["", "a", "b"]
    assert build_tokenizer(reversed(texts)).vocabulary == build_tokenizer(texts).vocabulary


def test_encode_leaves_out_padding_and_unknown_words(tmp_path):
    tokenizer = build_tokenizer(["red shoe", "red"], min_count=1)
    ids = tokenizer.encode("A shoe; red, RED!")
    assert ids.dtype == np.int32
    assert ids.tolist() == [2, 1, 1]
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.encode("").dtype == np.int32
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.vocabulary == tokenizer.vocabulary
    assert again.encode("shoe").tolist() == [2]
    assert pickle.loads(pickle.dumps(again)).encode("shoe").tolist() == [2]


@pytest.mark.parametrize("kind", ["words", "sentencepiece"])
def test_no_titles_at_all(kind, tmp_path):
    tokenizer = build_tokenizer(["", "  ", "--"], kind=kind)
    tokenizer.save(tmp_path)
    for each in (tokenizer, load_tokenizer(tmp_path)):
        assert list(each.vocabulary) == [""]
        assert each.encode("red shoe").size == 0


def test_sentencepiece(tmp_path, capfd):
    texts = ["红色运动鞋", "蓝色运动鞋", "红色连衣裙", "蓝色连衣裙", "运动鞋 包邮"] * 20
    tokenizer = build_tokenizer(iter(texts), kind="sentencepiece")
    assert capfd.readouterr().err == ""
    assert tokenizer.vocabulary[0] == ""
    assert len(tokenizer.vocabulary) > 5
    ids = tokenizer.encode("红色运动鞋 Ω")
    assert ids.dtype == np.int32
    assert ids.size
    assert (ids > 1).all()
    assert (ids < len(tokenizer.vocabulary)).all()
    assert build_tokenizer(texts, kind="sentencepiece").vocabulary == tokenizer.vocabulary
    tokenizer.save(tmp_path)
    for again in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert again.encode("红色运动鞋").tolist() == tokenizer.encode("红色运动鞋").tolist()


def test_bad_arguments_and_missing_file(tmp_path):
    with pytest.raises(ValueError, match="wanted 'words' or 'sentencepiece'"):
        build_tokenizer([], kind="chars")
    with pytest.raises(ValueError, match="drop_top_share=1"):
        build_tokenizer([], drop_top_share=1)
    with pytest.raises(ValueError, match="min_count=0"):
        build_tokenizer([], min_count=0)
    with pytest.raises(InputError, match="import again"):
        load_tokenizer(tmp_path)


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
