"""Whether a step fits: compiled ahead of everything else, and what would fit instead.

Activations are the temporary memory of a compiled step less what the formulas of a plan own of it,
and belong to the backend that it was compiled for.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from sicot_jax import config as config_lib
from sicot_jax.config import Config, ConfigError, HeadConfig
from sicot_jax.errors import InputError
from sicot_jax.parallel import mesh
from sicot_jax.parallel.device_memory import memory_per_device, format_size
from sicot_jax.training import evaluate
from sicot_jax.training.memory.plan import SHARE, Plan, can_divide, make_plan
from sicot_jax.training.step import make_train_step
from sicot_jax.training.state import TrainState, abstract_state
from sicot_jax.training.setup import Setup, make_setup
from sicot_jax.training.model import num_word_columns

FEW_CLASSES = 8  # of the classifier in a step that is compiled for its activations


class DoesNotFit(InputError):
    """A step that needs more than the `memory` of its devices, with its plan and what would fit
    instead.
    """

    def __init__(self, what: str, plan: Plan, memory: int):
        self.plan, self.memory, self.others = plan, memory, alternatives(plan, memory)
        best = self.others[0] if self.others else None
        remedy = (
            f"{'add' if best.overrides else 'take'} {best}"
            if best
            else "take more devices or a smaller model"
        )
        super().__init__(
            f"{what}, more than {SHARE:.0%} of the {format_size(memory)} that a device has; {remedy}"
        )


def compile_step(setup: Setup, state: TrainState, batch_size: int) -> jax.stages.Compiled:
    """The training step of a batch of that size, under `jax.set_mesh`: (state, batch, numbers) ->
    (state, losses), the state donated.

    Args:
      state: shapes and shardings, see `abstract_state`; what it is called with must have the same.
    """
    config, side = setup.config, setup.config.preprocessing
    batch = {
        "image": jax.ShapeDtypeStruct(
            (batch_size, side.resize_height, side.resize_width, 3), jnp.uint8
        ),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    if config.loss.with_text:
        batch["token_ids"] = jax.ShapeDtypeStruct((batch_size, config.data.max_tokens), jnp.int32)
    if config.loss.box_regression:
        batch["box"] = jax.ShapeDtypeStruct((batch_size, 4), jnp.float32)
    batch = {name: mesh.sharded_struct(x, setup.mesh) for name, x in batch.items()}
    numbers = mesh.with_shardings(jax.eval_shape(setup.numbers), setup.mesh)
    return jax.jit(make_train_step(setup), donate_argnums=0).lower(state, batch, numbers).compile()


def evaluation_bytes(setup: Setup, state: TrainState) -> int:
    """What a device holds for a batch of an evaluation beyond the state, by its compiled program."""
    config, side = setup.config, setup.config.preprocessing
    image = jax.ShapeDtypeStruct(
        (config.eval.batch_size, side.resize_height, side.resize_width, 3), jnp.uint8
    )
    label = jax.ShapeDtypeStruct((config.eval.batch_size,), jnp.int32)
    recognize = jax.jit(
        evaluate.make_recognize(
            config,
            setup.visual_graphdef,
            setup.shape.num_classes,
            with_post_hoc=setup.shape.num_classes <= config.eval.analysis_up_to_classes,
        )
    )
    classifier = mesh.with_shardings(jax.eval_shape(evaluate.plain_classifier, state), setup.mesh)
    visual = state.params["visual"], state.batch_stats["visual"], classifier
    size = _analysis(
        recognize.lower(*visual, *(mesh.sharded_struct(x, setup.mesh) for x in (image, label))).compile()
    )
    photos = math.prod(image.shape) // setup.mesh.size
    folded = classifier.kernel.shape != state.classifier.kernel.shape
    rows = 4 * classifier.kernel.size // setup.mesh.size if folded else 0
    return (
        size.temp_size_in_bytes + size.output_size_in_bytes + rows + 2 * photos
    )  # this batch and the next


def with_activations(plan: Plan) -> Plan:
    """The plan with the activations of one device's share of the batch, from a step compiled for
    the backend here.

    One device and few classes: what streams hold depends on neither, and so any number of devices
      can be planned for.
    """
    config = dataclasses.replace(
        _of_batch(plan.config, plan.photos, plan.micro_batches), head=HeadConfig()
    )
    shape = dataclasses.replace(plan.shape, num_classes=FEW_CLASSES)
    device_mesh = mesh.make_mesh(data=1, model=1, devices=jax.local_devices())
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, shape, device_mesh)
        compiled = compile_step(setup, abstract_state(setup), plan.photos)
    return _with_compiled(
        plan, compiled, of=dataclasses.replace(plan, config=config, shape=shape, devices=1)
    )


def _of_batch(config: Config, batch_size: int, micro_batches: int) -> Config:
    train = dataclasses.replace(
        config.train,
        batch_size=batch_size,
        micro_batches=micro_batches,
        grow_every_epochs=0.0,
        max_micro_batches=0,
    )
    return dataclasses.replace(config, train=train)


def _with_compiled(plan: Plan, compiled: jax.stages.Compiled, *, of: Plan) -> Plan:
    """The plan with the activations of a compiled step: what it holds for a while, less what
    formulas own `of` it.
    """
    rest = _analysis(compiled).temp_size_in_bytes - sum(of.temporary().values())
    return dataclasses.replace(
        plan,
        activations=max(0, rest),
        activations_of=of.photos_at_a_time,
        compiled_for=jax.default_backend(),
    )


def needed_bytes(compiled: jax.stages.Compiled) -> int:
    """What a device holds while a compiled step runs: arguments, results that are not written over
    them, temporary.
    """
    size = _analysis(compiled)
    return (
        size.argument_size_in_bytes
        + size.output_size_in_bytes
        - size.alias_size_in_bytes
        + size.temp_size_in_bytes
    )


def _analysis(compiled: jax.stages.Compiled):
    size = compiled.memory_analysis()
    assert size is not None, f"no memory analysis on {jax.default_backend()}"
    return size


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A change that makes a plan fit: overrides, or more devices like those at hand."""

    overrides: tuple[str, ...]
    plan: Plan

    def __str__(self) -> str:
        like = "on machines like this one" if self.plan.platform == "cpu" else "of this kind"
        return " ".join(self.overrides) or f"{self.plan.devices} devices {like}"


