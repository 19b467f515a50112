from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import json
import multiprocessing
import pickle
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sicot_jax.catalog.catalog import SPLITS
from sicot_jax.catalog.importing.builder import ImportJob
from sicot_jax.catalog.importing.manifest_rows import ManifestError
from sicot_jax.catalog.importing.photos import prepare_photos
from sicot_jax.catalog.importing.settings import ImportSettings
from sicot_jax.catalog.sources import render
from sicot_jax.catalog.sources.generated import generated_data_hash, open_generated
from sicot_jax.catalog.sources.generated_products import PROMOTIONS, zipf_counts
from sicot_jax.catalog.sources.shapes import BODIES, MARKS
from sicot_jax.catalog.tokenizer import split_words
from sicot_jax.config import GeneratedSpec

SMALL = GeneratedSpec(num_classes=20, train_photos=300, word_vectors="random", word_vector_width=8)
NOISE = set(split_words(" ".join(PROMOTIONS)))


def _fingerprint(record) -> str:
    parts = {
        key: value.tobytes().hex() if isinstance(value, np.ndarray) else value
        for key, value in record.items()
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _first_prints(spec: GeneratedSpec) -> list[str]:
    return [_fingerprint(open_generated(spec).splits[name][3]) for name in SPLITS]


def test_zipf_counts_by_hand():
    assert zipf_counts(3, 11, 1.0).tolist() == [6, 3, 2]
    assert zipf_counts(4, 20, 0.0).tolist() == [5, 5, 5, 5]
    assert zipf_counts(5, 7, 3.0).tolist() == [3, 1, 1, 1, 1]  # everyone keeps one photo
    assert zipf_counts(5, 5, 1.0).tolist() == [1] * 5
    for exponent in (0.3, 1.0, 2.5):
        counts = zipf_counts(997, 12_345, exponent)
        assert counts.sum() == 12_345
        assert counts.min() >= 1
        assert (np.diff(counts) <= 0).all()


def test_tables_and_labels():
    catalog = open_generated(SMALL)
    counts = catalog.classes.counts
    assert {name: int(counts[name].sum()) for name in SPLITS} == {
        "train": 300,
        "validation": 40,
        "test": 100,
    }
    for name, split in catalog.splits.items():
        assert len(split) == len(split.labels)
        assert split.labels.dtype == np.int32
        assert (np.bincount(split.labels, minlength=20) == counts[name]).all()
        for index in (0, 7, len(split) - 1, -1):
            assert split[index]["class_id"] == split.labels[index]
        with pytest.raises(IndexError):
            split[len(split)]
    head = counts["train"] > catalog.head_boundary
    assert 0 < head.sum() < 20
    assert counts["train"][head].sum() >= 150
    assert catalog.word_vectors.shape == (len(catalog.tokenizer.vocabulary), 8)
    assert (catalog.word_vectors[0] == 0).all()
    assert len(set(catalog.classes.sku)) == len(catalog.classes) == 20
    first = int(np.flatnonzero(catalog.splits["train"].labels == 7)[0])
    record = catalog.splits["train"][first]
    assert (catalog.classes.sku[7], catalog.classes.title[7]) == (record["sku"], record["title"])
    assert catalog.classes.category[7] == record["category"]
    assert catalog.classes.sku[2:4] == [
        "sku-0000002",
        "sku-0000003",
    ]


def test_record_fields():
    record = open_generated(SMALL).splits["train"][11]
    assert record["image"].shape == (48, 48, 3)
    assert record["image"].dtype == np.uint8
    assert record["box"].shape == (4,)
    assert record["box"].dtype == np.float32
    assert record["token_ids"].dtype == np.int32
    assert len(record["token_ids"]) == len(split_words(record["title"]))
    assert (record["token_ids"] > 0).all()
    assert record["role"] == "catalogue"


def test_a_record_does_not_depend_on_the_others():
    catalog = open_generated(SMALL)
    alone = [_fingerprint(catalog.splits["train"][i]) for i in (250, 3)]
    every = [_fingerprint(record) for record in catalog.splits["train"]]
    assert [every[250], every[3]] == alone
    assert len(set(every)) == 300
    copy = pickle.loads(pickle.dumps(catalog.splits["train"]))
    assert _fingerprint(copy[250]) == alone[0]
    assert len(pickle.dumps(copy)) < 1000


def test_equal_in_another_process():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_first_prints, (SMALL,)) == _first_prints(SMALL)


def test_draws_are_those_of_this_generator_version():
    """NumPy may change the streams of `Generator`: then GENERATOR_VERSION must be raised."""
    split = open_generated(SMALL).splits["train"]
    assert [split[i]["title"] for i in (0, 250)] == [
        "shirt plain diamondlogo discount new arrival veri",
        "discount gift free shipping shirt free shipping ringlogo lanex",
    ]


