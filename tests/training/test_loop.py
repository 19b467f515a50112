"""The loop through its public face on the tiny config: resume, other meshes, signals, wrong losses."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from sicot_jax import config as config_lib
from sicot_jax.catalog import open as opening
from sicot_jax.catalog.sources import tables
from sicot_jax.config import Config, ConfigError
from sicot_jax.errors import InputError, TrainingStopped
from sicot_jax.models.semantic_stream import set_word_vectors
from sicot_jax.parallel import mesh as mesh_lib
from sicot_jax.training import run as runs
from sicot_jax.training.checkpoint import CheckpointError, Checkpoints
from sicot_jax.training.loop import test as evaluate_run
from sicot_jax.training.loop import train
from sicot_jax.training.state import abstract_state, class_log_prior, initial_state
from sicot_jax.training.setup import make_setup
from sicot_jax.training.model import DataShape
from sicot_jax.training.warm_start import warm_start

ROOT = Path(__file__).parents[2]


def tiny(**train_options) -> Config:
    config = config_lib.load_config("tiny", ["--config.mesh.data=1"])
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train_options))


def with_mesh(config: Config, data: int, model: int) -> Config:
    return dataclasses.replace(
        config, mesh=dataclasses.replace(config.mesh, data=data, model=model)
    )


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
    from sicot_jax.training import device_batches

    original = device_batches.to_device
    calls = {"n": 0}

    def dying(batch, mesh):
        if "token_ids" in batch:
            calls["n"] += 1
            if calls["n"] == step:
                raise ZeroDivisionError("killed")
        return original(batch, mesh)

    monkeypatch.setattr(device_batches, "to_device", dying)


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
        sum(row["photos"] for row in results["swallowed"]) <= results["accuracy"]["tail"]["photos"]
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


def test_classes_beyond_the_limit_are_not_tested_with_remedies(uninterrupted, tmp_path):
    workdir, _, results = uninterrupted
    shutil.copytree(workdir, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    stored["config"]["eval"]["analysis_up_to_classes"] = 10  # of 11
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    again = evaluate_run(tmp_path / "run")
    assert again["accuracy"] == results["accuracy"]
    assert again["post_hoc_on_validation"] == {}
    with np.load(tmp_path / "run" / "predictions.npz") as arrays:
        assert "post_hoc" not in arrays


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
        jax.tree.leaves(last_state(tmp_path / "run", config)),
        jax.tree.leaves(last_state(whole, config)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, wanted)
    assert resumed["accuracy"] == results["accuracy"]

    def losses(workdir):
        lines = map(json.loads, (workdir / "log.jsonl").read_text().splitlines())
        return [(r["step"], r["total"]) for r in lines if r["kind"] == "train"]

    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.slow
def test_a_run_whose_batch_grows_resumes_bit_for_bit_before_and_after_it_grew(
    tmp_path, monkeypatch
):
    """Batches of 32, 32, 64, 128, 128; saved after each and killed after the first, the second and
    the third.
    """
    config = tiny(epochs=2.5, grow_every_epochs=0.4, max_micro_batches=4, checkpoint_every_steps=1)
    results = train(config, tmp_path / "whole")
    for step in (2, 2, 2):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            stop_at(patch, step)
            train(config, tmp_path / "run")
    resumed = train(config, tmp_path / "run")
    states = [last_state(tmp_path / name, config) for name in ("run", "whole")]
    for got, wanted in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert resumed["accuracy"] == results["accuracy"]


@pytest.mark.slow
def test_a_growing_run_resumes_before_a_damaged_checkpoint(tmp_path, monkeypatch):
    """Batches of 32, 32, 64, 128, ...: the step of 64 is compiled although the newest checkpoint is
    past it.
    """
    config = tiny(epochs=2.5, grow_every_epochs=0.4, max_micro_batches=4, checkpoint_every_steps=2)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        stop_at(patch, 5)
        train(config, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "last" / "4").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    results = train(config, tmp_path / "run")
    assert results["step_of_end"] == 5
    assert results["accuracy"]["overall"]["photos"] == 22


@pytest.mark.slow
def test_what_was_not_sent_yet_is_part_of_the_checkpoint(tmp_path, monkeypatch):
    """Resumed bit for bit on as many devices; on fewer what the others had not sent is dropped, on
    more nothing is.
    """
    config = with_mesh(tiny(steps=4, checkpoint_every_steps=2, gradient_ratio=0.01), 2, 2)
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        stop_at(patch, 3)
        train(config, tmp_path / "run")
    saved = last_state(tmp_path / "run", config).residual
    for devices in (2, 8):
        restored = last_state(tmp_path / "run", with_mesh(config, devices, 1)).residual
        for name, there in saved.items():
            here = restored[name]
            assert np.any(there)
            assert here.shape == (devices, *there.shape[1:])
            np.testing.assert_array_equal(here[:4], there[:devices])
            assert not np.any(here[4:])
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    results = train(with_mesh(config, 8, 1), tmp_path / "moved")
    assert results["step_of_end"] == 4
    train(config, tmp_path / "run")
    for got, wanted in zip(
        *(jax.tree.leaves(last_state(tmp_path / n, config)) for n in ("run", "whole")), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "model"), [(1, 1), (2, 2)])
def test_a_checkpoint_of_eight_devices_continues_on_fewer(tmp_path, monkeypatch, data, model):
    """11 classes are padded to 16 rows on eight devices, to 12 on four, to 11 on one.

    With softplus in place of ReLU, whose derivative jumps: sums over devices are added in another
      order, and a value that is zero but for rounding gives its whole share of the gradient on one
      mesh and nothing on the other. Where that happens is chance. Measured with jax 0.12: one step
      moves one bias of a batch norm's 64 by 2.0e-3 of the largest, the other 63 by 1.1e-6 at most,
      and the next step carries that everywhere (0.17); with jax 0.10 nothing here, but 1.3e-3 at
      batch 128. With softplus every array moves by 6.1e-6 at most after one step and 6.6e-6 after
      two, with both.
    """
    monkeypatch.setattr(jax.nn, "relu", jax.nn.softplus)
    config = tiny(steps=4, checkpoint_every_steps=2)
    eight, few = with_mesh(config, 4, 2), with_mesh(config, data, model)
    train(eight, tmp_path / "eight")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
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
        # first bias, 1e-5 and less) are bounded absolutely. 1.4e-5 was seen with jax 0.12, whose
        # sums go in another order with each number of devices.
        finite = np.isfinite(b)
        np.testing.assert_array_equal(np.isfinite(a), finite)
        a, b = np.where(finite, a, 0), np.where(finite, b, 0)
        assert np.abs(a - b).max(initial=0) <= 2e-5 * np.abs(b).max(initial=0) + 1e-9


def unpadded(state) -> list[np.ndarray]:
    """The arrays of a state of 11 classes, the classifier's cut to their rows."""
    cut = jax.tree.map(lambda x: x[:11] if x.ndim else x, state.classifier)
    return jax.tree.leaves(dataclasses.replace(state, classifier=cut))


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


