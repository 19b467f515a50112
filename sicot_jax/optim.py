"""Learning-rate schedules, the optimizer, and what trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from sicot_jax import mesh
from sicot_jax.config import OptimConfig
from sicot_jax.errors import InputError

FROZEN, TRAINED = "frozen", "trained"


def make_schedule(config: OptimConfig, *, steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Step -> learning rate, after a linear warm-up of `warmup_epochs`.

    "step":   lr * gamma^floor(epoch / decay_epochs)  (SICoT 4.3: gamma 0.8, every epoch)
    "cosine": lr * (1 + cos(pi * progress)) / 2 over the steps after the warm-up (Loshchilov & Hutter 2017)
    "constant": lr
    """
    warmup = min(round(config.warmup_epochs * steps_per_epoch), max(steps - 1, 0))
    match config.schedule:
        case "step":
            every = max(1, round(config.decay_epochs * steps_per_epoch))
            main = optax.exponential_decay(config.learning_rate, every, config.gamma, staircase=True)
        case "cosine":
            main = optax.cosine_decay_schedule(config.learning_rate, max(1, steps - warmup))
        case "constant":
            main = optax.constant_schedule(config.learning_rate)
        case other:
            raise InputError(f"optim.schedule={other!r}, wanted step, cosine or constant")
    if not warmup:
        return main
    rise = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, warmup)
    return optax.join_schedules([rise, main], [warmup])


def decayed(params):
    """Weight decay touches matrices and kernels, not biases, batch-norm scales or anything else of one axis."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def path_name(path) -> str:
    """Tree path -> "visual/resnet/conv1/kernel"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def trains(config: OptimConfig, name: str) -> bool:
    """Whether the parameter of that path name trains: `optim.trainable` is a regex matched from its beginning."""
    return re.match(config.trainable, name) is not None


def trained_parts(config: OptimConfig, params: dict) -> dict[str, bool]:
    """Part ("visual/resnet", "semantic", ...) -> whether any of its parameters trains; others keep their batch statistics."""
    parts: dict[str, bool] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        part = "visual/resnet" if name.startswith("visual/resnet/") else name.partition("/")[0]
        parts[part] = parts.get(part, False) or trains(config, name)
    return parts


def make_tx(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD with momentum (decay added to the gradient, as torch does) or AdamW (decoupled), frozen parameters untouched."""
    match config.name:
        case "sgd":
            tx = optax.chain(
                optax.add_decayed_weights(config.weight_decay, mask=decayed),
                optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov),
            )
        case "adamw":
            tx = optax.adamw(schedule, weight_decay=config.weight_decay, mask=decayed)
        case other:
            raise InputError(f"optim.name={other!r}, wanted sgd or adamw")

    def label(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: TRAINED if trains(config, path_name(path)) else FROZEN, params
        )

    return optax.partition({TRAINED: tx, FROZEN: optax.set_to_zero()}, label)


CatchUp = Callable[..., dict[str, Any]]  # (rows of the classifier's state, *, missed, step) -> the same, up to date


def make_catch_up(config: OptimConfig, schedule: optax.Schedule) -> CatchUp:
    """What SGD does to classifier rows in m steps without gradient, but for the movement that momentum still had in it.

    momentum * mu^m and kernel * (1 - lr * decay)^m with the learning rate of now, as Partial FC's and KNN softmax's rows
    are frozen while they take no part. For AdamW there is none: the config refuses it with a sampled head.
    """
    decays = trains(config, "classifier/kernel")

    def catch_up(state: dict[str, Any], *, missed, step) -> dict[str, Any]:
        momenta, counts = mesh.split_per_class(state["opt_state"], missed.shape[0])
        momenta = jax.tree.map(lambda m: m * (config.momentum**missed).reshape(-1, *(1,) * (m.ndim - 1)), momenta)
        new = {**state, "opt_state": mesh.join_per_class(momenta, counts)}
        if decays:
            new["kernel"] = state["kernel"] * ((1 - schedule(step) * config.weight_decay) ** missed)[:, None]
        return new

    return catch_up
