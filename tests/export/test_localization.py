"""A run with a box branch, on every side of a conversion and in the index."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

import sicot_jax
from sicot_jax import config as config_lib
from sicot_jax import recognizer
from sicot_jax.catalog.open import open_catalog
from sicot_jax.classifier.heads import Classifier
from sicot_jax.cli import main as cli
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.export import to_onnx
from sicot_jax.export.from_run import Exported
from sicot_jax.index.storage import layout
from sicot_jax.recognizer import jax_engine
from sicot_jax.training import run as runs
from sicot_jax.training.loop import train
from sicot_jax.weights import bundle as folders
from sicot_jax.weights import parity as proof
from sicot_jax.weights import torch_names as names
from sicot_jax.weights import visual as network
from sicot_jax.weights.bundle import Model

pytest.importorskip("torch", reason="conversion needs the extra torch")


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=pytest.mark.slow) for kind in ("image", "features")],
)
def run(request, tmp_path_factory):
    """Photos of 40 x 24; the branch has moved."""
    workdir = tmp_path_factory.mktemp("box") / "run"
    flags = [
        "loss.mixed=0",
        # Enough to move a box of the photo in eight steps, not so much that one of the map ends as
        # a cell.
        f"loss.background_suppression={1 if request.param == 'image' else 0.2}",
        "loss.box_regression=0.1",
        "train.steps=8",
        # hard training makes boxes of a cell, where the mask enlarges every rounding
        "optim.learning_rate=0.02",
        "preprocessing.height=40",
        "preprocessing.resize_height=40",
    ]
    train(
        config_lib.load_config(
            "tiny", [f"--config.{flag}" for flag in (*flags, f"model.localization={request.param}")]
        ),
        workdir,
    )
    return workdir


@pytest.fixture(scope="module")
def converted(run):
    for kind in ("to-torch", "to-onnx", "to-stablehlo"):
        assert cli.main(["convert", kind, f"--workdir={run}", f"--out={run.parent / kind}"]) == 0
    return run.parent


def test_all_sides_find_the_same_box(run, converted):
    """And the embedding of what is in it, which is what conversions compare."""
    split = open_catalog(runs.read_run(run).config.data).splits["test"]
    in_torch = folders.read_converted(converted / "to-torch")
    photos = in_torch.preprocessing.batch([split[i]["image"] for i in range(8)])
    by_jax, by_onnx = (
        jax_engine(in_torch)(photos),
        sicot_jax.load(converted / "to-onnx").engine(photos),
    )
    assert by_jax.box.shape == (8, 4)
    assert np.ptp(by_jax.box, 0).max() > 1e-4
    assert by_jax.box.min() >= 0
    assert by_jax.box.max() <= 1
    np.testing.assert_allclose(
        by_onnx.box, by_jax.box, atol=1e-4
    )  # of a photo: a fiftieth of a pixel at 224
    # The proof's tolerance: a rounding moves the box, and the soft mask of a second look enlarges
    # that some ten times.
    np.testing.assert_allclose(
        by_onnx.embedding, by_jax.embedding, atol=1e-4 * np.abs(by_jax.embedding).max()
    )
    with np.load(run / "predictions.npz") as told:
        np.testing.assert_allclose(
            by_jax.embedding, told["embedding"][:8], atol=1e-4 * np.abs(told["embedding"]).max()
        )


def test_conversions_compare_boxes(converted):
    for kind in ("to-torch", "to-onnx", "to-stablehlo"):
        (compared,) = json.loads((converted / kind / "manifest.json").read_text())["proof"].values()
        assert compared["box"]["max_relative"] <= proof.TOLERANCE


def test_what_pytorch_may_change_comes_back_with_its_box(converted, tmp_path):
    assert (
        cli.main(
            ["convert", "from-torch", str(converted / "to-torch"), f"--out={tmp_path / 'back'}"]
        )
        == 0
    )
    there, back = (
        jax_engine(folders.read_converted(path))
        for path in (converted / "to-torch", tmp_path / "back")
    )
    photos = np.random.default_rng(0).integers(0, 256, (2, 40, 24, 3), np.uint8)
    np.testing.assert_array_equal(back(photos).box, there(photos).box)


def any_weights(model: Model, *, seed: int) -> dict[str, np.ndarray]:
    """Arrays in torch's names whose branch and batch norms are at no starting value."""
    _, *trees = nnx.split(network.fresh_stream(model, seed=seed), nnx.Param, nnx.BatchStat)
    rng, arrays = np.random.default_rng(seed), network.arrays_of(*map(nnx.to_pure_dict, trees))
    for name, array in arrays.items():
        if array.ndim == 1 or name == "box.score.weight":
            drawn = rng.normal(size=array.shape)
            near_one = name.endswith("running_var") or (array.ndim == 1 and name.endswith("weight"))
            arrays[name] = np.float32(np.exp(0.2 * drawn) if near_one else 0.1 * drawn)
    arrays["box.log_scale"] = np.float32([-0.4, -0.7])  # sides that no edge of the photo cuts
    width = model.embedding_width
    return arrays | {
        "fc.weight": np.float32(rng.normal(size=(5, width))),
        "fc.bias": np.zeros(5, np.float32),
    }


