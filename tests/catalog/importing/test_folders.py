"""Folders of photos: nothing is passed over in silence, nothing is taken for a product."""

from __future__ import annotations

import json
import os
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.made_photos import jpeg, photo
from helpers.photo_zoo import colours, saved
from PIL import Image

from sicot_jax.catalog.importing.folders import read_folders
from sicot_jax.catalog.importing.manifest_rows import ManifestError, ManifestRow, SourceNotes
from sicot_jax.catalog.importing.photos import FolderPhotos, ZipPhotos, photo_path, source_sha256
from sicot_jax.catalog.importing.run import import_catalog
from sicot_jax.catalog.importing.settings import CatalogImportError, ImportSettings
from sicot_jax.catalog.sources.imported import open_imported
from sicot_jax.common.table_files import DroppedRow
from sicot_jax.serve.photo import QUERY_FORMATS

SMALL = ImportSettings(word_width=8, word_epochs=1, min_count=1, short_side=24)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def read(folder):
    """Returns kept rows as (image, SKU, split), dropped rows, and warnings."""
    notes = SourceNotes()
    rows = list(read_folders(folder, notes))
    kept = [(row.image, row.sku, row.split) for row in rows if isinstance(row, ManifestRow)]
    return kept, [row for row in rows if isinstance(row, DroppedRow)], notes.folders


def reasons(dropped):
    return {row.row: row.reason for row in dropped}


def write_photos(folder, number, *, product=0, size=24):
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(number):
        (folder / f"{n}.jpg").write_bytes(jpeg(photo(product, n, size=size)))


def test_one_folder_per_sku(tmp_path):
    touch(tmp_path, "0012/a.jpg", "0012/deep/b.PNG", "XL/a.jpg", "XL/.hidden.jpg", "XL/notes.txt")
    touch(tmp_path, "loose.jpg", "m.txt", "XL/photo.of_no_known_kind", "XL/no suffix")
    kept, dropped, warnings = read(tmp_path)
    assert kept == [
        ("0012/a.jpg", "0012", ""),
        ("0012/deep/b.PNG", "0012", ""),
        ("XL/a.jpg", "XL", ""),
    ]
    assert [(row.row, row.reason, row.bad) for row in dropped] == [
        ("XL/no suffix", "no photo file (other)", False),
        ("XL/notes.txt", "no photo file (.txt)", False),
        ("XL/photo.of_no_known_kind", "no photo file (other)", False),
        ("loose.jpg", "photo outside a SKU folder", True),
    ]
    assert not warnings


def test_folder_without_folders(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(ManifestError, match="one folder per SKU"):
        read_folders(tmp_path)


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "jif", "pjpeg"])
def test_other_names_of_jpeg_are_photos(tmp_path, suffix):
    touch(tmp_path, f"A/a.{suffix}")
    assert read(tmp_path)[0] == [(f"A/a.{suffix}", "A", "")]


def test_heic_is_read_or_named_with_the_remedy(tmp_path, monkeypatch):
    touch(tmp_path, "A/a.jpg", *(f"PHONE/{n}.HEIC" for n in range(5)))
    monkeypatch.setattr("sicot_jax.common.image.HEIF_FORMATS", ())
    kept, dropped, warnings = read(tmp_path)
    assert kept == [("A/a.jpg", "A", "")]
    reason = "HEIC photo (install sicot_jax[heif], or save it as JPEG)"
    assert [row.reason for row in dropped] == [reason] * 5 + ["SKU folder without a photo"]
    assert not any(row.bad for row in dropped)
    assert warnings == [
        f"{reason}, left out: 5 (PHONE/0.HEIC, PHONE/1.HEIC, PHONE/2.HEIC and 2 more)",
        "SKU folder without a photo, left out: 1 (PHONE)",
    ]
    monkeypatch.setattr("sicot_jax.common.image.HEIF_FORMATS", ("HEIF",))
    assert len(read(tmp_path)[0]) == 6


def test_heic_photos_are_imported_and_answered(tmp_path):
    pytest.importorskip("pillow_heif")
    for n in range(5):
        path = tmp_path / f"shop/PHONE/{n}.heic"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(saved(Image.fromarray(photo(n, size=64)), "HEIF"))
    result = import_catalog(tmp_path / "shop", tmp_path / "out", settings=SMALL, workers=1)
    assert result.report.kept == 5
    assert "HEIF" in QUERY_FORMATS


