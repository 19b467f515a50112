from __future__ import annotations

import csv
import dataclasses
import errno
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from sicot_jax.catalog.catalog import SPLITS
from sicot_jax.catalog.importing import catalog_tables
from sicot_jax.catalog.importing.photos import FolderPhotos, prepare_photos, source_sha256
from sicot_jax.catalog.importing.run import import_catalog
from sicot_jax.catalog.importing.settings import (
    CatalogImportError,
    ImportSettings,
    TransferredTitle,
)
from sicot_jax.catalog.sources.imported import CatalogError, open_imported, read_import_source
from sicot_jax.common.image import decode_photo, image_id
from sicot_jax.common.table_files import TableError
from sicot_jax.errors import InputError

ROOT = Path(__file__).parents[3]
SMALL = ImportSettings(word_width=8, word_epochs=1, min_count=1, short_side=24)
CLASSES = {"0012": 12, "NA": 8, "b": 5, "c": 3}


def photo(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_manifest(folder, rows, name="photos.csv"):
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, ("image", "sku", "title", "tags", "category", "box", "role", "split")
        )
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


def make_source(folder, classes):
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for sku, n in classes.items():
        for i in range(n):
            name = f"{sku}_{i}.png"
            photo(folder / name, [ord(char) for char in name])
            rows.append(
                {
                    "image": name,
                    "sku": sku,
                    "title": f"word{sku} nice photo{sku}{i}",
                    "tags": "blue",
                }
            )
    return rows


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return write_manifest(folder, make_source(folder, CLASSES))


@pytest.fixture
def rows(source):
    with source.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory):
    return import_catalog(source, tmp_path_factory.mktemp("out"), settings=SMALL, workers=1)


def records(catalog):
    return {
        split: [catalog.splits[split][i] for i in range(len(catalog.splits[split]))]
        for split in SPLITS
    }


def left_behind(out):
    return sorted(
        os.fspath(path.relative_to(out)) for path in out.rglob("*") if path.name != ".import.lock"
    )


def test_records_and_tables_agree(imported, source):
    catalog = open_imported(imported.folder.parent.parent)
    assert catalog.name == "photos"
    assert imported.folder.name == "1.0.0"
    assert catalog.classes.sku == ["0012", "NA", "b", "c"]
    assert not catalog.classes.discontinued.any()
    by_split = records(catalog)
    for split in SPLITS:
        labels = catalog.splits[split].labels
        assert labels.dtype == np.int32
        assert [record["class_id"] for record in by_split[split]] == labels.tolist()
        counts = np.bincount(labels, minlength=4)
        np.testing.assert_array_equal(catalog.classes.counts[split], counts)
    expected = {"train": [8, 5, 3, 3], "validation": [2, 1, 1, 0], "test": [2, 2, 1, 0]}
    assert {split: counts.tolist() for split, counts in catalog.classes.counts.items()} == expected
    assert catalog.head_boundary == 4
    for record in by_split["train"] + by_split["test"]:
        assert record["sku"] == catalog.classes.sku[record["class_id"]]
        assert record["title"].startswith(f"word{record['sku']} ")
        assert record["tags"] == "blue"
        np.testing.assert_array_equal(
            record["token_ids"], catalog.tokenizer.encode(f"{record['title']} blue")
        )
        assert record["token_ids"].dtype == np.int32
        assert record["box"].tolist() == [0, 0, 0, 0]
        assert record["role"] == "catalogue"
        original = decode_photo((source.parent / record["reference"]).read_bytes())
        assert record["image_id"] == image_id(original)
        assert decode_photo(record["image"]).shape == (24, 32, 3)
    first = next(record for record in by_split["train"] if record["sku"] == "NA")
    assert catalog.classes.title[1] == first["title"]


def test_words_come_from_train_alone(imported):
    catalog = open_imported(imported.folder)
    by_split = records(catalog)
    # Every photo has a unique word: exactly those of train are known.
    unique_words = {
        split: {record["title"].split()[-1].lower() for record in by_split[split]}
        for split in SPLITS
    }
    known = set(catalog.tokenizer.vocabulary)
    assert unique_words["train"] <= known
    assert not known & (unique_words["validation"] | unique_words["test"])
    assert catalog.word_vectors.shape == (len(catalog.tokenizer.vocabulary), 8)
    assert not catalog.word_vectors[0].any()


