"""Batches with triplets: against triplets by hand, in several processes, and from visitors to a
training step.
"""

import collections
import dataclasses
import json
import re

import jax
import numpy as np
import pyarrow as pa
import pytest
from flax import nnx
from PIL import Image
from pyarrow import parquet

from sicot_jax import config as config_lib
from sicot_jax.catalog.batches import train_batches
from sicot_jax.catalog.sampling import Sampler
from sicot_jax.catalog.sources.generated import open_generated
from sicot_jax.catalog.triplets import open_clicks
from sicot_jax.classifier import losses
from sicot_jax.cli import main as cli
from sicot_jax.config import Config, ConfigError, DataConfig, GeneratedSpec, LossConfig, TrainConfig
from sicot_jax.config.batch_plan import num_triplets
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.events import simulator as visitors
from sicot_jax.training.loop import train
from sicot_jax.training.optimizer import trained_parts
from sicot_jax.training.model import DataShape, build_model

SPEC = GeneratedSpec(
    num_classes=5, train_photos=40, image_size=12, word_vectors="random", word_vector_width=8
)
SMALL = Preprocessing(height=8, width=8, resize_height=10, resize_width=10)
CATALOG = open_generated(SPEC)
TRAIN = CATALOG.splits["train"]
SKU = list(CATALOG.classes.sku)


def write(folder, rows, photos=("q0", "q1", "q2")):
    """rows: (request_id, query_image_id, clicked class or SKU, not clicked, weight). Query photo i
    is of grey 80 * i.
    """
    texts = [[SKU[c] if isinstance(c, int) else c for c in row[:4]] for row in rows]
    columns = dict(
        zip(
            ("request_id", "query_image_id", "clicked", "not_clicked"),
            zip(*texts, strict=True),
            strict=True,
        )
    )
    weight = pa.array([row[4] for row in rows], pa.float32())
    parquet.write_table(pa.table(columns | {"weight": weight}), folder / "t.parquet")
    (folder / "queries").mkdir(exist_ok=True)
    for i, name in enumerate(photos):
        Image.new("RGB", (12, 12), (80 * i,) * 3).save(folder / "queries" / f"{name}.png")


def config(folder, *, batch=12, parts=1, seed=0, share=0.5, **train_options):
    data = DataConfig(
        generated=SPEC,
        max_tokens=5,
        triplets=str(folder / "t.parquet"),
        queries=str(folder / "queries"),
        triplet_share=share,
    )
    return Config(
        seed=seed,
        data=data,
        preprocessing=SMALL,
        train=TrainConfig(batch_size=batch, micro_batches=parts, **train_options),
    )


ROWS = [("r0", "q0", 0, 1, 1.0), ("r1", "q1", 2, 3, 3.0), ("r2", "q0", 3, 0, 4.0)]


def triplets(make, step, parts, count):
    """Record indices of the triplets of a batch: [parts, count, 3]; and the others: [parts, rest]."""
    rows = make.sampler(step).reshape(-1, parts).T
    return rows[:, : 3 * count].reshape(parts, count, 3), rows[:, 3 * count :]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_batch_holds_what_the_triplets_say_and_ordinary_photos(tmp_path, parts):
    write(tmp_path, ROWS)
    make = train_batches(CATALOG, config(tmp_path, batch=12 * parts, parts=parts))
    said = {("q0.png", 0, 1), ("q1.png", 2, 3), ("q0.png", 3, 0)}
    for step in range(5):
        chosen, others = triplets(make, step, parts, 2)
        for query, clicked, not_clicked in chosen.reshape(-1, 3).tolist():
            record = make.split[query]
            assert query >= len(TRAIN) > max(clicked, not_clicked)
            labels = TRAIN.labels[[clicked, not_clicked]].tolist()
            assert (record["image_id"], *labels) in said
            assert record["class_id"] == make.split.labels[query] == labels[0]
            assert record["sku"] == SKU[labels[0]]
        assert others.shape == (parts, 6)
        assert others.max() < len(TRAIN)
        np.testing.assert_array_equal(others.ravel(), Sampler(TRAIN.labels, 6 * parts, 0)(step))


