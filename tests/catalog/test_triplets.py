"""Triplets from a file: which can be used, errors, and from simulated clicks to a training step."""

import collections
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from flax import nnx
from helpers.triplet_files import (
    CATALOG,
    ROWS,
    SKU,
    SPEC,
    TRAIN,
    triplet_config,
    triplets_and_others,
    write_triplets,
)
from PIL import Image
from pyarrow import parquet

from sicot_jax import config as config_lib
from sicot_jax.catalog.batches import ProcessShard, TrainBatchLoader, train_batch_loader
from sicot_jax.catalog.sampling import RecordSampler
from sicot_jax.catalog.sources.generated import open_generated
from sicot_jax.catalog.triplets import TEXT_COLUMNS, open_triplets
from sicot_jax.cli import main as cli
from sicot_jax.config import Config, ConfigError, DataConfig, LossConfig
from sicot_jax.config.batch_plan import num_triplets
from sicot_jax.errors import InputError
from sicot_jax.events import simulator
from sicot_jax.events.simulator import ClickModel
from sicot_jax.training import loop
from sicot_jax.training.auxiliary_losses import triplet_loss
from sicot_jax.training.loop import train
from sicot_jax.training.model import DataShape, build_model
from sicot_jax.training.optimizer import trained_parts


def test_a_query_that_is_a_training_photo_is_that_record(tmp_path):
    """Of the class that was clicked: with its title, and never the clicked photo itself. Of
    another: its photo alone.
    """
    first = int(np.flatnonzero(TRAIN.labels == 0)[0])
    name = TRAIN[first]["image_id"]
    write_triplets(tmp_path, [("r", name, 0, 1, 1.0), ("r", name, 2, 3, 1.0)])
    table = open_triplets(triplet_config(tmp_path).data, CATALOG)
    assert table.query.tolist() == [first, len(TRAIN)]
    assert len(table.split) == len(TRAIN) + 1
    np.testing.assert_array_equal(table.split[len(TRAIN)]["image"], TRAIN[first]["image"])
    assert table.split[len(TRAIN)]["class_id"] == 2
    assert table.split[len(TRAIN)]["title"] == ""
    loader = train_batch_loader(CATALOG, triplet_config(tmp_path, batch=12, share=1.0))
    drawn = np.concatenate([loader.sampler(step).reshape(-1, 3) for step in range(100)])
    of_first = drawn[drawn[:, 0] == first]
    assert set(of_first[:, 1]) == set(np.flatnonzero(TRAIN.labels == 0)) - {first}


def test_what_cannot_be_used_is_counted(tmp_path):
    alone = dataclasses.replace(SPEC, train_photos=5)  # each class has one photo
    catalog = open_generated(alone)
    name = catalog.splits["train"][0]["image_id"]
    rows = [
        ("r0", "q0", 0, 1, 1.0),
        ("r1", "q0", "no such", 1, 1.0),
        ("r1", "q0", 1, "no such", 1.0),
        ("r2", "gone", 0, 1, 1.0),
        ("r3", name, 0, 1, 1.0),
        ("r3", name, 2, 0, 1.0),
        ("r4", "q1", 2, 2, 1.0),
        ("r5", "q1", 2, 3, 0.0),
    ]
    write_triplets(tmp_path, rows)
    table = open_triplets(triplet_config(tmp_path).data, catalog)
    assert table.summary() == (
        "1 of 8 triplets, query photos: 1; left out: 2 of a product that is not in "
        "the catalogue, 1 whose query photo is missing, "
        "1 whose query photo is the only photo of the clicked product, "
        "1 whose query photo shows the product not clicked, "
        "1 of one product twice, 1 of weight 0"
    )
    discontinued = dataclasses.replace(
        catalog, splits=catalog.splits | {"train": _WithoutTheLastTwo(catalog.splits["train"])}
    )
    assert (
        open_triplets(triplet_config(tmp_path).data, discontinued).skipped[
            "of a product without a training photo"
        ]
        == 1
    )
    before = table.digest
    (tmp_path / "queries" / "gone.png").write_bytes((tmp_path / "queries" / "q0.png").read_bytes())
    assert open_triplets(triplet_config(tmp_path).data, catalog).digest != before


