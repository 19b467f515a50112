"""Bytes a device holds, sends and needs by item, before anything is allocated; and what fits.

Formulas, from shapes alone, own the state, the head and the messages. Activations are the temporary memory of a compiled
step less what the formulas own of it, and belong to the backend that it was compiled for.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from sicot_jax import config as config_lib
from sicot_jax import heads, mesh
from sicot_jax.config import Config, HeadConfig
from sicot_jax.device_memory import DEVICE_KINDS, GIB, device_memory, is_kind
from sicot_jax.errors import InputError
from sicot_jax.optim import path_name, trained_parts, trains
from sicot_jax.step import (
    DataShape,
    Setup,
    TrainState,
    abstract_state,
    check_batches,
    compute_dtype,
    make_setup,
    make_train_step,
)

MIB = 2**20

# Of a device's memory that a plan may take: the allocator leaves gaps, and programs and their constants live there too.
SHARE = 0.95

GRAPH_CHUNK = 4096  # of `sampled.class_graph`
FEW_CLASSES = 8  # of the classifier in a step that is compiled for its activations


class DoesNotFit(InputError):
    """A step that needs more memory than its devices have."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One array that crosses devices: `size` bytes are gathered, scattered, summed or passed on, `times` a step."""

    kind: str  # as XLA calls it
    size: int
    times: float = 1

    def sent(self, devices: int) -> float:
        """Bytes that one device sends in a step, where all devices form a ring."""
        if devices == 1:
            return 0.0
        if self.kind == "collective-permute":
            return self.size * self.times
        return self.size * self.times * (devices - 1) / devices * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step holds and sends; bytes of one device.

    parameters, optimizer, gradient: of the streams, whole on every device; the gradient is that of what trains.
    per_class: item -> bytes for each class of the device.
    width: D.
    moments: numbers in the batch statistics that a step computes (mean and variance of each batch norm that trains).
    activations: of `activations_of` photos at a time, on the backend `compiled_for`; None before a step is compiled.
    """

    config: Config
    shape: DataShape
    devices: int
    parameters: int
    optimizer: int
    gradient: int
    per_class: dict[str, int]
    width: int
    moments: int
    activations: int | None = None
    activations_of: int = 1
    compiled_for: str = ""

    @property
    def shard_classes(self) -> int:
        return -(-self.shape.num_classes // self.devices)

    @property
    def micro_batches(self) -> int:
        """Of the largest batch: one that grows has the more of them."""
        return max(self.config.train.micro_batches, self.config.train.max_micro_batches)

    @property
    def batch_size(self) -> int:
        """Photos of the largest batch."""
        return self.config.train.batch_size // self.config.train.micro_batches * self.micro_batches

    @property
    def photos(self) -> int:
        """Of one device and step."""
        return -(-self.batch_size // self.devices)

    @property
    def photos_at_a_time(self) -> int:
        return -(-self.photos // self.micro_batches)

    @property
    def rows(self) -> int:
        """Embeddings of a step, streams times batch."""
        return len(heads.loss_weights(self.config.loss)) * self.batch_size

    def state(self) -> dict[str, int]:
        """Item -> bytes that stay from step to step."""
        classifier = {f"classifier: {item}": size * self.shard_classes for item, size in self.per_class.items()}
        return {"streams: parameters": self.parameters, "streams: optimizer": self.optimizer, **classifier}

    def batch(self) -> int:
        side = self.config.preprocessing
        tokens = self.config.data.max_tokens if self.config.loss.with_text else 0
        return self.photos * (3 * side.resize_height * side.resize_width + 4 * tokens + 4)

    def head(self) -> int:
        """What the head holds while it runs."""
        if self.config.head.kind == "dense" and self.devices > 1:  # the whole kernel, its gradient by stream, their sum
            streams = self.rows // self.batch_size
            return 4 * self.shard_classes * self.devices * self.width * (2 + streams)
        running = heads.temporary_bytes(
            self.config.head, rows=self.rows, width=self.width, shard_classes=self.shard_classes
        )
        # That counts one array of the kernel's shape in the optimizer: AdamW's second adds a chunk of it, updated.
        second = self.per_class["optimizer"] // (4 * self.width) - 1
        running += max(0, second) * 4 * min(self.config.head.chunk, self.shard_classes) * self.width
        return max(running, self._graph()) if self.config.head.kind == "knn" else running

    def _graph(self) -> int:
        """What building the graph of neighbours holds; not at the same time as the rest of the head."""
        rows, k, number = self.shard_classes, self.config.head.neighbours, compute_dtype(self.config).itemsize
        chunk = min(GRAPH_CHUNK, rows)
        blocks = 3 * number * rows * self.width + 4 * rows * k  # own rows, a block and the next one; the best so far
        slices = (2 * number * chunk * self.width + 8 * chunk * k) if rows > chunk else 0
        return blocks + slices + 4 * chunk * (chunk + rows % chunk)  # cosines of whole chunks and of the last one

    def temporary(self) -> dict[str, int]:
        """Item -> bytes that live within a step, without activations."""
        items = {"classifier: head, while it runs": self.head(), "streams: gradient": self.gradient}
        if self.micro_batches > 1:
            size = self.config.preprocessing
            items["streams: gradient"] *= 2  # of one micro-batch, and the sum
            items["photos of all micro-batches"] = self.photos * 4 * 3 * size.height * size.width
        return items

    def memory(self) -> dict[str, int]:
        """Item -> bytes; activations last, where they are known, in proportion to the photos at a time."""
        items = {**self.state(), **self.temporary(), "batch": self.batch()}
        if self.activations is not None:
            now = round(self.activations * self.photos_at_a_time / self.activations_of)
            items[f"activations, compiled for {self.compiled_for}"] = now
        return items

    def total(self) -> int:
        return sum(self.memory().values())

    def fits(self, memory: int) -> bool:
        return self.total() <= SHARE * memory

    def messages(self) -> dict[str, Message]:
        """Item -> what crosses devices in a step."""
        config, width = self.config, self.width
        photos, parts = self.batch_size, self.micro_batches
        passes = 3 if parts == 1 else 5  # mean and variance forward, once or twice; the mean's gradient
        streams = {
            "streams: gradient": Message("all-reduce", self.gradient, parts),
            "streams: batch-norm statistics": Message("all-reduce", 4 * self.moments // 2, parts * passes),
        }
        if config.head.kind == "dense":
            kernel = 4 * (width + 1) * self.shard_classes * self.devices
            return streams | {
                "classifier: kernel and bias": Message("all-gather", kernel),
                "classifier: gradient of each stream": Message("all-reduce", kernel, self.rows // photos),
            }
        items = streams | {
            "classifier: embeddings": Message("all-gather", 4 * self.rows * width),
            "classifier: labels": Message("all-gather", 4 * photos),
            "classifier: cotangents": Message("reduce-scatter", 4 * self.rows * width),
            "classifier: maxima, sums, label logits": Message("all-reduce", 4 * self.rows, 3),
        }
        if config.head.kind == "knn":
            block = compute_dtype(config).itemsize * width * self.shard_classes
            passed = self.devices / config.head.rebuild_steps
            items["classifier: neighbours of labels"] = Message("all-reduce", 4 * photos * config.head.neighbours)
            items["classifier: rows, for the graph"] = Message("collective-permute", block, passed)
        return items


def size_of(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def make_plan(config: Config, shape: DataShape, *, devices: int) -> Plan:
    """The plan of a config on that many devices, whether they are here or not. Nothing is allocated or compiled.

    Raises ConfigError where batch or classes cannot be divided over the devices.
    """
    device_mesh = AbstractMesh((devices, 1), mesh.AXES, axis_types=(AxisType.Explicit,) * 2)
    check_batches(config, device_mesh)
    with jax.sharding.use_abstract_mesh(device_mesh):
        state = abstract_state(make_setup(config, shape, device_mesh))
    classifier, params = state.classifier, state.params
    count = classifier.kernel.shape[0]

    def each_class(*arrays: Any) -> int:
        return size_of(mesh.split_per_class(arrays, count)[0]) // count

    per_class = {
        "kernel, bias, prior": each_class(classifier.kernel, classifier.bias, classifier.log_prior),
        "optimizer": each_class(classifier.opt_state),
    }
    if classifier.sampling:
        per_class["sampling"] = each_class(classifier.sampling)
    trained = [x for path, x in jax.tree_util.tree_leaves_with_path(params) if trains(config.optim, path_name(path))]
    parts = trained_parts(config.optim, params)
    moments = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(state.batch_stats)
        if parts["visual/resnet" if path_name(path).startswith("visual/resnet/") else path_name(path).partition("/")[0]]
    ]
    return Plan(
        config=config,
        shape=shape,
        devices=devices,
        parameters=size_of((params, state.batch_stats)),
        optimizer=size_of(state.opt_state),
        gradient=size_of(trained),
        per_class=per_class,
        width=classifier.kernel.shape[1],
        moments=size_of(moments) // 4,
    )


def compile_step(setup: Setup, state: TrainState, batch_size: int) -> jax.stages.Compiled:
    """The training step of a batch of that size, under `jax.set_mesh`: (state, batch) -> (state, losses), state donated.

    Args:
      state: shapes and shardings, see `abstract_state`; what it is called with must have the same.
    """
    config, side = setup.config, setup.config.preprocessing
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, side.resize_height, side.resize_width, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    if config.loss.with_text:
        batch["token_ids"] = jax.ShapeDtypeStruct((batch_size, config.data.max_tokens), jnp.int32)
    batch = {name: mesh.divided(x, setup.mesh) for name, x in batch.items()}
    return jax.jit(make_train_step(setup), donate_argnums=0).lower(state, batch).compile()


def with_activations(plan: Plan) -> Plan:
    """The plan with the activations of one device's share of the batch, from a step compiled for the backend here.

    One device and few classes: what streams hold depends on neither, and so any number of devices can be planned for.
    """
    config = dataclasses.replace(_of_batch(plan.config, plan.photos, plan.micro_batches), head=HeadConfig())
    shape = dataclasses.replace(plan.shape, num_classes=FEW_CLASSES)
    device_mesh = mesh.make_mesh(data=1, model=1, devices=jax.local_devices())
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, shape, device_mesh)
        compiled = compile_step(setup, abstract_state(setup), plan.photos)
    return _with_compiled(plan, compiled, of=dataclasses.replace(plan, config=config, shape=shape, devices=1))


def _of_batch(config: Config, batch_size: int, micro_batches: int) -> Config:
    train = dataclasses.replace(
        config.train, batch_size=batch_size, micro_batches=micro_batches, grow_every_epochs=0.0, max_micro_batches=0
    )
    return dataclasses.replace(config, train=train)


def _with_compiled(plan: Plan, compiled: jax.stages.Compiled, *, of: Plan) -> Plan:
    """The plan with the activations of a compiled step: what it holds for a while, less what formulas own `of` it."""
    rest = _analysis(compiled).temp_size_in_bytes - sum(of.temporary().values())
    return dataclasses.replace(
        plan,
        activations=max(0, rest),
        activations_of=of.photos_at_a_time,
        compiled_for=jax.default_backend(),
    )


def largest_classes(plan: Plan, memory: int, *, devices: int) -> int:
    """The largest number of classes that fits that many devices of `memory` bytes, all else as planned; 0 for none."""

    def fits(rows: int) -> bool:
        shape = dataclasses.replace(plan.shape, num_classes=rows * devices)
        return dataclasses.replace(plan, shape=shape, devices=devices).fits(memory)

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * devices


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A change that makes a plan fit: overrides, or more devices of the same kind."""

    overrides: tuple[str, ...]
    plan: Plan

    def __str__(self) -> str:
        return " ".join(self.overrides) or f"{self.plan.devices} devices of this kind"


