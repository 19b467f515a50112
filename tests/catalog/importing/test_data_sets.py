"""The builders of data/ on tiny synthetic copies of their published layouts."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import io
import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sicot_jax
from sicot_jax.catalog.catalog import SPLITS
from sicot_jax.catalog.importing.manifest_rows import ManifestError
from sicot_jax.catalog.importing.run import import_catalog, load_builder
from sicot_jax.catalog.importing.settings import CatalogImportError, ImportSettings
from sicot_jax.catalog.sources.imported import open_imported
from sicot_jax.config import load_config
from sicot_jax.errors import InputError
from sicot_jax.experiments.sweep import compare

SMALL = ImportSettings(word_width=4, word_epochs=1, min_count=1, min_photos=1)
STYLES = """\
id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,\
productDisplayName
1,Men,Apparel,Socks,Socks,Navy,Summer,2012,Casual,Puma Men Sports Socks
2,Men,Apparel,Socks,Socks,Navy,Summer,2012,Casual,Puma Men Pack, of 3, Socks
3,Women,Apparel,Topwear,Tops,Red,Fall,2011,,"United Colors Women Top, red"
4,Men,Apparel,Topwear,Tops,Red,Fall,2011,Casual,Plain Top
5,Men,Apparel
"""


def jpeg(seed):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def fashion(tmp_path):
    folder = tmp_path / "fashion"
    (folder / "images").mkdir(parents=True)
    (folder / "styles.csv").write_text(STYLES, encoding="utf-8")
    for i in (1, 2, 3, 4):
        (folder / "images" / f"{i}.jpg").write_bytes(jpeg(i))
    return folder


def test_fashion_public_layout(tmp_path, fashion):
    result = import_catalog(
        fashion, tmp_path / "out", settings=SMALL, dataset="fashion_products", workers=1
    )
    catalog = open_imported(result.folder)
    assert result.folder == tmp_path / "out" / "fashion_products" / "1.0.0"
    assert catalog.classes.sku == ["Puma | Socks", "United Colors | Tops"]
    assert catalog.classes.category == ["Socks", "Tops"]
    train_records = [catalog.splits["train"][i] for i in range(3)]
    titles = {"Puma Men Sports Socks", "Puma Men Pack, of 3, Socks", "United Colors Women Top, red"}
    assert {record["title"] for record in train_records} == titles
    assert {record["tags"] for record in train_records} == {""}
    assert train_records[0]["image"] in [jpeg(i) for i in (1, 2, 3)]  # a small JPEG keeps its bytes
    dropped = result.report.dropped
    assert not dropped["no brand in the title"]["bad"]
    assert dropped["no brand in the title"]["count"] == 1
    assert dropped["wrong number of fields"]["rows"] == ["line 6: 3 fields, wanted 10"]


def test_fashion_zip_equals_folder(tmp_path, fashion):
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    shutil.copy(fashion / "styles.csv", zipped)
    with zipfile.ZipFile(zipped / "images.zip", "w") as file:
        for photo in (fashion / "images").iterdir():
            file.write(photo, f"images/{photo.name}")
    hashes = [
        open_imported(
            import_catalog(
                folder, tmp_path / f"out{i}", settings=SMALL, dataset="fashion_products", workers=1
            ).folder
        ).data_hash
        for i, folder in enumerate((fashion, zipped))
    ]
    assert hashes[0] == hashes[1]


def test_fashion_leaves_small_classes_out_by_default(tmp_path, fashion):
    with pytest.raises(
        CatalogImportError, match=r"no photo of .* can be used.*wrong number of fields"
    ):
        import_catalog(fashion, tmp_path / "out", dataset="fashion_products", workers=1)


@pytest.mark.parametrize(
    "dataset", ["fashion_products", "grocery_store", "imaterialist", "webvision1k"]
)
def test_wrong_folder(tmp_path, dataset):
    with pytest.raises(ManifestError, match="place the data set there") as caught:
        import_catalog(tmp_path, tmp_path / "out", dataset=dataset, workers=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


GROCERY_HEADER = (
    "Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),"
    "Iconic Image Path (str),Product Description Path (str)\n"
)


@pytest.fixture
def grocery(tmp_path):
    root = tmp_path / "grocery" / "dataset"
    lines = [GROCERY_HEADER]
    photos = {"train": [], "val": [], "test": []}
    for c, (name, coarse) in enumerate([("Royal-Gala", "Apple"), ("Avocado", "Avocado")]):
        (root / "icons").mkdir(parents=True, exist_ok=True)
        (root / "icons" / f"{name}.jpg").write_bytes(jpeg(100 + c))
        (root / "icons" / f"{name}.txt").write_text(
            f"{name} is sweet.\nIt grows on trees.", encoding="utf-8"
        )
        lines.append(f"{name},{c},{coarse},{c},/icons/{name}.jpg,/icons/{name}.txt\n")
        for split, n in (("train", 6), ("val", 2), ("test", 3)):
            for i in range(n):
                path = f"{split}/{name}_{i}.jpg"
                (root / path).parent.mkdir(exist_ok=True)
                (root / path).write_bytes(jpeg(1000 * c + 10 * i + len(split)))
                photos[split].append(f"{path}, {c}, {c}\n")
    (root / "classes.csv").write_text("".join(lines), encoding="utf-8")
    for split, entries in photos.items():
        (root / f"{split}.txt").write_text("".join(entries), encoding="utf-8")
    return root.parent


def test_grocery_keeps_official_splits(tmp_path, grocery):
    result = import_catalog(
        grocery, tmp_path / "out", settings=SMALL, dataset="grocery_store", workers=1
    )
    catalog = open_imported(result.folder)
    assert result.report.photos == {"train": 12, "validation": 4, "test": 6}
    assert catalog.classes.sku == ["Avocado", "Royal-Gala"]
    assert catalog.classes.category == [
        "Avocado",
        "Apple",
    ]
    assert catalog.classes.title[1] == "Royal Gala Apple. Royal-Gala is sweet."
    with pytest.raises(
        CatalogImportError, match="holds the catalogue 'grocery_store', not 'fashion_products'"
    ):
        import_catalog(
            grocery, tmp_path / "out", settings=SMALL, dataset="fashion_products", workers=1
        )
    for split, folder in zip(SPLITS, ("train", "val", "test"), strict=True):
        for i in range(len(catalog.splits[split])):
            record = catalog.splits[split][i]
            assert record["reference"].startswith(f"dataset/{folder}/")
            assert record["role"] == "query"


def test_grocery_zip_and_tail_cut(tmp_path, grocery):
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "any.zip", "w") as file:
        for path in sorted(grocery.rglob("*")):
            file.write(path, path.relative_to(grocery))
    settings = ImportSettings(word_width=4, min_count=1, tail_cut=5)
    result = import_catalog(
        tmp_path / "zipped", tmp_path / "o", settings=settings, dataset="grocery_store", workers=1
    )
    assert result.report.photos == {"train": 6, "validation": 4, "test": 6}
    assert result.report.tail_cut == 6
    assert open_imported(result.folder).classes.counts["train"].tolist() == [5, 1]


def test_builders_are_loaded_from_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "sicot_jax"
    source = load_builder("grocery_store")
    assert source.name == "grocery_store"
    package.mkdir(parents=True)
    monkeypatch.setattr(sicot_jax, "__file__", str(package / "__init__.py"))
    with pytest.raises(CatalogImportError, match="install sicot_jax again"):
        load_builder("grocery_store")
    shutil.copytree(Path(__file__).parents[3] / "data", package / "data")
    monkeypatch.delitem(sys.modules, "sicot_jax.data.grocery_store.grocery_store_dataset_builder")
    assert Path(inspect.getfile(load_builder("grocery_store"))).is_relative_to(package)
    with pytest.raises(
        CatalogImportError,
        match=r"wanted one of fashion_products, generated, grocery_store, imat.*, webvision1k",
    ):
        load_builder("imagenet")


@pytest.fixture
def materialist(tmp_path):
    """Two products with ten training and two test photos each, and a third without test photos."""
    folder = tmp_path / "imat"
    for part, products, n in (("train", 3, 10), ("val", 2, 2)):
        (folder / part).mkdir(parents=True)
        images = []
        for c in range(products):
            for i in range(n):
                name = f"{part}{c}{i}.jpg"
                (folder / part / name).write_bytes(jpeg(1000 * len(part) + 100 * c + i))
                images.append({"id": name, "url": f"http://example.org/{name}", "class": 7 * c})
        (folder / f"{part}.json").write_text(json.dumps({"images": images}), encoding="utf-8")
    return folder


def test_imaterialist_tests_on_the_official_validation_set(tmp_path, materialist):
    result = import_catalog(
        materialist, tmp_path / "out", settings=SMALL, dataset="imaterialist", workers=1
    )
    catalog = open_imported(result.folder)
    assert catalog.classes.sku == ["0", "14", "7"]
    # Of ten photos two are validation, and none but the official ones is tested; product 14 has no
    # test photo.
    assert catalog.classes.counts["train"].tolist() == [8, 10, 8]
    assert catalog.classes.counts["validation"].tolist() == [2, 0, 2]
    assert catalog.classes.counts["test"].tolist() == [2, 0, 2]
    tested = [catalog.splits["test"][i] for i in range(4)]
    assert all(record["reference"].startswith("val/") for record in tested)
    assert {record["title"] for record in tested} == {""}
    assert len(catalog.tokenizer.vocabulary) == 1
    again = import_catalog(
        materialist, tmp_path / "again", settings=SMALL, dataset="imaterialist", workers=1
    )
    assert open_imported(again.folder).data_hash == catalog.data_hash


def test_imaterialist_is_not_co_trained_without_titles(tmp_path, materialist):
    result = import_catalog(
        materialist, tmp_path / "out", settings=SMALL, dataset="imaterialist", workers=1
    )
    config = load_config("imaterialist", [f"--config.data.path={result.folder}"])
    with pytest.raises(
        InputError, match=r"imaterialist has no title .*import --titles-from RUN"
    ) as caught:
        compare(config, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_imaterialist_names_broken_entries(tmp_path, materialist):
    annotations = json.loads((materialist / "train.json").read_text(encoding="utf-8"))
    broken = [
        17,
        {"id": "../val/val00.jpg", "class": 0},
        {"id": "x.jpg", "class": "0"},
        {"class": 0},
        {"id": "missing.jpg"},
    ]
    missing_photo = {"id": "missing.jpg", "class": 0}
    (materialist / "train.json").write_text(
        json.dumps({"images": [*annotations["images"], *broken, missing_photo]}), encoding="utf-8"
    )
    (materialist / "val" / "val00.jpg").write_bytes(b"no photo")
    settings = dataclasses.replace(SMALL, max_bad_share=0.5)
    report = import_catalog(
        materialist, tmp_path / "o", settings=settings, dataset="imaterialist", workers=1
    ).report
    assert report.dropped["id is no file name"]["count"] == 3
    assert report.dropped["class is no number"]["rows"] == [
        "train.json image 33: '0'",
        "train.json image 35: None",
    ]
    assert report.dropped["photo missing"]["rows"] == ["train/missing.jpg: no such file"]
    assert report.dropped["not a photo"]["count"] == 1
    assert report.photos["test"] == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "train.json",
            None,
            "no train.json in .*; place the data set there, see data/imaterialist",
        ),
        ("val.json", None, "no val.json in .*; place the data set there, see data/imaterialist"),
        (
            "val.json",
            '{"images": [',
            "val.json is no JSON .*; take the file as its owner publishes it",
        ),
        ("val.json", "[]", "val.json has no list 'images', wanted one"),
        ("val", None, "no val in .*; place the data set there, see data/imaterialist"),
    ],
)
def test_imaterialist_files_that_are_missing_or_broken(tmp_path, materialist, name, text, message):
    path = materialist / name
    if text is not None:
        path.write_text(text, encoding="utf-8")
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(ManifestError, match=message) as caught:
        import_catalog(
            materialist, tmp_path / "out", settings=SMALL, dataset="imaterialist", workers=1
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", [{"test_per_class": 2}, {"test_share": 0.5}])
def test_an_official_test_split_is_not_chosen_anew(tmp_path, materialist, flag):
    settings = dataclasses.replace(SMALL, **flag)
    with pytest.raises(
        CatalogImportError, match="imaterialist, whose test split is its owners'; leave them out"
    ):
        import_catalog(
            materialist, tmp_path / "out", settings=settings, dataset="imaterialist", workers=1
        )


@pytest.fixture
def webvision(tmp_path, monkeypatch):
    """Six classes, three of them chosen; of each five photos by Google, three by Flickr and two to
    test.
    """
    builder = load_builder("webvision1k")
    monkeypatch.setattr(builder, "NUM_CLASSES", 6)
    monkeypatch.setattr(builder, "NUM_CHOSEN", 3)
    folder = tmp_path / "webvision"
    (folder / "info").mkdir(parents=True)
    synsets = "".join(f"n0000000{c} name {c}, other name {c}\n" for c in range(6))
    (folder / "info" / "synsets.txt").write_text(synsets, encoding="utf-8")
    for source, n in (("google", 5), ("flickr", 3)):
        photos, texts = [], []
        for c in range(6):
            entries = []
            for i in range(n):
                path = folder / source / f"q000{c}" / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(jpeg(10_000 * n + 100 * c + i))
                photos.append(f"{source}/q000{c}/{i}.jpg {c}\n")
                # The metadata is in another order than the photos.
                texts.append(f"{source}/q000{c}.json {n - i}\n")
                entries.insert(
                    0, {"id": str(i), "title": f"{source} title {c}{i}", "description": "long"}
                )
            if source == "flickr":
                entries[0]["tags"] = ["first", "second"]
                del entries[1]["title"]
            (folder / source / f"q000{c}.json").write_text(json.dumps(entries), encoding="utf-8")
        (folder / "info" / f"train_filelist_{source}.txt").write_text(
            "".join(photos), encoding="utf-8"
        )
        (folder / "info" / f"train_meta_list_{source}.txt").write_text(
            "".join(texts), encoding="utf-8"
        )
    (folder / "val_images_resized").mkdir()
    for c in range(6):
        for i in range(2):
            (folder / "val_images_resized" / f"val{c}{i}.jpg").write_bytes(jpeg(100 * c + i))
    lines = [f"val{c}{i}.jpg {c}\n" for i in range(2) for c in range(6)]
    (folder / "val_filelist.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def test_webvision_classes_are_a_function_of_the_seed_alone():
    module = sys.modules[load_builder("webvision1k").__module__]
    synsets = [f"n{i:08}" for i in range(5000)]
    chosen = module.choose_classes(synsets, 1000)
    assert len(chosen) == 1000
    assert chosen == module.choose_classes(reversed(synsets), 1000)
    # Written out once more, as the README gives it: another choice would be another data set.
    key = {s: hashlib.blake2b(f"0\0{s}\0class".encode(), digest_size=16).digest() for s in synsets}
    assert chosen == set(sorted(synsets, key=key.__getitem__)[:1000])
    assert module.choose_classes(synsets, 10) < chosen


def test_webvision_public_layout(tmp_path, webvision):
    result = import_catalog(
        webvision, tmp_path / "out", settings=SMALL, dataset="webvision1k", workers=1
    )
    catalog = open_imported(result.folder)
    module = sys.modules[load_builder("webvision1k").__module__]
    chosen = sorted(module.choose_classes((f"n0000000{c}" for c in range(6)), 3))
    assert catalog.classes.sku == chosen
    assert catalog.classes.category == [f"name {sku[-1]}, other name {sku[-1]}" for sku in chosen]
    # held_out(8) = 2 of each class; the official validation photos are tested.
    assert result.report.photos == {"train": 18, "validation": 6, "test": 6}
    assert not result.report.dropped
    records = [
        catalog.splits[split][i] for split in SPLITS for i in range(len(catalog.splits[split]))
    ]
    for record in records:
        reference, c = record["reference"], record["sku"][-1]
        if reference.startswith("val_"):
            assert reference.startswith(f"val_images_resized/val{c}")
            assert not record["title"]
        else:
            source, query, name = reference.split("/")
            number = int(name[0])
            assert query == f"q000{c}"
            without = source == "flickr" and number == 1
            assert record["title"] == ("" if without else f"{source} title {c}{number}")
            assert record["tags"] == ("first second" if source == "flickr" and number == 2 else "")
    (webvision / "val_filelist.txt").rename(webvision / "info" / "val_filelist.txt")
    again = import_catalog(
        webvision, tmp_path / "again", settings=SMALL, dataset="webvision1k", workers=1
    )
    assert open_imported(again.folder).data_hash == catalog.data_hash


def test_webvision_names_broken_rows(tmp_path, webvision, monkeypatch):
    monkeypatch.setattr(load_builder("webvision1k"), "NUM_CHOSEN", 6)
    (webvision / "google" / "q0001.json").write_text("{", encoding="utf-8")
    (webvision / "flickr" / "q0002.json").unlink()
    (webvision / "flickr" / "q0003.json").write_text(
        '[1, {"title": 5, "tags": "no list"}]', encoding="utf-8"
    )
    with (webvision / "val_filelist.txt").open("a", encoding="utf-8") as file:
        file.write("val99.jpg 6\nval98.jpg\n\n")
    settings = dataclasses.replace(SMALL, max_bad_share=0.9)
    report = import_catalog(
        webvision, tmp_path / "out", settings=settings, dataset="webvision1k", workers=1
    ).report
    # All of two files; of the third entry 1 is no object and entry 3 is not there.
    assert report.dropped["no metadata"]["count"] == 5 + 3 + 2
    assert report.dropped["unknown class"]["count"] == 3
    assert report.dropped["unknown class"]["rows"][0] == "val_filelist.txt line 13: 6"
    assert sum(report.photos.values()) == 6 * (5 + 3 + 2) - 10


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "info/synsets.txt",
            None,
            "no info/synsets.txt in .*; place the data set there, see data/webvision1k",
        ),
        (
            "info/synsets.txt",
            "n1 tench\n",
            "names 1 classes, wanted 6; place WebVision 2.0 there, not 1.0",
        ),
        (
            "info/synsets.txt",
            "\udcff",
            "synsets.txt is not UTF-8; take the file as its owners publish it",
        ),
        (
            "info/train_filelist_flickr.txt",
            None,
            "no info/train_filelist_flickr.txt in .*; place the data set there",
        ),
        (
            "info/train_meta_list_google.txt",
            None,
            "no info/train_meta_list_google.txt in .*; place the data set there",
        ),
        (
            "info/train_meta_list_google.txt",
            "a 1\n",
            "train_meta_list_google.txt differ in length, .*; copy them again",
        ),
        (
            "val_filelist.txt",
            None,
            "no val_filelist.txt or info/val_filelist.txt in .*; place the data set there",
        ),
        (
            "val_images_resized",
            None,
            "no val_images_resized in .*; place the data set there, see data/webvision1k",
        ),
    ],
)
def test_webvision_files_that_are_missing_or_broken(tmp_path, webvision, name, text, message):
    path = webvision / name
    if text is not None:
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    settings = dataclasses.replace(SMALL, max_bad_share=0.9)
    with pytest.raises(ManifestError, match=message) as caught:
        import_catalog(
            webvision, tmp_path / "out", settings=settings, dataset="webvision1k", workers=1
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