def test_threads_open_one_after_the_other(imported, monkeypatch):
    """Two of them inside TFDS's imports at once have waited for each other for ever."""
    inside, most = [], []
    original = tfds.builder_from_directory

    def opening(folder):
        inside.append(folder)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return original(folder)

    monkeypatch.setattr(tfds, "builder_from_directory", opening)
    split = pickle.loads(pickle.dumps(open_imported(imported.folder).splits["train"]))
    with ThreadPoolExecutor(4) as threads:
        records = list(threads.map(split.__getitem__, [0, 1, 0, 1]))
    assert max(most) == 1
    assert records[0]["image_id"] == records[2]["image_id"] != records[1]["image_id"]


def test_splits_are_pickled_unopened(imported):
    split = open_imported(imported.folder).splits["train"]
    expected = split[2]["image_id"]
    copy = pickle.loads(pickle.dumps(split))
    assert copy[2]["image_id"] == expected
    assert len(copy) == len(split)
    assert len(pickle.dumps(split)) < 2000
    with pytest.raises(IndexError, match="wanted 0 to"):
        split[len(split)]


def test_nothing_but_the_data_set_is_written(imported):
    names = {path.name for path in imported.folder.iterdir()}
    assert not any("tmp" in name or "incomplete" in name for name in names)
    assert {
        "classes.csv",
        "labels_train.npy",
        "catalog.json",
        "report.json",
        "report.md",
        "words.txt",
    } <= names
    out = imported.folder.parent.parent
    assert {path.name for path in out.iterdir()} == {"photos", ".import.lock"}


def test_order_and_hash_depend_on_neither_rows_nor_workers(tmp_path, rows, source, imported):
    # Enough photos that two processes start.
    big = tmp_path / "big"
    many = make_source(big, {"a": 90, "b": 30})
    manifest = write_manifest(big, many)
    reversed_manifest = write_manifest(big, many[::-1], "reversed.csv")
    one = import_catalog(manifest, tmp_path / "one", settings=SMALL, workers=1)
    two = import_catalog(
        reversed_manifest, tmp_path / "two", settings=SMALL, workers=2, name="photos"
    )
    first, second = open_imported(one.folder), open_imported(two.folder)
    assert first.data_hash == second.data_hash
    for split in SPLITS:
        np.testing.assert_array_equal(first.splits[split].labels, second.splits[split].labels)
        for i in range(len(first.splits[split])):
            a, b = first.splits[split][i], second.splits[split][i]
            assert (a["image_id"], a["image"], a["title"]) == (
                b["image_id"],
                b["image"],
                b["title"],
            )
    seeded = import_catalog(
        manifest,
        tmp_path / "three",
        settings=ImportSettings(seed=1, word_width=8, min_count=1),
        workers=1,
    )
    assert open_imported(seeded.folder).data_hash != first.data_hash


def made_elsewhere(build):
    """What a library makes of the same input with another processor or version."""

    def build_otherwise(*args, **kwargs):
        made = build(*args, **kwargs)
        if isinstance(made, np.ndarray):
            return np.nextafter(made, np.float32(1))
        made.vocabulary = ["", *made.vocabulary[:0:-1]]
        return made

    return build_otherwise


@pytest.mark.parametrize("tokenizer", ["words", "sentencepiece"])
def test_hash_covers_what_was_read_and_not_what_libraries_make_of_it(
    tmp_path, source, tokenizer, monkeypatch
):
    settings = dataclasses.replace(SMALL, tokenizer=tokenizer)
    first = open_imported(import_catalog(source, tmp_path / "one", settings=settings).folder)
    for name in ("train_word_vectors", "build_tokenizer"):
        monkeypatch.setattr(catalog_tables, name, made_elsewhere(getattr(catalog_tables, name)))
    second = open_imported(import_catalog(source, tmp_path / "two", settings=settings).folder)
    assert (first.word_vectors != second.word_vectors).any()
    assert list(first.tokenizer.vocabulary) != list(second.tokenizer.vocabulary)
    assert first.data_hash == second.data_hash


@pytest.mark.parametrize(
    "change",
    [
        {"word_width": 9},
        {"word_epochs": 2},
        {"min_count": 2},
        {"max_vocabulary": 3},
        {"drop_top_share": 0.5},
        {"tokenizer": "sentencepiece"},
        {"short_side": 25},
    ],
    ids=lambda change: next(iter(change)),
)
def test_hash_covers_the_settings_of_words_and_pixels(tmp_path, source, imported, change):
    settings = dataclasses.replace(SMALL, **change)
    changed = open_imported(import_catalog(source, tmp_path / "out", settings=settings).folder)
    assert changed.data_hash != open_imported(imported.folder).data_hash


