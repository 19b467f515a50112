"""Training that starts from another class table: rows by product, new ones from their photos."""

import dataclasses

import jax
import numpy as np
import pytest

import sicot_jax
from sicot_jax import config as config_lib
from sicot_jax.catalog.catalog import Catalog, ClassTable
from sicot_jax.catalog.open import open_catalog
from sicot_jax.classifier.class_weights import gather_rows
from sicot_jax.errors import InputError
from sicot_jax.parallel import mesh
from sicot_jax.training.checkpoint import Checkpoints
from sicot_jax.training.loop import train
from sicot_jax.training.model import DataShape
from sicot_jax.training.restore import restore_params
from sicot_jax.training.run import Run, mesh_of_config, read_run
from sicot_jax.training.setup import make_setup
from sicot_jax.training.state import abstract_state


def tiny(*overrides):
    return config_lib.load_config(
        "tiny", ["--config.train.steps=3", *(f"--config.{flag}" for flag in overrides)]
    )


@pytest.fixture(scope="module")
def run(make_once):
    """A run whose rows point to the photos of their products: few steps do not reach that."""
    config = tiny("loss.mixed=0", "train.steps=60")
    return make_once("warm", lambda folder: train(config, folder / "run")) / "run"


def train_frozen(config, workdir, catalog=None) -> tuple[Run, np.ndarray, np.ndarray]:
    """The run, its kernel and bias after one step that changes only biases, by a hair."""
    still = config_lib.override_config(
        config, ["optim.trainable=classifier/bias", "optim.learning_rate=1e-9", "train.steps=1"]
    )
    train(still, workdir, catalog=catalog)
    trained = read_run(workdir)
    device_mesh = mesh_of_config(trained.config)
    with jax.set_mesh(device_mesh):
        setup = make_setup(trained.config, trained.shape, device_mesh)
        checkpoints = Checkpoints(workdir, num_classes=trained.shape.num_classes)
        state = checkpoints.restore(abstract_state(setup))
        checkpoints.close()
    count = trained.shape.num_classes
    return (
        trained,
        np.asarray(state.classifier.weights.kernel)[:count],
        np.asarray(state.classifier.weights.bias)[:count],
    )


def test_rows_are_gathered_from_all_devices(device_mesh):
    rows = np.arange(48, dtype=np.float32).reshape(16, 3)
    index = np.array([3, -1, 15, 0, 3, 8, -1, 7] * 2, np.int32)
    placed = mesh.shard_rows(rows.shape, rows, device_mesh)
    gathered = gather_rows(placed, mesh.shard_class_vector(index, device_mesh))
    np.testing.assert_array_equal(gathered, np.where(index[:, None] >= 0, rows[index], 0))
    assert gathered.sharding == placed.sharding


