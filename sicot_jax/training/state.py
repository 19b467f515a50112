"""The state of a training run: parameters, batch statistics, optimizer, classifier, residual."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sicot_jax.catalog.statistics import log_prior
from sicot_jax.classifier.state import ClassifierState, init_classifier
from sicot_jax.common.trees import path_name
from sicot_jax.config import Config
from sicot_jax.parallel import gradient_sync, mesh
from sicot_jax.parallel.array_types import Array, Float, Num
from sicot_jax.training.model import build_model
from sicot_jax.training.setup import Setup


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a run needs to continue.

    Attributes:
      step: int32 scalar, updates done; it is the position in the data too, and random keys are
        fold_in(seed, step).
      params: {"visual": ..., "semantic": ...}, float32, a copy on every device.
      batch_stats: running means and variances of the batch norms, likewise.
      opt_state: optimizer state of `params`.
      classifier: class weights and their optimizer state, rows divided over devices.
      residual: error-feedback residual: the part of each device's gradients that it has not sent
        yet, float32 [devices, ...] by parameter; empty with train.gradient_ratio=1.
    """

    step: jax.Array
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: optax.OptState
    classifier: ClassifierState
    residual: gradient_sync.Residual


def initial_state(setup: Setup, log_prior: Float[Array, " C"]) -> TrainState:
    """Returns the state before the first update, a pure function of the config's seed.

    To be called under `jax.set_mesh(setup.mesh)`.

    Args:
      setup: the run's setup.
      log_prior: float32 [C padded], log share of each class, divided over devices by class.

    Returns:
      The state, on the devices.
    """
    model = build_model(setup.config, setup.shape)
    split: Any = nnx.split(model, nnx.Param, nnx.BatchStat)
    _, params, batch_stats = split
    params, batch_stats = mesh.replicate_tree(
        (nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)), setup.mesh
    )

    def initial_classifier(key: jax.Array, log_prior: jax.Array) -> ClassifierState:
        return init_classifier(
            setup.config.head,
            key,
            log_prior,
            num_classes=setup.shape.num_classes,
            width=setup.graphs.classifier_width,
            optimizer=setup.optimizer,
        )

    key = jax.random.fold_in(jax.random.key(setup.config.seed), 1)
    shapes = compressed_shapes(setup.config, params)
    return TrainState(
        step=mesh.replicate_tree(jnp.zeros((), jnp.int32), setup.mesh),
        params=params,
        batch_stats=batch_stats,
        opt_state=mesh.replicate_tree(setup.optimizer.init(params), setup.mesh),
        classifier=jax.jit(initial_classifier)(key, log_prior),
        residual=jax.jit(lambda: gradient_sync.init_residual(shapes, setup.mesh.size))(),
    )


def abstract_state(setup: Setup) -> TrainState:
    """Returns shapes, dtypes and shardings of the state; allocates nothing.

    To be called under `jax.set_mesh(setup.mesh)`.

    Args:
      setup: the run's setup.

    Returns:
      The state with a ShapeDtypeStruct for every array.
    """
    padded = mesh.pad_classes(setup.shape.num_classes, setup.mesh)
    prior = jax.ShapeDtypeStruct((padded,), jnp.float32, sharding=mesh.class_sharding(setup.mesh))
    state = jax.eval_shape(lambda prior: initial_state(setup, prior), prior)
    return mesh.with_shardings(state, setup.mesh)


def class_log_prior(
    train_counts: Num[np.ndarray, " C"], device_mesh: jax.sharding.Mesh
) -> Float[np.ndarray, " P"]:
    """Returns the log share of each class in the training photos, padded for the mesh.

    Args:
      train_counts: training photos per class [C].
      device_mesh: the devices that divide the classes.

    Returns:
      float32 [C padded], 0 for padding.
    """
    padding = mesh.pad_classes(len(train_counts), device_mesh) - len(train_counts)
    return np.pad(log_prior(train_counts), (0, padding)).astype(np.float32)


def compressed_shapes(config: Config, params: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the parameters whose gradients are compressed: only their largest entries are sent.

    Args:
      config: the run's config.
      params: parameters of the streams, a tree of arrays.

    Returns:
      Path name -> shape of each trained array of two or more axes; empty with
      train.gradient_ratio=1.
    """
    if config.train.gradient_ratio >= 1:
        return {}
    shapes = {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    return {
        name: shape
        for name, shape in shapes.items()
        if len(shape) > 1 and config.optim.trains(name)
    }
