"""The benchmarks run at their smallest and print every row; times are not checked."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers.benchmarks import ROOT, printed_by, rows

pytestmark = pytest.mark.slow


def test_input_pipeline(imported):
    printed = rows(
        "input_pipeline",
        *(
            "--path",
            str(imported),
            "--batch-size",
            "4",
            "--batches",
            "2",
            "--photos",
            "20",
            "--workers",
            "0",
            "1",
        ),
    )
    catalogs = ["imported 60x80", "generated 48x48", "array file 48x48"]
    pipelines = [
        f"{name}, {how}" for name in catalogs[:2] for how in ("threads", "1 worker process")
    ]
    parts = ["read record", "decode and fit photo", "read title", "stack photos", "put on device"]
    wanted = {
        *pipelines,
        "array file 48x48, in line",
        *(f"{name}: {part}" for name in catalogs for part in parts),
    }
    assert set(printed) == {"pipeline", "part", *wanted}
    assert not [name for name in wanted if "not measured" in printed[name][0]]


def test_training_loop(imported):
    printed = rows(
        "training_loop",
        *("--config", "tiny", "--path", str(imported), "--batch-size", "8", "--steps", "2"),
        *(
            "--classes",
            "5",
            "--train-photos",
            "20",
            "--vocabulary",
            "9",
            "--word-width",
            "8",
            "--encoders",
            "bilinear",
        ),
    )
    streams = ["baseline", "co-training, bilinear"]
    bare = ["bare step", "bare step, imported"]
    arrays = ["loop, array file", "loop, array file, photos on the device"]
    loops = [*arrays, "loop, generated on the fly", "loop, imported, threads"]
    assert set(printed) == {"step", "loop", *streams, *bare, *loops}
    assert not [name for name, cells in printed.items() if "not measured" in cells[0]]


def test_rows_without_their_data_say_so():
    options = ("--batch-size", "4", "--batches", "2", "--photos", "20", "--workers", "0")
    assert rows("input_pipeline", *options)["imported, threads"][0] == "not measured (no --path)"


def test_catalog_import():
    """300 photos: enough for two worker processes."""
    printed = rows(
        "catalog_import", *("--sizes", "30x40", "300x280", "--photos", "300", "--part-photos", "4")
    )
    stages = ["entire import", "photos", "words", "splits, tables, records"]
    parts = ["read file", "decode", "hash pixels", "shrink", "encode"]
    wanted = {
        f"{size}: {part}"
        for size in ("30x40", "300x280")
        for part in [
            *(f"{stage}, {n}" for stage in stages for n in ("1 worker", "2 workers")),
            *parts,
        ]
    }
    assert set(printed) == {"part", *wanted}
    assert not [name for name in wanted if "not measured" in printed[name][0]]


def test_classifier_step():
    """Every contender runs, those of PyTorch where it is; the graph's table too."""
    printed = rows(
        "classifier_step", *("--sizes", "8x16x500", "--steps", "1", "--graphs", "8x16x100")
    )
    ours = {
        f"ours, {name}" for name in ("exact", "exact, bf16 logits kept", "exact, f32 logits kept")
    }
    ours |= {
        "ours, sampled, rate 0.1",
        "ours, KNN, rate 0.1",
        "reference",
        "dense JAX (optax loss)",
    }
    torch = {"plain PyTorch", "Partial FC, rate 1 (PyTorch)", "Partial FC, rate 0.1 (PyTorch)"}
    assert set(printed) == {"head", "classes x width", "100 x 16", *ours, *torch}
    assert not [name for name in ours if "not measured" in printed[name][0]]


def test_crash_recovery():
    """Two kills of a small run: every start resumes from a complete checkpoint."""
    printed = printed_by(
        "crash_recovery", "--tries", "2", "--classes", "500", "--width", "16", "--longest", "0.05"
    )
    during, resumed, lost = printed["2"]
    assert (resumed, lost) == ("2", "0")
    assert int(during) <= 2


def test_gradient_compression(tmp_path):
    """Of 8 devices, summing an entry sends 7 bytes, gathering a value and its index 56: a hundredth
    costs 0.08, and biases.
    """
    options = "--ratios", "1", "0.01", "--out", str(tmp_path), "--config.train.steps=2"
    printed = printed_by(
        "gradient_compression", "--config", "tiny", *options, JAX_NUM_CPU_DEVICES="8"
    )
    assert set(printed) == {"ratio", "1", "0.01"}
    assert printed["1"][-1] == "1.000"
    assert 0.08 < float(printed["0.01"][-1]) < 0.1


def test_sampled_softmax(tmp_path):
    """Recall is a share, and the graph's age the steps since it was built: 4 steps, every 3."""
    options = (
        "--rates",
        "0.5",
        "--out",
        str(tmp_path),
        "--config.train.steps=4",
        "--config.head.rebuild_steps=3",
    )
    options = *options, "--config.head.neighbours=4", "--config.mesh.data=1"
    printed = printed_by("sampled_softmax", "--config", "tiny", *options)
    assert set(printed) == {"head", "class sharded", "sampled 0.5", "knn 0.5"}
    share, age = re.fullmatch(r"([\d.]+) % after (\d+)", printed["knn 0.5"][-1]).groups()
    assert 0 < float(share) <= 100
    assert age == "1"