def alternatives(plan: Plan, memory: int) -> list[Alternative]:
    """What fits instead of a plan with activations: overrides, as few and as mild as do, then more devices."""
    return [*_overrides_that_fit(plan, memory), *_devices_that_fit(plan, memory)]


def _overrides_that_fit(plan: Plan, memory: int) -> list[Alternative]:
    config, train, powers = plan.config, plan.config.train, [2**i for i in range(20)]
    # From the one that changes most to the one that changes least: the model, then the statistics of batch norm, then time.
    choices: dict[str, list] = {
        "model.embedding_width": [n for n in reversed(powers) if 64 <= n < plan.width],
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
        new = make_plan(
            config_lib.override(config, [f"--config.model.embedding_width={width}"]), plan.shape, devices=plan.devices
        )
        return dataclasses.replace(
            new, activations=plan.activations, activations_of=plan.activations_of, compiled_for=plan.compiled_for
        )

    @functools.cache
    def planned(overrides: tuple[str, ...]) -> Plan:
        changed = config_lib.override(config, overrides)
        same_model = changed.model.embedding_width == config.model.embedding_width
        return dataclasses.replace(plan if same_model else of_width(changed.model.embedding_width), config=changed)

    found: list[Alternative] = []
    for count in range(1, len(choices) + 1):
        for names in itertools.combinations(choices, count):
            for values in itertools.product(*(choices[name] for name in names)):
                overrides = tuple(f"--config.{name}={value}" for name, value in zip(names, values, strict=True))
                if planned(overrides).fits(memory):
                    found.insert(0, Alternative(overrides, planned(overrides)))
                    break
        if found:
            break
    return found


def _devices_that_fit(plan: Plan, memory: int) -> list[Alternative]:
    config, devices = plan.config, plan.devices
    micro_batch = config.train.batch_size // config.train.micro_batches
    while math.gcd(micro_batch, config.eval.batch_size) % (2 * devices) == 0:
        devices *= 2
        more = dataclasses.replace(plan, devices=devices)
        if more.fits(memory):
            return [Alternative((), more)]
    return []


def compile_within_memory(
    plan: Plan, setup: Setup, state: TrainState, batch_sizes: Iterable[int]
) -> dict[int, jax.stages.Compiled]:
    """Batch size -> the training step for it (see `compile_step`), all compiled before anything is allocated.

    Raises DoesNotFit, with the plan on stderr, where a device has less memory than the state takes (known without
    compiling), or than a compiled step takes. Host memory counts as free as it is now, and what Python and the catalogue
    will still take of it is not known.
    """
    memory = device_memory(setup.mesh.local_devices)
    kept = sum(plan.state().values())
    if memory is not None and kept > memory:
        raise _refusal(with_activations(plan), memory, f"parameters and optimizer take {size_text(kept)}")
    steps = {}
    for batch_size in sorted(set(batch_sizes), reverse=True):  # the largest first: it takes most
        steps[batch_size] = compiled = compile_step(setup, state, batch_size)
        needed = needed_bytes(compiled)
        if memory is not None and needed > memory:
            micro_batch = setup.config.train.batch_size // setup.config.train.micro_batches
            config = _of_batch(setup.config, batch_size, batch_size // micro_batch)
            planned = _with_compiled(plan, compiled, of=dataclasses.replace(plan, config=config))
            raise _refusal(planned, memory, f"a step takes {size_text(needed)}")
    return steps


def needed_bytes(compiled: jax.stages.Compiled) -> int:
    """What a device holds while a compiled step runs: arguments, results that are not written over them, temporary."""
    size = _analysis(compiled)
    return size.argument_size_in_bytes + size.output_size_in_bytes - size.alias_size_in_bytes + size.temp_size_in_bytes


def _analysis(compiled: jax.stages.Compiled):
    size = compiled.memory_analysis()
    assert size is not None, f"no memory analysis on {jax.default_backend()}"
    return size


def _refusal(plan: Plan, memory: int, what: str) -> DoesNotFit:
    """The plan goes to stderr, one line into the error."""
    others = alternatives(plan, memory)
    print(*memory_lines(plan), *alternative_lines(plan, others, memory), sep="\n", file=sys.stderr)
    add = f"{'add' if others[0].overrides else 'take'} {others[0]}" if others else ""
    remedy = add or "take more devices or a smaller model"
    return DoesNotFit(f"{what} on a device that has {size_text(memory)}; {remedy}")


def size_text(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.2f} MiB"


def _count_text(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count >= 1_000_000 else f"{count:,}"


def _line(name: str, size: float) -> str:
    return f"  {name:<42}{size_text(size):>12}"


def memory_lines(plan: Plan) -> list[str]:
    """Bytes of one device by item, and their sum."""
    with_or_without = "without" if plan.activations is None else "with"
    items = {**plan.memory(), f"sum, {with_or_without} activations": plan.total()}
    title = f"memory a device, {plan.photos_at_a_time} of its {plan.photos} photos at a time:"
    return [title, *(_line(name, size) for name, size in items.items())]


def message_lines(plan: Plan) -> list[str]:
    """What a device sends in a step by item, and the sum."""
    if plan.devices == 1:
        return []
    sent = {name: message.sent(plan.devices) for name, message in plan.messages().items()}
    lines = [f"{_line(name, size)}  {plan.messages()[name].kind}" for name, size in sent.items()]
    return ["sent by a device in a step:", *lines, _line("sum", sum(sent.values()))]


def alternative_lines(plan: Plan, others: list[Alternative], memory: int) -> list[str]:
    lines = [f"  {str(other):<64}{size_text(other.plan.total()):>12}" for other in others]
    if most := largest_classes(plan, memory, devices=plan.devices):
        lines.append(f"  up to {most:,} classes, all else as it is")
    return ["what would fit instead:", *(lines or ["  nothing with this model and batch"])]


def kind_lines(plan: Plan, memory: int | None, kind: str) -> list[str]:
    """The largest number of classes for each kind of device, the one at hand first."""
    counts = [1, 8, 64]
    sizes = {name: round(size * GIB) for name, size in DEVICE_KINDS.items() if not is_kind(kind, name)}
    here = {} if memory is None else {kind: memory}
    header = f"  {'kind':<24}{'memory':>12}" + "".join(f"{n:>13}" for n in counts) + "  devices"
    lines = [f"largest number of classes in {SHARE:.0%} of the memory, all else as planned:", header]
    for name, size in (here | sizes).items():
        classes = "".join(f"{_count_text(largest_classes(plan, size, devices=n)):>13}" for n in counts)
        lines.append(f"  {name:<24}{size_text(size):>12}{classes}  {'at hand' if name in here else 'estimate'}")
    return lines


def plan_lines(config: Config, shape: DataShape, *, devices: int = 0) -> Iterator[str]:
    """The whole report, line by line: what formulas know at once, then what waits for a step to be compiled.

    Args:
      devices: as many of the kind at hand, here or not; 0 for those that the config would train on here.
    """
    at_hand = jax.local_devices()
    if devices < 0:
        raise InputError(f"--devices={devices}, wanted 1 or more, or 0 for those here")
    wanted = config.mesh
    devices = devices or wanted.data * wanted.model or mesh.make_mesh(model=wanted.model).size
    plan = make_plan(config, shape, devices=devices)
    many = "device" if devices == 1 else "devices"
    yield f"{shape.num_classes:,} classes x {plan.width} numbers, head {config.head.kind}, on {devices} {many}"
    yield from (*message_lines(plan), *memory_lines(plan))
    plan = with_activations(plan)
    name, size = list(plan.memory().items())[-1]
    yield from (_line(name, size), _line("sum", plan.total()))
    memory, kind = device_memory(at_hand[:devices]), at_hand[0].device_kind
    if memory is None:
        yield f"the memory of a {kind} is not known"
    else:
        fits = "fits" if plan.fits(memory) else "does not fit"
        yield f"{fits}: a {kind} here has {size_text(memory)}, of which {SHARE:.0%} may be taken"
        if not plan.fits(memory):
            yield from alternative_lines(plan, alternatives(plan, memory), memory)
    yield from kind_lines(plan, memory, kind)