def alternatives(plan: Plan, memory: int) -> list[Alternative]:
    """What fits instead of a plan with activations: overrides, as few and as mild as do, then more
    devices.
    """
    return [*_overrides_that_fit(plan, memory), *_devices_that_fit(plan, memory)]


def _overrides_that_fit(plan: Plan, memory: int) -> list[Alternative]:
    config, train, powers = plan.config, plan.config.train, [2**i for i in range(20)]
    shared = num_word_columns(config, plan.shape)
    # From the one that changes most to the one that changes least: the model, then the statistics
    # of batch norm, then time.
    choices: dict[str, list] = {
        "model.embedding_width": [n for n in reversed(powers) if 64 <= n < plan.width - shared],
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

    @functools.cache
    def of_width(width: int) -> Plan:
        narrower = config_lib.override_config(config, [f"--config.model.embedding_width={width}"])
        new = make_plan(narrower, plan.shape, devices=plan.devices, platform=plan.platform)
        return dataclasses.replace(
            new,
            activations=plan.activations,
            activations_of=plan.activations_of,
            compiled_for=plan.compiled_for,
        )

    @functools.cache
    def planned(overrides: tuple[str, ...]) -> Plan:
        changed = config_lib.override_config(config, overrides)
        same_model = changed.model.embedding_width == config.model.embedding_width
        return dataclasses.replace(
            plan if same_model else of_width(changed.model.embedding_width), config=changed
        )

    found: list[Alternative] = []
    for count in range(1, len(choices) + 1):
        for names in itertools.combinations(choices, count):
            for values in itertools.product(*(choices[name] for name in names)):
                overrides = tuple(
                    f"--config.{name}={value}" for name, value in zip(names, values, strict=True)
                )
                if planned(overrides).fits(memory):
                    found.insert(0, Alternative(overrides, planned(overrides)))
                    break
        if found:
            break
    return found


def _devices_that_fit(plan: Plan, memory: int) -> list[Alternative]:
    devices = plan.devices
    while can_divide(plan.config, 2 * devices):
        devices *= 2
        more = dataclasses.replace(plan, devices=devices)
        if more.fits(memory):
            return [Alternative((), more)]
    return []


def compile_within_memory(
    plan: Plan, setup: Setup, state: TrainState, batch_sizes: Iterable[int]
) -> dict[int, jax.stages.Compiled]:
    """Batch size -> the training step for it (see `compile_step`), all compiled before anything is
    allocated.

    Raises DoesNotFit where a device has less memory than the state takes (known without compiling)
    or a compiled step, and what is held beside it; ConfigError where it has less than the
    evaluation takes. Host memory counts as free as it is now, and what Python and the catalogue
    will still take of it is not known.
    """
    found = memory_per_device(setup.mesh.local_devices)
    memory = sys.maxsize if found is None else found  # not known: nothing to refuse by
    beside = sum(plan.beside_step().values())
    kept = sum(plan.state().values()) + beside
    if kept > SHARE * memory:
        what = f"parameters, optimizer and what is held beside a step take {format_size(kept)}"
        raise DoesNotFit(what, with_activations(plan), memory)
    steps = {}
    micro_batch = setup.config.train.batch_size // setup.config.train.micro_batches
    for batch_size in sorted(set(batch_sizes), reverse=True):  # the largest first: it takes most
        steps[batch_size] = compiled = compile_step(setup, state, batch_size)
        needed = needed_bytes(compiled) + beside
        if needed > SHARE * memory:
            config = _of_batch(setup.config, batch_size, batch_size // micro_batch)
            planned = _with_compiled(plan, compiled, of=dataclasses.replace(plan, config=config))
            raise DoesNotFit(
                f"a step and what is held beside it take {format_size(needed)}", planned, memory
            )
    evaluated = setup.config.eval.batch_size
    if (
        evaluated > micro_batch
        and (needed := kept + evaluation_bytes(setup, state)) > SHARE * memory
    ):
        raise ConfigError(
            f"an evaluation of {evaluated} photos at a time takes {format_size(needed)}, more than {SHARE:.0%} of the "
            f"{format_size(memory)} that a device has; lower eval.batch_size"
        )
    return steps