def test_class_ids_are_append_only(tmp_path, rows, source):
    folder = source.parent
    out = tmp_path / "out"
    import_catalog(source, out, settings=SMALL, workers=1)
    photo(folder / "new.png", 999)
    changed = [row for row in rows if row["sku"] != "NA"] + [
        {"image": "new.png", "sku": "A new", "title": "first"}
    ]
    second = import_catalog(
        write_manifest(folder, changed, "other.csv"), out, settings=SMALL, workers=1
    )
    assert second.folder == out / "photos" / "1.0.1"
    catalog = open_imported(out)
    assert catalog.classes.sku == ["0012", "NA", "b", "c", "A new"]
    assert catalog.classes.discontinued.tolist() == [False, True, False, False, False]
    assert catalog.classes.title[1].startswith("wordNA")
    assert catalog.classes.counts["train"].tolist() == [8, 0, 3, 3, 1]
    assert set(catalog.splits["train"].labels.tolist()) == {0, 2, 3, 4}
    assert "discontinued: 1" in second.report.summary()
    third = import_catalog(source, out, settings=SMALL, workers=1)
    assert open_imported(out).classes.discontinued.tolist() == [False, False, False, False, True]
    assert third.folder.name == "1.0.2"
    assert open_imported(out / "photos" / "1.0.0").classes.sku == ["0012", "NA", "b", "c"]
    with pytest.raises(CatalogImportError, match="holds the catalogue 'photos', not 'fresh'"):
        import_catalog(source, out, settings=SMALL, workers=1, name="fresh")


def test_a_later_version_keeps_every_split(tmp_path):
    """Classes grow and one is missing in one version: no photo changes its split."""
    source = tmp_path / "source"
    grown = make_source(source, {"a": 12, "b": 9})
    few = write_manifest(
        source,
        [row for row in grown if row["image"] not in {"a_8.png", "a_9.png", "b_8.png"}],
        "few.csv",
    )
    without_b = write_manifest(source, [row for row in grown if row["sku"] == "a"], "a.csv")
    where, unchanged = [], []
    for manifest in (few, without_b, write_manifest(source, grown)):
        result = import_catalog(manifest, tmp_path / "out", settings=SMALL, workers=1)
        by_split = records(open_imported(result.folder))
        where.append({record["image_id"]: split for split in SPLITS for record in by_split[split]})
        unchanged.append(result.report.unchanged_splits)
    assert {image: where[2][image] for image in where[0]} == where[0]
    assert {image: where[2][image] for image in where[1]} == where[1]
    assert unchanged == [0, 10, 20]
    assert "20 of 21 photos keep the split of an earlier version" in result.report.summary()
    fresh = import_catalog(source / "photos.csv", tmp_path / "fresh", settings=SMALL, workers=1)
    by_split = records(open_imported(fresh.folder))
    assert (
        where[0].items()
        - {record["image_id"]: split for split in SPLITS for record in by_split[split]}.items()
    )


def test_summary_reports_unused_columns_and_uneven_classes(tmp_path):
    rows = make_source(tmp_path, {"a": 1, "b": 9})
    for row in rows[3:8]:
        row["split"] = "test"
    manifest = write_manifest(tmp_path, rows)
    settings = dataclasses.replace(SMALL, test_per_class=3)
    manifest.write_text(manifest.read_text().replace("title,tags", "titel,tags", 1))
    summary_lines = (
        import_catalog(manifest, tmp_path / "out", settings=settings, workers=1)
        .report.summary()
        .splitlines()
    )
    assert "unused columns: titel (did you mean title?)" in summary_lines
    assert "tested with another number of photos than --test-per-class: 1 class" in summary_lines
    assert "under 4 photos, trained but not tested: 1 class" in summary_lines


def test_identical_photos_stay_in_one_split(tmp_path, rows, source):
    folder = source.parent
    copies = tmp_path / "copies"
    shutil.copytree(folder, copies)
    # The same pixels in other files, one of them in another format; then one photo under two SKUs.
    for i in range(6):
        shutil.copy(copies / f"0012_{i}.png", copies / f"copy_{i}.png")
    with Image.open(copies / "0012_6.png") as image:
        image.save(copies / "copy_6.bmp")
    rows += [{"image": f"copy_{i}.png", "sku": "0012", "title": "copy"} for i in range(6)]
    rows += [{"image": "copy_6.bmp", "sku": "0012", "title": "copy"}]
    rows += [{"image": "NA_0.png", "sku": "b", "title": "both"}]
    result = import_catalog(
        write_manifest(copies, rows), tmp_path / "out", settings=SMALL, workers=1
    )
    catalog = open_imported(result.folder)
    where = Counter()
    for split, split_records in records(catalog).items():
        where.update({(image, split) for image in {record["image_id"] for record in split_records}})
    assert max(Counter(image for image, _ in where).values()) == 1
    assert result.report.surplus_copies == 7
    assert result.report.kept == sum(CLASSES.values()) + 1
    (conflict,) = result.report.conflicting
    assert {(entry["image"], entry["sku"]) for entry in conflict["photos"]} == {
        ("NA_0.png", "NA"),
        ("NA_0.png", "b"),
    }
    assert (conflict["image_id"], "train") in where
    text = (result.folder / "report.md").read_text(encoding="utf-8")
    assert "`NA_0.png` (NA), `NA_0.png` (b)" in text
    assert "copy_3.png" in text


