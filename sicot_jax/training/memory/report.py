"""A plan as a person reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax

from sicot_jax.config import Config
from sicot_jax.errors import InputError
from sicot_jax.parallel import mesh
from sicot_jax.parallel.device_memory import DEVICE_KINDS, GIB, memory_per_device, format_size
from sicot_jax.training.memory import fit
from sicot_jax.training.memory.plan import SHARE, Plan, can_divide, largest_classes, make_plan
from sicot_jax.training.model import DataShape


def _count_text(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count >= 1_000_000 else f"{count:,}"


def _line(name: str, size: float) -> str:
    return f"  {name:<42}{format_size(size):>12}"


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
    return [
        "sent by a device in a step:",
        *lines,
        _line("sum", sum(sent.values())),
        *ratio_lines(plan),
    ]


def ratio_lines(plan: Plan) -> list[str]:
    """Where `train.gradient_ratio` saves nothing: a line that says so."""
    ratio = plan.config.train.gradient_ratio
    if ratio == 1 or ratio * plan.devices < 1 < plan.devices:
        return []
    remedy = (
        f"below {1 / plan.devices:g} it would"
        if plan.devices > 1
        else "one device sends nothing; set it to 1"
    )
    return [f"train.gradient_ratio={ratio:g} saves nothing on {plan.devices} devices: {remedy}"]


def alternative_lines(plan: Plan, others: list[fit.Alternative], memory: int) -> list[str]:
    lines = [f"  {other!s:<64}{format_size(other.plan.total()):>12}" for other in others]
    if most := largest_classes(plan, memory, devices=plan.devices):
        lines.append(f"  up to {most:,} classes, all else as it is")
    return ["what would fit instead:", *(lines or ["  nothing with this model and batch"])]


def kind_lines(plan: Plan, memory: int | None, kind: str) -> list[str]:
    """The largest number of classes for each kind of device, the one at hand first; "-" where the
    batch cannot be divided.
    """
    counts = [1, 8, 64]
    rows = [] if memory is None else [(kind, memory, plan, "at hand")]
    for other in DEVICE_KINDS:
        if kind not in other.jax_names:
            there = dataclasses.replace(plan, platform=other.platform)
            rows.append((other.name, round(other.gib * GIB), there, "estimate"))
    header = f"  {'kind':<24}{'memory':>12}" + "".join(f"{n:>13}" for n in counts) + "  devices"
    lines = [
        f"largest number of classes in {SHARE:.0%} of the memory, all else as planned:",
        header,
    ]
    for name, size, there, source in rows:
        classes = [
            _count_text(largest_classes(there, size, devices=n))
            if can_divide(plan.config, n)
            else "-"
            for n in counts
        ]
        lines.append(
            f"  {name:<24}{format_size(size):>12}{''.join(f'{text:>13}' for text in classes)}  {source}"
        )
    return lines


def _number_of_devices(config: Config, wanted: int) -> int:
    """As many as wanted, 0 for those that the config would train on here; InputError where its mesh
    has others.
    """
    data, model = config.mesh.data, config.mesh.model
    if wanted < 0:
        raise InputError(f"--devices={wanted}, wanted 1 or more, or 0 for those here")
    if wanted % model or (wanted and data and wanted != data * model):
        raise InputError(
            f"--devices={wanted} is not a mesh of {data or 'any'} x {model}; set mesh.data and mesh.model, or give another"
        )
    return wanted or data * model or mesh.make_mesh(model=model).size


def plan_lines(config: Config, shape: DataShape, *, devices: int = 0) -> Iterator[str]:
    """The whole report, line by line: what formulas know at once, then what waits for a step to be
    compiled.

    Args:
      devices: as many of the kind at hand, here or not; 0 for those that the config would train on
        here.
    """
    at_hand = jax.local_devices()
    devices = _number_of_devices(config, devices)
    plan = make_plan(config, shape, devices=devices, platform=jax.default_backend())
    many = "device" if devices == 1 else "devices"
    yield f"{shape.num_classes:,} classes x {plan.width} numbers, head {config.head.kind}, on {devices} {many}"
    yield from (*message_lines(plan), *memory_lines(plan))
    plan = fit.with_activations(plan)
    name, size = list(plan.memory().items())[-1]
    yield from (_line(name, size), _line("sum", plan.total()))
    memory, kind = memory_per_device(at_hand[:devices]), at_hand[0].device_kind
    if memory is None:
        yield f"the memory of a {kind} is not known"
    else:
        fits = "fits" if plan.fits(memory) else "does not fit"
        yield f"{fits}: a {kind} here has {format_size(memory)}, of which {SHARE:.0%} may be taken"
        if not plan.fits(memory):
            yield from alternative_lines(plan, fit.alternatives(plan, memory), memory)
    yield from kind_lines(plan, memory, kind)
