from __future__ import annotations

import dataclasses
import io
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sicot_jax.catalog.catalog import SPLITS, Catalog, Record
from sicot_jax.catalog.sources.arrays import open_array_file, resize_catalog, write_array_file
from sicot_jax.catalog.sources.generated import open_generated
from sicot_jax.catalog.sources.tables import pack_strings, unpack_strings
from sicot_jax.catalog.tokenizer import build_tokenizer
from sicot_jax.config import GeneratedSpec
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError

SPEC = GeneratedSpec(
    num_classes=6,
    train_photos=20,
    validation_per_class=1,
    test_per_class=1,
    image_size=16,
    word_vectors="random",
)


def _image(record: Record) -> np.ndarray:
    assert isinstance(record["image"], np.ndarray)
    return record["image"]


def _assert_equal(actual: Record, wanted: Record) -> None:
    assert set(actual) == set(wanted)
    for key, value in wanted.items():
        if isinstance(value, np.ndarray):
            assert actual[key].dtype == value.dtype
            assert type(actual[key]) is np.ndarray
            np.testing.assert_array_equal(actual[key], value)
        else:
            assert actual[key] == value
            assert type(actual[key]) is type(value)


@pytest.fixture
def source() -> Catalog:
    return open_generated(SPEC)


def test_round_trip(source, tmp_path):
    path = tmp_path / "catalog.npz"
    write_array_file(source, path, to_image=_image)
    assert [each.name for each in tmp_path.iterdir()] == ["catalog.npz"]
    opened = open_array_file(str(path))
    for name in SPLITS:
        split = opened.splits[name]
        assert split.labels.dtype == np.int32
        assert len(split) == len(source.splits[name])
        np.testing.assert_array_equal(split.labels, source.splits[name].labels)
        for actual, wanted in zip(split, source.splits[name], strict=True):
            _assert_equal(actual, wanted)
        np.testing.assert_array_equal(opened.classes.counts[name], source.classes.counts[name])
        with pytest.raises(IndexError):
            split[len(split)]
    assert isinstance(opened.splits["train"].images, np.memmap)
    for key in ("sku", "title", "category"):
        assert list(getattr(opened.classes, key)) == list(getattr(source.classes, key))
    np.testing.assert_array_equal(opened.classes.discontinued, source.classes.discontinued)
    np.testing.assert_array_equal(opened.word_vectors, source.word_vectors)
    for field in ("name", "data_hash", "head_boundary"):
        assert getattr(opened, field) == getattr(source, field)
    assert opened.tokenizer.vocabulary == source.tokenizer.vocabulary
    title = source.classes.title[0]
    np.testing.assert_array_equal(opened.tokenizer.encode(title), source.tokenizer.encode(title))
    with np.load(path) as plain:  # an ordinary .npz to everyone else
        np.testing.assert_array_equal(plain["train/labels"], source.splits["train"].labels)
        assert plain["test/images"].shape == (6, 16, 16, 3)


def _shape(height: int, width: int, fit: str) -> Preprocessing:
    return Preprocessing(height=8, width=8, resize_height=height, resize_width=width, fit=fit)


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(48, 32), (32, 48), (40, 40)])
def test_boxes_follow_their_photos(source, tmp_path, size, fit, encoded):
    """A red rectangle is where its box says, before and after, to a pixel."""
    photo = np.full((60, 100, 3), 20, np.uint8)
    photo[12:36, 20:70] = (255, 0, 0)
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "PNG")
    box = np.array([0.2, 0.2, 0.7, 0.6], np.float32)
    record = {
        **source.splits["train"][0],
        "image": file.getvalue() if encoded else photo,
        "box": box,
    }
    catalog = dataclasses.replace(source, splits={"train": _Records([record])})
    write_array_file(
        resize_catalog(catalog, _shape(*size, fit)), tmp_path / "c.npz", splits=("train",)
    )
    record = open_array_file(tmp_path / "c.npz").splits["train"][0]
    assert record["image"].shape == (*size, 3)
    red = (record["image"][..., 0] > 128) & (record["image"][..., 1] < 128)
    rows, columns = (np.flatnonzero(red.any(axis)) for axis in (1, 0))
    seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(record["box"] * [size[1], size[0], size[1], size[0]], seen, atol=1)


class _Records(list):
    labels = np.zeros(1, np.int32)


def test_a_box_that_was_cut_away_and_none_are_zero(source):
    outside = [0.0, 0.2, 0.15, 0.8]
    for fit, box, wanted in [
        ("crop", outside, [0, 0, 0, 0]),
        ("crop", [0.0, 0.25, 0.5, 1.0], [0, 0.25, 0.5, 1]),
        ("crop", [0, 0, 0, 0], [0, 0, 0, 0]),
        ("pad", outside, [0, 0.35, 0.15, 0.65]),
        ("pad", [0, 0, 0, 0], [0, 0, 0, 0]),
        ("stretch", outside, outside),
    ]:
        record = {
            **source.splits["train"][0],
            "image": np.zeros((10, 20, 3), np.uint8),
            "box": np.float32(box),
        }
        catalog = dataclasses.replace(source, splits={"train": _Records([record])})
        box = resize_catalog(catalog, _shape(16, 16, fit)).splits["train"][0]["box"]
        assert box.dtype == np.float32
        np.testing.assert_allclose(box, wanted, atol=1e-6, err_msg=fit)


