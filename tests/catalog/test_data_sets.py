"""The builders of data/ on tiny made-up copies of their owners' layouts."""

from __future__ import annotations

import inspect
import io
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sicot_jax
from sicot_jax.catalog.catalog import SPLITS
from sicot_jax.catalog.import_settings import ImportFailed, ImportSettings
from sicot_jax.catalog.imported import open_imported
from sicot_jax.catalog.importing import import_catalog, load_builder
from sicot_jax.catalog.manifest import ManifestError

SMALL = ImportSettings(word_width=4, word_epochs=1, min_count=1, min_photos=1)
STYLES = """id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName
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
    made = import_catalog(fashion, tmp_path / "out", settings=SMALL, dataset="fashion_products", workers=1)
    catalog = open_imported(made.folder)
    assert made.folder == tmp_path / "out" / "fashion_products" / "1.0.0"
    assert catalog.classes.sku == ["Puma | Socks", "United Colors | Tops"]
    assert catalog.classes.category == ["Socks", "Tops"]
    found = [catalog.splits["train"][i] for i in range(3)]
    titles = {"Puma Men Sports Socks", "Puma Men Pack, of 3, Socks", "United Colors Women Top, red"}
    assert {record["title"] for record in found} == titles and {record["tags"] for record in found} == {""}
    assert found[0]["image"] in [jpeg(i) for i in (1, 2, 3)]  # a small JPEG keeps its bytes
    dropped = made.report.dropped
    assert not dropped["no brand in the title"]["bad"] and dropped["no brand in the title"]["count"] == 1
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
            import_catalog(folder, tmp_path / f"out{i}", settings=SMALL, dataset="fashion_products", workers=1).folder
        ).data_hash
        for i, folder in enumerate((fashion, zipped))
    ]
    assert hashes[0] == hashes[1]


def test_fashion_leaves_small_classes_out_by_default(tmp_path, fashion):
    with pytest.raises(ImportFailed, match=r"no photo of .* can be used.*wrong number of fields"):
        import_catalog(fashion, tmp_path / "out", dataset="fashion_products", workers=1)


@pytest.mark.parametrize("dataset", ["fashion_products", "grocery_store"])
def test_wrong_folder(tmp_path, dataset):
    with pytest.raises(ManifestError, match="place the data set there") as caught:
        import_catalog(tmp_path, tmp_path / "out", dataset=dataset, workers=1)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


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
        (root / "icons" / f"{name}.txt").write_text(f"{name} is sweet.\nIt grows on trees.", encoding="utf-8")
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
    made = import_catalog(grocery, tmp_path / "out", settings=SMALL, dataset="grocery_store", workers=1)
    catalog = open_imported(made.folder)
    assert made.report.photos == {"train": 12, "validation": 4, "test": 6}
    assert catalog.classes.sku == ["Avocado", "Royal-Gala"] and catalog.classes.category == ["Avocado", "Apple"]
    assert catalog.classes.title[1] == "Royal Gala Apple. Royal-Gala is sweet."
    with pytest.raises(ImportFailed, match="holds the catalogue 'grocery_store', not 'fashion_products'"):
        import_catalog(grocery, tmp_path / "out", settings=SMALL, dataset="fashion_products", workers=1)
    for split, folder in zip(SPLITS, ("train", "val", "test"), strict=True):
        for i in range(len(catalog.splits[split])):
            record = catalog.splits[split][i]
            assert record["reference"].startswith(f"dataset/{folder}/") and record["role"] == "query"


def test_grocery_zip_and_tail_cut(tmp_path, grocery):
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "any.zip", "w") as file:
        for path in sorted(grocery.rglob("*")):
            file.write(path, path.relative_to(grocery))
    settings = ImportSettings(word_width=4, min_count=1, tail_cut=5)
    made = import_catalog(tmp_path / "zipped", tmp_path / "o", settings=settings, dataset="grocery_store", workers=1)
    assert made.report.photos == {"train": 6, "validation": 4, "test": 6} and made.report.tail_cut == 6
    assert open_imported(made.folder).classes.counts["train"].tolist() == [5, 1]


def test_builders_are_found_in_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "sicot_jax"
    source = load_builder("grocery_store")
    assert source.name == "grocery_store"
    package.mkdir(parents=True)
    with pytest.raises(ImportFailed, match="install sicot_jax again"):
        monkeypatch.setattr(sicot_jax, "__file__", str(package / "__init__.py"))
        load_builder("grocery_store")
    shutil.copytree(Path(__file__).parents[2] / "data", package / "data")
    monkeypatch.delitem(sys.modules, "sicot_jax.data.grocery_store.grocery_store_dataset_builder")
    assert Path(inspect.getfile(load_builder("grocery_store"))).is_relative_to(package)
    with pytest.raises(ImportFailed, match="wanted one of fashion_products, generated"):
        load_builder("imagenet")
