"""State of rows of the classifier, the optimizer that updates them, static options of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.classifier.losses import LossOptions
from sicot_jax.classifier.trust_ratio import TrustRatio


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowState:
    """What the update of a chunk of rows reads and writes.

    Arrays with one entry per class are cut to the chunk, the others are complete.

    Attributes:
      weights: kernel float32 [n, D], bias float32 [n].
      opt_state: optimizer state of the weights.
      learning_rate: factor of the schedule, float32 scalar.
      step: updates done, int32 scalar; None where rows never miss a step.
      last_update: step up to which each row is up to date, int32 [n]; None likewise.
    """

    weights: ClassWeights
    opt_state: Any
    learning_rate: Any = None
    step: Any = None
    last_update: Any = None


@dataclasses.dataclass(frozen=True)
class StreamingOptions(LossOptions):
    """Options of the streaming loss; label smoothing is not for active rows.

    Attributes:
      chunk: classes at a time on a device; temporary memory is a few times chunk * (S * B + D)
        numbers.
      keep_logits: dtype in which all logits [C / devices, S * B] are kept for the second pass; None
        computes them again. Loss and gradients are those of logits rounded to that dtype.
    """

    chunk: int = 4096
    keep_logits: DTypeLike | None = None


@dataclasses.dataclass(frozen=True)
class RowUpdate:
    """How a chunk of rows is updated.

    Attributes:
      apply: (gradient, state of the rows[, trust_ratio=scalar]) -> new state of the rows.
      bring_up_to_date: applies to the state of rows what they missed, before they are used; None
        where rows never miss a step.
      trust_ratio: trust ratio of an optimizer that scales by the norms of the complete kernel
        (LARS): costs an extra pass (two products more, or one with kept logits), and is given
        to `apply`.
    """

    apply: Callable[..., RowState]
    bring_up_to_date: Callable[[RowState], RowState] | None = None
    trust_ratio: TrustRatio | None = None


@dataclasses.dataclass(frozen=True)
class RowOptimizer:
    """An optimizer of class weights that can be applied to some rows at a time.

    Attributes:
      transformation: transformation of {"classifier": {"kernel", "bias"}}; works element by
        element, but for a trust ratio and a learning rate that it is given.
      num_frozen_columns: last columns of the kernel that keep their values (shared word weights).
    """

    transformation: optax.GradientTransformationExtraArgs
    num_frozen_columns: int = 0

    def __call__(self, gradient: ClassWeights, state: RowState, **extra_args: Any) -> RowState:
        """Updates rows.

        Args:
          gradient: gradient of the rows' weights, kernel float32 [n, D], bias float32 [n].
          state: state of the rows.
          **extra_args: arguments for the transformation, such as the trust ratio.

        Returns:
          New weights and optimizer state of the rows.
        """
        params = state.weights.as_params()
        updates, opt_state = self.transformation.update(
            gradient.as_params(),
            state.opt_state,
            params,
            **extra_args,
            learning_rate=state.learning_rate,
        )
        weights = ClassWeights.from_params(optax.apply_updates(params, updates))
        if self.num_frozen_columns:
            is_trained = jnp.arange(weights.width) < weights.width - self.num_frozen_columns
            kernel = jnp.where(is_trained, weights.kernel, state.weights.kernel)
            weights = dataclasses.replace(weights, kernel=kernel)
        return dataclasses.replace(state, weights=weights, opt_state=opt_state)
