"""Formats a memory plan as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax

from sicot_jax.config import Config
from sicot_jax.errors import InputError
from sicot_jax.parallel import mesh
from sicot_jax.parallel.device_memory import DEVICE_KINDS, GIB, format_size, memory_per_device
from sicot_jax.training.memory import fit
from sicot_jax.training.memory.fit import Alternative, find_alternatives
from sicot_jax.training.memory.plan import (
    USABLE_SHARE,
    MemoryPlan,
    divides_batches,
    make_memory_plan,
    max_classes,
    step_collectives,
)
from sicot_jax.training.model import DataShape

_DEVICE_COUNTS = (1, 8, 64)


def _format_count(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count >= 1_000_000 else f"{count:,}"


def _line(name: str, size: float) -> str:
    return f"  {name:<42}{format_size(size):>12}"


def memory_lines(plan: MemoryPlan) -> list[str]:
    """Formats the bytes of one device by item, and their sum.

    Args:
      plan: the plan.

    Returns:
      Lines.
    """
    with_or_without = "without" if plan.activations is None else "with"
    items = {**plan.bytes_by_item(), f"sum, {with_or_without} activations": plan.total_bytes()}
    title = (
        f"memory a device, {plan.micro_batch_per_device} of its {plan.photos_per_device} photos "
        "at a time:"
    )
    return [title, *(_line(name, size) for name, size in items.items())]


def collective_lines(plan: MemoryPlan) -> list[str]:
    """Formats what a device sends in a step by item, and the sum.

    Args:
      plan: the plan.

    Returns:
      Lines; none for one device.
    """
    if plan.devices == 1:
        return []
    collectives = step_collectives(plan)
    sent = {name: collective.bytes_sent(plan.devices) for name, collective in collectives.items()}
    return [
        "sent by a device in a step:",
        *(f"{_line(name, size)}  {collectives[name].kind}" for name, size in sent.items()),
        _line("sum", sum(sent.values())),
        *gradient_ratio_lines(plan),
    ]


def gradient_ratio_lines(plan: MemoryPlan) -> list[str]:
    """Warns where `train.gradient_ratio` (share of the entries sent) saves no traffic.

    Args:
      plan: the plan.

    Returns:
      One line, or none.
    """
    ratio = plan.config.train.gradient_ratio
    if ratio == 1 or ratio * plan.devices < 1 < plan.devices:
        return []
    advice = (
        f"below {1 / plan.devices:g} it would"
        if plan.devices > 1
        else "one device sends nothing; set it to 1"
    )
    return [f"train.gradient_ratio={ratio:g} saves nothing on {plan.devices} devices: {advice}"]


def alternative_lines(plan: MemoryPlan, alternatives: list[Alternative], memory: int) -> list[str]:
    """Formats settings that would fit.

    Args:
      plan: the plan that does not.
      alternatives: result of `find_alternatives`.
      memory: bytes of a device.

    Returns:
      Lines.
    """
    lines = [
        f"  {other!s:<64}{format_size(other.plan.total_bytes()):>12}" for other in alternatives
    ]
    if most := max_classes(plan, memory, devices=plan.devices):
        lines.append(f"  up to {most:,} classes, all else as it is")
    return ["what would fit instead:", *(lines or ["  nothing with this model and batch"])]


def device_kind_lines(plan: MemoryPlan, memory: int | None, kind: str) -> list[str]:
    """Formats the largest number of classes for each kind of device.

    Args:
      plan: the plan, with activations.
      memory: bytes of an attached device, None where it is not known.
      kind: JAX's name of the attached devices, which come first.

    Returns:
      A table; "-" where the batch cannot be divided over so many devices.
    """
    rows = [] if memory is None else [(kind, memory, plan, "at hand")]
    for other in DEVICE_KINDS:
        if kind not in other.jax_names:
            there = dataclasses.replace(plan, platform=other.platform)
            rows.append((other.name, round(other.gib * GIB), there, "estimate"))
    counts = "".join(f"{n:>13}" for n in _DEVICE_COUNTS)
    lines = [
        f"largest number of classes in {USABLE_SHARE:.0%} of the memory, all else as planned:",
        f"  {'kind':<24}{'memory':>12}{counts}  devices",
    ]
    for name, size, there, source in rows:
        classes = [
            _format_count(max_classes(there, size, devices=n))
            if divides_batches(plan.config, n)
            else "-"
            for n in _DEVICE_COUNTS
        ]
        cells = "".join(f"{text:>13}" for text in classes)
        lines.append(f"  {name:<24}{format_size(size):>12}{cells}  {source}")
    return lines


def _number_of_devices(config: Config, wanted: int) -> int:
    """As many as wanted; 0 for those that the config would use here."""
    data, model = config.mesh.data, config.mesh.model
    if wanted < 0:
        raise InputError(f"--devices={wanted}, wanted 1 or more, or 0 for those here")
    if wanted % model or (wanted and data and wanted != data * model):
        raise InputError(
            f"--devices={wanted} is not a mesh of {data or 'any'} x {model}; set mesh.data and "
            "mesh.model, or give another"
        )
    return wanted or data * model or mesh.make_mesh(model=model).size


def plan_lines(config: Config, shape: DataShape, *, devices: int = 0) -> Iterator[str]:
    """Formats the complete report: first what formulas give, then what a compiled step adds.

    Args:
      config: the run's.
      shape: sizes of its catalogue.
      devices: devices of the attached kind, attached or not; 0 for those that the config would use
        here.

    Yields:
      Lines.

    Raises:
      InputError: the devices do not form the config's mesh, or cannot share its work.
    """
    attached = jax.local_devices()
    devices = _number_of_devices(config, devices)
    plan = make_memory_plan(config, shape, devices=devices, platform=jax.default_backend())
    noun = "device" if devices == 1 else "devices"
    yield (
        f"{shape.num_classes:,} classes x {plan.width} numbers, head {config.head.kind}, on "
        f"{devices} {noun}"
    )
    yield from (*collective_lines(plan), *memory_lines(plan))
    plan = fit.with_activations(plan)
    name, size = list(plan.bytes_by_item().items())[-1]
    yield from (_line(name, size), _line("sum", plan.total_bytes()))
    memory, kind = memory_per_device(attached[:devices]), attached[0].device_kind
    if memory is None:
        yield f"the memory of a {kind} is not known"
    else:
        fits = "fits" if plan.fits(memory) else "does not fit"
        yield (
            f"{fits}: a {kind} here has {format_size(memory)}, of which {USABLE_SHARE:.0%} may be "
            "used"
        )
        if not plan.fits(memory):
            yield from alternative_lines(plan, find_alternatives(plan, memory), memory)
    yield from device_kind_lines(plan, memory, kind)