def test_the_resize_settings_are_stored_and_part_of_the_hash(source, tmp_path):
    assert source.resized_by == {}
    hashes = {source.data_hash}
    for fit in ("crop", "pad"):
        resized = resize_catalog(source, _shape(8, 12, fit))
        write_array_file(resized, tmp_path / fit)
        opened = open_array_file(tmp_path / fit)
        assert opened.resized_by == {"resize_height": 8, "resize_width": 12, "fit": fit}
        assert opened.data_hash == resized.data_hash
        hashes.add(opened.data_hash)
    assert len(hashes) == 3


def _title_of(split, index: int) -> str:
    return split[index]["title"]


def test_splits_travel_to_other_processes(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_array_file(source, "c.npz", to_image=_image)
    split = open_array_file("c.npz").splits["train"]
    _assert_equal(pickle.loads(pickle.dumps(split))[4], split[4])
    monkeypatch.chdir("/")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_title_of, (split, 4)) == split[4]["title"]


def test_some_splits_and_an_empty_one(source, tmp_path):
    class Empty:
        labels = np.zeros(0, np.int32)

        def __len__(self) -> int:
            return 0

    catalog = dataclasses.replace(source, splits={**source.splits, "test": Empty()})
    write_array_file(catalog, tmp_path / "c.npz", to_image=_image, splits=("train", "test"))
    opened = open_array_file(tmp_path / "c.npz")
    assert list(opened.splits) == ["train", "test"]
    assert len(opened.splits["test"]) == 0
    assert opened.splits["test"].images.shape == (0, 0, 0, 3)


def test_sentencepiece_travels_inside(source, tmp_path):
    tokenizer = build_tokenizer(
        ["红色运动鞋", "蓝色运动鞋", "红色连衣裙"] * 20, kind="sentencepiece"
    )
    catalog = dataclasses.replace(source, tokenizer=tokenizer, splits={})
    write_array_file(catalog, tmp_path / "c.npz", to_image=_image, splits=())
    opened = open_array_file(tmp_path / "c.npz").tokenizer
    assert opened.vocabulary == tokenizer.vocabulary
    assert opened.encode("红色连衣裙").tolist() == tokenizer.encode("红色连衣裙").tolist()


@pytest.mark.parametrize("kind", ["words", "sentencepiece"])
def test_reading_needs_only_numpy(source, tmp_path, kind):
    path = tmp_path / "c.npz"
    catalog = dataclasses.replace(
        source, tokenizer=build_tokenizer(["red shoe", "blue shoe"] * 9, kind=kind)
    )
    write_array_file(catalog, path, to_image=_image)
    code = (
        "import sys\n"
        "names = 'pyarrow PIL tensorflow_datasets gensim sentencepiece jax grain array_record'\n"
        "for name in names.split():\n"
        "    sys.modules[name] = None\n"
        "from sicot_jax.catalog.sources.arrays import open_array_file\n"
        f"catalog = open_array_file({str(path)!r})\n"
        "assert len(catalog.tokenizer.vocabulary) > 1 and catalog.splits['train'][0]['title']\n"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_killed_midway_leaves_no_partial_file(source, tmp_path):
    path = tmp_path / "c.npz"
    num_encoded = 0

    def stop(record: Record) -> np.ndarray:
        nonlocal num_encoded
        num_encoded += 1
        if num_encoded == 7:
            raise KeyboardInterrupt
        return _image(record)

    with pytest.raises(KeyboardInterrupt):
        write_array_file(source, path, to_image=stop)
    assert list(tmp_path.iterdir()) == []
    # SIGKILL cannot tidy up, but the final name stays free, or keeps the older file.
    write_array_file(source, path, to_image=_image)
    complete = path.read_bytes()
    code = (
        "import os\n"
        "from sicot_jax.catalog.sources.arrays import write_array_file\n"
        "from sicot_jax.catalog.sources.generated import open_generated\n"
        "from sicot_jax.config import GeneratedSpec\n"
        "def die(record): os.kill(os.getpid(), 9)\n"
        "spec = GeneratedSpec(num_classes=2, train_photos=9, word_vectors='random')\n"
        f"write_array_file(open_generated(spec), {str(path)!r}, to_image=die)\n"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == -9
    )
    assert path.read_bytes() == complete


def test_refused(source, tmp_path):
    path = tmp_path / "c.npz"
    sizes = iter([16, 8])
    with pytest.raises(InputError, match="resize all photos alike"):
        write_array_file(
            source, path, to_image=lambda record: np.zeros((16, next(sizes), 3), np.uint8)
        )
    with pytest.raises(InputError, match="wanted uint8"):
        write_array_file(source, path, to_image=lambda record: np.zeros((16, 16, 3), np.float32))
    assert not path.exists()
    with pytest.raises(InputError, match=r"no array file .*where it is now: --catalog"):
        open_array_file(path)
    write_array_file(source, path, to_image=_image)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"no array file .*write it again"):
        open_array_file(path)
    np.savez(path, a=np.zeros(3))
    with pytest.raises(InputError, match="no array file"):
        open_array_file(path)


def test_strings():
    strings = ["", "a", "连衣裙", "\ud800", "x\ny"]
    table = unpack_strings(*pack_strings(strings))
    assert list(table) == strings
    assert table[-1] == "x\ny"
    assert table[1:3] == ["a", "连衣裙"]
    assert "a" in table
    assert list(unpack_strings(*pack_strings([]))) == []
