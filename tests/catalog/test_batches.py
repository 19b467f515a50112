"""Host batches: by hand, of several processes, growing, and photo batches without text."""

import dataclasses
import os
import re
import shutil
import signal
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.batch_catalog import SMALL, SPEC, HandMadeSplit, TextlessSplit, batch_config

from sicot_jax.catalog.batches import (
    ProcessShard,
    evenly_spaced,
    photo_batch_loader,
    prefetch,
    train_batch_loader,
)
from sicot_jax.catalog.sampling import RecordSampler
from sicot_jax.catalog.sources.generated import open_generated
from sicot_jax.config import LossConfig
from sicot_jax.errors import InputError
from sicot_jax.training.device_batches import to_device


def test_training_batch_by_hand():
    catalog = open_generated(SPEC)
    chosen = batch_config()
    batch = train_batch_loader(catalog, chosen)(5)
    indices = RecordSampler(catalog.splits["train"].labels, 6, 0)(5)
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
    without = train_batch_loader(catalog, dataclasses.replace(chosen, loss=LossConfig(mixed=0.0)))(
        5
    )
    assert set(without) == {"image", "label"}
    np.testing.assert_array_equal(without["image"], batch["image"])


@pytest.mark.parametrize("processes", [2, 3])
def test_shards_of_several_processes_make_the_global_batch(processes):
    catalog = open_generated(SPEC)
    global_loader = train_batch_loader(catalog, batch_config())
    process_loaders = [
        dataclasses.replace(global_loader, shard=ProcessShard(i, processes))
        for i in range(processes)
    ]
    for step in (0, 3, 4):
        batch = global_loader(step)
        for name, array in batch.items():
            np.testing.assert_array_equal(
                np.concatenate([loader(step)[name] for loader in process_loaders]), array
            )


def test_batches_that_grow_hold_the_same_photos_and_words():
    """23 photos in batches of 6, of 12 from the end of epoch 1 on: joined, they are the same."""
    catalog, plain = open_generated(SPEC), batch_config()
    train = dataclasses.replace(plain.train, grow_every_epochs=1.0, max_micro_batches=2)
    grown = [
        train_batch_loader(catalog, dataclasses.replace(plain, train=train))(step)
        for step in range(6)
    ]
    assert [len(batch["label"]) for batch in grown] == [6, 6, 6, 6, 12, 12]
    constant = [train_batch_loader(catalog, plain)(step) for step in range(8)]
    for name in constant[0]:
        np.testing.assert_array_equal(
            *(np.concatenate([batch[name] for batch in batches]) for batches in (grown, constant))
        )


def test_photo_batches_hold_no_text_and_pad_the_last():
    batches = photo_batch_loader(TextlessSplit(), SMALL, batch_size=20)
    assert len(batches) == 4
    all_batches = [batches(number) for number in range(4)]
    for batch in all_batches:
        assert set(batch) == {"image", "label", "image_id"}
        assert batch["image"].shape == (20, 10, 9, 3)
        assert len(batch["label"]) == len(batch["image_id"]) == 20
    joined = {
        name: np.concatenate([batch[name] for batch in all_batches]) for name in all_batches[0]
    }
    np.testing.assert_array_equal(joined["label"], [*HandMadeSplit.labels, *[-1] * 8])
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
    batches = photo_batch_loader(TextlessSplit(), SMALL, batch_size=10, max_photos=max_photos)
    assert batches.indices.tolist() == wanted
    read = [i for number in range(len(batches)) for i in batches(number)["image_id"] if i]
    assert read == [f"photo {i}" for i in wanted]


@pytest.mark.parametrize(
    ("size", "max_count", "expected"), [(0, 3, []), (2, 3, [0, 1]), (9, 3, [0, 3, 6])]
)
def test_evenly_spaced(size, max_count, expected):
    assert evenly_spaced(size, max_count).tolist() == expected


