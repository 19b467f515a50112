"""The loop through its public face on the tiny config: resume, other meshes, signals, wrong losses."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sicot_jax import config as config_lib
from sicot_jax import runs
from sicot_jax.checkpoint import CheckpointError, Checkpoints
from sicot_jax.config import Config, ConfigError
from sicot_jax.errors import InputError, TrainingStopped
from sicot_jax.step import abstract_state, make_setup
from sicot_jax.train import test as evaluate_run
from sicot_jax.train import train

ROOT = Path(__file__).parent.parent


def tiny(**train_options) -> Config:
    config = config_lib.load("tiny", ["--config.mesh.data=1"])
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train_options))


def with_mesh(config: Config, data: int, model: int) -> Config:
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=data, model=model))


def last_state(workdir: Path, config: Config):
    """The last checkpoint as numpy, padding rows cut."""
    run = runs.read_run(workdir)
    device_mesh = runs.start_mesh(config)
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, run.shape, device_mesh)
        checkpoints = Checkpoints(workdir, num_classes=run.shape.num_classes)
        state = checkpoints.restore(abstract_state(setup))
        checkpoints.close()
        return jax.device_get(state)


def stop_at(monkeypatch, step: int):
    """The process 'dies' (an exception nobody expects) when that step's batch is asked for."""
    from sicot_jax import pipeline

    original = pipeline.to_device
    calls = {"n": 0}

    def dying(batch, mesh):
        if "token_ids" in batch:
            calls["n"] += 1
            if calls["n"] == step:
                raise ZeroDivisionError("killed")
        return original(batch, mesh)

    monkeypatch.setattr(pipeline, "to_device", dying)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One whole run on one device, six steps."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    config = tiny(steps=6, checkpoint_every_steps=3)
    results = train(config, workdir)
    return workdir, config, results


def test_a_run_leaves_what_it_promises(uninterrupted):
    workdir, config, results = uninterrupted
    assert results["accuracy"]["overall"]["photos"] == 22
    assert json.loads((workdir / "results.json").read_text()) == results
    stored = json.loads((workdir / "config.json").read_text())
    assert config_lib.load(str(workdir / "config.json")) == config
    assert stored["data"]["hash"] == results["hashes"]["data"]
    with np.load(workdir / "predictions.npz") as arrays:
        assert arrays["top_classes"].shape == (22, 5)
        assert arrays["embedding"].shape == (22, 16)
        assert len(set(arrays["image_id"])) == 22
        assert np.all(np.diff(arrays["top_logits"], axis=1) <= 0)
        assert np.all(arrays["label_log_prob"] < 0)
    records = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    assert {r["kind"] for r in records} == {"train", "validation"}


def test_a_finished_run_is_not_trained_again(uninterrupted):
    workdir, config, results = uninterrupted
    before = (workdir / "results.json").stat().st_mtime_ns
    assert train(config, workdir) == results
    assert (workdir / "results.json").stat().st_mtime_ns == before


def test_kill_and_resume_equals_uninterrupted_bit_for_bit(uninterrupted, tmp_path, monkeypatch):
    whole, config, results = uninterrupted
    with monkeypatch.context() as patch:
        stop_at(patch, 5)  # saved at 3, dies in step 5
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
    resumed = train(config, tmp_path / "run")
    for got, wanted in zip(
        jax.tree.leaves(last_state(tmp_path / "run", config)), jax.tree.leaves(last_state(whole, config)), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)
    assert resumed["accuracy"] == results["accuracy"]

    def losses(workdir):
        lines = map(json.loads, (workdir / "log.jsonl").read_text().splitlines())
        return [(r["step"], r["total"]) for r in lines if r["kind"] == "train"]

    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("data, model", [(1, 1), (2, 2)])
def test_a_checkpoint_of_eight_devices_continues_on_fewer(tmp_path, monkeypatch, data, model):
    """11 classes are padded to 16 rows on eight devices, to 12 on four, to 11 on one."""
    config = tiny(steps=4, checkpoint_every_steps=2)
    eight = with_mesh(config, 4, 2)
    train(eight, tmp_path / "eight")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(ZeroDivisionError):
            train(eight, tmp_path / "moved")
    few = with_mesh(config, data, model)
    train(few, tmp_path / "moved")
    wanted = last_state(tmp_path / "eight", few)
    got = last_state(tmp_path / "moved", few)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        # Sums over devices are added in another order; an entry that cancels to nearly nothing keeps that noise, so the
        # bound is relative to the largest of each array (measured on both meshes: at most 4.0e-6), and arrays that are
        # noise altogether (the attention's first bias, 9e-7 after four steps) are bounded absolutely.
        finite = np.isfinite(b)
        np.testing.assert_array_equal(np.isfinite(a), finite)
        a, b = np.where(finite, a, 0), np.where(finite, b, 0)
        assert np.abs(a - b).max(initial=0) <= 1e-5 * np.abs(b).max(initial=0) + 1e-9


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
    assert "SIGTERM: saved at step" in rest
    saved = int(rest.split("saved at step ")[1].split(";")[0])
    checkpoints = Checkpoints(workdir, num_classes=11)
    assert checkpoints.latest_step() == saved
    checkpoints.close()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    config = tiny(steps=30, checkpoint_every_steps=1)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=1e30))
    with pytest.raises(
        TrainingStopped,
        match=r"(loss is (nan|inf) at|parameters are not finite after) step \d+.*lower optim.learning_rate",
    ):
        train(config, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", num_classes=11)
    kept = checkpoints.latest_step()
    checkpoints.close()
    if kept is not None:
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(last_state(tmp_path / "run", config).params))
    assert not (tmp_path / "run" / "results.json").exists()


