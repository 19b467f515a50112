"""Brings back a run: its weights for inference (`restore_params`), or its state for training."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.classifier.state import ClassifierState
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.parallel import mesh
from sicot_jax.training.checkpoint import Checkpoints
from sicot_jax.training.model import ModelGraphs, model_graphs, plain_class_weights
from sicot_jax.training.run import Run
from sicot_jax.training.setup import Setup
from sicot_jax.training.state import TrainState, abstract_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StoredWeights:
    """The fields of a `TrainState` that inference reads, by the same names."""

    step: Any
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    classifier: ClassifierState


@dataclasses.dataclass(frozen=True)
class RestoredModel:
    """The weights of a run on this process's devices; no optimizer, head or catalogue.

    The run's class table and tokenizer are read on demand: `run.class_table()`, `run.tokenizer()`.

    Attributes:
      run: the run.
      graphs: structure of its network.
      params: {"visual": ..., "semantic": ...}, float32, a copy on every device.
      batch_stats: running means and variances of the batch norms, likewise.
      classifier: class weights as trained and log prior, rows divided over devices.
      step: updates before the weights were saved.
      trained_steps: updates of the run so far; above `step` for a best checkpoint.
    """

    run: Run
    graphs: ModelGraphs
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    classifier: ClassifierState
    step: int
    trained_steps: int

    @property
    def preprocessing(self) -> Preprocessing:
        """How photos become the input of the network."""
        return self.run.config.preprocessing

    @property
    def num_classes(self) -> int:
        """Number of classes C, padding not counted."""
        return self.run.shape.num_classes

    @property
    def class_weights(self) -> ClassWeights:
        """Weights that apply to the visual embedding: kernel [C padded, D], bias [C padded]."""
        return plain_class_weights(self.params, self.classifier.weights)


def restore_params(
    run: Run, device_mesh: jax.sharding.Mesh, *, allow_unfinished: bool = False
) -> RestoredModel:
    """Restores the weights of a run for inference: its best checkpoint, or the last one without.

    Neither the optimizer state, which is as large as all weights, nor the catalogue is read. Runs
    without validation photos have no best checkpoint. To be called under
    `jax.set_mesh(device_mesh)`.

    Args:
      run: see `run.read_run`.
      device_mesh: the devices; any number, whatever the run was trained on.
      allow_unfinished: whether a run that is not trained to its end is restored too.

    Returns:
      The weights.

    Raises:
      InputError: the run is not trained to its end, or has no readable checkpoint.
    """
    graphs = model_graphs(run.config, run.shape)
    checkpoints = Checkpoints(run.workdir, num_classes=run.shape.num_classes)
    try:
        kind = "best" if checkpoints.info("best") is not None else "last"  # or a damaged one
        target = _abstract_weights(graphs, run.shape.num_classes, device_mesh)
        stored: StoredWeights = checkpoints.restore(target, kind, partial=True)
        step = int(stored.step)
        trained_steps = step if kind == "last" else checkpoints.latest_step() or 0
    finally:
        checkpoints.close()
    if not allow_unfinished and trained_steps < run.total_steps():
        raise InputError(
            f"{run.workdir} is trained for {trained_steps} of {run.total_steps()} steps; the "
            "command that started it goes on from there"
        )
    return RestoredModel(
        run=run,
        graphs=graphs,
        params=stored.params,
        batch_stats=stored.batch_stats,
        classifier=stored.classifier,
        step=step,
        trained_steps=trained_steps,
    )


def restore_state(setup: Setup, checkpoints: Checkpoints) -> TrainState:
    """Restores the last checkpoint of a run to continue its training.

    Damaged checkpoints after it are moved aside (`Checkpoints.resume`). To be called under
    `jax.set_mesh(setup.mesh)`.

    Args:
      setup: the run's setup.
      checkpoints: checkpoints of the run.

    Returns:
      The state, on the setup's devices.

    Raises:
      CheckpointError: no readable checkpoint, or one of another model.
    """
    return checkpoints.resume(abstract_state(setup))


def _abstract_weights(
    graphs: ModelGraphs, num_classes: int, device_mesh: jax.sharding.Mesh
) -> StoredWeights:
    padded = mesh.pad_classes(num_classes, device_mesh)
    kernel, vector = (
        mesh.sharded_struct(jax.ShapeDtypeStruct(shape, jnp.float32), device_mesh)
        for shape in ((padded, graphs.classifier_width), (padded,))
    )
    step, params, batch_stats = mesh.with_shardings(
        (jax.ShapeDtypeStruct((), jnp.int32), graphs.params, graphs.batch_stats), device_mesh
    )
    classifier = ClassifierState(ClassWeights(kernel, vector), vector, opt_state=())
    return StoredWeights(step, params, batch_stats, classifier)