class _WithoutTheLastTwo:
    """Without the photos of the last two classes, which have one each."""

    def __init__(self, split):
        self.split, self.labels = split, split.labels[:-2]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.split[index]


def refused(data, match):
    with pytest.raises(InputError, match=match) as error:
        open_triplets(data, CATALOG)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_learned_from(tmp_path):
    write_triplets(tmp_path, [("r", "gone", 0, 1, 1.0)])
    data = triplet_config(tmp_path).data
    refused(data, "no triplet to learn from; left out: 1 whose query photo is missing; wanted")
    refused(
        dataclasses.replace(data, queries=str(tmp_path / "none")), "none: no folder, wanted that of"
    )
    write_triplets(tmp_path, [("r", "q0", 0, 1, float("nan"))])
    refused(data, "a weight that is negative or no number")
    parquet.write_table(
        pa.table({"query_image_id": ["q"], "clicked": ["a"]}), tmp_path / "t.parquet"
    )
    refused(
        data,
        "no column request_id and not_clicked and weight; "
        "wanted the Parquet file of `sicot events triplets`",
    )
    no_rows = {name: pa.array([], pa.string()) for name in TEXT_COLUMNS}
    parquet.write_table(
        pa.table(no_rows | {"weight": pa.array([], pa.float32())}), tmp_path / "t.parquet"
    )
    refused(data, "no triplet to learn from, no row")
    (tmp_path / "t.parquet").write_text("no Parquet")
    refused(data, "t.parquet: .*; wanted the Parquet file")
    refused(
        dataclasses.replace(data, triplets=str(tmp_path / "nothing")),
        "nothing: .*; wanted the Parquet file",
    )


def test_a_photo_that_breaks_or_goes_is_named(tmp_path):
    write_triplets(tmp_path, ROWS[:1])
    loader = train_batch_loader(CATALOG, triplet_config(tmp_path))
    (tmp_path / "queries" / "q0.png").write_bytes(b"no photo")
    with pytest.raises(
        InputError,
        match=r"query photo .*q0.png: not a photo.*; photos have to stay until the run has ended",
    ):
        loader(0)
    (tmp_path / "queries" / "q0.png").unlink()
    with pytest.raises(InputError, match=r"query photo .*q0.png: No such file"):
        loader(0)


def test_configs_that_cannot_be(tmp_path):
    with pytest.raises(
        ConfigError, match=r"data.triplet_share=0.5 of a micro-batch of 4 photos holds no triplet"
    ):
        triplet_config(tmp_path, batch=8, parts=2)
    with pytest.raises(ConfigError, match=r"data.triplet_share=1.5, wanted a share"):
        triplet_config(tmp_path, share=1.5)
    with pytest.raises(ConfigError, match=r"data.queries='x' without data.triplets"):
        Config(data=DataConfig(queries="x"))
    with pytest.raises(ConfigError, match=r"data.triplets with data.on_device=True"):
        Config(data=DataConfig(source="arrays", path="x", on_device=True, triplets="x"))
    assert [num_triplets(12, share) for share in (0.25, 0.5, 0.75, 1.0)] == [1, 2, 3, 4]
    assert (
        num_triplets(30, 0.1) == 1
    )  # 30 * 0.1 is a little more than 3, 30 * 0.7 a little less than 21
    assert num_triplets(30, 0.7) == 7


