"""Conversion of runs to PyTorch, ONNX and StableHLO and back, with the command line.

A refused conversion leaves nothing behind.
"""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import sicot_jax
from sicot_jax import config as config_lib
from sicot_jax.catalog.open import open_catalog
from sicot_jax.cli import main as cli
from sicot_jax.errors import InputError
from sicot_jax.export.to_stablehlo import load_program
from sicot_jax.training.loop import train
from sicot_jax.training.run import read_run
from sicot_jax.weights.bundle import read_bundle
from sicot_jax.weights.parity import ArrayDifference, ModelOutputs, check_parity, parity_photos
from sicot_jax.weights.visual import load_module

torch = pytest.importorskip("torch", reason="conversion needs the extra torch")
PHOTOS = parity_photos()


def tiny(*overrides):
    return config_lib.load_config(
        "tiny", ["--config.train.steps=3", *(f"--config.{flag}" for flag in overrides)]
    )


@pytest.fixture(scope="module")
def run(make_once):
    """A run on eight devices; with 11 classes the last devices hold padding rows."""
    return make_once("convert", lambda folder: train(tiny(), folder / "run")) / "run"


@pytest.fixture(scope="module")
def in_torch(run, make_once):
    def convert(folder):
        command = ["convert", "to-torch", f"--workdir={run}", f"--out={folder / 'in_torch'}"]
        assert cli.main(command) == 0

    return make_once("converted", convert) / "in_torch"


def fails_with(capsys, command):
    capsys.readouterr()
    assert cli.main(command) == cli.INPUT_ERROR
    line = capsys.readouterr().err.strip().splitlines()[-1]
    return line


def predictions(workdir):
    with np.load(workdir / "predictions.npz") as arrays:
        return {
            name: arrays[name]
            for name in ("top_classes", "top_logits", "embedding", "label_log_prob")
        }


def test_plain_pytorch_recognises_the_same_products_as_the_run(run, in_torch):
    """In a process without sicot_jax and jax, on the run's test photos."""
    photos = [record["image"] for record in open_catalog(read_run(run).config.data).splits["test"]]
    np.save(in_torch.parent / "photos.npy", np.stack(photos))
    program = (
        "import sys, numpy, torch\n"
        "sys.modules['jax'] = sys.modules['sicot_jax'] = None\n"  # an import of either fails
        "from model import SicotRecognizer\n"
        "recognizer = SicotRecognizer.from_pretrained('.')\n"
        "photos = numpy.load('../photos.npy')\n"
        "images = torch.stack([recognizer.preprocess(photo) for photo in photos])\n"
        "with torch.inference_mode():\n"
        "    logits, embedding = recognizer(images), recognizer.embed(images)\n"
        "numpy.savez('../outputs.npz', logits=logits, embedding=embedding)\n"
        "first = recognizer.recognize(photos[0], k=2)\n"
        "print(first[0]['sku'], len(first), first[0]['probability'] >= first[1]['probability'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=in_torch, check=True, capture_output=True, text=True
    )
    expected, actual = predictions(run), np.load(in_torch.parent / "outputs.npz")
    np.testing.assert_allclose(
        actual["embedding"], expected["embedding"], atol=1e-5 * np.abs(expected["embedding"]).max()
    )
    logits = np.take_along_axis(actual["logits"], expected["top_classes"].astype(int), 1)
    np.testing.assert_allclose(
        logits, expected["top_logits"], atol=1e-5 * np.abs(expected["top_logits"]).max()
    )
    sku = sicot_jax.load(in_torch).classes.sku[expected["top_classes"][0, 0]]
    assert done.stdout.split() == [sku, "2", "True"]


def test_a_bundle_records_its_source_and_its_parity_check(run, in_torch, capsys):
    stored, manifest = (
        json.loads((in_torch / name).read_text()) for name in ("config.json", "manifest.json")
    )
    assert stored["source"]["data"] == read_run(run).data_hash
    assert stored["version"] == sicot_jax.__version__
    (report,) = manifest["parity"]
    assert (report["inputs"], report["count"]) == ("photos", len(PHOTOS))
    assert report["top_k_agreement"] == 1
    assert report["differences"]["embedding"]["max_relative"] < 1e-5
    assert report["differences"]["logits"]["max_relative"] < 1e-5
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["versions"]["torch"].startswith(torch.__version__[:4])
    assert manifest["sha256"].keys() == {
        "model.safetensors",
        "config.json",
        "classes.csv",
        "model.py",
    }
    assert read_bundle(in_torch).model.num_classes == 11


