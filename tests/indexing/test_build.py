"""From a run and its catalogue to an index, whatever happens in between."""

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

from sicot_jax import config as config_lib
from sicot_jax.catalog import open as opening
from sicot_jax.catalog.catalog import ClassTable
from sicot_jax.cli import main as cli
from sicot_jax.errors import InputError
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import inverted_lists, layout
from sicot_jax.index.storage.products import PICTURES, ProductStore
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing import build, calibrate, embed
from sicot_jax.indexing.update import update_products
from sicot_jax.indexing.verify import verify_version
from sicot_jax.recognizer import jax_engine
from sicot_jax.search import ranker as rerank
from sicot_jax.search.product_scores import ProductScores, top_products
from sicot_jax.search.ranking_features import FEATURES, CatalogStatistics, image_sharpness
from sicot_jax.search.rejection import MIN_PHOTOS, read_calibration
from sicot_jax.training.loop import train
from sicot_jax.training.provenance import class_table_hash
from sicot_jax.training.restore import restore_params
from sicot_jax.training.run import mesh_of_config, read_run
from sicot_jax.weights.bundle import read_bundle


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """11 classes, 160 photos, 55 for validation; codes of 64 bits."""
    workdir = tmp_path_factory.mktemp("build") / "run"
    options = ["data.generated.validation_per_class=5", "loss.codes=1", "model.code_bits=64"]
    train(config_lib.load_config("tiny", [f"--config.{option}" for option in options]), workdir)
    return workdir


@pytest.fixture(scope="module")
def built(run):
    return build.build_index(run, run.parent / "index")


def catalog_of(run):
    return opening.open_catalog(read_run(run).config.data)


def test_an_index_holds_the_catalogue(run, built):
    """Every training photo of every product, by category; cards with pictures; whole, to the last
    checksum.
    """
    catalog, manifest = catalog_of(run), layout.read_index_manifest(built)
    assert verify_version(built, checksums=True) == []
    assert layout.current_version(built.parent) == built
    assert (manifest.num_photos, manifest.num_products, manifest.data_hash) == (
        160,
        11,
        catalog.data_hash,
    )
    store = ProductStore(built / layout.PRODUCTS)
    for c in range(11):
        product, own = store.products([c])[0], np.flatnonzero(catalog.splits["train"].labels == c)
        assert (product.sku, product.title) == (catalog.classes.sku[c], catalog.classes.title[c])
        places = store.connection.execute(
            "SELECT row FROM photos WHERE product_id = ?", (c,)
        ).fetchall()
        assert store.count_photos(c) == len(places) == len(own)
        assert len(product.picture_rows) == min(len(own), PICTURES)
        first, last = manifest.category_ranges[catalog.classes.category[c]]
        assert all(first <= place < last for (place,) in places)
    store.close()


def test_codes_that_the_run_learned(run, built, tmp_path):
    """Each bit says on which side of 1/2 the layer's share of the photo is; features are those of
    an index by other codes.
    """
    assert layout.read_index_manifest(built).codes == "pca"
    folder = build.build_index(run, tmp_path / "index", code_kind="learned", bits=64)
    manifest = layout.read_index_manifest(folder)
    assert (manifest.code_kind, manifest.bits) == ("learned", 64)
    assert verify_version(folder, checksums=True) == []
    features, codes = (
        VectorFiles(folder, 16, 64).memmap(name, 160) for name in (layout.FEATURES, layout.CODES)
    )
    np.testing.assert_array_equal(
        features, VectorFiles(built, 16, 256).memmap(layout.FEATURES, 160)
    )
    restored = read_run(run)
    device_mesh = mesh_of_config(restored.config)
    with jax.set_mesh(device_mesh):
        model = restore_params(restored, device_mesh)
        stream = nnx.merge(model.graphs.visual, model.params["visual"], model.batch_stats["visual"])
        shares = np.asarray(stream.binary_code(jnp.asarray(features, jnp.float32)))
    sure = np.abs(shares - 0.5) > 1e-4
    np.testing.assert_array_equal(
        (shares > 0.5)[sure], np.unpackbits(codes, axis=1, bitorder="little")[sure]
    )
    assert sure.mean() > 0.99
    with pytest.raises(
        InputError, match="--bits 256 with --codes learned, and the run learned 64; ask for those"
    ):
        build.build_index(run, tmp_path / "index", code_kind="learned")


