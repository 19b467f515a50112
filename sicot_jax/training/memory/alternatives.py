"""Searches for settings that make a run fit in memory."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

from sicot_jax.config import override_config
from sicot_jax.training.memory.plan import MemoryPlan, divides_batches, make_memory_plan
from sicot_jax.training.model import num_word_columns


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A change that makes a plan fit.

    Attributes:
      overrides: flags `--config.a.b=value`; none where more devices of the same kind do it.
      plan: the changed plan.
    """

    overrides: tuple[str, ...]
    plan: MemoryPlan

    def __str__(self) -> str:
        like = "on machines like this one" if self.plan.platform == "cpu" else "of this kind"
        return " ".join(self.overrides) or f"{self.plan.devices} devices {like}"


def find_alternatives(plan: MemoryPlan, memory: int) -> list[Alternative]:
    """Lists settings that fit: as few and as mild overrides as do, then more devices.

    Args:
      plan: a plan with activations.
      memory: bytes of a device.

    Returns:
      The alternatives, the mildest first.
    """
    return [*_fitting_overrides(plan, memory), *_fitting_devices(plan, memory)]


def _candidate_values(plan: MemoryPlan) -> dict[str, list[Any]]:
    """Field -> values to try.

    From the field that changes most to the one that changes least: the model, then the statistics
    of batch norm, then time.
    """
    config, train, powers = plan.config, plan.config.train, [2**i for i in range(20)]
    widest = plan.width - num_word_columns(config, plan.shape)
    return {
        "model.embedding_width": [n for n in reversed(powers) if 64 <= n < widest],
        "train.micro_batches": [
            n
            for n in powers
            if n > train.micro_batches
            and train.batch_size % (n * plan.devices) == 0
            and (not train.max_micro_batches or 2 * n <= train.max_micro_batches)
        ],
        "head.kind": ["class_sharded"] if config.head.kind == "dense" else [],
        "head.keep_logits": ["no"] if config.head.keep_logits != "no" else [],
    }


def _fitting_overrides(plan: MemoryPlan, memory: int) -> list[Alternative]:
    @functools.cache
    def plan_of_width(width: int) -> MemoryPlan:
        narrower = override_config(plan.config, [f"--config.model.embedding_width={width}"])
        new = make_memory_plan(narrower, plan.shape, devices=plan.devices, platform=plan.platform)
        return dataclasses.replace(
            new,
            activations=plan.activations,
            activations_photos=plan.activations_photos,
            activations_backend=plan.activations_backend,
        )

    @functools.cache
    def plan_with(overrides: tuple[str, ...]) -> MemoryPlan:
        changed = override_config(plan.config, overrides)
        width = changed.model.embedding_width
        same_model = width == plan.config.model.embedding_width
        return dataclasses.replace(plan if same_model else plan_of_width(width), config=changed)

    candidates = _candidate_values(plan)
    fitting: list[Alternative] = []
    for count in range(1, len(candidates) + 1):
        for names in itertools.combinations(candidates, count):
            for values in itertools.product(*(candidates[name] for name in names)):
                overrides = tuple(
                    f"--config.{name}={value}" for name, value in zip(names, values, strict=True)
                )
                if plan_with(overrides).fits(memory):
                    fitting.insert(0, Alternative(overrides, plan_with(overrides)))
                    break
        if fitting:
            break
    return fitting


def _fitting_devices(plan: MemoryPlan, memory: int) -> list[Alternative]:
    devices = plan.devices
    while divides_batches(plan.config, 2 * devices):
        devices *= 2
        larger = dataclasses.replace(plan, devices=devices)
        if larger.fits(memory):
            return [Alternative((), larger)]
    return []