def test_the_batch_has_the_photo_and_no_title(tmp_path):
    """A query is of one grey; titles "shuffled" would give it another photo's."""
    write(tmp_path, ROWS[1:2])
    for title in ("raw", "masked", "shuffled"):
        plain = config(tmp_path)
        chosen = dataclasses.replace(
            plain, data=dataclasses.replace(plain.data, title=title), loss=LossConfig()
        )
        batch = train_batches(CATALOG, chosen)(3)
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
    boxes = train_batches(CATALOG, known)(3)["box"]
    assert not boxes[[0, 3]].any()
    assert boxes[1].any()


def test_triplets_are_drawn_by_weight_and_photos_evenly(tmp_path):
    """1 : 3 : 4 of 4,000; four deviations of a binomial. Class 2's photos each as often."""
    write(tmp_path, ROWS)
    make = train_batches(CATALOG, config(tmp_path, batch=12, share=1.0))
    drawn = np.concatenate([make.sampler(step).reshape(-1, 3) for step in range(1000)])
    counts = collections.Counter(TRAIN.labels[drawn[:, 1]].tolist())
    for label, share in ((0, 1 / 8), (2, 3 / 8), (3, 4 / 8)):
        assert abs(counts[label] - 4000 * share) < 4 * np.sqrt(4000 * share * (1 - share))
    photos = np.flatnonzero(TRAIN.labels == 2)
    each = np.array([np.sum(drawn[:, 1] == photo) for photo in photos])
    assert np.all(np.abs(each - each.mean()) < 5 * np.sqrt(each.mean()))
    assert set(drawn[TRAIN.labels[drawn[:, 1]] == 2, 2]) == set(np.flatnonzero(TRAIN.labels == 3))


def test_the_same_seed_and_step_are_the_same_batch_and_processes_share_it(tmp_path):
    write(tmp_path, ROWS)
    chosen = config(tmp_path, batch=24, parts=2)
    make, again = (train_batches(CATALOG, chosen) for _ in range(2))
    for step in (4, 1):
        whole = make(step)
        for name, array in whole.items():
            np.testing.assert_array_equal(again(step)[name], array)
            parts = [
                dataclasses.replace(make, process_index=i, process_count=3)(step)[name]
                for i in range(3)
            ]
            np.testing.assert_array_equal(np.concatenate(parts), array)
    other = train_batches(CATALOG, dataclasses.replace(chosen, seed=1))
    assert (other.sampler(1) != make.sampler(1)).any()
    assert (make.sampler(0) != make.sampler(1)).any()


def test_a_growing_batch_has_twice_the_triplets(tmp_path):
    write(tmp_path, ROWS)
    make = train_batches(
        CATALOG, config(tmp_path, batch=12, grow_every_epochs=0.5, max_micro_batches=2)
    )
    sizes = [len(make.sampler(step)) for step in range(4)]
    assert sizes == [12, 12, 24, 24]
    chosen, others = triplets(make, 3, 2, 2)
    assert (chosen[..., 0] >= len(TRAIN)).all()
    assert others.max() < len(TRAIN)


