"""Heads that update only some classes in each step: random ones, or the labels' neighbours.

Rows of inactive classes are not updated. The momentum and decay that they missed are applied when
their class is active again.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.classifier.exact_heads import row_state, with_row_state
from sicot_jax.classifier.knn_graph import knn_graph
from sicot_jax.classifier.lazy_update import LazyUpdate
from sicot_jax.classifier.row_optimizer import RowOptimizer
from sicot_jax.classifier.row_state import RowState, RowUpdate, StreamingOptions
from sicot_jax.classifier.sampling import neighbour_classes, uniform_classes
from sicot_jax.classifier.sharded import loss_and_update
from sicot_jax.classifier.state import (
    ClassifierState,
    Embeddings,
    Losses,
    SamplingState,
    StepHyperparams,
)
from sicot_jax.parallel.array_types import Array, Int, Key


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
