"""A run with a box branch, on every side of a conversion and in the index."""

import json

import numpy as np
import pytest

import sicot_jax
from sicot_jax import cli, runs
from sicot_jax import config as config_lib
from sicot_jax.catalog.opening import open_catalog
from sicot_jax.convert import folder as folders
from sicot_jax.convert import names
from sicot_jax.index import layout
from sicot_jax.recognizer import jax_engine
from sicot_jax.train import train

pytest.importorskip("torch", reason="conversion needs the extra torch")


@pytest.fixture(scope="module", params=["image", pytest.param("features", marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    """Photos of 40 x 24; the branch has moved."""
    workdir = tmp_path_factory.mktemp("box") / "run"
    flags = ["loss.mixed=0", "loss.box=1", "train.steps=8", "preprocessing.height=40", "preprocessing.resize_height=40"]
    train(config_lib.load("tiny", [f"--config.{flag}" for flag in (*flags, f"model.box={request.param}")]), workdir)
    return workdir


@pytest.fixture(scope="module")
def converted(run):
    for kind in ("to-torch", "to-onnx"):
        assert cli.main(["convert", kind, f"--workdir={run}", f"--out={run.parent / kind}"]) == 0
    return run.parent


def test_all_sides_find_the_same_box(run, converted):
    """And the embedding of what is in it, which is what conversions compare."""
    split = open_catalog(runs.read_run(run).config.data).splits["test"]
    in_torch = folders.read_converted(converted / "to-torch")
    photos = in_torch.preprocessing.batch([split[i]["image"] for i in range(8)])
    by_jax, by_onnx = jax_engine(in_torch)(photos), sicot_jax.load(converted / "to-onnx").engine(photos)
    assert by_jax.box.shape == (8, 4) and np.ptp(by_jax.box, 0).max() > 1e-4  # not the same of all photos
    assert by_jax.box.min() >= 0 and by_jax.box.max() <= 1
    np.testing.assert_allclose(by_onnx.box, by_jax.box, atol=1e-5)
    # The proof's tolerance: a rounding moves the box, and the soft mask of a second look enlarges that some ten times.
    np.testing.assert_allclose(by_onnx.embedding, by_jax.embedding, atol=1e-4 * np.abs(by_jax.embedding).max())
    with np.load(run / "predictions.npz") as told:
        np.testing.assert_allclose(by_jax.embedding, told["embedding"][:8], atol=1e-4 * np.abs(told["embedding"]).max())


def test_a_folder_from_before_has_no_box(converted, tmp_path):
    stored = json.loads((converted / "to-torch" / "config.json").read_text())
    del stored["model"]["box"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert folders.read_config(tmp_path).model.box == "none"


def test_names_of_the_branch():
    paths = ("convs/0/kernel", "convs/2/kernel", "norm/scale", "norm/var", "score/kernel", "score/bias", "log_scale")
    assert [names.box_name(path) for path in paths] == [
        "box.conv1.weight", "box.conv3.weight", "box.bn.weight", "box.bn.running_var", "box.score.weight", "box.score.bias",
        "box.log_scale",
    ]  # fmt: skip


@pytest.mark.slow
def test_an_index_holds_what_is_in_the_box(run, converted, tmp_path):
    assert cli.main(["index", "build", f"--workdir={run}", f"--out={tmp_path / 'index'}"]) == 0
    version = layout.current_version(tmp_path / "index")
    engine = jax_engine(folders.read_converted(version / layout.MODEL))
    split = open_catalog(runs.read_run(run).config.data).splits["train"]
    preprocessing = folders.read_converted(version / layout.MODEL).preprocessing
    found = engine(preprocessing.batch([split[i]["image"] for i in range(4)]))
    from sicot_jax.index.embedded import EmbeddedIndex
    from sicot_jax.index.vectors import unit

    opened = EmbeddedIndex(version)
    nearest = opened.nearest(unit(found.embedding), 1, photos=1)
    assert [near.photos[0].similarity for near in nearest] == pytest.approx([1.0] * 4, abs=2e-3)
    opened.close()