@pytest.fixture
def clicks_config(tmp_path):
    """Config of triplets from simulated clicks on the tiny catalogue, made by the command line."""
    tiny = config_lib.load_config("tiny")
    catalog = open_generated(tiny.data.generated)
    queries = catalog.splits["test"]
    folder = tmp_path / "queries"
    folder.mkdir()
    names = [f"query{i}" for i in range(len(queries))]
    for i, name in enumerate(names):
        Image.fromarray(queries[i]["image"]).save(folder / f"{name}.png")
    rng = np.random.default_rng(0)
    shown = np.stack([rng.permutation(11)[:6] for _ in names])
    like = np.where(shown == queries.labels[:, None], 3.0, -1.0)
    skus = list(catalog.classes.sku)
    results = simulator.results_from_scores(names, skus, shown, like, np.zeros(11))
    simulator.write_simulated_log(
        results,
        tmp_path / "events.parquet",
        ClickModel(shuffled_share=1.0),
        num_requests=800,
        seed=1,
    )
    out = tmp_path / "t.parquet"
    assert (
        cli.main(
            [
                "events",
                "triplets",
                str(tmp_path / "events.parquet"),
                "--out",
                str(out),
                "--threads",
                "1",
            ]
        )
        == 0
    )
    data = dataclasses.replace(tiny.data, triplets=str(out), queries=str(folder))
    return dataclasses.replace(
        tiny,
        data=data,
        mesh=config_lib.MeshConfig(data=1),
        model=dataclasses.replace(tiny.model, localization="features"),
        loss=LossConfig(background_suppression=1.0, triplet=1.0),
        train=dataclasses.replace(
            tiny.train, steps=3, batch_size=12, checkpoint_every_steps=2, log_every_steps=1
        ),
    )


@pytest.mark.slow
def test_from_simulated_clicks_to_a_run_that_resumes(clicks_config, tmp_path, monkeypatch, capsys):
    original, workdir = TrainBatchLoader.__call__, tmp_path / "run"

    def dying(self, step):
        if step == 2:
            raise ZeroDivisionError("killed")
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(
            loop,
            "prefetch",
            lambda make, start, stop, **_: (make(step) for step in range(start, stop)),
        )
        patch.setattr(TrainBatchLoader, "__call__", dying)
        with pytest.raises(ZeroDivisionError):
            train(clicks_config, workdir)
    assert re.search(
        r"triplets: (\d+) of \1 triplets, query photos: \d\d\n", capsys.readouterr().err
    )

    photo = sorted((tmp_path / "queries").iterdir())[0]
    kept = photo.read_bytes()
    photo.unlink()
    with pytest.raises(InputError, match=r"not the query photos that .* began with"):
        train(clicks_config, workdir)
    photo.write_bytes(kept)
    file = tmp_path / "t.parquet"
    content = file.read_bytes()
    parquet.write_table(parquet.read_table(file).slice(1), file)
    with pytest.raises(ConfigError, match=r"holds another run \(triplets: \w{12} -> \w{12}\)"):
        train(clicks_config, workdir)
    with pytest.raises(ConfigError, match=r"triplets: \w{12} -> none"):
        train(
            dataclasses.replace(
                clicks_config, data=dataclasses.replace(clicks_config.data, triplets="", queries="")
            ),
            workdir,
        )
    moved = tmp_path / "elsewhere.parquet"
    file.unlink()
    moved.write_bytes(content)
    clicks_config = dataclasses.replace(
        clicks_config, data=dataclasses.replace(clicks_config.data, triplets=str(moved))
    )
    assert train(clicks_config, workdir)["step_of_end"] == 3
    log_records = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    records = [line for line in log_records if line["kind"] == "train"]
    assert len(records) == 3
    assert all(
        np.isfinite([line["background_suppression"], line["triplet"], line["total"]]).all()
        for line in records
    )


@pytest.mark.slow
def test_the_triplet_loss_trains_localization_and_backbone(clicks_config, one_device):
    """The triplet loss alone gives gradients to the localization branch and the backbone."""
    loader = train_batch_loader(open_generated(clicks_config.data.generated), clicks_config)
    batch = loader(0)
    shape = DataShape.of(open_generated(clicks_config.data.generated))
    graph, params, rest = nnx.split(build_model(clicks_config, shape), nnx.Param, ...)
    trained = trained_parts(clicks_config.optim, nnx.to_pure_dict(params))
    pixels = jnp.asarray(clicks_config.preprocessing.normalize(batch["image"]))
    token_ids, label = jnp.asarray(batch["token_ids"]), jnp.asarray(batch["label"])

    def loss(params):
        outputs = nnx.merge(graph, params, rest, copy=True)(pixels, token_ids, train=trained)
        unit = outputs.foreground
        return triplet_loss(unit, unit, label, label, margin=2.0)

    gradient = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))["visual"]
    for part in ("localization", "resnet"):
        norms = [float(np.linalg.norm(x)) for x in jax.tree.leaves(gradient[part])]
        assert max(norms) > 0
        assert np.isfinite(norms).all()


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
