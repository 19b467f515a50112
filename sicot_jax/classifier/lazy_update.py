"""Lazy updates: momentum and weight decay of class weights that missed steps of a sampled head."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import optax

from sicot_jax.classifier.row_state import RowState
from sicot_jax.config import OptimConfig
from sicot_jax.parallel import mesh
from sicot_jax.parallel.array_types import Array, Int


class LazyUpdate(Protocol):
    """Applies to rows the momentum and weight decay of the steps that they missed."""

    def __call__(self, state: RowState, *, steps_behind: Array, step: Array) -> RowState:
        """Brings rows up to date.

        Args:
          state: state of n rows.
          steps_behind: steps that each row missed, int32 [n].
          step: updates done, int32 scalar.

        Returns:
          The state of the rows at `step`.
        """
        ...


def make_lazy_update(config: OptimConfig, schedule: optax.Schedule) -> LazyUpdate:
    """Returns what SGD does to rows in m steps without gradient, but for movement by momentum.

    momentum * mu^m and kernel * (1 - lr * decay)^m with the learning rate of now (the schedule's
    times the state's), as the rows of Partial FC and KNN softmax are frozen while they take no
    part.
    There is none for AdamW: the config refuses it with a sampled head.

    Args:
      config: the optimizer.
      schedule: step -> learning rate.

    Returns:
      The lazy update.
    """
    decays = config.trains("classifier/kernel")

    def lazy_update(
        state: RowState, *, steps_behind: Int[Array, " n"], step: Int[Array, ""]
    ) -> RowState:
        momenta, counts = mesh.split_per_class(state.opt_state, steps_behind.shape[0])
        momenta = jax.tree.map(
            lambda m: m * (config.momentum**steps_behind).reshape(-1, *(1,) * (m.ndim - 1)), momenta
        )
        weights = state.weights
        if decays:
            rate = state.learning_rate * schedule(step)
            decay = ((1 - rate * config.weight_decay) ** steps_behind)[:, None]
            weights = dataclasses.replace(weights, kernel=weights.kernel * decay)
        return dataclasses.replace(
            state, weights=weights, opt_state=mesh.join_per_class(momenta, counts)
        )

    return lazy_update
