"""`sicot report uv`: unique-visitor conversion of each variant of the service, and its gain over
another one.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sicot_jax.errors import InputError
from sicot_jax.events.store import Event, opened

_Z = 1.959963984540054  # of a 95 % interval
CONVERSIONS = ("click", "purchase")


@dataclasses.dataclass(frozen=True)
class Variant:
    """Visitors who were shown something by it, and those of them who converted after that."""

    name: str
    visitors: int
    converted: int

    @property
    def rate(self) -> float:
        return self.converted / self.visitors

    def interval(self) -> tuple[float, float]:
        """95 % of the rate, Wilson's (1927)."""
        n, rate = self.visitors, self.rate
        centre = (rate + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(rate * (1 - rate) / n + _Z**2 / (4 * n**2))
        return max(centre - half, 0.0), min(centre + half, 1.0)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """`mixed`: visitors who saw several variants; they are in none of them."""

    variants: list[Variant]
    mixed: int
    kind: str


def conversion(events: Iterable[Event], *, kind: str = "purchase") -> Conversion:
    """Of events in any order. A visitor is one however often he comes; what he does before his
    first impression does not count.

    Raises InputError where no variant has shown anything.
    """
    if kind not in CONVERSIONS:
        raise InputError(f"--kind {kind}, wanted {' or '.join(CONVERSIONS)}")
    first: dict[str, float] = {}
    seen: dict[str, set[str]] = collections.defaultdict(set)
    last: dict[str, float] = {}
    for event in events:
        if event.kind == "impression":
            first[event.visitor] = min(event.time, first.get(event.visitor, math.inf))
            seen[event.visitor].add(event.variant)
        elif event.kind == kind:
            last[event.visitor] = max(event.time, last.get(event.visitor, -math.inf))
    if not seen:
        raise InputError(
            "no impression among the events, wanted some of a variant; send them with POST /v1/events"
        )
    visitors: collections.Counter[str] = collections.Counter()
    converted: collections.Counter[str] = collections.Counter()
    for visitor, variants in seen.items():
        if len(variants) == 1:
            (variant,) = variants
            visitors[variant] += 1
            converted[variant] += last.get(visitor, -math.inf) >= first[visitor]
    found = [Variant(name, visitors[name], converted[name]) for name in sorted(visitors)]
    return Conversion(found, len(seen) - sum(visitors.values()), kind)


def relative_gain(variant: Variant, control: Variant) -> tuple[float, float, float] | None:
    """rate / control's rate - 1 and its 95 % interval, exp(log ratio -+ z sqrt(sum of (1 - p) / (n
    p))) - 1 (Katz et al. 1978).

    None where one of the two has no conversion.
    """
    if not variant.converted or not control.converted:
        return None
    ratio = math.log(variant.rate / control.rate)
    error = math.sqrt(sum((1 - v.rate) / (v.visitors * v.rate) for v in (variant, control)))
    return tuple(math.exp(ratio + z * error) - 1 for z in (0, -_Z, _Z))  # type: ignore[return-value]


def report(paths: Sequence[Path], *, kind: str, control: str = "") -> str:
    """A table in Markdown, of the events of all files. `control`: the variant that gains are over;
    by default the first by name.
    """
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(contextlib.closing(opened(path))) for path in paths]
        found = conversion(
            itertools.chain.from_iterable(stores), kind=kind
        )  # an event in two files counts as one
    by_name: Mapping[str, Variant] = {variant.name: variant for variant in found.variants}
    if not by_name:
        raise InputError(
            f"{paths[0]}: every visitor saw several variants; give each visitor one of them"
        )
    if control and control not in by_name:
        raise InputError(
            f"--control {control}: no such variant, wanted one of {', '.join(by_name)}"
        )
    base = by_name[control or found.variants[0].name]
    lines = [
        f"| variant | visitors | with a {kind} | rate, % | gain over {base.name}, % |",
        "|---|---:|---:|---:|---:|",
    ]
    for variant in found.variants:
        low, high = (100 * x for x in variant.interval())
        gain = "" if variant is base else _gain(relative_gain(variant, base))
        rate = f"{100 * variant.rate:.2f} [{low:.2f}, {high:.2f}]"
        lines.append(
            f"| {variant.name} | {variant.visitors:,} | {variant.converted:,} | {rate} | {gain} |"
        )
    lines += ["", "Unique visitors, 95 % intervals; ~ marks a gain whose interval holds zero."]
    if found.mixed:
        lines.append(f"{found.mixed:,} visitors saw several variants and are left out.")
    return "\n".join(lines)


def _gain(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return "not measurable: no conversion"
    gain, low, high = (100 * x for x in found)
    return f"{'~' if low <= 0 <= high else ''}{gain:+.1f} [{low:+.1f}, {high:+.1f}]"