def test_a_signal_before_validation_puts_it_off_to_the_resumed_run(
    uninterrupted, tmp_path, monkeypatch
):
    """Waiting for validation could take longer than a cluster does; the best state is found all the
    same.
    """
    from sicot_jax.catalog.batches import TrainBatchLoader
    from sicot_jax.training import loop

    whole, config, results = uninterrupted
    original = TrainBatchLoader.__call__

    def stopping(self, step):
        return (step == 4 and os.kill(os.getpid(), signal.SIGTERM)) or original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(
            loop,
            "prefetch",
            lambda make, start, stop, **_: (make(step) for step in range(start, stop)),
        )
        patch.setattr(
            TrainBatchLoader, "__call__", stopping
        )  # in the last step of the first epoch
        with pytest.raises(TrainingStopped, match="SIGTERM: saved at step 5"):
            train(config, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints" / "best").iterdir())
    assert {**train(config, tmp_path / "run"), "when": ""} == {**results, "when": ""}

    def validations(workdir):
        lines = map(json.loads, (workdir / "log.jsonl").read_text().splitlines())
        return [record for record in lines if record["kind"] == "validation"]

    assert len(validations(whole)) == 2
    assert validations(tmp_path / "run") == validations(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_run(tmp_path, name):
    """As Ctrl-C in a terminal does: here while validation starts its workers, the worst moment."""
    with Group(tmp_path, "--config.train.evaluate_every_epochs=0.2") as process:
        process.wait_for("step 4/")
        os.killpg(process.pid, getattr(signal, name))
        rest = process.stderr.read()
    assert process.returncode == 3
    assert f"{name}: saved at step 4" in rest
    assert "Traceback" not in rest
    assert process.is_gone()


@pytest.mark.slow
def test_workers_end_with_a_killed_run(tmp_path):
    with Group(tmp_path) as process:
        process.wait_for("step 4/")
        process.kill()
    assert process.is_gone()


class Group(subprocess.Popen):
    """A training with two workers in a process group of its own."""

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

    def is_gone(self):
        """Whether every process of the group ends within ten seconds."""
        for _ in range(100):
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.1)
        os.killpg(self.pid, signal.SIGKILL)
        return False


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    """The learning rate becomes infinite in the fourth step (0.6 epochs are three)."""
    config = tiny(steps=30, checkpoint_every_steps=1)
    optim = dataclasses.replace(config.optim, learning_rate=2.0, gamma=3e38, decay_epochs=0.6)
    config = dataclasses.replace(config, optim=optim)
    with pytest.raises(
        TrainingStopped,
        match=r"parameters are not finite after step 4; the last good checkpoint is of step 3; lower optim.learning_rate",
    ):
        train(config, tmp_path / "run")
    state = last_state(tmp_path / "run", config)
    assert state.step == 3
    assert all(
        np.isfinite(x).all() for x in jax.tree.leaves((state.params, state.classifier.kernel))
    )
    assert not (tmp_path / "run" / "results.json").exists()


def test_another_config_in_the_same_workdir_is_refused_by_name(uninterrupted):
    workdir, config, _ = uninterrupted
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=0.2))
    with pytest.raises(ConfigError, match=r"optim.learning_rate: 0.05 -> 0.2"):
        train(other, workdir)


