from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sicot_jax.catalog import tokenizer as tokenizer_lib
from sicot_jax.catalog.tokenizer import (
    build_tokenizer,
    find_words,
    load_tokenizer,
    split_words,
)
from sicot_jax.errors import InputError
from sicot_jax.indexing.title_regression import fit_title_regression
from sicot_jax.search.ranking_features import FEATURES, CatalogStatistics, ranking_features


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


LONG = 2000  # 6,000 bytes of Chinese; sentencepiece leaves out texts above 4,192


@pytest.mark.parametrize(
    "text",
    [
        "\u7ea2\u8272\u8fd0\u52a8\u978b" * (LONG // 5),
        "\u7ea2\u8272 \u8fd0\u52a8\u978b " * (LONG // 5),
        "\u7ea2\u8272 \u2585 \u8fd0\u52a8\u978b",  # sentencepiece's own sign
    ],
    ids=["without blanks", "with blanks", "reserved"],
)
def test_sentencepiece_learns_from_every_text(text):
    tokenizer = build_tokenizer([text] * 10 + ["blue shoe"] * 10, kind="sentencepiece")
    assert {"\u7ea2", "\u978b"} <= set("".join(tokenizer.vocabulary))
    assert tokenizer.encode(text).size > 1
    alone = build_tokenizer([text] * 10, kind="sentencepiece")
    assert "\u978b" in "".join(alone.vocabulary)


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("a \u00e9\u7ea2\U0001f45f"), max_size=60))
def test_parts_of_a_long_text_are_short_and_lose_nothing(text):
    text = " ".join(text.split())
    parts = list(tokenizer_lib._split_long(text, 10))
    assert all(0 < len(part.encode()) <= 10 for part in parts if text)
    assert "".join(parts).replace(" ", "") == text.replace(" ", "")


def test_sentencepiece_says_what_helps(monkeypatch):
    texts = ["".join(map(chr, range(0x4E00, 0x4E00 + 300)))] * 5
    with pytest.raises(InputError, match=r"required_chars.*; raise max_vocabulary=50 or use words"):
        build_tokenizer(texts, kind="sentencepiece", max_vocabulary=50)

    def fail(**_):
        raise RuntimeError("Internal: no reason that more pieces would remove")

    monkeypatch.setattr("sentencepiece.SentencePieceTrainer.train", fail)
    with pytest.raises(InputError, match=r"sentencepiece failed \(Internal.*\); use words$"):
        build_tokenizer(texts, kind="sentencepiece")


_SAMPLED = """
import hashlib, sys
from sicot_jax.catalog import tokenizer
tokenizer._MAX_SENTENCES = 40
texts = [f"{a}{b}{a} {b}{c}{b}{c}" for a in "abcdefg" for b in "hijklm" for c in "nopqrs"]
made = tokenizer.build_tokenizer(texts, kind="sentencepiece", seed=int(sys.argv[1]))
print(hashlib.sha256(made.model).hexdigest())
"""


def test_sampled_sentences_depend_on_the_seed_alone():
    """Sentencepiece 0.2.3 samples others in every process, whatever its seed."""
    digests = [
        subprocess.run(
            [sys.executable, "-c", _SAMPLED, seed], capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "0", "1")
    ]
    assert digests[0] == digests[1] != digests[2]


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
    torch_text = pytest.importorskip(
        "sicot_jax.weights.templates.torch_text", reason="the exported text.py needs torch"
    )
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


@settings(max_examples=300, deadline=None)
@given(_AWKWARD)
@example("\u02bctis a\u02bcb ROCK'N'ROLL \uff76\uff9e \u0391\u03a3.\u0391")
def test_words_are_found_where_they_are(title: str) -> None:
    text, spans = find_words(title)
    found = [split_words(text[start:stop]) for start, stop in spans]
    assert all(len(words) == 1 for words in found)
    # A sigma is a final one or not by what follows, also beyond the word.
    assert [w.replace("\u03c2", "\u03c3") for (w,) in found] == [
        w.replace("\u03c2", "\u03c3") for w in split_words(title)
    ]


@settings(max_examples=200, deadline=None)
@given(_AWKWARD)
def test_splitting_the_joined_words_again_changes_nothing(title: str) -> None:
    words = split_words(title)
    assert split_words(" ".join(words)) == words
