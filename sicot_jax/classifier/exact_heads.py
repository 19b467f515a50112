"""Heads over all classes: the dense reference, and the one with classes divided over devices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.classifier.losses import LossOptions, co_training_loss
from sicot_jax.classifier.row_optimizer import RowOptimizer
from sicot_jax.classifier.row_state import RowState, RowUpdate, StreamingOptions
from sicot_jax.classifier.sharded import loss_and_update
from sicot_jax.classifier.state import ClassifierState, Embeddings, Losses, StepHyperparams
from sicot_jax.classifier.trust_ratio import TrustRatio
from sicot_jax.parallel import mesh
from sicot_jax.parallel.array_types import Array, Int


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
