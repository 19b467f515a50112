"""Compiles a step ahead of training, checks that it fits in memory, and lists settings that would.

Activations are the temporary memory of a compiled step minus what the formulas of the plan account
for; they belong to the backend that the step was compiled for.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from sicot_jax.config import Config, ConfigError, HeadConfig, override_config
from sicot_jax.errors import InputError
from sicot_jax.parallel import mesh
from sicot_jax.parallel.device_memory import format_size, memory_per_device
from sicot_jax.training.memory.plan import (
    USABLE_SHARE,
    MemoryPlan,
    divides_batches,
    make_memory_plan,
)
from sicot_jax.training.model import num_word_columns
from sicot_jax.training.predict import make_predict_step, visual_weights
from sicot_jax.training.setup import Setup, make_setup
from sicot_jax.training.state import TrainState, abstract_state
from sicot_jax.training.step import make_train_step


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


_FEW_CLASSES = 8  # of the classifier in a step that is compiled for its activations


class DoesNotFitError(InputError):
    """A step that needs more memory than its devices have.

    Attributes:
      plan: the plan, with activations.
      memory: bytes of a device.
      alternatives: settings that would fit.
    """

    def __init__(self, what: str, plan: MemoryPlan, memory: int) -> None:
        """Builds the message with the mildest alternative.

        Args:
          what: the items that do not fit, with their size.
          plan: the plan, with activations.
          memory: bytes of a device.
        """
        self.plan, self.memory = plan, memory
        self.alternatives: list[Alternative] = find_alternatives(plan, memory)
        best = self.alternatives[0] if self.alternatives else None
        advice = (
            f"{'add' if best.overrides else 'take'} {best}"
            if best
            else "take more devices or a smaller model"
        )
        super().__init__(
            f"{what}, more than {USABLE_SHARE:.0%} of the {format_size(memory)} that a device has; "
            f"{advice}"
        )


def compile_step(setup: Setup, state: TrainState, batch_size: int) -> jax.stages.Compiled:
    """Compiles the training step; under `jax.set_mesh`.

    Args:
      setup: the run's.
      state: shapes and shardings, see `abstract_state`; the states that the step is called with
        must have the same.
      batch_size: B.

    Returns:
      (state, batch, hyperparams) -> (state, losses), the state donated.
    """
    config, size = setup.config, setup.config.preprocessing
    batch = {
        "image": jax.ShapeDtypeStruct(
            (batch_size, size.resize_height, size.resize_width, 3), jnp.uint8
        ),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    if config.loss.with_text:
        batch["token_ids"] = jax.ShapeDtypeStruct((batch_size, config.data.max_tokens), jnp.int32)
    if config.loss.box_regression:
        batch["box"] = jax.ShapeDtypeStruct((batch_size, 4), jnp.float32)
    batch = {name: mesh.sharded_struct(x, setup.mesh) for name, x in batch.items()}
    hyperparams = mesh.with_shardings(jax.eval_shape(setup.hyperparams), setup.mesh)
    step = jax.jit(make_train_step(setup), donate_argnums=0)
    return step.lower(state, batch, hyperparams).compile()


def evaluation_bytes(setup: Setup, state: TrainState) -> int:
    """Compiles the evaluation and returns what a device holds for a batch of it.

    Args:
      setup: the run's.
      state: shapes and shardings, see `abstract_state`.

    Returns:
      Bytes beyond the state, with the next batch.
    """
    config, size = setup.config, setup.config.preprocessing
    batch_size = config.eval.batch_size
    image = jax.ShapeDtypeStruct((batch_size, size.resize_height, size.resize_width, 3), jnp.uint8)
    label = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    predict_step = make_predict_step(
        config,
        setup.visual_graphdef,
        setup.shape.num_classes,
        with_post_hoc=setup.shape.num_classes <= config.eval.analysis_up_to_classes,
    )
    weights = mesh.with_shardings(jax.eval_shape(visual_weights, state), setup.mesh)
    compiled = (
        jax.jit(predict_step)
        .lower(
            weights,
            mesh.sharded_struct(image, setup.mesh),
            mesh.sharded_struct(label, setup.mesh),
        )
        .compile()
    )
    program = _memory_analysis(compiled)
    photos = math.prod(image.shape) // setup.mesh.size
    folds = weights.class_weights.width != state.classifier.weights.width
    rows = 4 * weights.class_weights.kernel.size // setup.mesh.size if folds else 0
    # Photos twice: this batch and the next one.
    return program.temp_size_in_bytes + program.output_size_in_bytes + rows + 2 * photos


def with_activations(plan: MemoryPlan) -> MemoryPlan:
    """Adds activations to a plan, from a step compiled for the backend of this process.

    The step has one device's share of the batch and few classes: the streams' activations depend on
    neither, and so any number of devices can be planned for.

    Args:
      plan: the plan.

    Returns:
      The plan with `activations`.
    """
    config = dataclasses.replace(
        _with_batch_size(plan.config, plan.photos_per_device, plan.micro_batches), head=HeadConfig()
    )
    shape = dataclasses.replace(plan.shape, num_classes=_FEW_CLASSES)
    device_mesh = mesh.make_mesh(data=1, model=1, devices=jax.local_devices())
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, shape, device_mesh)
        compiled = compile_step(setup, abstract_state(setup), plan.photos_per_device)
    compiled_plan = dataclasses.replace(plan, config=config, shape=shape, devices=1)
    return _with_compiled_activations(plan, compiled, compiled_plan)


def _with_batch_size(config: Config, batch_size: int, micro_batches: int) -> Config:
    train = dataclasses.replace(
        config.train,
        batch_size=batch_size,
        micro_batches=micro_batches,
        grow_every_epochs=0.0,
        max_micro_batches=0,
    )
    return dataclasses.replace(config, train=train)


def _with_compiled_activations(
    plan: MemoryPlan, compiled: jax.stages.Compiled, compiled_plan: MemoryPlan
) -> MemoryPlan:
    """The plan with the activations of a step that was compiled for another plan."""
    program = _memory_analysis(compiled).temp_size_in_bytes
    return dataclasses.replace(
        plan,
        activations=max(0, program - sum(compiled_plan.temporary_bytes().values())),
        activations_photos=compiled_plan.micro_batch_per_device,
        activations_backend=jax.default_backend(),
    )


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns what a device holds while a compiled program runs.

    Args:
      compiled: the program.

    Returns:
      Bytes of arguments, of results that are not written over them, and temporary ones.
    """
    size = _memory_analysis(compiled)
    results = size.output_size_in_bytes - size.alias_size_in_bytes
    return size.argument_size_in_bytes + results + size.temp_size_in_bytes


