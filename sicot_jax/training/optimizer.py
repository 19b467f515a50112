"""Learning-rate schedules, the optimizer, and which parameters train."""

from __future__ import annotations

from typing import Any

import jax
import optax

from sicot_jax.classifier.trust_ratio import scale_by_trust_ratio
from sicot_jax.common.trees import path_name
from sicot_jax.config import OptimConfig
from sicot_jax.config.batch_plan import BatchPlan

_FROZEN, _TRAINED = "frozen", "trained"
_SUBPARTS = ("visual/resnet", "visual/localization")


def make_schedule(
    config: OptimConfig, plan: BatchPlan, *, steps: int, photos: int
) -> optax.Schedule:
    """Builds the learning-rate schedule of a run: a linear warm-up, then one of four curves.

    Epochs and progress count from the end of the warm-up of `warmup_epochs`:

    - "step": lr * gamma^floor(epoch / decay_epochs) (SICoT, section 4.3: gamma 0.8, every epoch)
    - "exponential": lr * gamma^(epoch / decay_epochs), the same decay, continuous
    - "cosine": lr * (1 + cos(pi * progress)) / 2 (Loshchilov & Hutter 2017)
    - "constant": lr

    Args:
      config: section `optim` of the config.
      plan: batch size of every step; where the batch grows an epoch is still one of all photos.
      steps: updates of the complete run.
      photos: training photos, which make an epoch.

    Returns:
      Function from step (int, or a traced integer array) to learning rate, float32.
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
        case _:  # "constant"; the config allows no other
            main = optax.constant_schedule(rate)
    if warmup:
        main = optax.join_schedules(
            [optax.linear_schedule(rate / warmup, rate, warmup), main], [warmup]
        )
    return lambda step: main(plan.batches_before(step))


def decay_mask(params: Any) -> Any:
    """Returns which parameters have weight decay: arrays of two or more axes, such as kernels.

    Biases, batch-norm scales and other vectors have none.

    Args:
      params: a tree of arrays.

    Returns:
      The tree with a bool for each array.
    """
    return jax.tree.map(lambda p: p.ndim > 1, params)


def model_part(name: str) -> str:
    """Returns the part of the model that a parameter belongs to.

    Args:
      name: path name of a parameter, such as "visual/resnet/conv1/kernel".

    Returns:
      "visual/resnet", "visual/localization", "visual" (what follows the backbone) or "semantic".
    """
    for part in _SUBPARTS:
        if name.startswith(f"{part}/"):
            return part
    return name.partition("/")[0]


def trained_parts(config: OptimConfig, params: dict[str, Any]) -> dict[str, bool]:
    """Returns which parts of the model train; the others keep their batch statistics.

    Args:
      config: section `optim` of the config.
      params: parameters of the streams, a tree of arrays.

    Returns:
      Part (see `model_part`) -> whether any of its parameters trains.
    """
    parts: dict[str, bool] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        part = model_part(name)
        parts[part] = parts.get(part, False) or config.trains(name)
    return parts


def make_optimizer(
    config: OptimConfig, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer; weight decay and trust ratio apply to kernels only (`decay_mask`).

    - "sgd": with momentum, decay added to the gradient, as in PyTorch
    - "lars": sgd with each kernel's step scaled to its norm, the learning rate inside the momentum,
      as `optax.lars`
    - "adamw": decoupled decay

    An update may be given a `learning_rate`, which the schedule's is multiplied by, and with "lars"
    a `trust_ratio` where it updates only some rows of a kernel (`classifier.trust_ratio`).

    Args:
      config: section `optim` of the config.
      schedule: step -> learning rate.

    Returns:
      The optimizer; parameters that `config.trains` excludes stay as they are.
    """
    match config.name:
        case "sgd":
            trained = optax.chain(
                optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
                _scaled_by_argument(
                    optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov)
                ),
            )
        case "lars":
            trained = optax.chain(
                optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
                optax.masked(scale_by_trust_ratio(config.trust_coefficient), decay_mask),
                _scaled_by_argument(optax.scale_by_learning_rate(schedule)),
                optax.trace(config.momentum, nesterov=config.nesterov),
            )
        case _:  # "adamw"; the config allows no other
            trained = _scaled_by_argument(
                optax.adamw(schedule, weight_decay=config.weight_decay, mask=decay_mask)
            )

    def label(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: _TRAINED if config.trains(path_name(path)) else _FROZEN, params
        )

    return optax.partition({_TRAINED: trained, _FROZEN: optax.set_to_zero()}, label)


def _scaled_by_argument(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by the argument `learning_rate`, if given; they are linear in the rate.

    Not `optax.inject_hyperparams`: it keeps the rate in the optimizer state, which is divided by
    class rows, updated chunk by chunk inside the head, and saved; here the rate is an argument.
    """

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        learning_rate: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        updates, state = transformation.update(updates, state, params)
        if learning_rate is not None:
            updates = jax.tree.map(lambda x: learning_rate * x, updates)
        return updates, state

    return optax.GradientTransformationExtraArgs(transformation.init, update)