def test_links_are_followed_and_broken_ones_named(tmp_path):
    root = tmp_path / "shop"
    touch(tmp_path, "elsewhere/a.jpg", "elsewhere/deep/b.jpg")
    touch(root, "A/a.jpg")
    for sku in ("B", "C"):  # the same folder is linked twice
        (root / sku).mkdir()
        (root / sku / "studio").symlink_to(tmp_path / "elsewhere")
    (root / "A/link.jpg").symlink_to(tmp_path / "elsewhere/a.jpg")
    (root / "A/gone.jpg").symlink_to("/nowhere.jpg")
    (root / "A/loop").symlink_to("..")
    (root / "A/self").symlink_to("self")
    (root / "EMPTY").mkdir()
    kept, dropped, warnings = read(root)
    assert [image for image, _, _ in kept] == [
        "A/a.jpg",
        "A/link.jpg",
        "B/studio/a.jpg",
        "B/studio/deep/b.jpg",
        "C/studio/a.jpg",
        "C/studio/deep/b.jpg",
    ]
    assert reasons(dropped) == {
        "A/gone.jpg": "broken link",
        "A/loop": "link to a folder that it is in",
        "A/self": "broken link",
        "EMPTY": "SKU folder without a photo",
    }
    assert not any(row.bad for row in dropped)
    assert warnings == [
        "SKU folder without a photo, left out: 1 (EMPTY)",
        "broken link, left out: 2 (A/gone.jpg, A/self)",
        "link to a folder that it is in, left out: 1 (A/loop)",
    ]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "A/a.jpg", "B/b.jpg")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "B":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    kept, dropped, warnings = read(tmp_path)
    assert [image for image, _, _ in kept] == ["A/a.jpg"]
    assert dropped[0].reason == "folder that cannot be read"
    assert "folder that cannot be read, left out: 1 (B)" in warnings


@pytest.mark.parametrize(
    "name", [".thumbnails", ".ipynb_checkpoints", "@eaDir/0.jpg", "__MACOSX", "#recycle/deep"]
)
def test_hidden_and_system_folders_are_no_photos(tmp_path, name):
    touch(tmp_path, "A/a.jpg", f"A/{name}/t.jpg", f"{name}/A/t.jpg", "A/._a.jpg")
    kept, dropped, warnings = read(tmp_path)
    assert kept == [("A/a.jpg", "A", "")]
    first = name.split("/")[0]
    assert reasons(dropped) == {f"A/{first}": "hidden folder", first: "hidden folder"}
    assert not warnings


def test_split_folders_give_the_split(tmp_path):
    touch(
        tmp_path, "train/A/1.jpg", "train/B/1.jpg", "Val/A/2.jpg", "test/A/deep/3.jpg", "x/C/1.jpg"
    )
    touch(tmp_path, "test/loose.jpg")
    (tmp_path / "test/EMPTY").mkdir()
    kept, dropped, warnings = read(tmp_path)
    assert kept == [
        ("Val/A/2.jpg", "A", "validation"),
        ("test/A/deep/3.jpg", "A", "test"),
        ("train/A/1.jpg", "A", "train"),
        ("train/B/1.jpg", "B", "train"),
    ]
    assert reasons(dropped) == {
        "test/loose.jpg": "photo outside a SKU folder",
        "x": "folder outside of the folders of the splits",
        "test/EMPTY": "SKU folder without a photo",
    }
    assert len(warnings) == 2


@pytest.mark.parametrize("names", [("train/1.jpg", "test/1.jpg"), ("train/A/1.jpg", "B/1.jpg")])
def test_skus_that_are_named_as_splits_stay_skus(tmp_path, names):
    touch(tmp_path, *names)
    assert [sku for _, sku, _ in read(tmp_path)[0]] == sorted(n.split("/")[0] for n in names)


def test_category_folders_are_doubted_and_views_are_not(tmp_path):
    skus = {"bags": ("101", "102"), "shoes": ("201", "202", "203")}
    touch(tmp_path, *(f"shop/{c}/{s}/a.jpg" for c, inner in skus.items() for s in inner))
    _, _, [warning] = read(tmp_path / "shop")
    assert warning.startswith(
        "2 folders taken as a SKU each, with photos in folders inside: bags/101, shoes/201; "
    )
    touch(tmp_path, *(f"views/{s}/{v}/a.jpg" for s in "abc" for v in ("front", "back")))
    touch(tmp_path, *(f"mixed/{s}/a.jpg" for s in "abc"), "mixed/d/x/a.jpg", "mixed/d/y/a.jpg")
    assert not read(tmp_path / "views")[2]
    assert not read(tmp_path / "mixed")[2]


def test_names_that_are_not_utf8_do_not_end_an_import(tmp_path):
    shop = tmp_path / "shop"
    write_photos(shop / "A", 30)
    folder = os.fsencode(shop) + b"/A/"
    for name in (b"f\xfcr.txt", b"f\xfcr.jpg"):
        Path(os.fsdecode(folder + name)).write_bytes(jpeg(photo(1)))
    os.mkdir(os.fsencode(shop) + b"/M\xf6bel")
    result = import_catalog(shop, tmp_path / "out", settings=SMALL, workers=1)
    assert result.report.kept == 30
    report = json.loads((result.folder / "report.json").read_text())
    assert report["dropped"]["file name is not UTF-8"]["rows"] == [
        "A/f\\xfcr.jpg: rename the file or folder"
    ]
    assert report["dropped"]["no photo file (.txt)"]["rows"] == ["A/f\\xfcr.txt"]
    assert "SKU folder without a photo, left out: 1 (M\\xf6bel)" in result.report.summary()


