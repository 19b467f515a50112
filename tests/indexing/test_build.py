"""Building an index from a run and its catalogue, and continuing builds that were stopped."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sicot_jax.catalog.catalog import ClassTable
from sicot_jax.catalog.open import open_catalog
from sicot_jax.cli import main as cli
from sicot_jax.config import load_config
from sicot_jax.errors import InputError
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import inverted_lists, layout
from sicot_jax.index.storage.products import PICTURES, ProductStore
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing import build, calibrate, embed, version_writer
from sicot_jax.indexing.build import build_index
from sicot_jax.indexing.update import update_products
from sicot_jax.indexing.verify import verify_version
from sicot_jax.recognizer import jax_engine
from sicot_jax.search.product_scores import ProductScores, top_products
from sicot_jax.search.ranker import (
    Ranker,
    RankingLists,
    fit_ranking_model,
    read_ranker,
    write_ranker,
)
from sicot_jax.search.ranking_features import FEATURES, CatalogStatistics, image_sharpness
from sicot_jax.search.rejection import MIN_PHOTOS, read_calibration
from sicot_jax.training.loop import train
from sicot_jax.training.provenance import class_table_hash
from sicot_jax.training.restore import restore_params
from sicot_jax.training.run import mesh_of_config, read_run
from sicot_jax.weights.bundle import read_bundle


@pytest.fixture(scope="module")
def run(make_once):
    """11 classes, 160 training and 55 validation photos; a code layer of 64 bits."""
    options = ["data.generated.validation_per_class=5", "loss.codes=1", "model.code_bits=64"]
    config = load_config("tiny", [f"--config.{option}" for option in options])
    return make_once("build", lambda folder: train(config, folder / "run")) / "run"


@pytest.fixture(scope="module")
def version(run, make_once):
    """The version folder of an index of that run."""
    folder = make_once("built", lambda folder: build_index(run, folder / "index"))
    return layout.current_version(folder / "index")


def catalog_of(run):
    return open_catalog(read_run(run).config.data)


def open_store(folder):
    return contextlib.closing(ProductStore(folder / layout.PRODUCTS))


def open_local(folder):
    return contextlib.closing(LocalIndex(folder))


def test_index_holds_all_training_photos(run, version):
    """Photos are ordered by category, records have pictures, and all checksums match."""
    catalog, manifest = catalog_of(run), layout.read_index_manifest(version)
    assert verify_version(version, checksums=True) == []
    assert layout.current_version(version.parent) == version
    assert (manifest.num_photos, manifest.num_products) == (160, 11)
    assert manifest.data_hash == catalog.data_hash
    with open_store(version) as store:
        for c in range(11):
            record = store.products([c])[0]
            photos = np.flatnonzero(catalog.splits["train"].labels == c)
            assert (record.sku, record.title) == (catalog.classes.sku[c], catalog.classes.title[c])
            rows = store.connection.execute(
                "SELECT row FROM photos WHERE product_id = ?", (c,)
            ).fetchall()
            assert store.count_photos(c) == len(rows) == len(photos)
            assert len(record.picture_rows) == min(len(photos), PICTURES)
            first, last = manifest.category_ranges[catalog.classes.category[c]]
            assert all(first <= row < last for (row,) in rows)


def test_learned_codes(run, version, tmp_path):
    """A bit says whether the code layer's output is above 1/2; features are as with other codes."""
    assert layout.read_index_manifest(version).code_kind == "pca"
    folder = build_index(run, tmp_path / "index", code_kind="learned", bits=64)
    manifest = layout.read_index_manifest(folder)
    assert (manifest.code_kind, manifest.bits) == ("learned", 64)
    assert verify_version(folder, checksums=True) == []
    features, codes = (
        VectorFiles(folder, 16, 64).memmap(name, 160) for name in (layout.FEATURES, layout.CODES)
    )
    np.testing.assert_array_equal(
        features, VectorFiles(version, 16, 256).memmap(layout.FEATURES, 160)
    )
    restored = read_run(run)
    device_mesh = mesh_of_config(restored.config)
    with jax.set_mesh(device_mesh):
        model = restore_params(restored, device_mesh)
        stream = nnx.merge(model.graphs.visual, model.params["visual"], model.batch_stats["visual"])
        outputs = np.asarray(stream.binary_code(jnp.asarray(features, jnp.float32)))
    clear = np.abs(outputs - 0.5) > 1e-4
    np.testing.assert_array_equal(
        (outputs > 0.5)[clear], np.unpackbits(codes, axis=1, bitorder="little")[clear]
    )
    assert clear.mean() > 0.99
    with pytest.raises(
        InputError, match="--bits 256 with --codes learned, and the run learned 64; ask for those"
    ):
        build_index(run, tmp_path / "index", code_kind="learned")


