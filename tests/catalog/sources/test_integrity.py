"""Damaged and foreign files of an imported catalogue, and more shards than files may be open."""

import csv
import resource
import shutil

import numpy as np
import pytest
from PIL import Image

from sicot_jax.catalog.importing import spool
from sicot_jax.catalog.importing.run import import_catalog
from sicot_jax.catalog.importing.settings import ImportSettings
from sicot_jax.catalog.sources import integrity
from sicot_jax.catalog.sources.imported import open_imported
from sicot_jax.errors import InputError

SETTINGS = ImportSettings(word_width=8, word_epochs=1, min_count=1, short_side=24)


def make_catalog(folder, *, seed):
    """A catalogue of two products; of photos of the same sizes whatever the seed."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    with (folder / "photos.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "sku", "title"])
        for i in range(16):
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / f"{i}.bmp")
            rows.writerow([f"{i}.bmp", "ab"[i % 2], f"title {i % 2}"])
    return import_catalog(
        folder / "photos.csv", folder / "out", settings=SETTINGS, workers=1, name="photos"
    ).folder


@pytest.fixture(scope="module")
def catalogs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalogs")
    return [make_catalog(folder / str(seed), seed=seed) for seed in (0, 1)]


@pytest.fixture
def catalog(catalogs, tmp_path):
    return shutil.copytree(catalogs[0], tmp_path / "catalog")


def read_all(folder):
    catalog = open_imported(folder)
    return [split[i]["image_id"] for split in catalog.splits.values() for i in range(len(split))]


DAMAGES = {
    "missing": None,
    "cut": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "flipped": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_every_damaged_file_is_named_in_one_line(catalog, damage):
    assert len(set(read_all(catalog))) == 16
    unchecked = (integrity.CHECKSUMS_FILE, "report.json", "report.md")
    files = [path for path in catalog.iterdir() if path.name not in unchecked]
    assert sum("array_record" in path.name for path in files) >= 2
    for path in files:
        content = path.read_bytes()
        path.write_bytes(damage(content)) if damage else path.unlink()
        with pytest.raises(InputError) as error:
            read_all(catalog)
        assert path.name in str(error.value), path
        assert len(str(error.value).splitlines()) == 1
        path.write_bytes(content)
    assert len(read_all(catalog)) == 16


def test_a_shard_of_another_catalogue_is_refused(catalog, catalogs):
    """It has as many records, and TFDS reads it in silence."""
    name = "photos-train.array_record-00000-of-00001"
    shutil.copy(catalogs[1] / name, catalog / name)
    with pytest.raises(InputError, match=f"{name}: not as it was imported; restore it"):
        read_all(catalog)
    (catalog / integrity.CHECKSUMS_FILE).unlink()  # as of an earlier release
    assert len(read_all(catalog)) == 16


def test_damage_inside_a_large_shard_is_one_line(catalogs, tmp_path, monkeypatch):
    """Beginning and end are whole; ArrayRecord notices the rest."""
    monkeypatch.setattr(integrity, "_EDGE_BYTES", 64)
    folder = shutil.copytree(catalogs[0], tmp_path / "catalog")
    integrity.write_catalog_checksums(folder)
    shard = folder / "photos-train.array_record-00000-of-00001"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"photo 0 of split train cannot be read \(.*; restore"):
        read_all(folder)


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    """The soft limit is raised as far as the hard one; then one line says the limit."""
    monkeypatch.setattr(spool, "_SHARD_BYTES", 1)
    folder = make_catalog(tmp_path / "many", seed=0)
    shards = len(list(folder.glob("*.array_record*")))
    assert shards == 16
    limits = [(100, 1000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    assert len(read_all(folder)) == 16
    assert limits[1:] == [(272, 1000)]
    limits[:] = [(100, 271)]
    with pytest.raises(InputError, match=r"16 shards, a process may open 271 files, wanted 272"):
        read_all(folder)


def test_a_relative_path_that_is_not_found_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=rf"catalogue x not found \(relative to {tmp_path}\); .*--catalog"
    ):
        open_imported("x")
    with pytest.raises(InputError, match=r"/x not found; make one"):
        open_imported(tmp_path / "x")