def test_bad_rows_are_dropped_and_named(tmp_path, rows, source):
    folder = tmp_path / "bad"
    shutil.copytree(source.parent, folder)
    (folder / "broken.jpg").write_bytes(b"no photo")
    (folder / "cut.png").write_bytes((folder / "b_0.png").read_bytes()[:800])
    Image.new("1", (10_001, 10_000)).save(folder / "huge.png")
    (folder / "folder.jpg").mkdir()
    rows += [
        {"image": "broken.jpg", "sku": "b"},
        {"image": "cut.png", "sku": "b"},
        {"image": "huge.png", "sku": "b"},
        {"image": "folder.jpg", "sku": "b"},
        {"image": "none.jpg", "sku": "b"},
        {"image": "b_0.png", "sku": " "},
        {"image": "b_0.png", "sku": "b"},
    ]
    manifest = write_manifest(folder, rows)
    with pytest.raises(CatalogImportError) as caught:
        import_catalog(manifest, tmp_path / "out", settings=SMALL, workers=1)
    message = str(caught.value)
    assert "\n" not in message
    assert "at most 0.05 of 35" in message
    assert "--max-bad-share" in message
    assert "empty SKU" in message
    assert "duplicate row" in message
    assert not (tmp_path / "out").exists()

    tolerant = ImportSettings(word_width=8, min_count=1, max_bad_share=0.3)
    result = import_catalog(manifest, tmp_path / "out", settings=tolerant, workers=1)
    counts = {reason: entry["count"] for reason, entry in result.report.dropped.items()}
    assert counts == {
        "broken photo": 1,
        "not a photo": 1,
        "photo missing": 1,
        "not a file": 1,
        "too many pixels": 1,
        "empty SKU": 1,
        "duplicate row": 1,
    }
    assert result.report.read == 35
    assert result.report.kept == 28
    report = json.loads((result.folder / "report.json").read_text(encoding="utf-8"))
    assert report["dropped"]["photo missing"]["rows"] == ["none.jpg: no such file"]
    assert report["small_classes"] == ["c"]
    text = (result.folder / "report.md").read_text(encoding="utf-8")
    assert "none.jpg" in text
    assert "under 4 photos" in text
    assert "- c\n" in text


def test_one_bad_row_never_stops_an_import_unless_the_limit_is_zero(tmp_path, source, rows):
    manifest = write_manifest(
        source.parent, [*rows[:12], {"image": "none.jpg", "sku": "x"}], "dozen.csv"
    )
    result = import_catalog(manifest, tmp_path / "out", settings=SMALL, workers=1)
    assert result.report.kept == 12
    with pytest.raises(
        CatalogImportError,
        match=r"1 of the first 13 rows .* at most 0 of 13 .*none.jpg: photo missing",
    ):
        import_catalog(
            manifest, tmp_path / "none", settings=ImportSettings(max_bad_share=0), workers=1
        )
    assert not (tmp_path / "none").exists()


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    names = ["pipe.jpg", "/dev/zero", "folder.jpg"]
    prepared = prepare_photos(FolderPhotos(tmp_path), names, short_side=8, workers=1)
    assert [photo.error.partition(":")[0] for photo in prepared] == ["not a file"] * 3
    with pytest.raises(CatalogImportError, match="not found as a file or folder"):
        import_catalog(tmp_path / "pipe.jpg", tmp_path / "out", workers=1)


def test_summary_names_the_first_bad_rows(tmp_path, source, rows):
    bad = [{"image": f"none{i}.png", "sku": "b"} for i in range(5)]
    settings = ImportSettings(word_width=8, min_count=1, max_bad_share=0.5)
    result = import_catalog(
        write_manifest(source.parent, rows + bad, "named.csv"),
        tmp_path,
        settings=settings,
        workers=1,
    )
    named = [line for line in result.report.summary().splitlines() if line.startswith("bad row: ")]
    assert named == [f"bad row: none{i}.png: photo missing (no such file)" for i in range(3)]


