"""Learning-rate schedules, the optimizer, and what trains."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sicot_jax import mesh
from sicot_jax.config import OptimConfig
from sicot_jax.sampling import BatchPlan

FROZEN, TRAINED = "frozen", "trained"


def make_schedule(config: OptimConfig, plan: BatchPlan, *, steps: int, photos: int) -> optax.Schedule:
    """Step -> learning rate, after a linear warm-up of `warmup_epochs`; `epoch` and progress count from its end.

    "step":   lr * gamma^floor(epoch / decay_epochs)  (SICoT 4.3: gamma 0.8, every epoch)
    "exponential": lr * gamma^(epoch / decay_epochs)  (the same decay, continuous)
    "cosine": lr * (1 + cos(pi * progress)) / 2 over the steps after the warm-up (Loshchilov & Hutter 2017)
    "constant": lr

    Args:
      plan: the batch of every step; an epoch stays one of all `photos` where the batch grows.
      steps: of the whole run.
    """
    batches_per_epoch = photos / plan.batch_size
    batches = plan.batches_before(steps)
    warmup = min(round(config.warmup_epochs * batches_per_epoch), max(batches - 1, 0))
    rate, every = config.learning_rate, config.decay_epochs * batches_per_epoch
    match config.schedule:
        case "step":
            main = optax.exponential_decay(rate, max(1, round(every)), config.gamma, staircase=True)
        case "exponential":
            main = optax.exponential_decay(rate, every, config.gamma)
        case "cosine":
            main = optax.cosine_decay_schedule(rate, max(1, batches - warmup))
        case _:  # "constant"; the config knows no other
            main = optax.constant_schedule(rate)
    if warmup:
        main = optax.join_schedules([optax.linear_schedule(rate / warmup, rate, warmup), main], [warmup])
    return lambda step: main(plan.batches_before(step))


def decayed(params):
    """Weight decay touches matrices and kernels, not biases, batch-norm scales or anything else of one axis."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def path_name(path) -> str:
    """Tree path -> "visual/resnet/conv1/kernel"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def trains(config: OptimConfig, name: str) -> bool:
    """Whether the parameter of that path name trains: `optim.trainable` is a regex matched from its beginning."""
    return re.match(config.trainable, name) is not None


def part_of(name: str) -> str:
    """Path name -> the part of the model that it belongs to: "visual/resnet", "visual/box", "visual" (its projection),
    "semantic".
    """
    return next(
        (part for part in ("visual/resnet", "visual/box") if name.startswith(f"{part}/")), name.partition("/")[0]
    )


def trained_parts(config: OptimConfig, params: dict) -> dict[str, bool]:
    """Part ("visual/resnet", "semantic", ...) -> whether any of its parameters trains; others keep their batch statistics."""
    parts: dict[str, bool] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        part = part_of(name)
        parts[part] = parts.get(part, False) or trains(config, name)
    return parts


@dataclasses.dataclass(frozen=True)
class TrustRatio:
    """LARS's trust ratio of a kernel that is met some rows at a time (You, Gitman & Ginsburg 2017).

    ratio = coefficient * |W| / |G + weight_decay * W|, norms over the whole kernel, 1 where one of them is 0: what
    `optax.scale_by_trust_ratio` computes of a kernel in one piece.
    """

    coefficient: float
    weight_decay: float

    def squares(self, gradient, kernel):
        """float32 [2]: the sums of squares of W and of G + weight_decay * W, of some rows [n, D]; to be added up."""
        update = gradient + self.weight_decay * kernel
        return jnp.stack([jnp.sum(jnp.square(kernel)), jnp.sum(jnp.square(update))])

    def of(self, squares):
        """The ratio, a scalar, from the `squares` of all rows."""
        kernel, update = jnp.sqrt(squares)
        return jnp.where((kernel == 0) | (update == 0), 1.0, self.coefficient * kernel / update)


def make_trust_ratio(config: OptimConfig) -> TrustRatio | None:
    """What a head that updates the kernel some rows at a time has to find out about all of it first; None for nothing."""
    if config.name != "lars" or not trains(config, "classifier/kernel"):
        return None
    return TrustRatio(config.trust_coefficient, config.weight_decay)


def scale_by_trust_ratio(coefficient: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_trust_ratio`, or by the `trust_ratio` that the update is given: for some rows of a kernel."""
    whole = optax.scale_by_trust_ratio(trust_coefficient=coefficient)

    def update(updates, state, params=None, *, trust_ratio=None, **extra_args):
        if trust_ratio is None:
            return whole.update(updates, state, params)
        return jax.tree.map(lambda x: x * trust_ratio, updates), state

    return optax.GradientTransformationExtraArgs(whole.init, update)


