"""Prefetched batches: the same as without, in order, with errors in one line."""

import re
from collections import Counter

import numpy as np
import pytest
from helpers.batch_catalog import SMALL, SPEC, TextlessSplit, batch_config

from sicot_jax.catalog.batches import photo_batch_loader, train_batch_loader
from sicot_jax.catalog.prefetch import prefetch
from sicot_jax.catalog.sources.generated import open_generated
from sicot_jax.errors import InputError


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
