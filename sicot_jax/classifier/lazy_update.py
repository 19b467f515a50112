"""Momentum and weight decay of class weights that missed steps (lazy updates of sampled heads)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from sicot_jax.config import OptimConfig
from sicot_jax.parallel import mesh

CatchUp = Callable[
    ..., dict[str, Any]
]  # (rows of the classifier's state, *, missed, step) -> the same, up to date


def make_catch_up(config: OptimConfig, schedule: optax.Schedule) -> CatchUp:
    """What SGD does to classifier rows in m steps without gradient, but for the movement that
    momentum still had in it.

    momentum * mu^m and kernel * (1 - lr * decay)^m with the learning rate of now (the schedule's
    times the state's "learning_rate"), as Partial FC's and KNN softmax's rows are frozen while they
    take no part. For AdamW there is none: the config refuses it with a sampled head.
    """
    decays = config.trains("classifier/kernel")

    def catch_up(state: dict[str, Any], *, missed, step) -> dict[str, Any]:
        momenta, counts = mesh.split_per_class(state["opt_state"], missed.shape[0])
        momenta = jax.tree.map(
            lambda m: m * (config.momentum**missed).reshape(-1, *(1,) * (m.ndim - 1)), momenta
        )
        new = {**state, "opt_state": mesh.join_per_class(momenta, counts)}
        if decays:
            rate = state["learning_rate"] * schedule(step)
            new["kernel"] = state["kernel"] * ((1 - rate * config.weight_decay) ** missed)[:, None]
        return new

    return catch_up