def test_codes_of_a_run_that_learned_none(built, tmp_path):
    found = types.SimpleNamespace(codes=None)
    with pytest.raises(
        InputError, match="run: trained without codes .loss.codes=0., .*; give another kind"
    ):
        build._learned_encoder(found, 256, tmp_path / "run")


def test_features_are_the_engine_s(run, built):
    """Embedded over eight devices, in batches; to float16."""
    split = catalog_of(run).splits["train"]
    photos = {split[i]["image_id"]: split[i]["image"] for i in range(len(split))}
    opened = LocalIndex(built)
    converted = read_bundle(built / layout.MODEL)
    rows = opened.store.connection.execute(
        "SELECT row, image_id FROM photos ORDER BY row"
    ).fetchall()
    batch = converted.preprocessing.batch([photos[image_id] for _, image_id in rows[:32]])
    embedding = jax_engine(converted)(batch).embedding
    wanted = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    np.testing.assert_allclose(
        np.asarray(opened._snapshot.features[:32], np.float32), wanted, atol=1e-3
    )
    opened.close()


def test_through_the_index_as_in_the_run_s_own_test(run, built):
    """The best product of every test photo is the class that the run's evaluation found."""
    with np.load(run / "predictions.npz") as stored:
        wanted = dict(
            zip(stored["image_id"].tolist(), stored["top_classes"][:, 0].tolist(), strict=True)
        )
    split, opened = catalog_of(run).splits["test"], LocalIndex(built)
    converted = read_bundle(built / layout.MODEL)
    engine = jax_engine(converted)
    for i in range(len(split)):
        record = split[i]
        embedding, logits, _ = next(
            engine(converted.preprocessing.batch([record["image"]])).per_photo()
        )
        numbers, _ = top_products(
            ProductScores.from_logits(embedding, logits, opened.active_products()), 1
        )
        assert numbers[0] == wanted[record["image_id"]]
    opened.close()


def test_a_calibration_where_there_are_enough_photos(built):
    assert MIN_PHOTOS <= 55 == read_calibration(built / layout.REJECTION).num_photos


def test_photos_of_a_calibration_count_as_new_ones(run, built, monkeypatch):
    """Each by its own share of what is usual, also without its product."""
    shares, seen = np.linspace(0.1, 0.9, 55), {}
    monkeypatch.setattr(
        calibrate, "cross_fitted_p_values", lambda embeddings: shares[: len(embeddings)]
    )
    monkeypatch.setattr(
        calibrate, "fit_calibration", lambda *answers, novelty: seen.update(answers=answers)
    )
    calibrate.calibrate(built, catalog_of(run).splits["validation"], np.arange(11))
    known, right, absent = seen["answers"]
    assert [e.p_value for e in known] == shares.tolist() == [e.p_value for e in absent]
    assert len(right) == 55
    assert all(
        a.nearest_similarity <= k.nearest_similarity for k, a in zip(known, absent, strict=True)
    )  # of the same photo