def test_a_field_newer_than_the_run_has_its_default_there(tmp_path, uninterrupted, capsys):
    workdir = tmp_path / "old"
    whole, config, _ = uninterrupted
    shutil.copytree(whole, workdir)
    stored = json.loads((workdir / "config.json").read_text())
    del stored["config"]["train"]["gradient_ratio"]
    (workdir / "config.json").write_text(json.dumps(stored))
    train(config, workdir)
    assert "finished before" in "".join(capsys.readouterr())
    with pytest.raises(
        ConfigError, match=r"holds another run \(train.gradient_ratio: 1.0 -> 0.5\)"
    ):
        train(
            dataclasses.replace(
                config, train=dataclasses.replace(config.train, gradient_ratio=0.5)
            ),
            workdir,
        )


def test_a_workdir_in_use_is_refused(tmp_path):
    with (
        runs.alone(tmp_path),
        pytest.raises(ConfigError, match="another process is training there"),
    ):
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
            CheckpointError,
            match=r"classifier/kernel is \(11, 16\), wanted \(11, 24\).*params/visual/projection",
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
    from sicot_jax.catalog.open import open_catalog

    catalog = open_catalog(config.data)

    class NoText:
        labels = catalog.splits["test"].labels

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            record = catalog.splits["test"][index]
            return {
                k: v
                for k, v in record.items()
                if k not in ("title", "tags", "token_ids", "category")
            }

    blind = dataclasses.replace(catalog, splits={**catalog.splits, "test": NoText()})
    monkeypatch.setattr("sicot_jax.training.loop.open_catalog", lambda data: blind)
    assert (
        evaluate_run(workdir)["accuracy"] == results["accuracy"]
    )  # and on eight devices instead of one