def test_hash_and_validation():
    changes = {
        "num_classes": 21, "train_photos": 301, "zipf_exponent": 1.1, "validation_per_class": 1,
        "test_per_class": 1, "image_size": 32, "box_area": (0.2, 0.8), "clutter": 0.1,
        "informativeness": 0.1, "word_sharing": 0.1, "seed": 1, "word_vectors": "word2vec",
        "word_vector_width": 9,
    }  # fmt: skip
    assert set(changes) == {field.name for field in dataclasses.fields(GeneratedSpec)}
    hashes = {
        generated_data_hash(dataclasses.replace(SMALL, **{name: value}))
        for name, value in changes.items()
    }
    assert len(hashes | {generated_data_hash(SMALL)}) == len(changes) + 1
    as_list = dataclasses.replace(SMALL, box_area=[0.3, 0.8])
    assert (
        open_generated(as_list).data_hash
        == generated_data_hash(SMALL)
        == open_generated(SMALL).data_hash
    )
    assert generated_data_hash(dataclasses.replace(SMALL, zipf_exponent=1)) == generated_data_hash(
        SMALL
    )
    with pytest.raises(ValueError, match="box_area"):
        open_generated(dataclasses.replace(SMALL, box_area=(0.3,)))
    bad = {
        "num_classes": 0, "train_photos": 19, "zipf_exponent": -1, "validation_per_class": 0,
        "test_per_class": 0, "image_size": 4, "box_area": (0.8, 0.3), "clutter": 1.5,
        "informativeness": -0.1, "word_sharing": 2, "seed": -1, "word_vectors": "glove",
        "word_vector_width": 0,
    }  # fmt: skip
    for name, value in bad.items():
        with pytest.raises(ValueError, match=rf"generated\.{name}=.*, wanted"):
            open_generated(dataclasses.replace(SMALL, **{name: value}))


def test_box_is_tight_around_the_product():
    # A white product on black: what differs between drawing and not drawing it is the product.
    rng = np.random.default_rng(0)
    size = 96
    for number in range(60):
        product = render.ProductAppearance(
            body=number % len(BODIES),
            pattern=0,
            mark=number % len(MARKS),
            colour=(0.0, 0.0, 1.0),
            second_colour=(0.0, 0.0, 1.0),
            mark_colour=(0.6, 1.0, 0.9),
            aspect=float(np.exp(rng.uniform(-0.4, 0.4))),
            pattern_angle=0.0,
            pattern_frequency=5.0,
            mark_position=float(rng.random()),
            mark_size=0.3,
        )
        area = float(rng.uniform(0.1, 0.5))
        pose, box = render._pose_in_canvas(
            product, area, float(rng.uniform(-0.35, 0.35)), rng.random(), rng.random()
        )
        canvas = np.zeros((3, size, size), np.float32)
        render._draw_product(canvas, product, pose)
        ys, xs = np.nonzero(canvas.max(0) > 0.3)
        drawn = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        np.testing.assert_allclose(drawn, np.array(box) * size, atol=1.3)
        assert min(box) >= 0
        assert max(box) <= 1
        assert (box[2] - box[0]) * (box[3] - box[1]) == pytest.approx(area)


def test_boxes_keep_to_the_range_and_spread():
    split = open_generated(dataclasses.replace(SMALL, box_area=(0.05, 0.4))).splits["train"]
    boxes = np.stack([record["box"] for record in split])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert 0.0499 < area.min() < 0.1
    assert 0.35 < area.max() < 0.4001
    # 0 at the left, 1 at the right of where it fits.
    position = boxes[:, 0] / (1 - boxes[:, 2] + boxes[:, 0])
    assert abs(position.mean() - 0.5) < 0.06
    assert abs(position.var() - 1 / 12) < 0.02


def _titles(catalog) -> tuple[list[list[str]], np.ndarray]:
    split = catalog.splits["train"]
    world = split._world
    return [split_words(world.title("train", i)) for i in range(len(split))], split.labels


def test_titles_say_nothing_at_informativeness_0():
    catalog = open_generated(
        dataclasses.replace(
            SMALL, num_classes=8, train_photos=2400, zipf_exponent=0.0, informativeness=0.0
        )
    )
    titles, labels = _titles(catalog)
    assert {word for title in titles for word in title} <= NOISE
    vocabulary = sorted(NOISE)
    table = np.zeros((8, len(vocabulary)))
    for title, label in zip(titles, labels, strict=True):
        for word in title:
            table[label, vocabulary.index(word)] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    chi2 = ((table - expected) ** 2 / expected).sum()
    freedom = 7 * (len(vocabulary) - 1)
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


def test_titles_name_the_product_at_informativeness_1():
    catalog = open_generated(dataclasses.replace(SMALL, informativeness=1.0, word_sharing=1.0))
    titles, labels = _titles(catalog)
    for title, label in zip(titles, labels, strict=True):
        informative = [word for word in title if word not in NOISE]
        assert len(informative) == 6
        assert catalog.classes.category[int(label)] in informative
    half, _ = _titles(open_generated(dataclasses.replace(SMALL, informativeness=0.5)))
    informative = [sum(word not in NOISE for word in title) for title in half]
    assert abs(np.mean(informative) - 3) < 0.25