def test_title_transfer(tmp_path):
    """Every photo gets a title, those left out of the search too; no similarity reaches 2."""
    command = [
        sys.executable,
        "-m",
        "sicot_jax.main",
        "--config=tiny",
        f"--workdir={tmp_path / 'run'}",
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, "--config.train.steps=2"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = printed_by(
        "title_transfer", "--run", str(tmp_path / "run"), "--photos", "60", "--limits", "0", "2"
    )
    wanted = {
        f"{split}, {how}"
        for split in ("train", "test")
        for how in ("nearest", "nearest from 2", "random")
    }
    assert set(printed) == {"titles", *wanted}
    assert printed["train, nearest"][:2] == ["60", "100.0 %"]
    assert printed["test, nearest"][:2] == [
        "22",
        "100.0 %",
    ]
    assert printed["train, nearest from 2"][1] == "0.0 %"
    assert printed["train, nearest"][-1].startswith(("0.", "1."))
    for split in ("train", "test"):
        for how in ("nearest", "random"):
            assert all(
                0 < float(cell.removesuffix(" %")) < 100 for cell in printed[f"{split}, {how}"][2:5]
            )


def test_convolution():
    printed = rows("convolution", "--batch", "2")
    assert len(printed) == 1 + (5 + 2) * 3
    assert printed["3x2, 128 to 128, 3x3 stride 1: XLA"][1] == "1.00"


def test_class_weights_from_titles(tmp_path):
    """Rows computed from titles are predicted, random ones are not; a finished run has a table."""
    from benchmarks.class_weights_from_titles import r_squared_by_group

    rng = np.random.default_rng(0)
    titles, counts = rng.normal(size=(200, 6)), rng.integers(1, 30, 200)
    groups = {"all": counts > 0, "few": counts <= 20}
    predicted = r_squared_by_group(titles, titles @ rng.normal(size=(6, 5)) + 1, counts, groups)
    assert min(predicted.values()) > 0.99
    assert (
        max(r_squared_by_group(titles, rng.normal(size=(200, 5)), counts, groups).values()) < 0.05
    )
    command = ["--config=tiny", "--config.train.steps=2", f"--workdir={tmp_path / 'run'}"]
    subprocess.run(
        [sys.executable, "-m", "sicot_jax.main", *command],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    printed = printed_by("class_weights_from_titles", str(tmp_path / "run"))
    assert set(printed) == {"R^2 of classes left out"} | {
        f"{tmp_path / 'run'}: {name}" for name in ("its titles", "titles of other classes")
    }


def test_error_analysis():
    """By hand: one photo of each kind; names that have no two parts are refused."""
    from benchmarks.error_analysis import error_shares
    from sicot_jax.errors import InputError

    names = ["Nike | Caps", "Nike | Shoes", "Puma | Caps", "Puma | Shoes"]
    label, predicted = np.array([0, 0, 0, 0, 3]), np.array([0, 2, 1, 3, 1])
    np.testing.assert_allclose(error_shares(names, label, predicted), [0.2, 0.4, 0.2, 0.2])
    with pytest.raises(InputError, match=r"1 of 2 class names are not \"a | b\", such as 'Caps'"):
        error_shares(["Nike | Caps", "Caps"], label, predicted)


def test_library_parity():
    """A library that is not installed is named, one that is agrees."""
    printed = printed_by("library_parity", "--depths", "18", "--photos", "1", "--size", "64")
    cells = dict(zip(printed["network"], printed["ResNet-18"], strict=True))
    assert set(cells) == {"torchvision", "timm", "transformers"}
    installed = {
        library: cell for library, cell in cells.items() if not cell.startswith("not measured (no ")
    }
    for cell in installed.values():
        assert [float(part) < 1e-5 for part in cell.split(" / ")] == [
            True,
            True,
        ]  # embedding and logits
    pytest.importorskip("transformers", reason="without it there is nothing to compare")
    assert "transformers" in installed


def test_inference_latency():
    printed = rows(
        "inference_latency", *("--depth", "18", "--width", "8", "--size", "32", "--batches", "2")
    )
    engines = {
        "JAX, batch norms folded",
        "StableHLO (jax.export)",
        "PyTorch, eager",
        "ONNX Runtime",
    }
    assert set(printed) == {"ResNet-18, 32x32", *engines}
    assert printed["JAX, batch norms folded"][2] == "1.00"
    pytest.importorskip("onnxruntime", reason="without it a row is not measured")
    assert not [name for name in engines if "not measured" in printed[name][0]]


def test_classifier_export():
    """Every part ends, and has seconds, MiB and shards."""
    pytest.importorskip("torch", reason="conversion needs the extra torch")
    printed = rows("classifier_export", *("--classes", "2000", "--width", "256"))
    assert set(printed) == {"part", "checkpoint", "by device", "gathered"}
    assert len(printed["gathered"]) == 3


def test_click_logs(tmp_path):
    printed = printed_by("click_logs", "--folder", str(tmp_path), "--requests", "9000")
    assert {"import", "triplets", *map(str, range(1, 21))} <= set(printed)
    assert all(float(printed[str(position)][2]) > 0 for position in range(1, 21))