def test_another_config_in_the_same_workdir_is_refused_by_name(uninterrupted):
    workdir, config, _ = uninterrupted
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=0.2))
    with pytest.raises(ConfigError, match=r"optim.learning_rate: 0.05 -> 0.2"):
        train(other, workdir)


def test_a_workdir_in_use_is_refused(tmp_path):
    with runs.alone(tmp_path), pytest.raises(ConfigError, match="another process is training there"):
        train(tiny(), tmp_path)


def test_restoring_another_model_names_every_difference(uninterrupted):
    workdir, config, _ = uninterrupted
    run = runs.read_run(workdir)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, embedding_width=24))
    device_mesh = runs.start_mesh(config)
    with jax.set_mesh(device_mesh):
        setup = make_setup(wider, run.shape, device_mesh)
        checkpoints = Checkpoints(workdir, num_classes=run.shape.num_classes)
        with pytest.raises(
            CheckpointError, match=r"classifier/kernel is \(11, 16\), wanted \(11, 24\).*params/visual/project"
        ):
            checkpoints.restore(abstract_state(setup))
        checkpoints.close()


def test_restoring_another_class_count_is_refused(uninterrupted):
    workdir, _, _ = uninterrupted
    checkpoints = Checkpoints(workdir, num_classes=12)
    with pytest.raises(CheckpointError, match=r"num_classes=11, the catalogue has 12"):
        checkpoints.restore(None)
    checkpoints.close()


def test_evaluation_again_gives_the_same_and_cannot_see_text(uninterrupted, monkeypatch):
    """Titles of the test split are poisoned: reading one would raise."""
    workdir, config, results = uninterrupted
    from sicot_jax.catalog.opening import open_catalog

    catalog = open_catalog(config.data)

    class NoText:
        labels = catalog.splits["test"].labels

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            record = catalog.splits["test"][index]
            return {k: v for k, v in record.items() if k not in ("title", "tags", "token_ids", "category")}

    blind = dataclasses.replace(catalog, splits={**catalog.splits, "test": NoText()})
    monkeypatch.setattr("sicot_jax.train.open_catalog", lambda data: blind)
    assert evaluate_run(workdir)["accuracy"] == results["accuracy"]  # and on eight devices instead of one


def test_an_unfinished_run_is_not_evaluated(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(ZeroDivisionError):
            train(tiny(steps=6, checkpoint_every_steps=3), tmp_path)
    with pytest.raises(InputError, match="trained for 3 of 6 steps; the command that started it goes on"):
        evaluate_run(tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_a_damaged_checkpoint_is_passed_over(uninterrupted, tmp_path, capsys):
    """The newest of the two is cut off: the run goes on from the one before and comes to the same end."""
    whole, config, results = uninterrupted
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "results.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "last" / "6" / "state")
    assert train(config, workdir)["accuracy"] == results["accuracy"]
    assert "damaged" in capsys.readouterr().err
    assert runs.read_run(workdir).shape.num_classes == 11


@pytest.mark.slow
def test_sigkill_and_the_same_command_equals_uninterrupted(tmp_path):
    """A real kill -9, wherever it happens to fall, twice; then the same checkpoint as without it."""

    def command(workdir):
        options = ["--config.mesh.data=1", "--config.train.steps=40", "--config.train.checkpoint_every_steps=5"]
        return [sys.executable, "-m", "sicot_jax.main", "--config=tiny", f"--workdir={workdir}", *options]

    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for step in (12, 26):
        with subprocess.Popen(command(tmp_path / "run"), stderr=subprocess.PIPE, text=True, env=environment) as process:
            for line in process.stderr:
                if line.startswith(f"step {step}/"):
                    process.kill()
                    break
        assert process.returncode == -signal.SIGKILL
    for workdir in (tmp_path / "run", tmp_path / "whole"):
        subprocess.run(command(workdir), check=True, capture_output=True, env=environment)
    config = runs.read_run(tmp_path / "run").config
    states = [last_state(tmp_path / name, config) for name in ("run", "whole")]
    for got, wanted in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_init_from_takes_streams_and_classifier(uninterrupted, tmp_path):
    workdir, config, _ = uninterrupted
    model = dataclasses.replace(config.model, init_from=str(workdir))
    frozen = dataclasses.replace(config.optim, trainable="classifier/bias")
    warm = dataclasses.replace(config, model=model, optim=frozen)
    train(dataclasses.replace(warm, train=dataclasses.replace(warm.train, steps=1)), tmp_path / "warm")
    run = runs.read_run(workdir)
    device_mesh = runs.start_mesh(config)
    with jax.set_mesh(device_mesh):
        _, best, _ = runs.restore_best(run, device_mesh)
    got = last_state(tmp_path / "warm", warm)
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(best.params), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(got.classifier.kernel, best.classifier.kernel)
    # No stream trains, so batch statistics stand still too.
    for a, b in zip(jax.tree.leaves(got.batch_stats), jax.tree.leaves(best.batch_stats), strict=True):
        np.testing.assert_array_equal(a, b)