def _memory_analysis(compiled: jax.stages.Compiled) -> Any:
    size = compiled.memory_analysis()
    assert size is not None, f"no memory analysis on {jax.default_backend()}"
    return size


def compile_within_memory(
    plan: MemoryPlan, setup: Setup, state: TrainState, batch_sizes: Iterable[int]
) -> dict[int, jax.stages.Compiled]:
    """Compiles the training steps before anything is allocated, and checks that they fit.

    Host memory counts as free as it is now; what Python and the catalogue will still take of it is
    not known.

    Args:
      plan: plan of the run, without activations.
      setup: the run's.
      state: shapes and shardings, see `abstract_state`.
      batch_sizes: batch sizes of the run.

    Returns:
      Batch size -> the step for it, see `compile_step`.

    Raises:
      DoesNotFitError: a device has less memory than the state takes (known without compiling), or a
        compiled step and what is held besides it.
      ConfigError: it has less than the evaluation takes.
    """
    known = memory_per_device(setup.mesh.local_devices)
    memory = sys.maxsize if known is None else known  # not known: nothing to refuse by
    outside = sum(plan.held_outside_step().values())
    kept = sum(plan.state_bytes().values()) + outside
    if kept > USABLE_SHARE * memory:
        what = f"parameters, optimizer and what is held besides a step take {format_size(kept)}"
        raise DoesNotFitError(what, with_activations(plan), memory)
    steps = {}
    micro_batch = setup.config.train.micro_batch_size
    for batch_size in sorted(set(batch_sizes), reverse=True):  # the largest first: it takes most
        steps[batch_size] = compiled = compile_step(setup, state, batch_size)
        needed = program_bytes(compiled) + outside
        if needed > USABLE_SHARE * memory:
            config = _with_batch_size(setup.config, batch_size, batch_size // micro_batch)
            compiled_plan = dataclasses.replace(plan, config=config)
            what = f"a step and what is held besides it take {format_size(needed)}"
            raise DoesNotFitError(
                what, _with_compiled_activations(plan, compiled, compiled_plan), memory
            )
    if setup.config.eval.batch_size > micro_batch:
        needed = kept + evaluation_bytes(setup, state)
        if needed > USABLE_SHARE * memory:
            raise ConfigError(
                f"an evaluation of {setup.config.eval.batch_size} photos at a time takes "
                f"{format_size(needed)}, more than {USABLE_SHARE:.0%} of the "
                f"{format_size(memory)} that a device has; lower eval.batch_size"
            )
    return steps
