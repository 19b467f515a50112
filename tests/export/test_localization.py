"""A run with a localisation branch: in every conversion, and in the index."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

import sicot_jax
from sicot_jax import config as config_lib
from sicot_jax.catalog.open import open_catalog
from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.cli import main as cli
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.export.from_run import ExportedRun
from sicot_jax.export.to_onnx import onnx_outputs, write_graph
from sicot_jax.index.storage import layout
from sicot_jax.recognizer import compile_engine, jax_engine
from sicot_jax.training.loop import train
from sicot_jax.training.run import read_run
from sicot_jax.weights.bundle import (
    ONNX_FILE,
    RecognizerSpec,
    WeightsBundle,
    read_bundle,
    write_bundle_config,
)
from sicot_jax.weights.parity import TOLERANCE, parity_photos
from sicot_jax.weights.torch_names import localization_array_name
from sicot_jax.weights.visual import (
    init_visual_stream,
    load_torch_arrays,
    torch_template,
    visual_outputs_jax,
    visual_outputs_torch,
    visual_to_torch,
)

pytest.importorskip("torch", reason="conversion needs the extra torch")


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=pytest.mark.slow) for kind in ("image", "features")],
)
def run(request, tmp_path_factory):
    """A run on photos of 40 x 24 pixels, trained enough that the boxes have moved."""
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


def test_all_conversions_predict_the_same_box(run, converted):
    """And the same embedding of its content."""
    split = open_catalog(read_run(run).config.data).splits["test"]
    in_torch = read_bundle(converted / "to-torch")
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
    # The tolerance of the parity check: rounding moves the box, and the soft mask of the second
    # pass amplifies that some ten times.
    np.testing.assert_allclose(
        by_onnx.embedding, by_jax.embedding, atol=1e-4 * np.abs(by_jax.embedding).max()
    )
    with np.load(run / "predictions.npz") as predictions:
        np.testing.assert_allclose(
            by_jax.embedding,
            predictions["embedding"][:8],
            atol=1e-4 * np.abs(predictions["embedding"]).max(),
        )


def test_parity_checks_compare_boxes(converted):
    for kind in ("to-torch", "to-onnx", "to-stablehlo"):
        manifest = json.loads((converted / kind / "manifest.json").read_text())
        (report,) = manifest["parity"]
        assert report["differences"]["box"]["max_relative"] <= TOLERANCE


def test_the_branch_survives_a_round_trip_through_pytorch(converted, tmp_path):
    assert (
        cli.main(
            ["convert", "from-torch", str(converted / "to-torch"), f"--out={tmp_path / 'back'}"]
        )
        == 0
    )
    original, back = (
        jax_engine(read_bundle(path)) for path in (converted / "to-torch", tmp_path / "back")
    )
    photos = np.random.default_rng(0).integers(0, 256, (2, 40, 24, 3), np.uint8)
    np.testing.assert_array_equal(back(photos).box, original(photos).box)


def random_weights(model: RecognizerSpec, *, seed: int) -> dict[str, np.ndarray]:
    """Arrays by torch's names; branch and batch norms do not have their initial values."""
    _, *trees = nnx.split(init_visual_stream(model, seed=seed), nnx.Param, nnx.BatchStat)
    rng, arrays = np.random.default_rng(seed), visual_to_torch(*map(nnx.to_pure_dict, trees))
    for name, array in arrays.items():
        if array.ndim == 1 or name == "localization.score.weight":
            drawn = rng.normal(size=array.shape)
            near_one = name.endswith("running_var") or (array.ndim == 1 and name.endswith("weight"))
            arrays[name] = np.float32(np.exp(0.2 * drawn) if near_one else 0.1 * drawn)
    # Boxes that lie inside the photo.
    arrays["localization.log_scale"] = np.float32([-0.4, -0.7])
    width = model.embedding_width
    return arrays | {
        "fc.weight": np.float32(rng.normal(size=(5, width))),
        "fc.bias": np.zeros(5, np.float32),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("image", marks=pytest.mark.slow), "features"])
@pytest.mark.parametrize(
    ("height", "width"), [(40, 30), pytest.param(64, 64, marks=pytest.mark.slow)]
)
def test_random_weights_give_the_same_outputs_everywhere(kind, height, width, tmp_path):
    model = RecognizerSpec(
        18, 8, "small", last_stride=2, embedding_width=16, num_classes=5, localization=kind
    )
    preprocessing, photos = Preprocessing(height, width, height, width), parity_photos()
    arrays = random_weights(model, seed=3)
    expected = visual_outputs_jax(model, preprocessing, arrays, photos)
    in_torch = torch_template().SicotRecognizer(
        dataclasses.asdict(model), dataclasses.asdict(preprocessing), [""] * 5
    )
    load_torch_arrays(in_torch, arrays)
    sides = [visual_outputs_torch(in_torch, photos)]
    sides.append(compile_engine(model, preprocessing, arrays)(preprocessing.batch(photos)))
    if height != width:
        class_weights = ClassWeights.from_named_arrays(arrays)
        stream = {name: array for name, array in arrays.items() if not name.startswith("fc.")}
        exported = ExportedRun(model, preprocessing, stream, class_weights, tmp_path, {})
        write_graph(tmp_path / ONNX_FILE, exported, top_k=0, discontinued=np.zeros(5, bool))
        write_bundle_config(WeightsBundle(tmp_path, model, preprocessing, {}))
        sides.append(onnx_outputs(tmp_path, photos))
    for side in sides:
        np.testing.assert_allclose(side.box, expected.box, atol=1e-5)
        for name in ("embedding", "logits"):
            array = getattr(expected, name)
            tolerance = 2e-5 * np.abs(array).max()
            np.testing.assert_allclose(getattr(side, name), array, atol=tolerance)
    assert np.ptp(expected.box, 0).max() > 0.01
    assert expected.box.min() > 0.01
    assert expected.box.max() < 0.99
    alone = visual_outputs_jax(
        dataclasses.replace(model, localization="none"), preprocessing, arrays, photos
    )
    assert (
        np.abs(alone.embedding - expected.embedding).max() > 0.01 * np.abs(expected.embedding).max()
    )
    assert alone.box is None


def test_array_names_of_the_branch():
    paths = (
        "convs/0/kernel",
        "convs/2/kernel",
        "norm/scale",
        "norm/var",
        "score/kernel",
        "score/bias",
        "log_scale",
    )
    assert [localization_array_name(path) for path in paths] == [
        f"localization.{name}"
        for name in (
            "conv1.weight",
            "conv3.weight",
            "bn.weight",
            "bn.running_var",
            "score.weight",
            "score.bias",
            "log_scale",
        )
    ]


@pytest.mark.slow
def test_an_index_holds_embeddings_of_the_foreground(run, converted, tmp_path):
    assert cli.main(["index", "build", f"--workdir={run}", f"--out={tmp_path / 'index'}"]) == 0
    version = layout.current_version(tmp_path / "index")
    engine = jax_engine(read_bundle(version / layout.MODEL))
    split = open_catalog(read_run(run).config.data).splits["train"]
    preprocessing = read_bundle(version / layout.MODEL).preprocessing
    outputs = engine(preprocessing.batch([split[i]["image"] for i in range(4)]))
    from sicot_jax.common.linalg import l2_normalize
    from sicot_jax.index.backends.local import LocalIndex

    opened = LocalIndex(version)
    nearest = opened.nearest(l2_normalize(outputs.embedding), 1, num_photos=1)
    assert [near.photos[0].similarity for near in nearest] == pytest.approx([1.0] * 4, abs=2e-3)
    opened.close()
