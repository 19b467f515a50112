"""The training loop: results of a run, resuming bit for bit, other meshes, diverging losses."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers.finished_runs import ROOT, die_at, last_state, tiny_run_config, with_mesh

from sicot_jax import config as config_lib
from sicot_jax.catalog.batches import TrainBatchLoader
from sicot_jax.errors import TrainingStopped
from sicot_jax.training import loop
from sicot_jax.training.checkpoint import Checkpoints
from sicot_jax.training.loop import train
from sicot_jax.training.run import read_run


def test_a_run_writes_its_results(finished_run):
    workdir, config, results = finished_run
    assert results["accuracy"]["overall"]["photos"] == 22
    assert json.loads((workdir / "results.json").read_text()) == results
    stored = json.loads((workdir / "config.json").read_text())
    assert config_lib.load_config(str(workdir / "config.json")) == config
    assert stored["data"]["hash"] == results["hashes"]["data"]
    with np.load(workdir / "predictions.npz") as arrays:
        assert arrays["top_classes"].shape == (22, 5)
        assert arrays["embedding"].shape == (22, 16)
        assert len(set(arrays["image_id"])) == 22
        assert np.all(np.diff(arrays["top_logits"], axis=1) <= 0)
        assert np.all(arrays["label_log_prob"] < 0)
        variants = dict(zip(arrays["post_hoc_names"].tolist(), arrays["post_hoc"].T, strict=True))
        np.testing.assert_array_equal(variants["logit_adjustment_0"], arrays["top_classes"][:, 0])
        assert any((best != arrays["top_classes"][:, 0]).any() for best in variants.values())
    assert results["post_hoc_on_validation"].keys() == variants.keys()
    assert results["catalog"]["photos"] == {"train": 160, "validation": 11, "test": 22}
    assert (
        sum(row["photos"] for row in results["tail_to_head_confusions"])
        <= results["accuracy"]["tail"]["photos"]
    )
    shown = results["attention"]["titles"]
    assert len(shown) == 12
    for row in shown:  # weights are multiples of equal ones
        np.testing.assert_allclose(np.mean([weight for _, weight in row["words"]]), 1, atol=1e-3)
    means = [row["weight"] for row in results["attention"]["highest"]]
    assert means == sorted(means, reverse=True)
    assert means[0] > results["attention"]["lowest"][0]["weight"]
    records = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    assert {r["kind"] for r in records} == {"train", "validation"}


def test_a_finished_run_is_not_trained_again(finished_run):
    workdir, config, results = finished_run
    before = (workdir / "results.json").stat().st_mtime_ns
    assert train(config, workdir) == results
    assert (workdir / "results.json").stat().st_mtime_ns == before


def test_a_killed_run_resumes_bit_for_bit(finished_run, tmp_path, monkeypatch):
    finished, config, results = finished_run
    with monkeypatch.context() as patch:
        die_at(patch, 5)  # saved at 3, dies in step 5
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
    resumed = train(config, tmp_path / "run")
    for actual, wanted in zip(
        jax.tree.leaves(last_state(tmp_path / "run", config)),
        jax.tree.leaves(last_state(finished, config)),
        strict=True,
    ):
        np.testing.assert_array_equal(actual, wanted)
    assert resumed["accuracy"] == results["accuracy"]

    def losses(workdir):
        lines = map(json.loads, (workdir / "log.jsonl").read_text().splitlines())
        return [(r["step"], r["total"]) for r in lines if r["kind"] == "train"]

    assert losses(tmp_path / "run") == losses(finished)


@pytest.mark.slow
def test_a_run_whose_batch_grows_resumes_bit_for_bit_before_and_after_it_grew(
    tmp_path, monkeypatch
):
    """Batches of 32, 32, 64, 128, 128; saved after each and killed after the first, the second and
    the third.
    """
    config = tiny_run_config(
        epochs=2.5, grow_every_epochs=0.4, max_micro_batches=4, checkpoint_every_steps=1
    )
    results = train(config, tmp_path / "uninterrupted")
    for step in (2, 2, 2):
        with monkeypatch.context() as patch:
            die_at(patch, step)
            with pytest.raises(ZeroDivisionError):
                train(config, tmp_path / "run")
    resumed = train(config, tmp_path / "run")
    states = [last_state(tmp_path / name, config) for name in ("run", "uninterrupted")]
    for actual, wanted in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(actual, wanted)
    assert resumed["accuracy"] == results["accuracy"]


@pytest.mark.slow
def test_a_growing_run_resumes_before_a_damaged_checkpoint(tmp_path, monkeypatch):
    """Batches of 32, 32, 64, 128, ...: the step of 64 is compiled although the newest checkpoint is
    past it.
    """
    config = tiny_run_config(
        epochs=2.5, grow_every_epochs=0.4, max_micro_batches=4, checkpoint_every_steps=2
    )
    with monkeypatch.context() as patch:
        die_at(patch, 5)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "last" / "4").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    results = train(config, tmp_path / "run")
    assert results["step_of_end"] == 5
    assert results["accuracy"]["overall"]["photos"] == 22


@pytest.mark.slow
def test_the_residual_is_part_of_the_checkpoint(tmp_path, monkeypatch):
    """Resumed bit for bit on as many devices; fewer devices drop the residual of the others, more
    start with zeros.
    """
    config = with_mesh(
        tiny_run_config(steps=4, checkpoint_every_steps=2, gradient_ratio=0.01), 2, 2
    )
    train(config, tmp_path / "uninterrupted")
    with monkeypatch.context() as patch:
        die_at(patch, 3)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "run")
    saved = last_state(tmp_path / "run", config).residual
    for devices in (2, 8):
        restored = last_state(tmp_path / "run", with_mesh(config, devices, 1)).residual
        for name, stored in saved.items():
            here = restored[name]
            assert np.any(stored)
            assert here.shape == (devices, *stored.shape[1:])
            np.testing.assert_array_equal(here[:4], stored[:devices])
            assert not np.any(here[4:])
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    results = train(with_mesh(config, 8, 1), tmp_path / "moved")
    assert results["step_of_end"] == 4
    train(config, tmp_path / "run")
    for actual, wanted in zip(
        *(jax.tree.leaves(last_state(tmp_path / n, config)) for n in ("run", "uninterrupted")),
        strict=True,
    ):
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "model"), [(1, 1), (2, 2)])
def test_a_checkpoint_of_eight_devices_continues_on_fewer(tmp_path, monkeypatch, data, model):
    """11 classes are padded to 16 rows on eight devices, to 12 on four, to 11 on one.

    With softplus instead of ReLU, whose derivative jumps: sums over devices are added in another
      order, and a value that is zero but for rounding gives its full share of the gradient on one
      mesh and nothing on the other. Where that happens is chance. Measured with jax 0.12: one step
      moves one bias of a batch norm's 64 by 2.0e-3 of the largest, the other 63 by 1.1e-6 at most,
      and the next step carries that everywhere (0.17); with jax 0.10 nothing here, but 1.3e-3 at
      batch 128. With softplus every array moves by 6.1e-6 at most after one step and 6.6e-6 after
      two, with both.
    """
    monkeypatch.setattr(jax.nn, "relu", jax.nn.softplus)
    config = tiny_run_config(steps=4, checkpoint_every_steps=2)
    eight, few = with_mesh(config, 4, 2), with_mesh(config, data, model)
    train(eight, tmp_path / "eight")
    with monkeypatch.context() as patch:
        die_at(patch, 3)
        with pytest.raises(ZeroDivisionError):
            train(eight, tmp_path / "moved")
    for a, b in zip(
        *(unpadded(last_state(tmp_path / "moved", mesh)) for mesh in (eight, few)), strict=True
    ):
        np.testing.assert_array_equal(a, b)  # what is restored is the same everywhere
    train(few, tmp_path / "moved")
    states = [unpadded(last_state(tmp_path / name, few)) for name in ("moved", "eight")]
    for a, b in zip(*states, strict=True):
        # Relative to the largest of each array; arrays that are noise altogether (the attention's
        # first bias, 2e-5 and less) are bounded absolutely: 1.6e-9 was seen. 1.4e-5 was seen with
        # jax 0.12, whose sums go in another order with each number of devices.
        finite = np.isfinite(b)
        np.testing.assert_array_equal(np.isfinite(a), finite)
        a, b = np.where(finite, a, 0), np.where(finite, b, 0)
        assert np.abs(a - b).max(initial=0) <= 2e-5 * np.abs(b).max(initial=0) + 2e-9


def unpadded(state) -> list[np.ndarray]:
    """The arrays of a state of 11 classes, the classifier's cut to their rows."""
    cut = jax.tree.map(lambda x: x[:11] if x.ndim else x, state.classifier)
    return jax.tree.leaves(dataclasses.replace(state, classifier=cut))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    """The learning rate becomes infinite in the fourth step (0.6 epochs are three)."""
    config = tiny_run_config(steps=30, checkpoint_every_steps=1)
    optim = dataclasses.replace(config.optim, learning_rate=2.0, gamma=3e38, decay_epochs=0.6)
    config = dataclasses.replace(config, optim=optim)
    with pytest.raises(
        TrainingStopped,
        match=r"parameters are not finite after step 4; the last good checkpoint is of step 3; "
        "lower optim.learning_rate",
    ):
        train(config, tmp_path / "run")
    state = last_state(tmp_path / "run", config)
    assert state.step == 3
    assert all(
        np.isfinite(x).all()
        for x in jax.tree.leaves((state.params, state.classifier.weights.kernel))
    )
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped(finished_run, tmp_path, capsys):
    """The newest of two is truncated: the run continues from the one before, to the same end."""
    finished, config, results = finished_run
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "results.json").unlink()
    last = workdir / "checkpoints" / "last"
    shutil.rmtree(last / "6" / "state")
    assert train(config, workdir)["accuracy"] == results["accuracy"]
    assert "last/6: damaged" in capsys.readouterr().err
    assert {entry.name for entry in last.iterdir()} == {"3", "6", "damaged-6"}
    for actual, wanted in zip(
        *(jax.tree.leaves(last_state(run, config)) for run in (workdir, finished)), strict=True
    ):
        np.testing.assert_array_equal(actual, wanted)