def test_an_out_that_is_not_utf8_is_refused_before_the_photos(tmp_path):
    write_photos(tmp_path / "shop/A", 5)
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(CatalogImportError, match="the path is not UTF-8"):
        import_catalog(tmp_path / "shop", out, settings=SMALL, workers=1)
    assert not out.exists()


def test_a_blank_in_front_of_a_folder_name_is_part_of_the_path(tmp_path):
    write_photos(tmp_path / "shop/ A", 5)
    result = import_catalog(tmp_path / "shop", tmp_path / "out", settings=SMALL, workers=1)
    assert (result.report.kept, result.report.dropped) == (5, {})


def test_an_import_without_a_usable_photo_says_what_was_left_out(tmp_path):
    (tmp_path / "shop/A").mkdir(parents=True)
    (tmp_path / "shop/A/a.jpg").symlink_to("/nowhere.jpg")
    with pytest.raises(CatalogImportError, match=r"first: A/a.jpg: broken link; A: SKU folder"):
        import_catalog(tmp_path / "shop", tmp_path / "out", settings=SMALL, workers=1)


def test_decomposed_file_names_are_found_by_composed_ones(tmp_path):
    composed = "M\u00f6bel/St\u00fchle 1.jpg"
    decomposed = unicodedata.normalize("NFD", composed)
    for name in (decomposed, "M\u00f6bel/" + unicodedata.normalize("NFD", "\u00dc.jpg")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    reader = FolderPhotos(tmp_path)
    assert reader.read(composed) == reader.read(decomposed) == decomposed.encode()
    assert reader.read("M\u00f6bel/\u00dc.jpg")  # composed folder, decomposed file
    assert photo_path(tmp_path, "M\u00f6bel/none.jpg") == tmp_path / "M\u00f6bel/none.jpg"
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"image,sku\n{composed},A\n", encoding="utf-8")
    before = source_sha256(manifest)
    (tmp_path / decomposed).write_bytes(b"another photo")
    assert source_sha256(manifest) != before


def test_decomposed_names_in_a_zip_file(tmp_path):
    composed = "St\u00fchle.jpg"
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        file.writestr(unicodedata.normalize("NFD", composed), b"photo")
    assert ZipPhotos(tmp_path / "photos.zip").read(composed) == b"photo"


def test_resized_copies_stay_in_one_split(tmp_path):
    """Copies of other sizes, and a cropped one that only its name gives away."""
    rng = np.random.default_rng(0)
    for sku in "ABC":
        (tmp_path / "shop" / sku).mkdir(parents=True)
        for n in range(6):
            blots = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            original = blots.resize((120, 160), Image.Resampling.BICUBIC)
            original.save(tmp_path / f"shop/{sku}/p{n}.jpg")
            original.resize((75, 100)).save(tmp_path / f"shop/{sku}/copy_of_{n}.png")
            original.crop((0, 20, 120, 140)).save(tmp_path / f"shop/{sku}/p{n}-120x120.jpg")
    result = import_catalog(
        tmp_path / "shop", tmp_path / "out", settings=ImportSettings(word_width=8), workers=1
    )
    splits: dict[str, set[str]] = {}
    catalog = open_imported(tmp_path / "out")
    for split in ("train", "validation", "test"):
        for i in range(len(catalog.splits[split])):
            sku, name = catalog.splits[split][i]["reference"].split("/")
            picture = name.removeprefix("copy_of_").lstrip("p")[0]
            splits.setdefault(sku + picture, set()).add(split)
    assert len(splits) == 18
    assert all(len(of_one) == 1 for of_one in splits.values())
    assert result.report.near_copies == 36
    assert result.report.photos == {"train": 36, "validation": 9, "test": 9}
    assert "near-identical photos: 36 of a picture" in result.report.summary()
    assert not result.report.divided


def test_copies_that_the_source_divides_are_a_warning(tmp_path):
    for n in range(4):
        original = colours(60, 90 + 20 * n).rotate(90 * n)
        split = "test" if n == 0 else "train"
        for folder, photo_of in ((split, original), ("train", original.resize((50, 40)))):
            path = tmp_path / f"shop/{folder}/A/{n}_{photo_of.width}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo_of.save(path)
    result = import_catalog(tmp_path / "shop", tmp_path / "out", settings=SMALL, workers=1)
    assert result.report.divided == [["test/A/0_90.png", "train/A/0_50.png"]]
    assert "WARNING: near-identical photos in several splits: 1 picture" in result.report.summary()