@pytest.mark.slow
def test_engines_agree(run, in_torch):
    out = run.parent / "onnx"
    pytest.importorskip("onnxruntime", reason="ONNX needs the extra onnx")
    assert cli.main(["convert", "to-onnx", f"--workdir={run}", f"--out={out}"]) == 0
    engines = [sicot_jax.load(path) for path in (run, in_torch, out)]
    embeddings = [recognizer.embed(PHOTOS) for recognizer in engines]
    for other in embeddings[1:]:
        np.testing.assert_allclose(other, embeddings[0], atol=1e-5 * np.abs(embeddings[0]).max())
    matches = [recognizer.recognize(PHOTOS, k=3) for recognizer in engines]
    for other in matches[1:]:
        assert [[match.sku for match in row] for row in other] == [
            [match.sku for match in row] for row in matches[0]
        ]
    assert all(sum(match.probability for match in row) <= 1 + 1e-6 for row in matches[0])


def test_a_graph_that_returns_the_best_classes(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX needs the extra onnx")
    assert (
        cli.main(
            ["convert", "to-onnx", f"--workdir={run}", f"--out={tmp_path / 'out'}", "--top-k=2"]
        )
        == 0
    )
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    recognizer = sicot_jax.load(run)
    preprocessing = recognizer.preprocessing
    for photos in (PHOTOS[:1], PHOTOS[:5]):  # any number of photos
        batch = np.stack([preprocessing.centre_crop(preprocessing.load(photo)) for photo in photos])
        _, probability, classes = session.run(None, {"photos": batch})
        for row, expected in enumerate(recognizer.recognize(photos, k=2)):
            assert classes[row].tolist() == [match.class_id for match in expected]
            np.testing.assert_allclose(
                probability[row], [match.probability for match in expected], rtol=1e-4
            )
    with pytest.raises(InputError, match="convert without --top-k"):
        sicot_jax.load(tmp_path / "out")


def test_best_classes_in_another_order_do_not_agree():
    """Classes are compared, not sorted probabilities alone."""
    from sicot_jax.export.to_onnx import top_k_probabilities

    logits = np.log(np.float32([[0.5, 0.3, 0.15, 0.05]]))
    none_discontinued = np.zeros(4, bool)
    expected = top_k_probabilities(logits, 2, none_discontinued)
    np.testing.assert_allclose(expected, [[0.5, 0.3, 0, 0]], rtol=1e-6)
    without_first = top_k_probabilities(logits, 2, np.array([True, False, False, False]))
    np.testing.assert_allclose(without_first, [[0, 0.6, 0.3, 0]], rtol=1e-6)
    same, other = (
        ModelOutputs(np.ones((1, 2)), dense) for dense in (expected, expected[:, [1, 0, 2, 3]])
    )
    outputs = ModelOutputs(np.ones((1, 2)), expected)
    assert check_parity(outputs, same, label="a against b").top_k_agreement == 1
    with pytest.raises(InputError, match="logits differs"):
        check_parity(outputs, other, label="a against b")


def test_without_flatbuffers_stablehlo_fails_before_any_work(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.setattr("sicot_jax.export.to_stablehlo.parity_photos", None)
    command = ["convert", "to-stablehlo", f"--workdir={run}", f"--out={tmp_path / 'out'}"]
    assert cli.main(command) == 2
    assert "no flatbuffers here for StableHLO; install it" in capsys.readouterr().err


def test_stablehlo_runs_any_batch_size_from_its_folder_alone(run, tmp_path):
    import safetensors.numpy

    out = tmp_path / "out"
    assert cli.main(["convert", "to-stablehlo", f"--workdir={run}", f"--out={out}"]) == 0
    program = jax.export.deserialize(bytearray((out / "model.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    weights, recognizer = (
        safetensors.numpy.load_file(out / "model.safetensors"),
        sicot_jax.load(run),
    )
    for photos in (PHOTOS[:1], PHOTOS[:3]):
        preprocessing = recognizer.preprocessing
        batch = np.stack([preprocessing.centre_crop(preprocessing.load(photo)) for photo in photos])
        outputs = program.call(weights, batch)
        np.testing.assert_allclose(
            outputs["embedding"], recognizer.embed(photos), rtol=1e-4, atol=1e-5
        )
    np.testing.assert_array_equal(load_program(out)(batch)["logits"], outputs["logits"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["versions"].keys() >= {"sicot_jax", "jax", "jaxlib", "numpy"}
    manifest["versions"]["jax"] = "0.99.1"
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"a program of jax 0\.99\.1, here is .*'jax>=0\.99\.1'"):
        load_program(out)
    with pytest.raises(InputError, match=r"StableHLO is loaded by jax\.export"):
        sicot_jax.load(out)
    with pytest.raises(
        InputError, match="holds a StableHLO program, its batch norms folded; give the run"
    ):
        train(tiny(f"model.init_from={out}"), tmp_path / "run")


@pytest.mark.slow
def test_weights_changed_in_pytorch_are_imported_and_trained(run, in_torch, tmp_path, capsys):
    """Exported, changed in PyTorch and imported: a run starts from the changed weights, the
    classifier included.
    """
    import safetensors.torch

    changed = tmp_path / "changed"
    changed.mkdir()
    for path in in_torch.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    arrays = safetensors.torch.load_file(changed / "model.safetensors")
    arrays["fc.bias"] += 0.5
    arrays["conv1.weight"] *= 1.5
    safetensors.torch.save_file(arrays, changed / "model.safetensors")
    with pytest.raises(InputError, match="changed or missing"):
        read_bundle(changed)
    back = tmp_path / "back"
    assert cli.main(["convert", "from-torch", str(changed), f"--out={back}"]) == 0
    # Nothing but a bias trains, slowly, so that what the run ends with is what it began with.
    flags = [
        f"model.init_from={back}",
        "optim.trainable=classifier/bias",
        "optim.learning_rate=1e-9",
    ]
    train(tiny(*flags, "loss.mixed=0"), tmp_path / "run")
    actual = sicot_jax.load(tmp_path / "run").recognize(PHOTOS, k=11)
    expected = sicot_jax.load(back).recognize(PHOTOS, k=11)
    assert [[match.sku for match in row] for row in actual] == [
        [match.sku for match in row] for row in expected
    ]
    assert (
        np.abs(sicot_jax.load(back).embed(PHOTOS) - sicot_jax.load(run).embed(PHOTOS)).max() > 1e-3
    )


@pytest.mark.slow
def test_shared_word_weights_are_exported_as_plain_rows(tmp_path):
    flags = ["model.shared_word_weights=True", "loss.mixed=0", "loss.tag_prediction=1"]
    train(tiny(*flags), tmp_path / "run")
    assert (
        cli.main(
            ["convert", "to-torch", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]
        )
        == 0
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = predictions(tmp_path / "run")
    assert config["model"]["embedding_width"] == expected["embedding"].shape[1] == 16
    catalog = open_catalog(read_run(tmp_path / "run").config.data)
    photos = [record["image"] for record in catalog.splits["test"]]
    logits = sicot_jax.load(tmp_path / "out").engine(np.stack(photos)).logits
    top_logits = np.take_along_axis(logits, expected["top_classes"].astype(int), 1)
    np.testing.assert_allclose(
        top_logits, expected["top_logits"], atol=1e-4 * np.abs(expected["top_logits"]).max()
    )


@pytest.mark.parametrize("kind", ["to-torch", "to-onnx", "to-stablehlo"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys, kind):
    out = tmp_path / "out"
    line = fails_with(capsys, ["convert", kind, f"--workdir={tmp_path}", f"--out={out}"])
    assert "wanted the config.json of a training run" in line
    assert list(tmp_path.iterdir()) == []


def test_an_existing_out_is_left_as_it_is(run, in_torch, capsys):
    before = {path: path.stat().st_mtime_ns for path in in_torch.iterdir()}
    for command in (["to-torch", f"--workdir={run}"], ["from-torch", str(in_torch)]):
        line = fails_with(capsys, ["convert", *command, f"--out={in_torch}"])
        assert "exists; give another --out, or remove it" in line
    assert {path: path.stat().st_mtime_ns for path in in_torch.iterdir()} == before


def test_a_failed_parity_check_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    from sicot_jax.export import to_torch

    def other_outputs(folder, photos):
        return ModelOutputs(*(np.full(shape, 0.1) for shape in [(8, 16), (8, 11)]))

    monkeypatch.setattr(to_torch, "bundle_outputs_torch", other_outputs)
    line = fails_with(
        capsys, ["convert", "to-torch", f"--workdir={run}", f"--out={tmp_path / 'out'}"]
    )
    assert "JAX against PyTorch: embedding differs by up to" in line
    assert "wanted 0.0001 at most" in line
    assert list(tmp_path.iterdir()) == []


def test_differences_by_hand():
    expected, actual = (
        ModelOutputs(np.float32([[2.0, 4.0]]), np.float32([[1, x, 0, -1]])) for x in (3, 3.0001)
    )
    report = check_parity(expected, actual, label="a against b")
    assert report.differences["embedding"] == ArrayDifference(0.0, 0.0, 0.0)
    logits = report.differences["logits"]
    np.testing.assert_allclose(logits.max_relative, 0.0001 / 3, rtol=1e-2)
    np.testing.assert_allclose(logits.mean_difference, 0.0001 / 4, rtol=1e-2)
    assert report.top_k_agreement == 1
    with pytest.raises(InputError, match="a against b: embedding differs"):
        check_parity(
            expected,
            dataclasses.replace(actual, embedding=np.float32([[np.nan, 4]])),
            label="a against b",
        )


@pytest.mark.slow
def test_discontinued_products_are_not_recognised(run, in_torch, tmp_path):
    """By the run, in PyTorch and inside a graph: the best product of a photo is discontinued, the
    next one is returned.
    """
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX needs the extra onnx")
    before = [match.class_id for match in sicot_jax.load(run).recognize(PHOTOS[0], k=3)]
    shutil.copytree(run, tmp_path / "run")
    table = tmp_path / "run" / "classes.csv"
    lines = table.read_text().splitlines()
    lines[1 + before[0]] = lines[1 + before[0]].removesuffix("0") + "1"
    table.write_text("\n".join(lines) + "\n")
    recognizer = sicot_jax.load(tmp_path / "run")
    matches = recognizer.recognize(PHOTOS[0], k=99)
    assert [match.class_id for match in matches[:2]] == before[1:]
    assert len(matches) == 10
    np.testing.assert_allclose(sum(match.probability for match in matches), 1, rtol=1e-6)
    outs = {kind: tmp_path / kind for kind in ("torch", "onnx")}
    assert (
        cli.main(["convert", "to-torch", f"--workdir={tmp_path / 'run'}", f"--out={outs['torch']}"])
        == 0
    )
    products = (
        load_module(outs["torch"] / "model.py")
        .SicotRecognizer.from_pretrained(outs["torch"])
        .recognize(PHOTOS[0])
    )
    assert [product["class"] for product in products[:2]] == before[1:]
    assert (
        cli.main(
            [
                "convert",
                "to-onnx",
                f"--workdir={tmp_path / 'run'}",
                f"--out={outs['onnx']}",
                "--top-k=10",
            ]
        )
        == 0
    )
    session, preprocessing = (
        onnxruntime.InferenceSession(outs["onnx"] / "model.onnx"),
        recognizer.preprocessing,
    )
    batch = preprocessing.centre_crop(preprocessing.load(PHOTOS[0]))[None]
    assert session.run(None, {"photos": batch})[2][0, :2].tolist() == before[1:]
    for k in ("11", "-1"):
        flags = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'more'}", f"--top-k={k}"]
        assert cli.main(["convert", "to-onnx", *flags]) == cli.INPUT_ERROR


def test_photos_of_any_kind_are_read(run):
    from PIL import Image

    recognizer = sicot_jax.load(run)
    photo = Image.fromarray(PHOTOS[0])
    for same in (photo, photo.convert("RGBA")):
        np.testing.assert_allclose(recognizer.embed(same), recognizer.embed(PHOTOS[0]), rtol=1e-6)
    for invalid, message in (
        (PHOTOS[0][..., 0], "wanted uint8"),
        (PHOTOS[0][:0], "wanted uint8"),
        (None, "are NoneType"),
        ([1], "is int"),
    ):
        with pytest.raises(InputError, match=message):
            recognizer.embed(invalid)


def test_parent_folders_are_created_only_with_the_bundle(run, tmp_path, capsys):
    fails_with(
        capsys,
        [
            "convert",
            "to-torch",
            f"--workdir={tmp_path / 'none'}",
            f"--out={tmp_path / 'a' / 'b' / 'out'}",
        ],
    )
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    line = fails_with(
        capsys, ["convert", "to-torch", f"--workdir={run}", f"--out={tmp_path / 'file' / 'out'}"]
    )
    assert "its parent is no folder" in line