def test_sigterm_saves_first_and_the_same_command_goes_on(tmp_path):
    workdir = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "sicot_jax.main",
        "--config=tiny",
        f"--workdir={workdir}",
        "--config.train.steps=4000",
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith("step "):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
    assert process.returncode == 3, [*seen, rest]
    assert "stopping after this step" in rest
    assert "SIGTERM: saved at step" in rest
    saved = int(rest.split("saved at step ")[1].split(";")[0])
    checkpoints = Checkpoints(workdir, num_classes=11)
    assert checkpoints.latest_step() == saved
    checkpoints.close()


@pytest.mark.slow
def test_a_validation_that_a_signal_has_put_off_is_done_by_the_resumed_run(
    finished_run, tmp_path, monkeypatch
):
    """A cluster may not wait for a validation; the best state is the same."""
    finished, config, results = finished_run
    original = TrainBatchLoader.__call__

    def stopping(self, step):
        return (step == 4 and os.kill(os.getpid(), signal.SIGTERM)) or original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(
            loop,
            "prefetch",
            lambda make, start, stop, **_: (make(step) for step in range(start, stop)),
        )
        patch.setattr(TrainBatchLoader, "__call__", stopping)  # in the last step of the first epoch
        with pytest.raises(TrainingStopped, match="SIGTERM: saved at step 5"):
            train(config, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints" / "best").iterdir())
    assert {**train(config, tmp_path / "run"), "when": ""} == {**results, "when": ""}

    def validations(workdir):
        lines = map(json.loads, (workdir / "log.jsonl").read_text().splitlines())
        return [record for record in lines if record["kind"] == "validation"]

    assert len(validations(finished)) == 2
    assert validations(tmp_path / "run") == validations(finished)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_the_process_group_stops_the_run_and_its_workers(tmp_path, name):
    """As Ctrl-C in a terminal does: here while validation starts its workers, the worst moment."""
    with RunProcessGroup(tmp_path, "--config.train.evaluate_every_epochs=0.2") as process:
        process.wait_for("step 4/")
        os.killpg(process.pid, getattr(signal, name))
        rest = process.stderr.read()
    assert process.returncode == 3
    assert f"{name}: saved at step 4" in rest
    assert "Traceback" not in rest
    assert process.has_exited()


@pytest.mark.slow
def test_workers_end_with_a_killed_run(tmp_path):
    with RunProcessGroup(tmp_path) as process:
        process.wait_for("step 4/")
        process.kill()
    assert process.has_exited()


class RunProcessGroup(subprocess.Popen):
    """A training with two workers in a separate process group."""

    def __init__(self, workdir, *options):
        options = "--config=tiny", f"--workdir={workdir}", "--config.data.workers=2", *options
        options = *options, "--config.mesh.data=1", "--config.train.steps=4000"
        super().__init__(
            [sys.executable, "-m", "sicot_jax.main", *options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )

    def wait_for(self, start):
        seen = []
        for line in self.stderr:
            seen.append(line)
            if line.startswith(start):
                return
        raise AssertionError(f"ended before {start!r}: {''.join(seen)[-2000:]}")

    def has_exited(self):
        """Whether every process of the group ends within ten seconds."""
        for _ in range(100):
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.1)
        os.killpg(self.pid, signal.SIGKILL)
        return False


@pytest.mark.slow
def test_sigkill_and_the_same_command_equals_uninterrupted(tmp_path):
    """Two real kill -9, wherever they come; then the same checkpoint as without them."""

    def command(workdir):
        options = [
            "--config.mesh.data=1",
            "--config.train.steps=40",
            "--config.train.checkpoint_every_steps=5",
        ]
        return [
            sys.executable,
            "-m",
            "sicot_jax.main",
            "--config=tiny",
            f"--workdir={workdir}",
            *options,
        ]

    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for step in (12, 26):
        with subprocess.Popen(
            command(tmp_path / "run"), stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            for line in process.stderr:
                if line.startswith(f"step {step}/"):
                    process.kill()
                    break
        assert process.returncode == -signal.SIGKILL
    for workdir in (tmp_path / "run", tmp_path / "uninterrupted"):
        subprocess.run(command(workdir), check=True, capture_output=True, env=environment)
    config = read_run(tmp_path / "run").config
    states = [last_state(tmp_path / name, config) for name in ("run", "uninterrupted")]
    for actual, wanted in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(actual, wanted)
