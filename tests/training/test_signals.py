"""Runs that are stopped or killed from outside, in separate processes."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers.training_runs import ROOT, last_state

from sicot_jax.catalog.batches import TrainBatchLoader
from sicot_jax.errors import TrainingStopped
from sicot_jax.training import loop
from sicot_jax.training.checkpoint import Checkpoints
from sicot_jax.training.loop import train
from sicot_jax.training.run import read_run


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
