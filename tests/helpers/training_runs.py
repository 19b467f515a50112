"""Shares small training runs among the tests of training."""

import dataclasses
from pathlib import Path

import jax

from sicot_jax import config as config_lib
from sicot_jax.config import Config
from sicot_jax.training.checkpoint import Checkpoints
from sicot_jax.training.run import mesh_of_config, read_run
from sicot_jax.training.setup import make_setup
from sicot_jax.training.state import abstract_state

ROOT = Path(__file__).parents[2]


def tiny_run_config(**train_options) -> Config:
    config = config_lib.load_config("tiny", ["--config.mesh.data=1"])
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train_options))


def with_mesh(config: Config, data: int, model: int) -> Config:
    return dataclasses.replace(
        config, mesh=dataclasses.replace(config.mesh, data=data, model=model)
    )


def last_state(workdir: Path, config: Config):
    """The last checkpoint as numpy, padding rows cut."""
    run = read_run(workdir)
    device_mesh = mesh_of_config(config)
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, run.shape, device_mesh)
        checkpoints = Checkpoints(workdir, num_classes=run.shape.num_classes)
        state = checkpoints.restore(abstract_state(setup))
        checkpoints.close()
        return jax.device_get(state)


def die_at(monkeypatch, step: int):
    """The process 'dies' (an exception nobody expects) when that step's batch is transferred."""
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