def test_summary_of_a_second_version(tmp_path, source, rows):
    first = import_catalog(source, tmp_path, settings=SMALL, workers=1, name="shop")
    assert "version 1.0.0" not in first.report.summary()
    assert "more than half" not in first.report.summary()
    half = [row for row in rows if row["sku"] in ("0012", "NA")]
    photo(source.parent / "second.png", 998)
    half.append({"image": "second.png", "sku": "second"})
    result = import_catalog(
        write_manifest(source.parent, half, "half.csv"), tmp_path, settings=SMALL, workers=1
    )
    summary = result.report.summary()
    assert (
        "version 1.0.1 of shop: 1 new SKU, 2 discontinued; 20 of 21 photos keep the split"
        in summary
    )
    assert "more than half" not in summary
    one = [row for row in rows if row["sku"] == "0012"]
    result = import_catalog(
        write_manifest(source.parent, one, "one.csv"), tmp_path, settings=SMALL, workers=1
    )
    summary = result.report.summary()
    assert (
        "version 1.0.2 of shop: 0 new SKUs, 2 discontinued; 12 of 12 photos keep the split"
        in summary
    )
    assert "WARNING: 2 of 3 SKUs discontinued, more than half" in summary


def test_summary_says_that_nothing_is_tested(tmp_path, source, rows):
    few = [row for row in rows if row["image"].endswith(("_0.png", "_1.png"))]
    result = import_catalog(
        write_manifest(source.parent, few, "few.csv"), tmp_path / "few", settings=SMALL, workers=1
    )
    for split in ("test", "validation"):
        line = (
            f"WARNING: no {split} photos: every class has under 4 photos; "
            "give a `split` column or more photos"
        )
        assert line in result.report.summary().splitlines()
    four = [row for row in rows if row["image"].endswith(("_0.png", "_1.png", "_2.png", "_3.png"))]
    result = import_catalog(
        write_manifest(source.parent, four, "four.csv"), tmp_path / "4", settings=SMALL, workers=1
    )
    assert result.report.photos["test"]
    assert "no test photos" not in result.report.summary()
    assert (
        "WARNING: no validation photos: no class has enough, no row has split validation"
        in result.report.summary()
    )


def test_no_progress_bars_without_a_terminal(tmp_path, source, capfd):
    import_catalog(source, tmp_path, settings=SMALL, workers=1)
    captured = capfd.readouterr()
    assert captured.err == ""
    assert captured.out == ""


def test_source_and_its_fingerprint_are_recorded(tmp_path, source, imported):
    expected = {"source": "photos.csv", "source_sha256": source_sha256(source)}
    for directory in (
        imported.folder,
        imported.folder.parent,
        os.fspath(imported.folder.parent.parent),
    ):
        assert read_import_source(directory) == expected
    unfinished = tmp_path / "out" / "shop" / "incomplete.123_1.0.0"
    unfinished.mkdir(parents=True)
    shutil.copy(imported.folder / "catalog.json", unfinished)
    for directory in (tmp_path / "none", tmp_path, tmp_path / "out", unfinished.parent, unfinished):
        assert read_import_source(directory) is None
    for name in ("a", "b"):
        shutil.copytree(imported.folder, tmp_path / "two" / name / "1.0.0")
    with pytest.raises(CatalogError, match="holds 2 catalogues"):
        read_import_source(tmp_path / "two")


def test_fingerprint_of_a_manifest_covers_its_text_and_its_photos(tmp_path):
    manifest = write_manifest(
        tmp_path, [*make_source(tmp_path, {"a": 2}), {"image": "none.png", "sku": "a"}]
    )
    hashes = [source_sha256(manifest)]
    (tmp_path / "unrelated.png").touch()
    assert source_sha256(manifest) == hashes[0]
    photo(tmp_path / "a_0.png", 1)
    hashes.append(source_sha256(manifest))
    photo(tmp_path / "none.png", 2)
    hashes.append(source_sha256(manifest))
    manifest.write_text(manifest.read_text().replace("blue", "red"))
    hashes.append(source_sha256(manifest))
    assert len(set(hashes)) == 4


def test_fingerprint_of_a_folder_covers_its_files(tmp_path):
    for sku in ("a", "b"):
        photo(tmp_path / "shop" / sku / "0.png", 1)
    before = source_sha256(tmp_path / "shop")
    result = import_catalog(tmp_path / "shop", tmp_path / "out", settings=SMALL, workers=1)
    assert read_import_source(result.folder) == {"source": "shop", "source_sha256": before}
    (tmp_path / "shop" / ".hidden").touch()
    assert source_sha256(tmp_path / "shop") == before
    hashes = {before}
    photo(tmp_path / "shop" / "a" / "0.png", 2)
    hashes.add(source_sha256(tmp_path / "shop"))
    (tmp_path / "shop" / "a" / "0.png").rename(tmp_path / "shop" / "a" / "1.png")
    hashes.add(source_sha256(tmp_path / "shop"))
    assert len(hashes) == 3