def test_a_query_that_is_a_training_photo_is_that_record(tmp_path):
    """Of the class that was clicked: with its title, and never its own clicked photo. Of another:
    its photo alone.
    """
    first = int(np.flatnonzero(TRAIN.labels == 0)[0])
    name = TRAIN[first]["image_id"]
    write(tmp_path, [("r", name, 0, 1, 1.0), ("r", name, 2, 3, 1.0)])
    clicks = open_clicks(config(tmp_path).data, CATALOG)
    assert clicks.query.tolist() == [first, len(TRAIN)]
    assert len(clicks.split) == len(TRAIN) + 1
    np.testing.assert_array_equal(clicks.split[len(TRAIN)]["image"], TRAIN[first]["image"])
    assert clicks.split[len(TRAIN)]["class_id"] == 2
    assert clicks.split[len(TRAIN)]["title"] == ""
    make = train_batches(CATALOG, config(tmp_path, batch=12, share=1.0))
    drawn = np.concatenate([make.sampler(step).reshape(-1, 3) for step in range(100)])
    own = drawn[drawn[:, 0] == first]
    assert set(own[:, 1]) == set(np.flatnonzero(TRAIN.labels == 0)) - {first}


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
    write(tmp_path, rows)
    clicks = open_clicks(config(tmp_path).data, catalog)
    assert clicks.summary() == (
        "1 of 8 triplets, query photos: 1; left out: 2 of a product that the catalogue has not, 1 whose query photo is gone, "
        "1 whose query photo is all that the clicked product has, 1 whose query photo shows what was not clicked, "
        "1 of one product twice, 1 of weight 0"
    )
    discontinued = dataclasses.replace(
        catalog, splits=catalog.splits | {"train": _Less(catalog.splits["train"])}
    )
    assert (
        open_clicks(config(tmp_path).data, discontinued).left_out[
            "of a product without a training photo"
        ]
        == 1
    )
    before = clicks.digest
    (tmp_path / "queries" / "gone.png").write_bytes((tmp_path / "queries" / "q0.png").read_bytes())
    assert open_clicks(config(tmp_path).data, catalog).digest != before


class _Less:
    """Without the photos of the last two classes, which have one each."""

    def __init__(self, split):
        self.split, self.labels = split, split.labels[:-2]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.split[index]


def refused(data, match):
    with pytest.raises(InputError, match=match) as error:
        open_clicks(data, CATALOG)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_learned_from(tmp_path):
    write(tmp_path, [("r", "gone", 0, 1, 1.0)])
    data = config(tmp_path).data
    refused(data, "no triplet to learn from; left out: 1 whose query photo is gone; wanted")
    refused(
        dataclasses.replace(data, queries=str(tmp_path / "none")), "none: no folder, wanted that of"
    )
    write(tmp_path, [("r", "q0", 0, 1, float("nan"))])
    refused(data, "a weight that is negative or no number")
    parquet.write_table(
        pa.table({"query_image_id": ["q"], "clicked": ["a"]}), tmp_path / "t.parquet"
    )
    refused(
        data,
        "no column request_id and not_clicked and weight; wanted the Parquet file of `sicot events triplets`",
    )
    parquet.write_table(pa.table({name: pa.array([], pa.string()) for name in ("request_id", "query_image_id", "clicked",
        "not_clicked")} | {"weight": pa.array([], pa.float32())}), tmp_path / "t.parquet")  # fmt: skip
    refused(data, "no triplet to learn from, no row")
    (tmp_path / "t.parquet").write_text("no Parquet")
    refused(data, "t.parquet: .*; wanted the Parquet file")
    refused(
        dataclasses.replace(data, triplets=str(tmp_path / "nothing")),
        "nothing: .*; wanted the Parquet file",
    )


def test_a_photo_that_breaks_or_goes_is_named(tmp_path):
    write(tmp_path, ROWS[:1])
    make = train_batches(CATALOG, config(tmp_path))
    (tmp_path / "queries" / "q0.png").write_bytes(b"no photo")
    with pytest.raises(
        InputError,
        match="query photo .*q0.png: not a photo.*; photos have to stay until the run has ended",
    ):
        make(0)
    (tmp_path / "queries" / "q0.png").unlink()
    with pytest.raises(InputError, match="query photo .*q0.png: No such file"):
        make(0)


def test_configs_that_cannot_be(tmp_path):
    with pytest.raises(
        ConfigError, match=r"data.triplet_share=0.5 of a micro-batch of 4 photos holds no triplet"
    ):
        config(tmp_path, batch=8, parts=2)
    with pytest.raises(ConfigError, match=r"data.triplet_share=1.5, wanted a share"):
        config(tmp_path, share=1.5)
    with pytest.raises(ConfigError, match="data.queries='x' without data.triplets"):
        Config(data=DataConfig(queries="x"))
    with pytest.raises(ConfigError, match="data.triplets with data.on_device=True"):
        Config(data=DataConfig(source="arrays", path="x", on_device=True, triplets="x"))
    assert [num_triplets(12, share) for share in (0.25, 0.5, 0.75, 1.0)] == [1, 2, 3, 4]
    assert (
        num_triplets(30, 0.1) == 1
    )  # 30 * 0.1 is a little more than 3, 30 * 0.7 a little less than 21
    assert num_triplets(30, 0.7) == 7


