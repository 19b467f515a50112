"""Learning-rate schedules, the optimizer, and what trains."""

from __future__ import annotations

import jax
import optax

from sicot_jax.classifier.trust_ratio import scale_by_trust_ratio
from sicot_jax.common.trees import path_name
from sicot_jax.config import OptimConfig
from sicot_jax.config.batch_plan import BatchPlan

FROZEN, TRAINED = "frozen", "trained"


def make_schedule(
    config: OptimConfig, plan: BatchPlan, *, steps: int, photos: int
) -> optax.Schedule:
    """Step -> learning rate, after a linear warm-up of `warmup_epochs`; `epoch` and progress count
    from its end.

    "step":   lr * gamma^floor(epoch / decay_epochs)  (SICoT 4.3: gamma 0.8, every epoch)
    "exponential": lr * gamma^(epoch / decay_epochs)  (the same decay, continuous) "cosine": lr * (1
    + cos(pi * progress)) / 2 over the steps after the warm-up (Loshchilov & Hutter 2017)
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
        main = optax.join_schedules(
            [optax.linear_schedule(rate / warmup, rate, warmup), main], [warmup]
        )
    return lambda step: main(plan.batches_before(step))


def decayed(params):
    """Weight decay touches matrices and kernels, not biases, batch-norm scales or anything else of
    one axis.
    """
    return jax.tree.map(lambda p: p.ndim > 1, params)


def part_of(name: str) -> str:
    """Path name -> the part of the model that it belongs to: "visual/resnet", "visual/localization",
    "visual" (its projection), "semantic".
    """
    return next(
        (part for part in ("visual/resnet", "visual/localization") if name.startswith(f"{part}/")),
        name.partition("/")[0],
    )


def trained_parts(config: OptimConfig, params: dict) -> dict[str, bool]:
    """Part ("visual/resnet", "semantic", ...) -> whether any of its parameters trains; others keep
    their batch statistics.
    """
    parts: dict[str, bool] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        part = part_of(name)
        parts[part] = parts.get(part, False) or config.trains(name)
    return parts


def make_optimizer(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """What one update does to parameters; frozen ones are left untouched. Decay and trust ratio are
    for kernels alone.

    "sgd":   with momentum, decay added to the gradient, as torch does "lars":  sgd with each
    kernel's step scaled to its norm, the learning rate inside the momentum, as `optax.lars`
    "adamw": decoupled decay

    Of lars an update may be given the `trust_ratio` of the kernel (`TrustRatio`) whose rows it
    updates; any update a `learning_rate`, which the schedule's is multiplied by.
    """
    match config.name:
        case "sgd":
            tx = optax.chain(
                optax.add_decayed_weights(config.weight_decay, mask=decayed),
                _times_learning_rate(
                    optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov)
                ),
            )
        case "lars":
            tx = optax.chain(
                optax.add_decayed_weights(config.weight_decay, mask=decayed),
                optax.masked(scale_by_trust_ratio(config.trust_coefficient), decayed),
                _times_learning_rate(optax.scale_by_learning_rate(schedule)),
                optax.trace(config.momentum, nesterov=config.nesterov),
            )
        case _:  # "adamw"; the config knows no other
            tx = _times_learning_rate(
                optax.adamw(schedule, weight_decay=config.weight_decay, mask=decayed)
            )

    def label(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: TRAINED if config.trains(path_name(path)) else FROZEN, params
        )

    return optax.partition({TRAINED: tx, FROZEN: optax.set_to_zero()}, label)


def _times_learning_rate(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An update's `learning_rate`, where it is given one, times what tx makes of it; tx is linear
    in the rate.
    """

    def update(updates, state, params=None, *, learning_rate=None, **extra_args):
        updates, state = tx.update(updates, state, params)
        if learning_rate is not None:
            updates = jax.tree.map(lambda x: learning_rate * x, updates)
        return updates, state

    return optax.GradientTransformationExtraArgs(tx.init, update)