@pytest.mark.parametrize("sharing", [0.0, 0.12, 0.5, 1.0])
def test_word_sharing(sharing):
    spec = dataclasses.replace(
        SMALL,
        num_classes=400,
        train_photos=4000,
        zipf_exponent=0.7,
        informativeness=1.0,
        word_sharing=sharing,
    )
    catalog = open_generated(spec)
    titles, labels = _titles(catalog)
    head = (catalog.classes.counts["train"] > catalog.head_boundary)[labels]
    in_head = {word for title, h in zip(titles, head, strict=True) if h for word in title} - NOISE
    in_tail = {
        word for title, h in zip(titles, head, strict=True) if not h for word in title
    } - NOISE
    # Concepts that both head and tail classes use: shared ones show one form, the others two.
    world = catalog.splits["train"]._world
    both = shared = 0
    for kind, sizes in world.shared.items():
        for number in range(len(sizes)):
            head_form, tail_form = world.word(kind, number, True), world.word(kind, number, False)
            if head_form in in_head and tail_form in in_tail:
                both += 1
                shared += head_form == tail_form
    assert both > 100
    assert abs(shared / both - sharing) < 0.05
    assert len(in_head & in_tail) == shared  # no word of one concept is by chance a word of another
    assert in_head | in_tail <= set(catalog.tokenizer.vocabulary)


def test_vocabulary_has_no_word_twice_and_word2vec_trains():
    catalog = open_generated(dataclasses.replace(SMALL, word_vectors="word2vec"))
    vocabulary = list(catalog.tokenizer.vocabulary)
    assert vocabulary[0] == ""
    assert len(set(vocabulary)) == len(vocabulary)
    assert catalog.word_vectors.shape == (len(vocabulary), 8)
    assert np.abs(catalog.word_vectors[1:]).max() > 0.2


def test_photos_do_not_depend_on_the_titles():
    plain = open_generated(SMALL).splits["test"][5]
    other = open_generated(
        dataclasses.replace(SMALL, informativeness=0.0, word_sharing=0.0)
    ).splits["test"][5]
    np.testing.assert_array_equal(plain["image"], other["image"])
    assert plain["title"] != other["title"]


def test_classes_differ_and_photos_of_a_class_are_similar():
    # Mean colour of the box's middle: photos of a class must be nearer to each other than to other
    # classes.
    split = open_generated(dataclasses.replace(SMALL, clutter=0.0)).splits["test"]
    features = []
    for record in split:
        x0, y0, x1, y1 = (record["box"] * 48).astype(int)
        features.append(record["image"][y0:y1, x0:x1].reshape(-1, 3).mean(0))
    features = np.stack(features).reshape(20, 5, 3)
    within = features.std(1).mean()
    between = features.mean(1).std(0).mean()
    assert 2 < within < between


def test_a_million_classes_open_fast_in_little_memory():
    spec = GeneratedSpec(
        num_classes=1_000_000, train_photos=10_000_000, word_vectors="random", seed=5
    )
    start = time.perf_counter()
    catalog = open_generated(spec)
    record = catalog.splits["train"][9_999_999]
    assert time.perf_counter() - start < 3
    assert record["class_id"] == 999_999
    assert record["sku"] == "sku-0999999"
    assert len(catalog.splits["test"]) == 5_000_000
    tracemalloc.start()
    open_generated(dataclasses.replace(spec, seed=6))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 250e6


def _builder_module():
    path = Path(__file__).parents[3] / "data" / "generated" / "generated_dataset_builder.py"
    spec = importlib.util.spec_from_file_location("generated_dataset_builder", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_written_to_disk_it_is_an_ordinary_import(tmp_path):
    module = _builder_module()
    (tmp_path / "spec.json").write_text(
        '{"num_classes": 3, "train_photos": 9, "test_per_class": 1}'
    )
    source = open_generated(module.read_spec(tmp_path))
    job = ImportJob(tmp_path, tmp_path / "out", ImportSettings(word_width=4))
    builder = module.Builder(job)
    rows = list(builder.rows())
    assert [row.split for row in rows] == ["train"] * 9 + ["validation"] * 6 + ["test"] * 3
    assert rows[4].title == source.splits["train"][4]["title"]
    prepared = list(
        prepare_photos(builder.photos(), [row.image for row in rows], short_side=48, workers=1)
    )
    assert not any(photo.error for photo in prepared)
    assert len({photo.image_id for photo in prepared}) == 18
    with Image.open(io.BytesIO(builder.photos().read("test/1"))) as image:
        np.testing.assert_array_equal(np.asarray(image), source.splits["test"][1]["image"])
    pickle.loads(pickle.dumps(builder.photos()))
    for text, message in (
        ('{"classes": 3}', "wanted a JSON object"),
        ("[", "wanted"),
        ('{"seed": -1}', "seed=-1"),
    ):
        (tmp_path / "spec.json").write_text(text)
        with pytest.raises(ManifestError, match=message):
            list(builder.rows())
    (tmp_path / "spec.json").unlink()
    with pytest.raises(ManifestError, match="write one"):
        list(builder.rows())