def test_learned_codes_need_a_code_layer(tmp_path):
    recognizer = types.SimpleNamespace(code_layer=None)
    with pytest.raises(
        InputError, match=r"run: trained without codes .loss.codes=0., .*; give another kind"
    ):
        build._learned_encoder(recognizer, 256, tmp_path / "run")


def test_features_equal_the_engine_s_embeddings(run, version):
    """Embedded in batches over eight devices, normalised, in float16."""
    split = catalog_of(run).splits["train"]
    photos = {split[i]["image_id"]: split[i]["image"] for i in range(len(split))}
    bundle = read_bundle(version / layout.MODEL)
    with open_local(version) as index:
        rows = index.store.connection.execute(
            "SELECT row, image_id FROM photos ORDER BY row"
        ).fetchall()
        batch = bundle.preprocessing.batch([photos[image_id] for _, image_id in rows[:32]])
        embedding = jax_engine(bundle)(batch).embedding
        expected = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
        features = np.asarray(index._snapshot.features[:32], np.float32)
        np.testing.assert_allclose(features, expected, atol=1e-3)


def test_recognition_equals_the_run_s_evaluation(run, version):
    """The best product of every test photo is the class that `evaluate` predicted."""
    with np.load(run / "predictions.npz") as stored:
        best = stored["top_classes"][:, 0].tolist()
        expected = dict(zip(stored["image_id"].tolist(), best, strict=True))
    split, bundle = catalog_of(run).splits["test"], read_bundle(version / layout.MODEL)
    engine = jax_engine(bundle)
    with open_local(version) as index:
        for i in range(len(split)):
            record = split[i]
            batch = bundle.preprocessing.batch([record["image"]])
            embedding, logits, _ = next(engine(batch).per_photo())
            scores = ProductScores.from_logits(embedding, logits, index.active_products())
            product_ids, _ = top_products(scores, 1)
            assert product_ids[0] == expected[record["image_id"]]


def test_calibration_uses_all_validation_photos(version):
    assert MIN_PHOTOS <= 55 == read_calibration(version / layout.REJECTION).num_photos


def test_calibration_photos_have_cross_fitted_p_values(run, version, monkeypatch):
    """Each photo has a p-value, with and without its product."""
    p_values, seen = np.linspace(0.1, 0.9, 55), {}
    monkeypatch.setattr(
        calibrate, "cross_fitted_p_values", lambda embeddings: p_values[: len(embeddings)]
    )
    monkeypatch.setattr(
        calibrate, "fit_calibration", lambda *answers, novelty: seen.update(answers=answers)
    )
    validation = catalog_of(run).splits["validation"]
    calibrate.calibrate_version(version, validation, np.arange(11))
    known, correct, unknown = seen["answers"]
    assert [f.p_value for f in known] == p_values.tolist() == [f.p_value for f in unknown]
    assert len(correct) == 55
    for with_product, without in zip(known, unknown, strict=True):
        assert without.nearest_similarity <= with_product.nearest_similarity