def test_an_out_that_cannot_be_written_is_one_line(tmp_path, source):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(CatalogImportError, match=r"file.*check --out") as caught:
            import_catalog(source, out, settings=SMALL, workers=1)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"image,title\na.png,b\n", "no column sku"),
        ("image,sku\ncaf\u00e9.png,b\n".encode("latin-1"), "not UTF-8"),
        (b"image,sku\nnone.png,b\n", "no photo of .* can be used"),
    ],
)
def test_unusable_manifests_leave_nothing(tmp_path, content, words):
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises((TableError, CatalogImportError), match=words) as caught:
        import_catalog(tmp_path / "m.csv", tmp_path / "deep" / "out", settings=SMALL, workers=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "deep").exists()


def test_a_failed_second_import_keeps_the_first(tmp_path, source):
    out = tmp_path / "out"
    import_catalog(source, out, settings=SMALL, workers=1)
    before = left_behind(out)
    (tmp_path / "m.csv").write_bytes(b"image,sku\nnone.png,b\nnone2.png,b\n")
    with pytest.raises(CatalogImportError):
        import_catalog(tmp_path / "m.csv", out, settings=SMALL, workers=1)
    assert left_behind(out) == before


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_disk_full_and_ctrl_c_leave_nothing(tmp_path, source, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(catalog_tables, "train_word_vectors", fail)
    with pytest.raises((CatalogImportError, KeyboardInterrupt)) as caught:
        import_catalog(source, tmp_path / "out", settings=SMALL, workers=1)
    assert not (tmp_path / "out").exists()
    if isinstance(caught.value, CatalogImportError):
        assert "no space left" in str(caught.value)


def test_two_imports_at_once_are_refused(tmp_path, source):
    (tmp_path / ".import.lock").touch()
    with (tmp_path / ".import.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CatalogImportError, match="another import is writing"):
            import_catalog(source, tmp_path, settings=SMALL, workers=1)


KILLED = """
import sys, time
from pathlib import Path
from sicot_jax.catalog.importing import catalog_tables

def wait(*args, **kwargs):
    print("decoded", file=sys.__stdout__, flush=True)
    time.sleep(60)

catalog_tables.train_word_vectors = wait
from sicot_jax.catalog.importing.run import import_catalog
import_catalog(Path(sys.argv[1]), Path(sys.argv[2]), workers=1)
"""


def test_a_killed_import_leaves_nothing_that_opens(tmp_path, source):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, os.fspath(source), os.fspath(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "decoded\n"
        with pytest.raises(CatalogImportError, match="another import"):
            import_catalog(source, out, settings=SMALL, workers=1)
        process.send_signal(signal.SIGKILL)
    (leftover,) = (out / "photos").iterdir()
    for directory in (out, out / "photos", leftover):
        with pytest.raises(CatalogError, match="unfinished import"):
            open_imported(directory)
    result = import_catalog(source, out, settings=SMALL, workers=1)
    assert not leftover.exists()
    assert result.folder.name == "1.0.0"
    assert open_imported(out).classes.sku == ["0012", "NA", "b", "c"]


def test_workers_end_with_a_killed_parent(tmp_path):
    """Orphans of a pool would keep memory and locks for ever."""
    script = (
        "import sys, time\n"
        "from sicot_jax.catalog.importing.photos import FolderPhotos, prepare_photos\n"
        "from pathlib import Path\nimport multiprocessing\n"
        "if __name__ == '__main__':\n"
        "    names = ['none.jpg'] * 400\n"
        "    prepared = prepare_photos(FolderPhotos(Path('.')), names, short_side=8, workers=2)\n"
        "    next(prepared)\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.fspath(ROOT)}
    command = [sys.executable, os.fspath(tmp_path / "script.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_runs, workers))


def _runs(pid):
    try:
        # A container's first process may not collect orphans: a zombie has ended.
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            != "Z"
        )
    except OSError:
        return False


def test_splits_boxes_roles_and_categories_of_the_source(tmp_path, rows, source):
    for i, row in enumerate(rows):
        row.update(split=SPLITS[i % 3], box="0 0.25 0.5 1", role="query", category="shoes")
    rows[0].update(role="catalogue", title="the record")
    result = import_catalog(
        write_manifest(source.parent, rows, "given.csv"), tmp_path, settings=SMALL, workers=1
    )
    catalog = open_imported(tmp_path)
    assert result.report.photos == {"train": 10, "validation": 9, "test": 9}
    record = catalog.splits["test"][0]
    assert record["box"].tolist() == [0, 0.25, 0.5, 1]
    assert record["box"].dtype == np.float32
    assert record["role"] == "query"
    assert catalog.classes.category == ["shoes"] * 4
    assert (
        catalog.classes.title[0] == "the record"
    )  # a catalogue photo describes its SKU before a query photo does


def test_folders_without_titles(tmp_path):
    for sku in ("0012", "b"):
        for i in range(5):
            photo(tmp_path / "shop" / sku / f"{i}.png", [ord(sku[0]), i])
    result = import_catalog(tmp_path / "shop", tmp_path / "out", settings=SMALL, workers=1)
    catalog = open_imported(result.folder)
    assert catalog.name == "shop"
    assert catalog.classes.sku == ["0012", "b"]
    record = catalog.splits["train"][0]
    assert record["title"] == ""
    assert record["token_ids"].shape == (0,)
    assert record["token_ids"].dtype == np.int32
    assert catalog.word_vectors.shape == (1, 8)
    assert result.report.photos_without_words == result.report.photos["train"]


class FakeTitleSource:
    """Gives each photo a different title; the first is too dissimilar, the last gets none."""

    provenance = MappingProxyType({"run": "run", "data_hash": "d" * 64, "commit": "c" * 40})

    def __init__(self):
        self.received = []

    def find_titles(self, photos):
        self.received += photos
        cosines = [0.25, *[0.5 + 0.01 * i for i in range(len(photos) - 2)]]
        return [
            *(
                TransferredTitle(f"title of {photo[0]}", c, "donor")
                for photo, c in zip(photos, cosines, strict=False)
            ),
            None,
        ]


def test_titles_are_transferred_to_training_photos_without_one(tmp_path, source, rows):
    for row in rows:
        row["title"] = "  " if row["sku"] == "0012" else row["title"]
    manifest = write_manifest(source.parent, rows, "half.csv")
    settings, titles = dataclasses.replace(SMALL, titles_min_similarity=0.5), FakeTitleSource()
    result = import_catalog(
        manifest, tmp_path / "out", settings=settings, workers=1, title_source=titles
    )
    catalog = open_imported(result.folder)
    by_split = records(catalog)
    bare = [record for record in by_split["train"] if record["sku"] == "0012"]
    assert titles.received == [(record["image_id"], record["image"]) for record in bare]
    given = [f"title of {record['image_id']}" for record in bare]
    assert [record["title"] for record in bare] == ["  ", *given[1:-1], "  "]
    assert bare[1]["token_ids"].tolist() == catalog.tokenizer.encode(f"{given[1]} blue").tolist()
    others = [
        r for split in SPLITS for r in by_split[split] if r["sku"] != "0012" or split != "train"
    ]
    original = {row["image"]: row["title"] for row in rows}
    assert all(record["title"] == original[record["reference"]] for record in others)

    transfer = result.report.title_transfer
    assert (transfer.photos_without_title, transfer.transferred, transfer.share) == (8, 6, 0.75)
    assert transfer.median_similarity == pytest.approx(0.525)
    assert transfer.min_similarity == 0.5
    assert (
        transfer.rows[0]
        == f"{bare[1]['reference']}: {given[1]} (from photo donor, similarity 0.500)"
    )
    line = (
        "transferred titles: 6 of 8 train photos without one (75.0%), "
        "from the nearest photos of run run "
        "(data dddddddddddd, commit cccccccccccc), median similarity 0.525"
    )
    assert line in result.report.summary().splitlines()
    assert "## Transferred titles (6)" in (result.folder / "report.md").read_text()

    again = import_catalog(
        manifest, tmp_path / "out", settings=settings, workers=1, title_source=FakeTitleSource()
    )
    without = import_catalog(manifest, tmp_path / "out", settings=settings, workers=1)
    assert [result.folder.name, again.folder.name, without.folder.name] == [
        "1.0.0",
        "1.0.1",
        "1.0.2",
    ]
    hashes = [open_imported(one.folder).data_hash for one in (result, again, without)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert "transferred" not in without.report.summary()
    assert "title_source" not in (without.folder / "catalog.json").read_text()


def test_title_source_is_not_called_when_every_photo_has_a_title(tmp_path, source, imported):
    titles = FakeTitleSource()
    result = import_catalog(source, tmp_path, settings=SMALL, workers=1, title_source=titles)
    assert not titles.received
    assert "transferred titles: none, every train photo has a title" in result.report.summary()
    assert open_imported(result.folder).data_hash == open_imported(imported.folder).data_hash


def test_splits_without_a_photo_are_empty(tmp_path, rows, source):
    manifest = write_manifest(source.parent, rows[:3], "three.csv")
    catalog = open_imported(import_catalog(manifest, tmp_path, settings=SMALL, workers=1).folder)
    assert [len(catalog.splits[split]) for split in SPLITS] == [3, 0, 0]


def test_options(tmp_path, source):
    settings = ImportSettings(
        word_width=8,
        min_count=1,
        test_per_class=4,
        tail_cut=3,
        min_photos=4,
        tokenizer="sentencepiece",
    )
    result = import_catalog(source, tmp_path, settings=settings, workers=1)
    catalog = open_imported(tmp_path)
    assert catalog.classes.sku == ["0012", "NA", "b"]
    assert catalog.classes.counts["test"].tolist() == [4, 4, 4]
    assert catalog.classes.counts["train"].tolist() == [3, 2, 1]
    assert result.report.dropped["class under 4 photos (min_photos)"]["count"] == 3
    assert (result.folder / "sentencepiece.model").exists()
    assert len(catalog.splits["train"][0]["token_ids"])
    limited = import_catalog(
        source, tmp_path / "few", settings=ImportSettings(max_rows=6, word_width=8), workers=1
    )
    assert limited.report.kept == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"short_side": 0}, "short_side=0"),
        ({"test_per_class": 0}, "test_per_class=0"),
        ({"test_share": 1.0}, "test_share=1.0"),
        (
            {"test_share": 0.2, "test_per_class": 5},
            "test_share=0.2 with test_per_class=5; give one",
        ),
        ({"max_bad_share": 2}, "max_bad_share=2"),
        ({"drop_top_share": 1}, "drop_top_share=1"),
        ({"tokenizer": "letters"}, "tokenizer='letters'"),
        ({"min_count": 0}, "min_count=0"),
    ],
)
def test_settings_are_checked(change, words):
    with pytest.raises(CatalogImportError, match=words):
        ImportSettings(**change)


def test_unusable_folders_are_refused_on_opening(tmp_path, imported):
    with pytest.raises(CatalogError, match="not found"):
        open_imported(tmp_path / "none")
    with pytest.raises(CatalogError, match="is no catalogue"):
        open_imported(tmp_path)
    newer = tmp_path / "newer"
    shutil.copytree(imported.folder, newer)
    description = json.loads((newer / "catalog.json").read_text(encoding="utf-8"))
    (newer / "catalog.json").write_text(
        json.dumps({**description, "format_version": 99}), encoding="utf-8"
    )
    with pytest.raises(CatalogError, match="has format 99, this version reads up to 1"):
        open_imported(newer)
    damaged = tmp_path / "damaged"
    shutil.copytree(imported.folder, damaged)
    (damaged / "labels_test.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"labels_test\.npy: not as it was imported"):
        open_imported(damaged)
    (damaged / "checksums.json").unlink()  # as of an earlier release
    with pytest.raises(CatalogError, match="is damaged"):
        open_imported(damaged)
    two = tmp_path / "two"
    for name in ("a", "b"):
        shutil.copytree(imported.folder, two / name / "1.0.0")
    with pytest.raises(CatalogError, match="holds 2 catalogues"):
        open_imported(two)


def test_flags_and_tables_need_no_tfds(imported):
    """The command line and an array-file run start where TFDS, Pillow and pyarrow are not
    installed.
    """
    script = (
        "import sys\nfrom sicot_jax.cli.main import make_parser\n"
        "from sicot_jax.catalog.sources.imported import open_imported\n"
        "make_parser()\n"
        "open_imported(sys.argv[1])\n"
        "optional = {'tensorflow_datasets', 'PIL', 'pyarrow', 'gensim', 'tqdm', 'jax'}\n"
        "heavy = optional & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, os.fspath(imported.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_neither_tensorflow_nor_jax_is_imported(tmp_path, source):
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from sicot_jax.catalog.importing.run import import_catalog\n"
        "from sicot_jax.catalog.sources.imported import open_imported\n"
        "result = import_catalog(Path(sys.argv[1]), Path(sys.argv[2]), workers=1)\n"
        "open_imported(result.folder).splits['train'][0]\n"
        "assert not {'tensorflow', 'jax'} & set(sys.modules), 'imported'\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, os.fspath(source), os.fspath(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