def test_rows_by_device_are_the_rows(device_mesh):
    rows = np.arange(33, dtype=np.float32).reshape(11, 3)
    placed = mesh.shard_rows(rows.shape, rows, device_mesh)
    assert placed.shape[0] == mesh.pad_classes(11, device_mesh)
    pieces = list(mesh.rows_by_device(placed, 11))
    assert max(map(len, pieces)) <= -(-16 // device_mesh.size) or device_mesh.size == 1
    np.testing.assert_array_equal(np.concatenate(pieces), rows)


def with_skus(catalog: Catalog, sku: list[str]) -> Catalog:
    classes = catalog.classes
    table = ClassTable(sku, classes.title, classes.category, classes.counts, classes.discontinued)
    return dataclasses.replace(catalog, classes=table, data_hash="0" * 64)


@pytest.mark.slow
def test_new_products_start_from_their_photos(run, tmp_path, capsys):
    """11 products, of which the run knew 8."""
    config = tiny("loss.mixed=0", f"model.init_from={run}")
    catalog = open_catalog(config.data)
    catalog = with_skus(catalog, [*catalog.classes.sku[:8], "new-a", "new-b", "new-c"])
    _, kernel, bias = train_frozen(config, tmp_path / "more", catalog)
    assert "3 products new: rows of 3 from their photos" in capsys.readouterr().err
    _, old, old_bias = train_frozen(config, tmp_path / "same")
    old, old_bias = old[:8], old_bias[:8]
    np.testing.assert_array_equal(kernel[:8], old)
    np.testing.assert_allclose(bias[:8], old_bias, atol=1e-6)
    split, recognizer = catalog.splits["train"], sicot_jax.load(run)
    vectors = recognizer.embed([split[i]["image"] for i in range(len(split))])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    means = np.stack([vectors[np.flatnonzero(split.labels == c)[:16]].mean(0) for c in range(11)])
    away = means - means[:8].mean(0)
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    scale = np.mean(np.sum((old - old.mean(0)) * away[:8], 1))
    assert scale > 0
    np.testing.assert_allclose(kernel[8:], old.mean(0) + scale * away[8:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias[8:], np.full(3, old_bias.mean()), atol=1e-5)


@pytest.mark.slow
def test_rows_follow_their_sku_and_not_their_class_id(run, tmp_path, capsys):
    """Two products have swapped rows, one is deleted, one is new."""
    config = tiny("loss.mixed=0", f"model.init_from={run}")
    catalog = open_catalog(config.data)
    sku = list(catalog.classes.sku)
    sku[0], sku[1], sku[2] = sku[1], sku[0], "new"
    _, kernel, _ = train_frozen(config, tmp_path / "other", with_skus(catalog, sku))
    printed = capsys.readouterr().err
    assert "10 rows of products that both have, 1 row left behind" in printed
    assert "1 product new: rows of 1 from" in printed
    _, old, _ = train_frozen(config, tmp_path / "same")
    np.testing.assert_array_equal(kernel[[1, 0, *range(3, 11)]], old[[0, 1, *range(3, 11)]])
    assert np.abs(kernel[2] - old[2]).max() > 1e-3


@pytest.mark.slow
def test_rows_of_discontinued_products_are_not_taken(run, tmp_path, capsys):
    """They keep their class id: the row starts anew, and is counted as left behind."""
    config = tiny("loss.mixed=0", f"model.init_from={run}")
    catalog = open_catalog(config.data)
    classes = dataclasses.replace(catalog.classes, discontinued=np.arange(11) == 3)
    _, kernel, _ = train_frozen(
        config,
        tmp_path / "other",
        dataclasses.replace(catalog, classes=classes, data_hash="0" * 64),
    )
    assert "10 rows of products that both have, 1 row left behind" in capsys.readouterr().err
    _, old, _ = train_frozen(config, tmp_path / "same")
    assert np.abs(kernel[3] - old[3]).max() > 1e-3
    np.testing.assert_array_equal(np.delete(kernel, 3, 0), np.delete(old, 3, 0))


@pytest.mark.slow
def test_a_run_that_saw_its_photos_otherwise_is_refused_before_anything_is_written(
    run, tmp_path, capsys
):
    with pytest.raises(
        InputError,
        match=r"its photos had preprocessing.mean=\(0.485, 0.456, 0.406\), the config has",
    ):
        train(
            tiny("loss.mixed=0", f"model.init_from={run}", "preprocessing.mean=(0.5,0.5,0.5)"),
            tmp_path / "run",
        )
    assert not (tmp_path / "run" / "config.json").exists()
    train_frozen(
        tiny("loss.mixed=0", f"model.init_from={run}", "model.last_stride=1"), tmp_path / "stride"
    )
    assert "trained with model.last_stride=2, goes on with 1" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_of_another_width_or_depth_are_one_line(run, tmp_path):
    pytest.importorskip("torch", reason="conversion needs the extra torch")
    from sicot_jax.export.to_torch import to_torch

    to_torch(run, tmp_path / "out")
    with pytest.raises(
        InputError,
        match=r"a ResNet-10 of width 8, and model.depth=34, model.width=8 want other arrays",
    ):
        train(tiny(f"model.init_from={tmp_path / 'out'}", "model.depth=34"), tmp_path / "run")
    with pytest.raises(
        InputError,
        match=r"its photos had preprocessing.mean=\(0.485, 0.456, 0.406\), the config has",
    ):
        train(
            tiny(f"model.init_from={tmp_path / 'out'}", "preprocessing.mean=(0.5,0.5,0.5)"),
            tmp_path / "run",
        )
    # A projection of another width is no projection of the model.
    with pytest.raises(InputError, match=r"projection\.weight is"):
        train(
            tiny(f"model.init_from={tmp_path / 'out'}", "model.embedding_width=8"), tmp_path / "run"
        )


class SplitOfFirstProducts:
    """The records of a split whose product is among the first `count`."""

    def __init__(self, split, count: int):
        self.split, self.index = split, np.flatnonzero(split.labels < count)
        self.labels = split.labels[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int):
        return self.split[int(self.index[index])]


def first_products(catalog: Catalog, count: int) -> Catalog:
    """The catalogue as it was before the last products came."""
    classes = catalog.classes
    table = ClassTable(
        *(getattr(classes, name)[:count] for name in ("sku", "title", "category")),
        {split: counts[:count] for split, counts in classes.counts.items()},
        classes.discontinued[:count],
    )
    splits = {name: SplitOfFirstProducts(split, count) for name, split in catalog.splits.items()}
    return dataclasses.replace(catalog, classes=table, splits=splits, data_hash="0" * 64)


@pytest.mark.slow
def test_new_products_are_learned_faster_from_a_run_than_from_random_weights(tmp_path):
    """40 products are learned, then 10 are added: accuracy at once, and after as few steps as from
    random weights.
    """
    shape = ["num_classes=50", "train_photos=1000", "zipf_exponent=0.0", "test_per_class=4"]
    flags = [
        "loss.mixed=0",
        *(f"data.generated.{flag}" for flag in shape),
        "optim.schedule=constant",
    ]
    catalog = open_catalog(tiny(*flags).data)

    def accuracy(workdir) -> tuple[float, float]:
        """Of the products that the first run knew, and of the others."""
        with np.load(workdir / "predictions.npz") as arrays:
            right, known = arrays["top_classes"][:, 0] == arrays["label"], arrays["label"] < 40
        return 100 * right[known].mean(), 100 * right[~known].mean()

    train(tiny(*flags, "train.steps=300"), tmp_path / "first", catalog=first_products(catalog, 40))
    with np.load(tmp_path / "first" / "predictions.npz") as arrays:
        first = 100 * np.mean(arrays["top_classes"][:, 0] == arrays["label"])
    starts = {"nothing": [], "run": [f"model.init_from={tmp_path / 'first'}"]}
    for name, more in starts.items():
        train(tiny(*flags, "train.steps=30", *more), tmp_path / name, catalog=catalog)
    still = ["optim.trainable=classifier/bias", "optim.learning_rate=1e-9", "train.steps=1"]
    train(tiny(*flags, *still, *starts["run"]), tmp_path / "at_once", catalog=catalog)
    at_once, nothing, run = (accuracy(tmp_path / name) for name in ("at_once", "nothing", "run"))
    assert at_once[0] > first - 10, (first, at_once)
    assert at_once[1] > 5, at_once  # chance is 2
    assert run[0] > nothing[0] + 10, (nothing, run)
    assert run[1] > nothing[1] + 5, (nothing, run)


@pytest.mark.slow
def test_shape_of_the_data_is_that_of_the_new_catalogue(run, tmp_path):
    config = tiny("loss.mixed=0", "data.generated.num_classes=14", f"model.init_from={run}")
    trained, kernel, _ = train_frozen(config, tmp_path / "more")
    assert trained.shape == DataShape.of(open_catalog(config.data))
    assert len(kernel) == 14


@pytest.mark.slow
def test_a_localization_branch_is_taken_where_both_have_one(run, tmp_path):
    """From a run without one it starts anew, the rest of the stream is the run's; a run without one
    leaves it out.
    """
    box = ["loss.mixed=0", "model.localization=image", "loss.background_suppression=1"]
    train_frozen(tiny(*box, f"model.init_from={run}"), tmp_path / "box")
    with_box, before = (_visual(workdir) for workdir in (tmp_path / "box", run))
    assert not with_box["localization"]["score"]["kernel"].any()
    assert "localization" not in before
    np.testing.assert_array_equal(
        with_box["resnet"]["conv1"]["kernel"], before["resnet"]["conv1"]["kernel"]
    )
    train_frozen(tiny("loss.mixed=0", f"model.init_from={tmp_path / 'box'}"), tmp_path / "back")
    assert "localization" not in _visual(tmp_path / "back")


@pytest.mark.slow
def test_a_localization_branch_of_converted_weights_is_taken_where_both_have_one(run, tmp_path):
    """From a folder without one; with one that the model lacks; with one of another kind."""
    pytest.importorskip("torch", reason="conversion needs the extra torch")
    from sicot_jax.export.to_torch import to_torch

    box = ["loss.mixed=0", "loss.background_suppression=1"]
    to_torch(run, tmp_path / "plain")
    train_frozen(
        tiny(*box, "model.localization=image", f"model.init_from={tmp_path / 'plain'}"),
        tmp_path / "box",
    )
    with_box, before = (_visual(workdir) for workdir in (tmp_path / "box", run))
    assert not with_box["localization"]["score"]["kernel"].any()
    np.testing.assert_array_equal(
        with_box["resnet"]["conv1"]["kernel"], before["resnet"]["conv1"]["kernel"]
    )
    to_torch(tmp_path / "box", tmp_path / "boxed")
    taken = f"model.init_from={tmp_path / 'boxed'}"
    train_frozen(tiny("loss.mixed=0", taken), tmp_path / "back")
    assert "localization" not in _visual(tmp_path / "back")
    train_frozen(tiny(*box, "model.localization=features", "seed=5", taken), tmp_path / "other")
    jax.tree.map(
        np.testing.assert_array_equal,
        _visual(tmp_path / "other")["localization"],
        with_box["localization"],
    )


def _visual(workdir):
    trained = read_run(workdir)
    device_mesh = mesh_of_config(trained.config)
    with jax.set_mesh(device_mesh):
        return jax.device_get(restore_params(trained, device_mesh).params["visual"])
