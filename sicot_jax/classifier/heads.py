"""Classifier heads (dense, class-sharded, sampled, KNN): loss, gradient and update in one step.

A head owns all three, so that it may update rows as it goes, or only some of them.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.classifier.knn_graph import knn_graph
from sicot_jax.classifier.lazy_update import LazyUpdate
from sicot_jax.classifier.losses import LossOptions, co_training_loss
from sicot_jax.classifier.row_state import RowOptimizer, RowState, RowUpdate, StreamingOptions
from sicot_jax.classifier.sampling import neighbour_classes, num_sampled_slots, uniform_classes
from sicot_jax.classifier.sharded import loss_and_update
from sicot_jax.classifier.state import (
    SAMPLED_HEADS,
    ClassifierState,
    Embeddings,
    Losses,
    SamplingState,
    StepHyperparams,
)
from sicot_jax.classifier.trust_ratio import TrustRatio
from sicot_jax.config import ConfigError, HeadConfig, LossConfig
from sicot_jax.parallel import mesh
from sicot_jax.parallel.array_types import Array, Int, Key


@dataclasses.dataclass(frozen=True)
class DenseHead:
    """The plain reference: all class weights on every device, logits [B, C] in memory.

    Attributes:
      options: options of the loss.
      optimizer: optimizer of the class weights.
    """

    options: LossOptions
    optimizer: RowOptimizer

    def __call__(
        self,
        embeddings: Embeddings,
        label: Int[Array, " B"],
        classifier: ClassifierState,
        hyperparams: StepHyperparams,
    ) -> tuple[Losses, Embeddings, ClassifierState]:
        """Computes losses and gradients and updates the classifier; see `heads.Head`."""

        def loss(embeddings: Embeddings, weights: ClassWeights) -> tuple[Array, dict[str, Array]]:
            return co_training_loss(
                embeddings,
                label,
                jax.tree.map(mesh.replicate, weights),
                stream_weights=hyperparams.stream_weights,
                log_prior=mesh.replicate(classifier.log_prior),
                options=self.options,
            )

        divided = {
            name: mesh.shard_leading_axis(embeddings[name]) for name in hyperparams.stream_weights
        }
        (total, losses), (gradients, weight_gradient) = jax.value_and_grad(
            loss, argnums=(0, 1), has_aux=True
        )(divided, classifier.weights)
        state = self.optimizer(weight_gradient, row_state(classifier, hyperparams))
        return {"total": total, **losses}, gradients, with_row_state(classifier, state)


@dataclasses.dataclass(frozen=True)
class ClassShardedHead:
    """All classes, exactly, with rows divided over all devices and logits a chunk at a time.

    Attributes:
      options: options of the loss.
      optimizer: optimizer of the class weights.
      trust_ratio: trust ratio of the optimizer, where it scales by the norms of the complete kernel
        (LARS).
    """

    options: StreamingOptions
    optimizer: RowOptimizer
    trust_ratio: TrustRatio | None = None

    def __call__(
        self,
        embeddings: Embeddings,
        label: Int[Array, " B"],
        classifier: ClassifierState,
        hyperparams: StepHyperparams,
    ) -> tuple[Losses, Embeddings, ClassifierState]:
        """Computes losses and gradients and updates the classifier; see `heads.Head`."""
        losses, gradients, state = loss_and_update(
            embeddings,
            label,
            row_state(classifier, hyperparams),
            classifier.log_prior,
            stream_weights=hyperparams.stream_weights,
            options=self.options,
            row_update=RowUpdate(self.optimizer, trust_ratio=self.trust_ratio),
        )
        return losses, gradients, with_row_state(classifier, state)


def row_state(classifier: ClassifierState, hyperparams: StepHyperparams) -> RowState:
    """Returns what an update of the classifier reads and writes.

    Args:
      classifier: classifier before the update.
      hyperparams: hyperparameters of the step.

    Returns:
      The state of all rows.
    """
    return RowState(
        weights=classifier.weights,
        opt_state=classifier.opt_state,
        learning_rate=jnp.asarray(hyperparams.learning_rate),
    )


def with_row_state(classifier: ClassifierState, state: RowState) -> ClassifierState:
    """Returns the classifier with updated rows.

    Args:
      classifier: classifier before the update.
      state: state of all rows after the update.

    Returns:
      The classifier with the weights and optimizer state of `state`.
    """
    return dataclasses.replace(classifier, weights=state.weights, opt_state=state.opt_state)


@dataclasses.dataclass(frozen=True)
class SampledHead:
    """The labels' classes and a random share of the others (after Partial FC, An et al. 2021).

    Attributes:
      options: options of the loss.
      optimizer: optimizer of the class weights.
      lazy_update: momentum and decay of the steps that a row missed.
      sample_rate: chance of each class without a label in the batch.
    """

    options: StreamingOptions
    optimizer: RowOptimizer
    lazy_update: LazyUpdate
    sample_rate: float

    def __call__(
        self,
        embeddings: Embeddings,
        label: Int[Array, " B"],
        classifier: ClassifierState,
        hyperparams: StepHyperparams,
    ) -> tuple[Losses, Embeddings, ClassifierState]:
        """Computes losses and gradients and updates the classifier; see `heads.Head`."""
        assert classifier.sampling is not None
        key = jax.random.fold_in(jax.random.key(hyperparams.seed), 2)
        key = jax.random.fold_in(key, classifier.sampling.step)
        sampling = self.prepare(classifier)
        active = self.active_rows(key, label, sampling, num_rows=classifier.weights.kernel.shape[0])
        losses, gradients, state = loss_and_update(
            embeddings,
            label,
            dataclasses.replace(
                row_state(classifier, hyperparams),
                step=sampling.step,
                last_update=sampling.last_update,
            ),
            classifier.log_prior,
            stream_weights=hyperparams.stream_weights,
            options=self.options,
            row_update=RowUpdate(self._update_rows, bring_up_to_date=self._bring_up_to_date),
            active=active,
        )
        sampling = dataclasses.replace(sampling, step=state.step, last_update=state.last_update)
        classifier = dataclasses.replace(with_row_state(classifier, state), sampling=sampling)
        return losses, gradients, classifier

    def prepare(self, classifier: ClassifierState) -> SamplingState:
        """Returns the sampling state that the step chooses classes with.

        Args:
          classifier: classifier before the update.

        Returns:
          Its sampling state.
        """
        assert classifier.sampling is not None
        return classifier.sampling

    def active_rows(
        self,
        key: Key[Array, ""],
        label: Int[Array, " B"],
        sampling: SamplingState,
        *,
        num_rows: int,
    ) -> Int[Array, " A"]:
        """Chooses the rows that take part in a step.

        Args:
          key: random key of the step.
          label: class ids, int32 [B].
          sampling: the sampling state.
          num_rows: rows of the classifier, padding included.

        Returns:
          Row indices as `sampling.uniform_classes` returns them.
        """
        return uniform_classes(key, label, num_rows=num_rows, rate=self.sample_rate)

    def _bring_up_to_date(self, state: RowState) -> RowState:
        steps_behind = state.step - state.last_update
        return self.lazy_update(state, steps_behind=steps_behind, step=state.step)

    def _update_rows(self, gradient: ClassWeights, state: RowState) -> RowState:
        step = state.step + 1
        return dataclasses.replace(
            self.optimizer(gradient, state),
            step=step,
            last_update=jnp.maximum(state.last_update, step),
        )


@dataclasses.dataclass(frozen=True)
class KnnHead(SampledHead):
    """The labels' classes and their nearest neighbours (KNN softmax, Song et al. 2020).

    Attributes:
      num_neighbours: K, neighbours of each class in the graph.
      rebuild_steps: steps after which the graph is built again.
    """

    num_neighbours: int = 0
    rebuild_steps: int = 1

    def prepare(self, classifier: ClassifierState) -> SamplingState:
        """Returns the sampling state, with a new graph of neighbours every `rebuild_steps`.

        Args:
          classifier: classifier before the update.

        Returns:
          Its sampling state.
        """
        sampling = classifier.sampling
        assert sampling is not None
        neighbours = jax.lax.cond(
            sampling.step % self.rebuild_steps == 0,
            lambda: knn_graph(
                classifier.weights.kernel,
                num_classes=self.options.num_classes,
                k=self.num_neighbours,
                dtype=self.options.dtype,
            ),
            lambda: sampling.neighbours,
        )
        return dataclasses.replace(sampling, neighbours=neighbours)

    def active_rows(
        self,
        key: Key[Array, ""],
        label: Int[Array, " B"],
        sampling: SamplingState,
        *,
        num_rows: int,
    ) -> Int[Array, " A"]:
        """Chooses the rows that take part in a step.

        Args:
          key: random key of the step.
          label: class ids, int32 [B].
          sampling: the sampling state, with the graph.
          num_rows: rows of the classifier, padding included.

        Returns:
          Row indices as `sampling.neighbour_classes` returns them.
        """
        return neighbour_classes(key, label, sampling.neighbours, rate=self.sample_rate)


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