def test_what_the_shop_told_and_the_ranker_outlive_a_build(run, built, tmp_path, capsys):
    """A ranker of another model does not: it has learned other cosines."""
    pytest.importorskip("lightgbm", reason="the ranker needs the service's extra")
    index = tmp_path / "index"
    shutil.copytree(built.parent, index)
    sku = catalog_of(run).classes.sku[3]
    (tmp_path / "prices.csv").write_text(f"sku,price\n{sku},9.5\n")
    update_products(index, tmp_path / "prices.csv")
    rows = np.random.default_rng(0).random((200, len(FEATURES)))
    shown = rerank.RankingLists(rows, np.arange(200) // 10, np.arange(200) % 10, rows[:, 0])
    model = rerank.fit_ranking_model(shown, np.ones(10))
    ranker = rerank.Ranker(
        layout.read_index_manifest(built).model, CatalogStatistics({}, frozenset()), model, {}
    )
    version = rerank.write_ranker(layout.current_version(index) / layout.RANKER, ranker)
    new = build.build_index(run, index)
    store = ProductStore(new / layout.PRODUCTS)
    told = store.product(sku)
    assert set(told.quality) == {"price", "sharpness"}
    assert told.quality["price"] == 9.5
    assert told.quality["sharpness"] == image_sharpness(store.picture(told.picture_rows[0])) > 0
    store.close()
    assert rerank.read_ranker(new / layout.RANKER).version == version
    assert verify_version(new, checksums=True) == []
    assert "ranked" not in capsys.readouterr().err
    rerank.write_ranker(new / layout.RANKER, dataclasses.replace(ranker, recognizer="another"))
    assert not (build.build_index(run, index) / layout.RANKER).exists()
    assert "sicot index rank" in capsys.readouterr().err


class Tagged:
    """A split whose records have tags."""

    def __init__(self, split):
        self.split, self.labels = split, split.labels

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        record = self.split[index]
        return {**record, "tags": f"tag {record['class_id']}"}


def test_a_build_that_was_stopped_goes_on(run, built, tmp_path, monkeypatch):
    """Stopped in its second piece: the first is there already, and the result is the same, store
    and all.
    """
    catalog = catalog_of(run)
    splits = {**catalog.splits, "train": Tagged(catalog.splits["train"])}
    monkeypatch.setattr(
        build, "open_catalog", lambda _: dataclasses.replace(catalog, splits=splits)
    )
    whole = build.build_index(run, tmp_path / "whole")
    monkeypatch.setattr(embed, "_BATCHES_PER_COMMIT", 1)
    embedded, write = [], VectorFiles.write_rows

    def stopping(self, name, at, lines):
        if name == layout.FEATURES:
            embedded.append((at, len(lines)))
            if len(embedded) == 2:
                raise KeyboardInterrupt
        write(self, name, at, lines)

    monkeypatch.setattr(VectorFiles, "write_rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        build.build_index(run, tmp_path / "index")
    with pytest.raises(InputError, match="no product index there"):
        layout.current_version(tmp_path / "index")
    again = build.build_index(run, tmp_path / "index")
    assert embedded[2][0] == embedded[1][0] > 0  # went on where it was stopped
    assert verify_version(again, checksums=True) == []
    for name in (layout.FEATURES, layout.CODES, layout.ROW_PRODUCTS):
        assert (again / name).read_bytes() == (built / name).read_bytes()
    assert all_cards(again) == all_cards(whole)
    assert [product.tags for product in all_cards(again)] == [f"tag {c}" for c in range(11)]


def all_cards(version):
    store = ProductStore(version / layout.PRODUCTS)
    found = list(store.all_products())
    store.close()
    return found


def test_what_is_damaged_is_built_anew(run, built, tmp_path, monkeypatch):
    """A build whose files turn out to be damaged is thrown away, not gone on from; and a version in
    use that cannot be read is no obstacle.
    """
    with monkeypatch.context() as patch:
        patch.setattr(build, "verify_version", lambda _: ["features.f16: broken"])
        with pytest.raises(
            InputError, match="features.f16: broken; the version in use stays, build again"
        ):
            build.build_index(run, tmp_path)
    assert not (tmp_path / layout.BUILDING).exists()
    version = build.build_index(run, tmp_path)
    (version / layout.PRODUCTS).write_bytes(b"junk")
    again = build.build_index(run, tmp_path)
    assert verify_version(again, checksums=True) == []
    assert again != version


def test_another_run_does_not_go_on_from_it(run, tmp_path, monkeypatch, capsys):
    """What a stopped build left is of other bits: it is made anew; large enough for lists, it has
    them.
    """
    with monkeypatch.context() as patch:
        patch.setattr(build, "_write_codes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build.build_index(run, tmp_path, bits=64)
    monkeypatch.setattr(inverted_lists, "MIN_ROWS", 100)
    manifest = layout.read_index_manifest(build.build_index(run, tmp_path, bits=128))
    assert manifest.bits == 128
    assert set(layout.INVERTED_LISTS) <= set(manifest.sha256)
    assert "of another model, catalogue or version; built anew" in capsys.readouterr().err


def grown(catalog):
    """The catalogue later: two products of before are gone, two are new with the photos of two
    others.
    """
    classes = catalog.classes
    sku = [*classes.sku[:9], "new-a", "new-b"]
    discontinued = np.zeros(11, bool)
    discontinued[0] = True
    table = ClassTable(
        sku, list(classes.title), list(classes.category), classes.counts, discontinued
    )
    return dataclasses.replace(catalog, classes=table, data_hash="grown")


def test_a_catalogue_that_has_grown(run, built, tmp_path, monkeypatch):
    """Products are matched by SKU: new ones have rows, those that are gone are no answer. Photos
    that the version in use has are not embedded again.
    """
    index = tmp_path / "index"
    build.build_index(run, index)
    catalog, counted = grown(catalog_of(run)), []
    monkeypatch.setattr(build, "open_catalog", lambda _: catalog)
    original = embed.PhotoBatchLoader

    def counting(split, preprocessing, size, indices):
        counted.append(len(indices))
        return original(split, preprocessing, size, indices)

    monkeypatch.setattr(embed, "PhotoBatchLoader", counting)
    version = build.build_index(run, index)
    assert verify_version(version, checksums=True) == []
    assert sum(counted) == 0
    opened = LocalIndex(version)
    gone = [0, 9, 10]
    assert opened.active_products().deleted.tolist() == gone
    assert opened.active_products().new_products.tolist() == [
        11,
        12,
    ]
    assert opened.products([*gone, 11, 12])[:3] == [None] * 3
    assert [product.sku for product in opened.products([11, 12])] == ["new-a", "new-b"]
    logits = np.zeros(11, np.float32)
    logits[gone] = 100
    numbers, _ = top_products(
        ProductScores.from_logits(np.ones(16, np.float32), logits, opened.active_products()), 20
    )
    assert not set(gone) & set(numbers.tolist())
    assert {11, 12} <= set(numbers.tolist())
    opened.close()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workdir", "nothing"], "wanted the config.json of a training run"),
        (["--bits", "100"], "bits=100, wanted a multiple of 8"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    command = ["index", "build", "--workdir", str(run), "--out", "index", *flags]
    assert cli.main(command) == cli.INPUT_ERROR
    assert said in capsys.readouterr().err
    assert not (tmp_path / "index" / "current").exists()


@pytest.mark.slow
def test_kill_9_at_random_moments_never_leaves_a_broken_index(run, built, tmp_path):
    """30 times, with a version in use that has to stay whole and readable; at last it is built to
    its end.
    """
    index = tmp_path / "index"
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "import jax\n"
        "jax.config.update('jax_num_cpu_devices', 8)\n"
        "from sicot_jax.indexing import build\n"
        "build._PIECE = 1\n"
        "write = VectorFiles.write_rows\n"
        "def slowly(self, *arguments):\n"
        "    time.sleep(0.02)\n"
        "    write(self, *arguments)\n"
        "    time.sleep(0.02)\n"
        "VectorFiles.write_rows = slowly\n"
        "print('started', flush=True)\n"
        "build.build_index(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    rng, ended = random.Random(0), 0
    build.build_index(run, index)
    for _ in range(30):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(run), str(index)], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        process.stdout.readline()
        time.sleep(rng.uniform(0.1, 8.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        ended += process.returncode == 0
        version = layout.current_version(index)
        assert verify_version(version, checksums=True) == []
        opened = LocalIndex(version)
        assert len(opened.nearest(np.ones((1, 16)), 3)[0].products) == 3
        opened.close()
    assert verify_version(build.build_index(run, index), checksums=True) == []
    assert ended < 30


def test_the_run_s_class_table_is_the_model_s(run, built):
    """The manifest and the store are told apart from a hash of another catalogue by SKU alone."""
    assert (
        class_table_hash(catalog_of(run))
        == json.loads((run / "config.json").read_text())["data"]["class_table"]
    )
