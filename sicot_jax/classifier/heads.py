"""Heads: loss, gradient and update of the classifier in one step, by the kind that a config names.

A head owns all three, so that it may update rows as it goes, or only some of them.
"""

from __future__ import annotations

from typing import Protocol

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from sicot_jax.classifier.exact_heads import ClassShardedHead, DenseHead
from sicot_jax.classifier.lazy_update import LazyUpdate
from sicot_jax.classifier.row_optimizer import RowOptimizer
from sicot_jax.classifier.row_state import StreamingOptions
from sicot_jax.classifier.sampled_heads import KnnHead, SampledHead
from sicot_jax.classifier.sampling import num_sampled_slots
from sicot_jax.classifier.state import (
    SAMPLED_HEADS,
    ClassifierState,
    Embeddings,
    Losses,
    StepHyperparams,
)
from sicot_jax.classifier.trust_ratio import TrustRatio
from sicot_jax.config import ConfigError, HeadConfig, LossConfig
from sicot_jax.parallel.array_types import Array, Int


class Head(Protocol):
    """Loss, gradient and update of the classifier."""

    def __call__(
        self,
        embeddings: Embeddings,
        label: Int[Array, " B"],
        classifier: ClassifierState,
        hyperparams: StepHyperparams,
    ) -> tuple[Losses, Embeddings, ClassifierState]:
        """Computes losses and gradients and updates the classifier.

        Args:
          embeddings: stream -> float32 [B, D], divided by batch or equal on all devices.
          label: class ids, int32 [B], divided by batch.
          classifier: classifier before the update; to be donated.
          hyperparams: hyperparameters of the step.

        Returns:
          Losses, "total" and the mean cross-entropy of each stream; gradients of the total, stream
          -> float32 [B, D], divided by batch; the classifier after the update.
        """
        ...


def make_head(
    config: HeadConfig,
    loss_config: LossConfig,
    *,
    num_classes: int,
    optimizer: optax.GradientTransformationExtraArgs,
    lazy_update: LazyUpdate,
    trust_ratio: TrustRatio | None = None,
    num_frozen_columns: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> Head:
    """Builds the head `config.kind`.

    Args:
      config: kind and options of the head.
      loss_config: logit adjustment and label smoothing.
      num_classes: C; rows of the kernel beyond it are padding: no probability, no gradient.
      optimizer: optimizer of {"classifier": {"kernel", "bias"}}; works element by element, since it
        is applied to some rows at a time, but for a trust ratio and a learning rate that it is
        given.
      lazy_update: what the optimizer would have done to rows that missed steps; for sampled heads.
      trust_ratio: trust ratio of an optimizer that scales by the norms of the complete kernel
        (LARS); for "class_sharded".
      num_frozen_columns: last columns of the kernel that keep their values (shared word weights);
        not for sampled heads.
      dtype: dtype of the inputs of the products; sums, softmax and loss are float32.

    Returns:
      The head.
    """
    options = StreamingOptions(
        num_classes=num_classes,
        tau=loss_config.logit_adjustment,
        smoothing=loss_config.label_smoothing,
        dtype=dtype,
        chunk=config.chunk,
        keep_logits=None if config.keep_logits == "no" else jnp.dtype(config.keep_logits),
    )
    rows = RowOptimizer(optimizer, num_frozen_columns)
    match config.kind:
        case "dense":
            return DenseHead(options, rows)
        case "sampled":
            return SampledHead(options, rows, lazy_update, config.sample_rate)
        case "knn":
            return KnnHead(
                options,
                rows,
                lazy_update,
                config.sample_rate,
                num_neighbours=config.neighbours,
                rebuild_steps=config.rebuild_steps,
            )
        case _:  # "class_sharded"; the config knows no other
            return ClassShardedHead(options, rows, trust_ratio)


def check_head(config: HeadConfig, *, num_classes: int, devices: int) -> None:
    """Raises ConfigError where a head cannot run with that many classes on that many devices.

    Args:
      config: the head.
      num_classes: classes of the catalogue.
      devices: devices of the mesh.

    Raises:
      ConfigError: fewer classes than devices, no slot for sampled classes, or as many neighbours as
        classes.
    """
    if num_classes < devices:
        raise ConfigError(
            f"{num_classes} classes on {devices} devices leave some without a class; lower "
            "mesh.data and mesh.model"
        )
    shard_classes = -(-num_classes // devices)
    if config.kind in SAMPLED_HEADS and num_sampled_slots(config.sample_rate, shard_classes) < 1:
        raise ConfigError(
            f"head.sample_rate={config.sample_rate} of {shard_classes} classes a device leaves no "
            "class besides the labels'; raise it, or set head.kind=class_sharded"
        )
    if config.kind == "knn" and config.neighbours >= num_classes:
        raise ConfigError(
            f"head.neighbours={config.neighbours} of {num_classes} classes, wanted fewer than "
            "classes; lower it"
        )
