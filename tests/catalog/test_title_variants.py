"""Title variants: raw, masked, shuffled and no titles."""

import dataclasses

import numpy as np
import pytest
from helpers.batch_catalog import SPEC, HandMadeSplit, batch_config, hand_made_catalog

from sicot_jax.catalog.sources.generated import open_generated
from sicot_jax.catalog.title_variants import EncodedSplit, TitleVariantReader, mask_label_words
from sicot_jax.catalog.tokenizer import WordTokenizer, build_tokenizer, split_words
from sicot_jax.config import DataConfig, LossConfig


def titles(catalog, chosen):
    """Each training record's title as it is read: int32 [N, max_tokens]."""
    reader, split = TitleVariantReader(catalog, chosen), catalog.splits["train"]
    return np.stack([reader(split[i], i) for i in range(len(split))])


def test_raw_titles_are_the_words_of_the_record_padded_or_cut():
    catalog = open_generated(SPEC)
    token_ids = titles(catalog, batch_config(title="raw", max_tokens=6))
    assert token_ids.shape == (23, 6)
    assert token_ids.dtype == np.int32
    lengths = set()
    for row, record in zip(token_ids, (catalog.splits["train"][i] for i in range(23)), strict=True):
        ids = record["token_ids"][:6].tolist()
        assert row.tolist() == ids + [0] * (6 - len(ids))
        lengths.add(len(record["token_ids"]))
    assert min(lengths) < 6 < max(lengths)  # both cases occur


def test_masked_titles_lose_the_words_of_sku_and_category_alone():
    vocabulary = ["", "red", "shirts", "nike", "k12", "cotton", "summer"]
    record = {
        "title": "Red Shirts Nike K12",
        "tags": "cotton, summer",
        "sku": "K12",
        "category": "Shirt",
        "token_ids": None,
    }
    catalog = hand_made_catalog(vocabulary=vocabulary)
    reader = TitleVariantReader(catalog, batch_config(title="masked"))
    assert reader(record, 0).tolist() == [1, 3, 5, 6, 0]
    generated = open_generated(SPEC)
    reader, split = (
        TitleVariantReader(generated, batch_config(title="masked", max_tokens=40)),
        generated.splits["train"],
    )
    lost = 0
    for index in range(len(split)):
        record = split[index]
        hidden = generated.tokenizer.encode(record["category"])
        kept = [i for i in record["token_ids"].tolist() if i not in hidden]
        assert [i for i in reader(record, index).tolist() if i] == kept
        lost += len(kept) < len(record["token_ids"])
    assert lost > 3


def test_no_titles():
    chosen = dataclasses.replace(
        batch_config(), loss=LossConfig(mixed=0.0), data=DataConfig(title="none", max_tokens=3)
    )
    np.testing.assert_array_equal(titles(hand_made_catalog(), chosen), np.zeros((72, 3)))


@pytest.mark.parametrize("title", ["shuffled", "shuffled_within_class"])
def test_shuffled_titles_are_a_fixed_permutation(title):
    token_ids = titles(hand_made_catalog(), batch_config(title=title))
    donor = token_ids[:, 0] - 1
    assert not token_ids[:, 1:].any()
    np.testing.assert_array_equal(np.sort(donor), np.arange(72))  # every title is used once
    np.testing.assert_array_equal(titles(hand_made_catalog(), batch_config(title=title)), token_ids)
    other = titles(hand_made_catalog(), batch_config(title=title, seed=1))
    assert (other != token_ids).any()
    same_class = HandMadeSplit.labels[donor] == HandMadeSplit.labels
    moved = donor != np.arange(72)
    if title == "shuffled":
        assert moved.sum() >= 66  # a random permutation leaves one title as it is, on average
        # By chance a title stays in its class with probability sum (n/N)^2 = 0.71; four deviations.
        assert abs(same_class.mean() - 0.711) < 0.22
        assert not same_class.all()
    else:
        assert same_class.all()
        several = np.bincount(HandMadeSplit.labels)[HandMadeSplit.labels] > 1
        assert moved[several].all()
        assert not moved[~several].any()


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_within_class_moves_every_title_for_every_seed(seed):
    donor = (
        titles(hand_made_catalog(), batch_config(title="shuffled_within_class", seed=seed))[:, 0]
        - 1
    )
    several = np.bincount(HandMadeSplit.labels)[HandMadeSplit.labels] > 1
    assert (donor != np.arange(72))[several].all()
    assert (HandMadeSplit.labels[donor] == HandMadeSplit.labels).all()


