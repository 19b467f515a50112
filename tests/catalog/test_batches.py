"""Title variants, host batches of several processes, photo batches without text, and preparing them
ahead.
"""

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest

from sicot_jax.catalog.batches import (
    PhotoBatches,
    TitleReader,
    TrainBatches,
    ahead,
    photo_batches,
    train_batches,
)
from sicot_jax.catalog.catalog import Catalog, ClassTable
from sicot_jax.catalog.sampling import Sampler
from sicot_jax.catalog.sources.generated import open_generated
from sicot_jax.catalog.tokenizer import WordTokenizer
from sicot_jax.config import Config, DataConfig, GeneratedSpec, LossConfig, TrainConfig
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.training.device_batches import to_device

SPEC = GeneratedSpec(
    num_classes=4, train_photos=23, image_size=12, word_vectors="random", word_vector_width=8
)
SMALL = Preprocessing(height=8, width=8, resize_height=10, resize_width=9)


class HandMade:
    """Training photo i of class LABELS[i] has the one word i + 1 in its title: who reads it knows
    whose title it is.
    """

    labels = np.repeat([0, 1, 2, 3], [1, 2, 9, 60])[
        np.random.default_rng(0).permutation(72)
    ].astype(np.int32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"token_ids": np.array([index + 1], np.int32), "class_id": int(self.labels[index])}


def hand_made(split=None, vocabulary=("",)):
    split = HandMade() if split is None else split
    names = ["a", "b", "c", "d"]
    table = ClassTable(
        names, names, names, {"train": np.bincount(HandMade.labels)}, np.zeros(4, bool)
    )
    return Catalog(
        "hand-made",
        "0",
        table,
        1,
        WordTokenizer(vocabulary),
        np.zeros((len(vocabulary), 2)),
        {"train": split},
    )


def config(*, seed=0, batch=6, **data):
    return Config(
        seed=seed,
        data=DataConfig(generated=SPEC, **{"max_tokens": 5, **data}),
        preprocessing=SMALL,
        train=TrainConfig(batch_size=batch),
    )


def titles(catalog, chosen):
    """Each training record's title as it is read: int32 [N, max_tokens]."""
    reader, split = TitleReader(catalog, chosen), catalog.splits["train"]
    return np.stack([reader(split[i], i) for i in range(len(split))])


def test_raw_titles_are_the_records_own_words_padded_or_cut():
    catalog = open_generated(SPEC)
    got = titles(catalog, config(title="raw", max_tokens=6))
    assert got.shape == (23, 6)
    assert got.dtype == np.int32
    lengths = set()
    for row, record in zip(got, (catalog.splits["train"][i] for i in range(23)), strict=True):
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
    catalog = hand_made(vocabulary=vocabulary)
    reader = TitleReader(catalog, config(title="masked"))
    assert reader(record, 0).tolist() == [1, 3, 5, 6, 0]
    generated = open_generated(SPEC)
    reader, split = (
        TitleReader(generated, config(title="masked", max_tokens=40)),
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
        config(), loss=LossConfig(mixed=0.0), data=DataConfig(title="none", max_tokens=3)
    )
    np.testing.assert_array_equal(titles(hand_made(), chosen), np.zeros((72, 3)))


@pytest.mark.parametrize("title", ["shuffled", "shuffled_within_class"])
def test_shuffled_titles_are_a_fixed_permutation(title):
    got = titles(hand_made(), config(title=title))
    donor = got[:, 0] - 1
    assert not got[:, 1:].any()
    np.testing.assert_array_equal(np.sort(donor), np.arange(72))  # every title is used once
    np.testing.assert_array_equal(titles(hand_made(), config(title=title)), got)
    other = titles(hand_made(), config(title=title, seed=1))
    assert (other != got).any()
    same_class = HandMade.labels[donor] == HandMade.labels
    moved = donor != np.arange(72)
    if title == "shuffled":
        assert moved.sum() >= 66  # a random permutation leaves one place as it is, on average
        # By chance a title stays in its class with probability sum (n/N)^2 = 0.71; four deviations.
        assert abs(same_class.mean() - 0.711) < 0.22
        assert not same_class.all()
    else:
        assert same_class.all()
        several = np.bincount(HandMade.labels)[HandMade.labels] > 1
        assert moved[several].all()
        assert not moved[~several].any()


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_within_class_moves_every_title_for_every_seed(seed):
    donor = titles(hand_made(), config(title="shuffled_within_class", seed=seed))[:, 0] - 1
    several = np.bincount(HandMade.labels)[HandMade.labels] > 1
    assert (donor != np.arange(72))[several].all()
    assert (HandMade.labels[donor] == HandMade.labels).all()


def test_training_batch_by_hand():
    catalog = open_generated(SPEC)
    chosen = config()
    batch = train_batches(catalog, chosen)(5)
    indices = Sampler(catalog.splits["train"].labels, 6, 0)(5)
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "image": ((6, 10, 9, 3), "uint8"),
        "label": ((6,), "int32"),
        "token_ids": ((6, 5), "int32"),
    }
    for row, index in enumerate(indices.tolist()):
        record = catalog.splits["train"][index]
        np.testing.assert_array_equal(batch["image"][row], SMALL.load(record["image"]))
        assert batch["label"][row] == record["class_id"]
        ids = record["token_ids"][:5].tolist()
        assert batch["token_ids"][row].tolist() == ids + [0] * (5 - len(ids))
    without = train_batches(catalog, dataclasses.replace(chosen, loss=LossConfig(mixed=0.0)))(5)
    assert set(without) == {"image", "label"}
    np.testing.assert_array_equal(without["image"], batch["image"])