def test_an_empty_split_has_no_batch():
    split = TextlessSplit()
    split.labels = split.labels[:0]
    batches = photo_batch_loader(split, SMALL, batch_size=10)
    assert len(batches) == 0
    for source in ("generated", "arrays"):
        assert list(prefetch(batches, 0, 0, workers=0, source=source)) == []


def test_strings_stay_on_the_host(one_device):
    batch = photo_batch_loader(TextlessSplit(), SMALL, batch_size=8)(0)
    arrays = to_device(batch, one_device)
    assert set(arrays) == {"image", "label"}
    np.testing.assert_array_equal(arrays["image"], batch["image"])


def assert_same(batches, expected):
    batches = list(batches)
    assert len(batches) == len(expected)
    for one, other in zip(batches, expected, strict=True):
        assert set(one) == set(other)
        for name in other:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(
    ("workers", "source"),
    [(0, "generated"), (0, "arrays"), pytest.param(2, "generated", marks=pytest.mark.slow)],
)
def test_prefetched_batches_are_the_same(workers, source):
    catalog = open_generated(SPEC)
    train = train_batch_loader(catalog, batch_config())
    test = photo_batch_loader(catalog.splits["test"], SMALL, batch_size=7)
    # From the middle on, as a resumed run does.
    assert_same(
        prefetch(train, 3, 10, workers=workers, source=source),
        [train(step) for step in range(3, 10)],
    )
    photos = list(prefetch(test, 0, len(test), workers=workers, source=source))
    assert_same(photos, [test(number) for number in range(len(test))])
    labels = np.concatenate([batch["label"] for batch in photos])
    assert Counter(labels.tolist()) == {0: 5, 1: 5, 2: 5, 3: 5, -1: 1}


class SplitWithABrokenPhoto(TextlessSplit):
    def __getitem__(self, index):
        return super().__getitem__(index) | (
            {"image": b"no photo", "image_id": "17"} if index == 17 else {}
        )


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_broken_photo_is_named_in_one_line(workers):
    batches = photo_batch_loader(SplitWithABrokenPhoto(), SMALL, batch_size=8)
    with pytest.raises(InputError) as error:
        list(prefetch(batches, 0, len(batches), workers=workers, source="imported"))
    assert re.fullmatch("photo 17: not a photo.*; import the catalogue again", str(error.value))


def test_workers_that_need_more_shared_memory_than_there_is_are_refused(monkeypatch):
    """A worker would die of SIGBUS. A batch of 8 photos of 10 x 9 is 2160 bytes: two workers and
    four more batches need 12 of them.
    """
    batches = photo_batch_loader(TextlessSplit(), SMALL, batch_size=8)
    assert batches.photo_bytes(0) == batches(0)["image"].nbytes == 2160
    free = SimpleNamespace(free=12 * 2160 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(InputError, match=r"data.workers=2 needs .* or set data.workers=1"):
        next(prefetch(batches, 0, 1, workers=2, source="imported"))
    train = train_batch_loader(open_generated(SPEC), batch_config())
    assert train.photo_bytes(3) == train(3)["image"].nbytes


class SplitThatKills(TextlessSplit):
    """Reading photo 17 ends the process by a signal."""

    def __init__(self, number):
        self.number = number

    def __getitem__(self, index):
        if index == 17:
            os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "SIGKILL: the system was out of memory, most likely; lower data.workers"),
        (signal.SIGBUS, "SIGBUS: .* is full; enlarge it, or lower data.workers"),
        (signal.SIGSEGV, "SIGSEGV: data.workers=0 decodes without such processes"),
    ],
)
def test_a_killed_worker_is_one_line(number, said):
    batches = photo_batch_loader(SplitThatKills(number), SMALL, batch_size=8)
    with pytest.raises(InputError, match=f"a process of data.workers was killed by {said}"):
        list(prefetch(batches, 0, len(batches), workers=1, source="imported"))
