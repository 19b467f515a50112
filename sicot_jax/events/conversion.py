"""`sicot report conversion`: unique-visitor conversion by variant of the service, and gains."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from scipy import stats

from sicot_jax.common.text import markdown_table, pluralize
from sicot_jax.errors import InputError
from sicot_jax.events.store import Event, open_events

CONVERSION_KINDS = ("click", "purchase")


@dataclasses.dataclass(frozen=True)
class VariantConversion:
    """Unique visitors of one variant of the service.

    Attributes:
      name: the variant.
      visitors: visitors who were shown something by it.
      converted: those of them who converted after that.
    """

    name: str
    visitors: int
    converted: int

    @property
    def rate(self) -> float:
        """Fraction of visitors who converted."""
        return self.converted / self.visitors

    def interval(self) -> tuple[float, float]:
        """Returns the 95 % confidence interval of the rate (Wilson 1927).

        Returns:
          (low, high), fractions.
        """
        result = stats.binomtest(self.converted, self.visitors)
        low, high = result.proportion_ci(0.95, method="wilson")
        return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Conversion of all variants.

    Attributes:
      variants: variants in the order of their names.
      mixed: visitors who saw several variants, and count for none of them.
    """

    variants: list[VariantConversion]
    mixed: int


def measure_conversion(events: Iterable[Event], *, kind: str = "purchase") -> Conversion:
    """Counts unique visitors and conversions by variant.

    A visitor counts once. Events before a visitor's first impression do not count.

    Args:
      events: events in any order; an event given twice counts once.
      kind: kind of event that converts a visitor, `click` or `purchase`.

    Returns:
      Counts by variant.

    Raises:
      InputError: there is no impression, or `kind` is another one.
    """
    if kind not in CONVERSION_KINDS:
        raise InputError(f"--kind {kind}, wanted {' or '.join(CONVERSION_KINDS)}")
    first_impression: dict[str, float] = {}
    variants_seen: dict[str, set[str]] = collections.defaultdict(set)
    last_conversion: dict[str, float] = {}
    for event in events:
        if event.kind == "impression":
            first_impression[event.visitor] = min(
                event.time, first_impression.get(event.visitor, math.inf)
            )
            variants_seen[event.visitor].add(event.variant)
        elif event.kind == kind:
            last_conversion[event.visitor] = max(
                event.time, last_conversion.get(event.visitor, -math.inf)
            )
    if not variants_seen:
        raise InputError(
            "no impression among the events, wanted some of a variant; send them with POST "
            "/v1/events"
        )
    visitors: collections.Counter[str] = collections.Counter()
    converted: collections.Counter[str] = collections.Counter()
    for visitor, seen in variants_seen.items():
        if len(seen) == 1:
            (variant,) = seen
            visitors[variant] += 1
            converted[variant] += (
                last_conversion.get(visitor, -math.inf) >= first_impression[visitor]
            )
    counts = [VariantConversion(name, visitors[name], converted[name]) for name in sorted(visitors)]
    return Conversion(counts, len(variants_seen) - sum(visitors.values()))


def relative_gain(
    variant: VariantConversion, control: VariantConversion
) -> tuple[float, float, float] | None:
    """Returns the relative gain in conversion rate over a control (Katz et al. 1978).

    Args:
      variant: variant to judge.
      control: variant that the gain is over.

    Returns:
      (rate / control's rate - 1, low, high) with the 95 % interval; None where one of the two has
      no conversion.
    """
    if not variant.converted or not control.converted:
        return None
    risk = stats.contingency.relative_risk(
        variant.converted, variant.visitors, control.converted, control.visitors
    )
    low, high = risk.confidence_interval(0.95)
    return float(risk.relative_risk) - 1, float(low) - 1, float(high) - 1


def conversion_report(paths: Sequence[Path], *, kind: str, control: str = "") -> str:
    """Makes the table of conversion by variant.

    Args:
      paths: files of events, see `open_events`; an event in two of them counts once.
      kind: kind of event that converts a visitor, `click` or `purchase`.
      control: variant that gains are over; the first by name by default.

    Returns:
      A Markdown table with 95 % intervals, and notes.

    Raises:
      InputError: no events, no impression, or no such control.
    """
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(contextlib.closing(open_events(path))) for path in paths]
        conversion = measure_conversion(itertools.chain.from_iterable(stores), kind=kind)
    by_name: Mapping[str, VariantConversion] = {
        variant.name: variant for variant in conversion.variants
    }
    if not by_name:
        raise InputError(
            f"{paths[0]}: every visitor saw several variants; give each visitor one of them"
        )
    if control and control not in by_name:
        raise InputError(
            f"--control {control}: no such variant, wanted one of {', '.join(by_name)}"
        )
    base = by_name[control or conversion.variants[0].name]
    rows = []
    for variant in conversion.variants:
        low, high = (100 * bound for bound in variant.interval())
        gain = "" if variant is base else _gain_cell(relative_gain(variant, base))
        rate = f"{100 * variant.rate:.2f} [{low:.2f}, {high:.2f}]"
        rows.append([variant.name, f"{variant.visitors:,}", f"{variant.converted:,}", rate, gain])
    header = ["variant", "visitors", f"with a {kind}", "rate, %", f"gain over {base.name}, %"]
    lines = [markdown_table(header, rows), ""]
    lines.append("Unique visitors, 95 % intervals; ~ marks a gain whose interval contains zero.")
    if conversion.mixed:
        visitors = pluralize(conversion.mixed, "visitor")
        lines.append(f"Left out for seeing several variants: {visitors}.")
    return "\n".join(lines)


def _gain_cell(gain: tuple[float, float, float] | None) -> str:
    if gain is None:
        return "not measurable: no conversion"
    value, low, high = (100 * bound for bound in gain)
    return f"{'~' if low <= 0 <= high else ''}{value:+.1f} [{low:+.1f}, {high:+.1f}]"
