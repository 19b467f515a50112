"""A finished run that the tests of training share; a test that changes it copies it first."""

import pytest
from helpers.finished_runs import tiny_run_config

from sicot_jax.training.loop import train


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """(run folder, config, results) of a run of six steps on one device."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    config = tiny_run_config(steps=6, checkpoint_every_steps=3)
    results = train(config, workdir)
    return workdir, config, results
