"""Batches with triplets: by hand, by weight, growing, and in several processes."""

import collections
import dataclasses

import numpy as np
import pytest
from helpers.triplet_files import (
    CATALOG,
    ROWS,
    SKU,
    TRAIN,
    triplet_config,
    triplets_and_others,
    write_triplets,
)

from sicot_jax import config as config_lib
from sicot_jax.catalog.batches import ProcessShard, train_batch_loader
from sicot_jax.catalog.sampling import RecordSampler
from sicot_jax.config import LossConfig


@pytest.mark.parametrize("parts", [1, 2])
def test_a_batch_holds_what_the_triplets_say_and_ordinary_photos(tmp_path, parts):
    write_triplets(tmp_path, ROWS)
    loader = train_batch_loader(CATALOG, triplet_config(tmp_path, batch=12 * parts, parts=parts))
    expected = {("q0.png", 0, 1), ("q1.png", 2, 3), ("q0.png", 3, 0)}
    for step in range(5):
        chosen, others = triplets_and_others(loader, step, parts, 2)
        for query, clicked, not_clicked in chosen.reshape(-1, 3).tolist():
            record = loader.split[query]
            assert query >= len(TRAIN) > max(clicked, not_clicked)
            labels = TRAIN.labels[[clicked, not_clicked]].tolist()
            assert (record["image_id"], *labels) in expected
            assert record["class_id"] == loader.split.labels[query] == labels[0]
            assert record["sku"] == SKU[labels[0]]
        assert others.shape == (parts, 6)
        assert others.max() < len(TRAIN)
        np.testing.assert_array_equal(
            others.ravel(), RecordSampler(TRAIN.labels, 6 * parts, 0)(step)
        )


def test_the_batch_has_the_photo_and_no_title(tmp_path):
    """A query is of one grey; titles "shuffled" would give it another photo's."""
    write_triplets(tmp_path, ROWS[1:2])
    for title in ("raw", "masked", "shuffled"):
        plain = triplet_config(tmp_path)
        chosen = dataclasses.replace(
            plain, data=dataclasses.replace(plain.data, title=title), loss=LossConfig()
        )
        batch = train_batch_loader(CATALOG, chosen)(3)
        for row in (0, 3):
            np.testing.assert_array_equal(batch["image"][row], np.full((10, 10, 3), 80))
            assert batch["label"][row] == 2
            assert not batch["token_ids"][row].any()
        assert batch["label"].tolist()[:6] == [2, 2, 3, 2, 2, 3]
        assert batch["token_ids"].any()
    known = dataclasses.replace(
        chosen,
        model=config_lib.ModelConfig(localization="features"),
        loss=LossConfig(background_suppression=1.0, box_regression=1.0),
    )
    boxes = train_batch_loader(CATALOG, known)(3)["box"]
    assert not boxes[[0, 3]].any()
    assert boxes[1].any()


def test_triplets_are_drawn_by_weight_and_photos_evenly(tmp_path):
    """1 : 3 : 4 of 4,000; four deviations of a binomial. Class 2's photos each as often."""
    write_triplets(tmp_path, ROWS)
    loader = train_batch_loader(CATALOG, triplet_config(tmp_path, batch=12, share=1.0))
    drawn = np.concatenate([loader.sampler(step).reshape(-1, 3) for step in range(1000)])
    counts = collections.Counter(TRAIN.labels[drawn[:, 1]].tolist())
    for label, share in ((0, 1 / 8), (2, 3 / 8), (3, 4 / 8)):
        assert abs(counts[label] - 4000 * share) < 4 * np.sqrt(4000 * share * (1 - share))
    photos = np.flatnonzero(TRAIN.labels == 2)
    each = np.array([np.sum(drawn[:, 1] == photo) for photo in photos])
    assert np.all(np.abs(each - each.mean()) < 5 * np.sqrt(each.mean()))
    assert set(drawn[TRAIN.labels[drawn[:, 1]] == 2, 2]) == set(np.flatnonzero(TRAIN.labels == 3))


def test_the_same_seed_and_step_are_the_same_batch_and_processes_share_it(tmp_path):
    write_triplets(tmp_path, ROWS)
    chosen = triplet_config(tmp_path, batch=24, parts=2)
    loader, again = (train_batch_loader(CATALOG, chosen) for _ in range(2))
    for step in (4, 1):
        global_batch = loader(step)
        for name, array in global_batch.items():
            np.testing.assert_array_equal(again(step)[name], array)
            parts = [
                dataclasses.replace(loader, shard=ProcessShard(i, 3))(step)[name] for i in range(3)
            ]
            np.testing.assert_array_equal(np.concatenate(parts), array)
    other = train_batch_loader(CATALOG, dataclasses.replace(chosen, seed=1))
    assert (other.sampler(1) != loader.sampler(1)).any()
    assert (loader.sampler(0) != loader.sampler(1)).any()


def test_a_growing_batch_has_twice_the_triplets(tmp_path):
    write_triplets(tmp_path, ROWS)
    loader = train_batch_loader(
        CATALOG, triplet_config(tmp_path, batch=12, grow_every_epochs=0.5, max_micro_batches=2)
    )
    sizes = [len(loader.sampler(step)) for step in range(4)]
    assert sizes == [12, 12, 24, 24]
    chosen, others = triplets_and_others(loader, 3, 2, 2)
    assert (chosen[..., 0] >= len(TRAIN)).all()
    assert others.max() < len(TRAIN)