@pytest.fixture
def asked(tmp_path):
    """Visitors who ask the tiny catalogue with its test photos: events, photos, and the triplets of
    the command line.
    """
    tiny = config_lib.load_config("tiny")
    catalog = open_generated(tiny.data.generated)
    asked_with = catalog.splits["test"]
    folder = tmp_path / "queries"
    folder.mkdir()
    names = [f"query{i}" for i in range(len(asked_with))]
    for i, name in enumerate(names):
        Image.fromarray(asked_with[i]["image"]).save(folder / f"{name}.png")
    rng = np.random.default_rng(0)
    shown = np.stack([rng.permutation(11)[:6] for _ in names])
    like = np.where(shown == asked_with.labels[:, None], 3.0, -1.0)
    lists = visitors.from_scores(names, list(catalog.classes.sku), shown, like, np.zeros(11))
    visitors.write(
        lists, tmp_path / "events.parquet", visitors.Behaviour(shuffled=1.0), requests=800, seed=1
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
def test_from_visitors_to_a_run_that_resumes(asked, tmp_path, monkeypatch, capsys):
    from sicot_jax.catalog import batches as pipeline

    original, workdir = pipeline.TrainBatches.__call__, tmp_path / "run"

    def dying(self, step):
        if step == 2:
            raise ZeroDivisionError("killed")
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(
            pipeline,
            "ahead",
            lambda make, start, stop, **_: (make(step) for step in range(start, stop)),
        )
        patch.setattr(pipeline.TrainBatches, "__call__", dying)
        with pytest.raises(ZeroDivisionError):
            train(asked, workdir)
    assert re.search(r"clicks: (\d+) of \1 triplets, query photos: \d\d\n", capsys.readouterr().err)

    photo = sorted((tmp_path / "queries").iterdir())[0]
    kept = photo.read_bytes()
    photo.unlink()
    with pytest.raises(InputError, match="not the query photos that .* began with"):
        train(asked, workdir)
    photo.write_bytes(kept)
    file = tmp_path / "t.parquet"
    whole = file.read_bytes()
    parquet.write_table(parquet.read_table(file).slice(1), file)
    with pytest.raises(ConfigError, match=r"holds another run \(triplets: \w{12} -> \w{12}\)"):
        train(asked, workdir)
    with pytest.raises(ConfigError, match=r"triplets: \w{12} -> none"):
        train(
            dataclasses.replace(
                asked, data=dataclasses.replace(asked.data, triplets="", queries="")
            ),
            workdir,
        )
    moved = tmp_path / "elsewhere.parquet"
    file.unlink()
    moved.write_bytes(whole)
    asked = dataclasses.replace(asked, data=dataclasses.replace(asked.data, triplets=str(moved)))
    assert train(asked, workdir)["step_of_end"] == 3
    lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["kind"] == "train"]
    assert len(told) == 3
    assert all(np.isfinite([line["box"], line["triplet"], line["total"]]).all() for line in told)


def test_triplets_shape_the_box(asked, one_device):
    """The gradient of the triplet term alone, over a batch of triplets, by the box branch and by
    the backbone.
    """
    make = train_batches(open_generated(asked.data.generated), asked)
    batch = make(0)
    shape = DataShape.of(open_generated(asked.data.generated))
    graph, params, rest = nnx.split(build_model(asked, shape), nnx.Param, ...)
    trained = trained_parts(asked.optim, nnx.to_pure_dict(params))
    pixels = asked.preprocessing.normalise(batch["image"])

    def loss(params):
        unit = nnx.merge(graph, params, rest, copy=True)(pixels, batch["token_ids"], train=trained)[
            "inside"
        ]
        return losses.triplet_loss(unit, unit, batch["label"], batch["label"], margin=2.0)

    gradient = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))["visual"]
    for part in ("box", "resnet"):
        norms = [float(np.linalg.norm(x)) for x in jax.tree.leaves(gradient[part])]
        assert max(norms) > 0
        assert np.isfinite(norms).all()