def test_an_unfinished_run_is_not_evaluated(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(ZeroDivisionError):
            train(tiny(steps=6, checkpoint_every_steps=3), tmp_path)
    with pytest.raises(
        InputError, match="trained for 3 of 6 steps; the command that started it goes on"
    ):
        evaluate_run(tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_a_damaged_checkpoint_is_passed_over(uninterrupted, tmp_path, capsys):
    """The newest of the two is cut off: the run goes on from the one before and comes to the same
    end.
    """
    whole, config, results = uninterrupted
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "results.json").unlink()
    last = workdir / "checkpoints" / "last"
    shutil.rmtree(last / "6" / "state")
    assert train(config, workdir)["accuracy"] == results["accuracy"]
    assert "last/6: damaged" in capsys.readouterr().err
    assert {entry.name for entry in last.iterdir()} == {"3", "6", "damaged-6"}
    for got, wanted in zip(
        *(jax.tree.leaves(last_state(run, config)) for run in (workdir, whole)), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


def test_an_older_state_is_not_evaluated_as_the_finished_run(uninterrupted, tmp_path):
    """A run without validation, whose last checkpoint is damaged."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "best")
    shutil.rmtree(workdir / "checkpoints" / "last" / "6" / "state")
    with pytest.raises(InputError, match="trained for 3 of 6 steps"):
        evaluate_run(workdir)


@dataclasses.dataclass
class Small:
    """As little of a state as a checkpoint wants."""

    step: jax.Array
    weight: jax.Array

    def __init__(self, step, weight):
        self.step, self.weight = step, weight


jax.tree_util.register_dataclass(Small, ["step", "weight"], [])


def small(step: int) -> Small:
    return Small(jax.numpy.asarray(step), jax.numpy.full(3, step, float))


def steps_in(checkpoints: Checkpoints, kind: str) -> list[int]:
    checkpoints.wait()
    return sorted(checkpoints.managers[kind].all_steps())


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path, num_classes=3, writer=True)
    yield opened
    opened.close()


@dataclasses.dataclass
class Grown(Small):
    later: dict


jax.tree_util.register_dataclass(Grown, ["step", "weight", "later"], [])


def test_a_part_of_the_state_that_a_run_does_not_use_may_be_newer_than_its_checkpoints(checkpoints):
    checkpoints.save(small(4), 4)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small(0)
    )
    restored = checkpoints.restore(Grown(target.step, target.weight, {}))
    assert (int(restored.step), restored.weight.tolist(), restored.later) == (4, [4.0] * 3, {})
    with pytest.raises(CheckpointError, match="another model: later/x missing"):
        checkpoints.restore(Grown(target.step, target.weight, {"x": target.weight}))


def test_what_is_not_saved_is_an_error(checkpoints):
    checkpoints.save(small(4), 4)
    for step in (2, 4):
        with pytest.raises(
            CheckpointError, match=rf"last: step {step} was not saved, step 4 lies there; move"
        ):
            checkpoints.save(small(step), step)
    checkpoints.save(small(6), 6)  # also while the one before is still being written
    assert steps_in(checkpoints, "last") == [4, 6]


def test_a_run_saves_beside_a_damaged_checkpoint(checkpoints, tmp_path):
    """It is neither counted among the two to keep, nor in the way of the steps before it."""
    for step in (4, 8):
        checkpoints.save(small(step), step)
    checkpoints.wait()
    shutil.rmtree(tmp_path / "checkpoints" / "last" / "8" / "state")
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small(0)
    )
    for later in (6, 7):
        assert checkpoints.resume(target).step == {6: 4, 7: 6}[later]
        checkpoints.save(small(later), later)
    assert steps_in(checkpoints, "last") == [6, 7]
    assert (tmp_path / "checkpoints" / "last" / "damaged-8").is_dir()


def test_a_new_best_checkpoint_replaces_one_of_a_later_step(checkpoints):
    for step in (8, 6, 6, 7):
        checkpoints.save(small(step), step, kind="best", info={"validation": step})
        assert steps_in(checkpoints, "best") == [step]
        assert checkpoints.info("best")["validation"] == step


def test_what_was_left_half_written_is_no_checkpoint(tmp_path):
    """Only the run itself clears it away: another process may read while it is being written."""
    left = tmp_path / "checkpoints" / "last" / "1.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    catalog = opening.open_catalog(tiny().data)
    runs.start_or_continue(tmp_path, tiny(), catalog)
    runs.start_or_continue(
        tmp_path, tiny(steps=7), catalog
    )  # no step was saved: any config may start
    for writer in (False, True):
        checkpoints = Checkpoints(tmp_path, num_classes=3, writer=writer)
        checkpoints.save(
            small(2 + writer), 2 + writer
        )  # waits for the clearing, which goes on behind
        checkpoints.wait()
        checkpoints.close()
        assert left.exists() is not writer


def test_the_older_version_of_a_catalogue_is_named(tmp_path):
    for version in ("1.0.0", "1.0.1"):
        (tmp_path / "shop" / version).mkdir(parents=True)
        description = {"format_version": tables.FORMAT_VERSION, "data_hash": f"hash of {version}"}
        (tmp_path / "shop" / version / tables.CATALOG_FILE).write_text(json.dumps(description))
    data = config_lib.DataConfig(source="imported", path=str(tmp_path))
    assert runs.same_data(data, "hash of 1.0.0") == f", which {tmp_path / 'shop' / '1.0.0'} holds"
    assert (
        runs.same_data(data, "another hash") == runs.same_data(tiny().data, "hash of 1.0.0") == ""
    )


@pytest.mark.slow
def test_sigkill_and_the_same_command_equals_uninterrupted(tmp_path):
    """A real kill -9, wherever it happens to fall, twice; then the same checkpoint as without it."""

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
    train(
        dataclasses.replace(warm, train=dataclasses.replace(warm.train, steps=1)), tmp_path / "warm"
    )
    run = runs.read_run(workdir)
    device_mesh = runs.start_mesh(config)
    with jax.set_mesh(device_mesh):
        _, best, _ = runs.restore_best(run, device_mesh)
    got = last_state(tmp_path / "warm", warm)
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(best.params), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(got.classifier.kernel, best.classifier.kernel)
    # No stream trains, so batch statistics stand still too.
    for a, b in zip(
        jax.tree.leaves(got.batch_stats), jax.tree.leaves(best.batch_stats), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", [8, 7])
def test_init_from_takes_no_word_vectors_of_another_vocabulary(uninterrupted, capsys, seed):
    """As many words as the run's in one case, fewer in the other."""
    workdir, config, _ = uninterrupted
    state, got, source = started_from(workdir, with_seed(config, seed))
    same_count = state.params["semantic"]["word_vectors"].shape == source.params["semantic"]["word_vectors"].shape
    assert same_count == (seed == 8)
    np.testing.assert_array_equal(
        got.params["semantic"].pop("word_vectors"), state.params["semantic"]["word_vectors"]
    )
    source.params["semantic"].pop("word_vectors")
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(source.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "another vocabulary; word vectors are the catalogue's own" in capsys.readouterr().err


@pytest.mark.slow
def test_init_from_leaves_what_rows_share_through_titles(tmp_path):
    """Scores of another vocabulary's words, and the part of rows that other titles of the same
    classes would give.
    """
    flags = ["model.shared_word_weights=True", "loss.mixed=0", "loss.tag_prediction=1"]
    config = config_lib.override_config(tiny(steps=2), flags)
    train(config, tmp_path / "run")
    state, got, source = started_from(tmp_path / "run", config)
    own = got.classifier.kernel.shape[1] - got.params["visual"]["tag_head"]["kernel"].shape[1]
    theirs, kernel, mine = (np.asarray(s.classifier.kernel) for s in (source, got, state))
    np.testing.assert_array_equal(kernel[:, :own], theirs[:, :own])
    np.testing.assert_array_equal(kernel[:, own:], mine[:, own:])
    assert (mine != theirs).all(1).any()
    scores = [s.params["visual"]["tag_head"]["kernel"] for s in (got, source)]
    np.testing.assert_array_equal(*scores)
    state, got, source = started_from(tmp_path / "run", with_seed(config, 8))
    scores = [s.params["visual"]["tag_head"]["kernel"] for s in (got, state)]
    np.testing.assert_array_equal(*scores)
    for a, b in zip(
        *(jax.tree.leaves(s.params["visual"]["resnet"]) for s in (got, source)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    # A run without scores takes the rows with what they shared, one with its own scores too.
    _, got, source = started_from(
        tmp_path / "run",
        config_lib.override_config(config, ["loss.tag_prediction=0", "model.shared_word_weights=False"]),
    )
    scores = np.asarray(source.params["visual"]["tag_head"]["kernel"])
    theirs = np.asarray(source.classifier.kernel)
    np.testing.assert_allclose(
        got.classifier.kernel, theirs[:, :own] + theirs[:, own:] @ scores.T, rtol=1e-4, atol=1e-5
    )
    assert "tag_head" not in got.params["visual"]


def test_init_from_a_run_without_scores_keeps_its_own(uninterrupted):
    workdir, config, _ = uninterrupted
    flags = ["model.shared_word_weights=True", "loss.mixed=0", "loss.tag_prediction=1"]
    state, got, source = started_from(workdir, config_lib.override_config(config, flags))
    np.testing.assert_array_equal(*(s.params["visual"]["tag_head"]["kernel"] for s in (got, state)))
    own = source.classifier.kernel.shape[1]
    np.testing.assert_array_equal(got.classifier.kernel[:, :own], source.classifier.kernel)
    np.testing.assert_array_equal(got.classifier.kernel[:, own:], state.classifier.kernel[:, own:])


@pytest.mark.slow
def test_init_from_takes_codes_of_as_many_bits(uninterrupted, tmp_path):
    """Of another number, or of a run without, they start anew; a run without codes leaves them
    behind.
    """
    plain = config_lib.override_config(tiny(steps=1), ["loss.mixed=0"])
    config = config_lib.override_config(plain, ["loss.codes=1", "model.code_bits=16"])
    train(config, tmp_path / "run")

    def kernels(workdir, config):
        states = started_from(workdir, config)
        return [s.params["visual"].get("code_head", {}).get("kernel") for s in states]

    mine, got, theirs = kernels(tmp_path / "run", config)
    np.testing.assert_array_equal(got, theirs)
    assert (mine != theirs).any()
    mine, got, _ = kernels(tmp_path / "run", config_lib.override_config(config, ["model.code_bits=24"]))
    np.testing.assert_array_equal(got, mine)
    mine, got, theirs = kernels(uninterrupted[0], config)
    np.testing.assert_array_equal(got, mine)
    assert theirs is None
    _, got, theirs = kernels(tmp_path / "run", plain)
    assert got is None
    assert theirs is not None


def test_init_from_another_depth_is_one_line(uninterrupted):
    workdir, config, _ = uninterrupted
    deeper = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=34))
    with pytest.raises(
        CheckpointError, match=r"model.init_from=.*: another model: .* missing; and \d+ more"
    ) as error:
        started_from(workdir, deeper)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def with_seed(config: Config, seed: int) -> Config:
    generated = dataclasses.replace(config.data.generated, seed=seed)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, generated=generated))


def started_from(workdir: Path, config: Config):
    """-> (fresh state, the same with `init_from` the run, the run's state)."""
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, init_from=str(workdir))
    )
    catalog = opening.open_catalog(config.data)
    device_mesh = runs.start_mesh(config)
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, DataShape.of(catalog), device_mesh)
        prior = mesh_lib.shard_class_vector(
            class_log_prior(catalog.classes.counts["train"], device_mesh), device_mesh
        )
        state = initial_state(setup, prior)
        if config.loss.with_semantic:
            state = set_word_vectors(state, catalog.word_vectors)
        _, source, _ = runs.restore_best(runs.read_run(workdir), device_mesh)
        return state, warm_start(state, setup, catalog), source