@pytest.mark.parametrize("kind", ["image", "features"])
@pytest.mark.parametrize(
    ("height", "width"), [(40, 30), pytest.param(64, 64, marks=pytest.mark.slow)]
)
def test_a_branch_of_any_weights_is_the_same_on_all_sides(kind, height, width, tmp_path):
    model = Model(18, 8, "small", last_stride=2, embedding_width=16, classes=5, box=kind)
    preprocessing, photos = Preprocessing(height, width, height, width), proof.fixed_photos()
    arrays = any_weights(model, seed=3)
    here = network.outputs_here(model, preprocessing, arrays, photos)
    in_torch = network.torch_module().SicotRecognizer(
        dataclasses.asdict(model), dataclasses.asdict(preprocessing), [""] * 5
    )
    network.load_into(in_torch, arrays)
    sides = [network.outputs_in_torch(in_torch, photos)]
    sides.append(recognizer._jax(model, preprocessing, arrays)(preprocessing.batch(photos)))
    if height != width:
        classifier = Classifier(
            arrays["fc.weight"], arrays["fc.bias"], np.zeros(5, np.float32), (), {}
        )
        own = {name: array for name, array in arrays.items() if not name.startswith("fc.")}
        found = Exported(model, preprocessing, own, classifier, tmp_path, {})
        to_onnx._export(
            network.torch_module(), found, tmp_path / folders.GRAPH, 0, np.zeros(5, bool)
        )
        folders.write_config(tmp_path, model, preprocessing, {})
        sides.append(to_onnx.graph_outputs(tmp_path, photos))
    for side in sides:
        np.testing.assert_allclose(side.box, here.box, atol=1e-5)
        for name in ("embedding", "logits"):
            there, wanted = getattr(side, name), getattr(here, name)
            np.testing.assert_allclose(there, wanted, atol=2e-5 * np.abs(wanted).max())
    assert np.ptp(here.box, 0).max() > 0.01
    assert here.box.min() > 0.01
    assert here.box.max() < 0.99
    alone = network.outputs_here(
        dataclasses.replace(model, box="none"), preprocessing, arrays, photos
    )
    assert np.abs(alone.embedding - here.embedding).max() > 0.01 * np.abs(here.embedding).max()
    assert alone.box is None


def test_a_folder_from_before_has_no_box(converted, tmp_path):
    stored = json.loads((converted / "to-torch" / "config.json").read_text())
    del stored["model"]["box"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert folders.read_config(tmp_path).model.box == "none"


def test_names_of_the_branch():
    paths = (
        "convs/0/kernel",
        "convs/2/kernel",
        "norm/scale",
        "norm/var",
        "score/kernel",
        "score/bias",
        "log_scale",
    )
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
    from sicot_jax.common.linalg import l2_normalize
    from sicot_jax.index.backends.local import LocalIndex

    opened = LocalIndex(version)
    nearest = opened.nearest(l2_normalize(found.embedding), 1, num_photos=1)
    assert [near.photos[0].similarity for near in nearest] == pytest.approx([1.0] * 4, abs=2e-3)
    opened.close()
