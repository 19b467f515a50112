"""Applies an optax optimizer to some rows of the class weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.classifier.row_state import RowState


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