def make_tx(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """What one update does to parameters; frozen ones are left untouched. Decay and trust ratio are for kernels alone.

    "sgd":   with momentum, decay added to the gradient, as torch does
    "lars":  sgd with each kernel's step scaled to its norm, the learning rate inside the momentum, as `optax.lars`
    "adamw": decoupled decay

    Of lars an update may be given the `trust_ratio` of the kernel (`TrustRatio`) whose rows it updates; any update a
    `learning_rate`, which the schedule's is multiplied by.
    """
    match config.name:
        case "sgd":
            tx = optax.chain(
                optax.add_decayed_weights(config.weight_decay, mask=decayed),
                _times_learning_rate(optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov)),
            )
        case "lars":
            tx = optax.chain(
                optax.add_decayed_weights(config.weight_decay, mask=decayed),
                optax.masked(scale_by_trust_ratio(config.trust_coefficient), decayed),
                _times_learning_rate(optax.scale_by_learning_rate(schedule)),
                optax.trace(config.momentum, nesterov=config.nesterov),
            )
        case _:  # "adamw"; the config knows no other
            tx = _times_learning_rate(optax.adamw(schedule, weight_decay=config.weight_decay, mask=decayed))

    def label(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: TRAINED if trains(config, path_name(path)) else FROZEN, params
        )

    return optax.partition({TRAINED: tx, FROZEN: optax.set_to_zero()}, label)


def _times_learning_rate(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An update's `learning_rate`, where it is given one, times what tx makes of it; tx is linear in the rate."""

    def update(updates, state, params=None, *, learning_rate=None, **extra_args):
        updates, state = tx.update(updates, state, params)
        if learning_rate is not None:
            updates = jax.tree.map(lambda x: learning_rate * x, updates)
        return updates, state

    return optax.GradientTransformationExtraArgs(tx.init, update)


CatchUp = Callable[..., dict[str, Any]]  # (rows of the classifier's state, *, missed, step) -> the same, up to date


def make_catch_up(config: OptimConfig, schedule: optax.Schedule) -> CatchUp:
    """What SGD does to classifier rows in m steps without gradient, but for the movement that momentum still had in it.

    momentum * mu^m and kernel * (1 - lr * decay)^m with the learning rate of now (the schedule's times the state's
    "learning_rate"), as Partial FC's and KNN softmax's rows are frozen while they take no part. For AdamW there is none: the
    config refuses it with a sampled head.
    """
    decays = trains(config, "classifier/kernel")

    def catch_up(state: dict[str, Any], *, missed, step) -> dict[str, Any]:
        momenta, counts = mesh.split_per_class(state["opt_state"], missed.shape[0])
        momenta = jax.tree.map(lambda m: m * (config.momentum**missed).reshape(-1, *(1,) * (m.ndim - 1)), momenta)
        new = {**state, "opt_state": mesh.join_per_class(momenta, counts)}
        if decays:
            rate = state["learning_rate"] * schedule(step)
            new["kernel"] = state["kernel"] * ((1 - rate * config.weight_decay) ** missed)[:, None]
        return new

    return catch_up