@pytest.mark.slow
def test_prices_and_ranker_survive_a_build(run, version, tmp_path, capsys):
    """A ranker of another model does not: it was fitted to other similarities."""
    pytest.importorskip("lightgbm", reason="the ranker needs the service's extra")
    index = tmp_path / "index"
    shutil.copytree(version.parent, index)
    sku = catalog_of(run).classes.sku[3]
    (tmp_path / "prices.csv").write_text(f"sku,price\n{sku},9.5\n")
    update_products(index, tmp_path / "prices.csv")
    rows = np.random.default_rng(0).random((200, len(FEATURES)))
    lists = RankingLists(rows, np.arange(200) // 10, np.arange(200) % 10, rows[:, 0])
    ranker = Ranker(
        layout.read_index_manifest(version).model_sha256,
        CatalogStatistics({}, frozenset()),
        fit_ranking_model(lists, np.ones(10)),
        {},
    )
    ranker_version = write_ranker(layout.current_version(index) / layout.RANKER, ranker)
    new = build_index(run, index)
    with open_store(new) as store:
        record = store.product(sku)
        assert set(record.quality) == {"price", "sharpness"}
        assert record.quality["price"] == 9.5
        picture = store.picture(record.picture_rows[0])
        assert record.quality["sharpness"] == image_sharpness(picture) > 0
    assert read_ranker(new / layout.RANKER).version == ranker_version
    assert verify_version(new, checksums=True) == []
    assert "ranked" not in capsys.readouterr().err
    write_ranker(new / layout.RANKER, dataclasses.replace(ranker, recognizer="another"))
    assert not (build_index(run, index) / layout.RANKER).exists()
    assert "sicot index rank" in capsys.readouterr().err


class TaggedSplit:
    """A split whose records have tags."""

    def __init__(self, split):
        self.split, self.labels = split, split.labels

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        record = self.split[index]
        return {**record, "tags": f"tag {record['class_id']}"}


@pytest.mark.slow
def test_stopped_build_is_continued(run, version, tmp_path, monkeypatch):
    """Stopped in its second commit, it keeps the first, and the result is the same."""
    catalog = catalog_of(run)
    splits = {**catalog.splits, "train": TaggedSplit(catalog.splits["train"])}
    tagged = dataclasses.replace(catalog, splits=splits)
    monkeypatch.setattr(build, "open_catalog", lambda _: tagged)
    uninterrupted = build_index(run, tmp_path / "uninterrupted")
    monkeypatch.setattr(embed, "_BATCHES_PER_COMMIT", 1)
    starts, write_rows = [], VectorFiles.write_rows

    def stop_at_second(self, name, start, rows):
        if name == layout.FEATURES:
            starts.append(start)
            if len(starts) == 2:
                raise KeyboardInterrupt
        write_rows(self, name, start, rows)

    monkeypatch.setattr(VectorFiles, "write_rows", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        build_index(run, tmp_path / "index")
    with pytest.raises(InputError, match="no product index there"):
        layout.current_version(tmp_path / "index")
    continued = build_index(run, tmp_path / "index")
    assert starts[2] == starts[1] > 0
    assert verify_version(continued, checksums=True) == []
    for name in (layout.FEATURES, layout.CODES, layout.ROW_PRODUCTS):
        assert (continued / name).read_bytes() == (version / name).read_bytes()
    assert all_records(continued) == all_records(uninterrupted)
    assert [record.tags for record in all_records(continued)] == [f"tag {c}" for c in range(11)]


def all_records(folder):
    with open_store(folder) as store:
        return list(store.all_products())


@pytest.mark.slow
def test_damaged_build_is_removed(run, tmp_path, monkeypatch):
    """A damaged build is not continued, and a damaged version in use does not stop a build."""
    with monkeypatch.context() as patch:
        patch.setattr(build, "verify_version", lambda _: ["features.f16: broken"])
        with pytest.raises(
            InputError, match=r"features.f16: broken; the version in use stays, build again"
        ):
            build_index(run, tmp_path)
    assert not (tmp_path / layout.BUILDING).exists()
    damaged = build_index(run, tmp_path)
    (damaged / layout.PRODUCTS).write_bytes(b"junk")
    again = build_index(run, tmp_path)
    assert verify_version(again, checksums=True) == []
    assert again != damaged


@pytest.mark.slow
def test_build_of_other_settings_is_not_continued(run, tmp_path, monkeypatch, capsys):
    """A stopped build of another number of bits is removed; a large version has inverted lists."""
    with monkeypatch.context() as patch:
        patch.setattr(
            version_writer, "_write_codes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            build_index(run, tmp_path, bits=64)
    monkeypatch.setattr(inverted_lists, "MIN_ROWS", 100)
    manifest = layout.read_index_manifest(build_index(run, tmp_path, bits=128))
    assert manifest.bits == 128
    assert set(layout.INVERTED_LISTS) <= set(manifest.sha256)
    assert "of another model, catalogue or version; built from scratch" in capsys.readouterr().err


def changed_catalog(catalog):
    """Product 0 is discontinued; two products are replaced by new ones with the same photos."""
    classes = catalog.classes
    sku = [*classes.sku[:9], "new-a", "new-b"]
    discontinued = np.zeros(11, bool)
    discontinued[0] = True
    table = ClassTable(
        sku, list(classes.title), list(classes.category), classes.counts, discontinued
    )
    return dataclasses.replace(catalog, classes=table, data_hash="changed")


@pytest.mark.slow
def test_changed_catalogue(run, tmp_path, monkeypatch):
    """Products are matched by SKU, and known photos are not embedded again.

    New products have class weights; products that are no longer sold are never returned.
    """
    index = tmp_path / "index"
    build_index(run, index)
    catalog, embedded = changed_catalog(catalog_of(run)), []
    monkeypatch.setattr(build, "open_catalog", lambda _: catalog)
    original = embed.PhotoBatchLoader

    def count_photos(split, preprocessing, batch_size, photos):
        embedded.append(len(photos))
        return original(split, preprocessing, batch_size, photos)

    monkeypatch.setattr(embed, "PhotoBatchLoader", count_photos)
    with pytest.raises(InputError, match="3 of 11 products would be withdrawn"):
        build_index(run, index, max_change_share=0)
    folder = build_index(run, index)
    assert verify_version(folder, checksums=True) == []
    assert sum(embedded) == 0
    deleted, new = [0, 9, 10], [11, 12]
    with open_local(folder) as opened:
        active = opened.active_products()
        assert active.deleted.tolist() == deleted
        assert active.new_products.tolist() == new
        assert opened.products(deleted) == [None] * 3
        assert [record.sku for record in opened.products(new)] == ["new-a", "new-b"]
    logits = np.zeros(11, np.float32)
    logits[deleted] = 100
    scores = ProductScores.from_logits(np.ones(16, np.float32), logits, active)
    product_ids, _ = top_products(scores, 20)
    assert not set(deleted) & set(product_ids.tolist())
    assert set(new) <= set(product_ids.tolist())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir", "nothing"], "wanted the config.json of a training run"),
        (["--bits", "100"], "bits=100, wanted a multiple of 8"),
    ],
)
def test_invalid_input_is_one_line(run, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    command = ["index", "build", "--workdir", str(run), "--out", "index", *flags]
    assert cli.main(command) == cli.INPUT_ERROR
    assert message in capsys.readouterr().err
    assert not (tmp_path / "index" / "current").exists()


_SLOW_BUILD = """
import sys, time
from pathlib import Path
import jax
jax.config.update('jax_num_cpu_devices', 8)
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing import build, embed
embed._BATCHES_PER_COMMIT = 1
write_rows = VectorFiles.write_rows
def slowly(self, *arguments):
    time.sleep(0.02)
    write_rows(self, *arguments)
    time.sleep(0.02)
VectorFiles.write_rows = slowly
print('started', flush=True)
build.build_index(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_killed_builds_never_damage_the_index(run, tmp_path):
    """Killed 30 times at random moments, builds leave the version in use sound and readable."""
    index = tmp_path / "index"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    rng, finished = random.Random(0), 0
    build_index(run, index)
    for _ in range(30):
        process = subprocess.Popen(
            [sys.executable, "-c", _SLOW_BUILD, str(run), str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        process.stdout.readline()
        time.sleep(rng.uniform(0.1, 8.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        finished += process.returncode == 0
        current = layout.current_version(index)
        assert verify_version(current, checksums=True) == []
        with open_local(current) as opened:
            assert len(opened.nearest(np.ones((1, 16)), 3)[0].products) == 3
    assert verify_version(build_index(run, index), checksums=True) == []
    assert finished < 30


def test_run_records_the_hash_of_the_class_table(run):
    stored = json.loads((run / "config.json").read_text())["data"]["class_table"]
    assert class_table_hash(catalog_of(run)) == stored
