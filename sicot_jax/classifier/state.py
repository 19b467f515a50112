"""The classifier's state, its initialisation, and what varies between steps of one program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sicot_jax.classifier.class_weights import ClassWeights, init_kernel
from sicot_jax.classifier.losses import STREAMS
from sicot_jax.config import HeadConfig, LossConfig
from sicot_jax.parallel import mesh
from sicot_jax.parallel.array_types import Array, Float, Key

Embeddings = dict[str, Array]  # stream -> float32 [B, D]
Losses = dict[str, Array]  # "total" and the mean cross-entropy of each stream, float32 scalars
SAMPLED_HEADS = ("sampled", "knn")
_INITIAL_SCALE = 0.01  # standard deviation of the first rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """What a head that updates only some rows in each step keeps.

    Attributes:
      step: updates done by the head, int32 scalar.
      last_update: step up to which each row is up to date, int32 [C padded].
      neighbours: nearest classes of each class, int32 [C padded, K]; None without a graph.
    """

    step: Any
    last_update: Any
    neighbours: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierState:
    """The output layer that all streams share, rows divided over all devices.

    Attributes:
      weights: kernel float32 [C padded, D], bias float32 [C padded].
      log_prior: log share of each class in the training photos, float32 [C padded]; constant, and
        here because it is divided like the rows.
      opt_state: optimizer state of the weights.
      sampling: state of a sampled head; None for the others.
    """

    weights: ClassWeights
    log_prior: Any
    opt_state: optax.OptState
    sampling: SamplingState | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepHyperparams:
    """Numbers in which runs of one compiled step may differ; arguments of the step.

    Attributes:
      seed: uint32, of everything that a step draws.
      learning_rate: float32, factor of the schedule.
      stream_weights: stream -> float32 weight of its cross-entropy.
    """

    seed: Any
    learning_rate: Any
    stream_weights: Mapping[str, Any]


def stream_weights(config: LossConfig) -> dict[str, float]:
    """Returns the weight of each stream's cross-entropy.

    Args:
      config: section `loss` of the config.

    Returns:
      Stream -> weight; streams of weight 0 are left out.
    """
    weights = {stream: float(getattr(config, stream)) for stream in STREAMS}
    return {stream: weight for stream, weight in weights.items() if weight}


def make_hyperparams(config: LossConfig, *, learning_rate: float, seed: int = 0) -> StepHyperparams:
    """Returns the hyperparameters of a step as NumPy scalars.

    Args:
      config: section `loss` of the config.
      learning_rate: factor of the schedule.
      seed: seed of everything that a step draws.

    Returns:
      The hyperparameters.
    """
    weights = {stream: np.float32(weight) for stream, weight in stream_weights(config).items()}
    return StepHyperparams(np.uint32(seed), np.float32(learning_rate), weights)


def init_classifier(
    config: HeadConfig,
    key: Key[Array, ""],
    log_prior: Float[Array, " C"],
    *,
    num_classes: int,
    width: int,
    optimizer: optax.GradientTransformation,
) -> ClassifierState:
    """Returns the classifier before the first update.

    To be jitted, so that arrays are made where they live.

    Args:
      config: the head.
      key: row c is drawn from fold_in(key, c), whatever the mesh and the number of classes.
      log_prior: float32 [C padded], divided over devices by class.
      num_classes: C; rows beyond it are padding, zero, and stay so.
      width: D, length of a row.
      optimizer: optimizer of {"classifier": {"kernel", "bias"}}.

    Returns:
      Rows ~ N(0, 0.01^2), biases of 0.
    """
    num_rows = log_prior.shape[0]
    kernel = init_kernel(key, num_rows, num_classes=num_classes, width=width, scale=_INITIAL_SCALE)
    weights = ClassWeights(kernel, jnp.zeros_like(log_prior))
    sampling = None
    if config.kind in SAMPLED_HEADS:
        neighbours = None
        if config.kind == "knn":
            neighbours = jnp.zeros(
                (num_rows, config.neighbours), jnp.int32, out_sharding=mesh.CLASS_ROWS
            )
        sampling = SamplingState(
            step=jnp.zeros((), jnp.int32),
            last_update=jnp.zeros_like(log_prior, jnp.int32),
            neighbours=neighbours,
        )
    return ClassifierState(weights, log_prior, optimizer.init(weights.as_params()), sampling)