@pytest.mark.parametrize("processes", [2, 3])
def test_parts_of_several_processes_make_the_whole_batch(processes):
    catalog = open_generated(SPEC)
    whole = train_batches(catalog, config())
    parts = [
        dataclasses.replace(whole, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    for step in (0, 3, 4):
        batch = whole(step)
        for name, array in batch.items():
            np.testing.assert_array_equal(
                np.concatenate([part(step)[name] for part in parts]), array
            )


def test_batches_that_grow_hold_the_same_photos_and_words():
    """23 photos in batches of 6, of 12 from the end of epoch 1 on: cut elsewhere, position by
    position the same.
    """
    catalog, plain = open_generated(SPEC), config()
    train = dataclasses.replace(plain.train, grow_every_epochs=1.0, max_micro_batches=2)
    grown = [
        train_batches(catalog, dataclasses.replace(plain, train=train))(step) for step in range(6)
    ]
    assert [len(batch["label"]) for batch in grown] == [6, 6, 6, 6, 12, 12]
    whole = [train_batches(catalog, plain)(step) for step in range(8)]
    for name in whole[0]:
        np.testing.assert_array_equal(
            *(np.concatenate([batch[name] for batch in made]) for made in (grown, whole))
        )


class Textless(HandMade):
    """Photos that say who they are; a title would be found out."""

    def __getitem__(self, index):
        record = {
            "image_id": f"photo {index}",
            "class_id": int(self.labels[index]),
            "title": "text",
            "token_ids": np.ones(3),
        }
        return record | {"image": np.full((10, 9, 3), index, np.uint8)}


def test_photo_batches_hold_no_text_and_pad_the_last():
    batches = photo_batches(Textless(), SMALL, batch_size=20)
    assert len(batches) == 4
    made = [batches(number) for number in range(4)]
    for batch in made:
        assert set(batch) == {"image", "label", "image_id"}
        assert batch["image"].shape == (20, 10, 9, 3)
        assert len(batch["label"]) == len(batch["image_id"]) == 20
    joined = {name: np.concatenate([batch[name] for batch in made]) for name in made[0]}
    np.testing.assert_array_equal(joined["label"], [*HandMade.labels, *[-1] * 8])
    assert joined["image_id"].tolist() == [f"photo {i}" for i in range(72)] + [""] * 8
    np.testing.assert_array_equal(joined["image"][:, 4, 4, 1], [*range(72), *[0] * 8])


@pytest.mark.parametrize(
    ("max_photos", "wanted"),
    [
        (0, list(range(72))),
        (72, list(range(72))),
        (100, list(range(72))),
        (4, [0, 18, 36, 54]),
        (1, [0]),
    ],
)
def test_max_photos_are_spread_evenly(max_photos, wanted):
    batches = photo_batches(Textless(), SMALL, batch_size=10, max_photos=max_photos)
    assert batches.indices.tolist() == wanted
    read = [i for number in range(len(batches)) for i in batches(number)["image_id"] if i]
    assert read == [f"photo {i}" for i in wanted]


def test_an_empty_split_has_no_batch():
    split = Textless()
    split.labels = split.labels[:0]
    batches = photo_batches(split, SMALL, batch_size=10)
    assert len(batches) == 0
    for source in ("generated", "arrays"):
        assert list(ahead(batches, 0, 0, workers=0, source=source)) == []


def assert_same(made, wanted):
    made = list(made)
    assert len(made) == len(wanted)
    for one, other in zip(made, wanted, strict=True):
        assert set(one) == set(other)
        for name in other:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(
    ("workers", "source"),
    [(0, "generated"), (0, "arrays"), pytest.param(2, "generated", marks=pytest.mark.slow)],
)
def test_batches_made_ahead_are_the_same(workers, source):
    catalog = open_generated(SPEC)
    train = train_batches(catalog, config())
    test = photo_batches(catalog.splits["test"], SMALL, batch_size=7)
    assert isinstance(train, TrainBatches)
    assert isinstance(test, PhotoBatches)
    # From the middle on, as a resumed run does.
    assert_same(
        ahead(train, 3, 10, workers=workers, source=source), [train(step) for step in range(3, 10)]
    )
    photos = list(ahead(test, 0, len(test), workers=workers, source=source))
    assert_same(photos, [test(number) for number in range(len(test))])
    labels = np.concatenate([batch["label"] for batch in photos])
    assert Counter(labels.tolist()) == {0: 5, 1: 5, 2: 5, 3: 5, -1: 1}


class Broken(Textless):
    def __getitem__(self, index):
        return super().__getitem__(index) | (
            {"image": b"no photo", "image_id": "17"} if index == 17 else {}
        )


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_broken_photo_is_named_in_one_line(workers):
    batches = photo_batches(Broken(), SMALL, batch_size=8)
    with pytest.raises(InputError) as error:
        list(ahead(batches, 0, len(batches), workers=workers, source="imported"))
    assert re.fullmatch("photo 17: not a photo.*; import the catalogue again", str(error.value))


def test_strings_stay_on_the_host(one_device):
    batch = photo_batches(Textless(), SMALL, batch_size=8)(0)
    arrays = to_device(batch, one_device)
    assert set(arrays) == {"image", "label"}
    np.testing.assert_array_equal(arrays["image"], batch["image"])