@pytest.mark.parametrize(
    ("title", "label", "masked"),
    [
        ("Nike Men's T-Shirt blue", "nike tshirts", "mens blue"),
        ("Nike tshirt, Blue", "NIKE T-Shirts", "blue"),
        ("Red T Shirts sale", "tshirt", "red sale"),
        ("two dresses and a watch", "Dress Watches", "two and a"),
        ("dress watches", "dresses watch", ""),
        ("accessory box, knife", "accessories boxes knives", ""),
        ("tomato shoe size tie", "tomatoes shoes sizes ties", ""),
        ("car care cap capes", "cars caps", "care capes"),
        ("大码连衣裙 新款", "连衣裙", "大码 新款"),
        ("plain title", "", "plain title"),
        ("", "shoe", ""),
    ],
)
def test_masking_by_hand(title, label, masked):
    assert split_words(mask_label_words(title, label)) == masked.split()


@pytest.mark.parametrize(
    "title", ["Men's T-Shirt, BLUE (new!) ", "\uff26\uff35\uff2c\uff2c Caf\u00e9 ", ""]
)
def test_a_title_without_a_word_of_the_label_stays_as_it_is(title):
    assert mask_label_words(title, "watch 123") == title


@pytest.mark.parametrize(
    ("title", "label", "masked"),
    [
        ("Men's T-Shirt, BLUE!", "tshirts", "Men's  , BLUE!"),
        ("'Shoes' & Co., Size-10.", "shoe", "'  & Co., Size-10."),
        ("NIKE\u7ea2\u8272T\u6064-2XL", "t\u6064", "NIKE\u7ea2\u8272 -2XL"),
    ],
)
def test_what_is_left_of_a_title_is_as_it_was(title, label, masked):
    assert mask_label_words(title, label) == masked


def test_pieces_are_masked_with_the_words_of_the_label_alone():
    """Pieces depend on what stands between words: "T-Shirt" is not "t shirt"."""
    texts = ["Men's T-Shirt, blue-red", "Fuel/Band watch (new!)", "Roadster's watch"] * 20
    tokenizer = build_tokenizer(texts, kind="sentencepiece", max_vocabulary=60)
    catalog = dataclasses.replace(hand_made_catalog(), tokenizer=tokenizer)
    reader = TitleVariantReader(catalog, batch_config(title="masked", max_tokens=40))
    for text in dict.fromkeys(texts):
        record = {"title": text, "tags": "", "sku": "k12", "category": "Bags"}
        assert [i for i in reader(record, 0).tolist() if i] == tokenizer.encode(text).tolist()
    record = {"title": texts[1], "tags": "", "sku": "k12", "category": "Watches"}
    left = tokenizer.encode("Fuel/Band   (new!)").tolist()
    assert [i for i in reader(record, 0).tolist() if i] == left


def test_titles_of_an_encoded_split_are_in_the_words_of_its_tokenizer():
    split = open_generated(SPEC).splits["train"]
    tokenizer = WordTokenizer(["", *split_words(split[0]["title"])[::-1]])
    encoded = EncodedSplit(split, tokenizer)
    assert len(encoded) == len(split)
    np.testing.assert_array_equal(encoded.labels, split.labels)
    words = [tokenizer.vocabulary[i] for i in encoded[0]["token_ids"]]
    assert words == split_words(split[0]["title"])
    assert encoded[0]["image_id"] == split[0]["image_id"]
