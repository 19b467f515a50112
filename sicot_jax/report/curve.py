"""Writes gains as a curve over one config field, for runs of several catalogues or settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sicot_jax.errors import InputError
from sicot_jax.report import figures, sections, tables
from sicot_jax.report.differences import GroupDifferences, paired_runs, variant_differences
from sicot_jax.report.document import Block, Figure, Heading, Paragraph, Table
from sicot_jax.report.page import read_runs, rename_runs, write_pages
from sicot_jax.report.runs import FinishedRun, check_comparable, config_differences
from sicot_jax.report.variant_roles import VariantRuns, group_by_variant, plain_baselines


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """The variants at one value of the field.

    Attributes:
      value: value of the field.
      reference: variant that gains are measured against, the same at every point.
      others: the other variants.
    """

    value: float
    reference: VariantRuns
    others: tuple[VariantRuns, ...]

    @property
    def variants(self) -> tuple[VariantRuns, ...]:
        """All variants, the reference first."""
        return self.reference, *self.others


def write_curve(
    inputs: Sequence[Path], out: Path, *, field: str, select: Sequence[str] = ()
) -> str:
    """Writes `report.md`, `report.html` and a figure of gains over a config field.

    Gains are against one variant at every value: of the plain baselines that all values have, the
    one that is best on validation, averaged over values.

    Args:
      inputs: run folders, folders of them, and run tables (`*.parquet`).
      out: folder to write into, made where it is missing.
      field: dotted name of a config field that is a number, such as
        `data.generated.informativeness`.
      select: patterns of the names of a table's runs, see `run_table.read_run_table`.

    Returns:
      The table of accuracies and gains, as Markdown for a terminal.

    Raises:
      InputError: the field is no number of these runs or has one value, runs of one value are of
        several catalogues, or there is nothing to compare.
    """
    runs = read_runs(inputs, select)
    points = _curve_points(runs, field)
    out.mkdir(parents=True, exist_ok=True)
    name = field.rpartition(".")[2].replace("_", " ")
    lines = _gain_lines(points)
    ylabel = f"gain over {points[0].reference.title} in top-1, points"
    figures.plot_gains(lines, out / "gains.png", xlabel=name, ylabel=ylabel)
    accuracy: list[Block] = [
        _curve_table(points, name),
        *map(Paragraph, _curve_notes(points, field)),
    ]
    num_drawn = min(len(lines), figures.MAX_LINES - 1)
    left_out = f"The figure shows {num_drawn} of the {len(lines)} variants."
    blocks: list[Block] = [
        Heading(f"Gains over {name}", 1),
        *accuracy,
        Figure("gains.png", f"gains in points over {name}, with their intervals"),
        *([Paragraph(left_out)] if num_drawn < len(lines) else []),
        *_training_blocks(points, name),
        Heading("Runs"),
        tables.runs_table(runs),
    ]
    return write_pages(blocks, out, title=f"Gains over {name}", shown=accuracy)


def _curve_points(runs: Sequence[FinishedRun], field: str) -> list[CurvePoint]:
    runs_at: dict[float, list[FinishedRun]] = {}
    for run in runs:
        value = run.config.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(
                f"{run.name}: {field} is {value!r}, wanted a number; name a field that is one"
            )
        runs_at.setdefault(float(value), []).append(run)
    if len(runs_at) < 2:
        raise InputError(
            f"{field} is {next(iter(runs_at)):g} in all of these runs; a curve needs runs of "
            "several values"
        )
    variants_at = {value: _variants_at(runs_at[value], value, field) for value in sorted(runs_at)}
    title = _reference_title(list(variants_at.values()), field)
    points = []
    for value, variants in variants_at.items():
        reference = next(variant for variant in variants if variant.title == title)
        others = tuple(variant for variant in variants if variant is not reference)
        points.append(CurvePoint(value, reference, others))
    if not any(point.others for point in points):
        raise InputError(
            f"no value of {field} has a variant besides {title}; give runs of two variants"
        )
    return points


def _variants_at(runs: Sequence[FinishedRun], value: float, field: str) -> list[VariantRuns]:
    if len(hashes := {run.results["hashes"]["data"][:12] for run in runs}) > 1:
        raise InputError(
            f"runs at {field}={value:g} are of several data ({', '.join(sorted(hashes))}); report "
            "them apart"
        )
    check_comparable(runs)
    # Variants have the same name at every value, whatever folder holds it.
    return group_by_variant(rename_runs(runs, [Path("/", run.name) for run in runs]))


def _reference_title(variants_at_values: Sequence[Sequence[VariantRuns]], field: str) -> str:
    top1_at_values = [
        {variant.title: variant.mean_validation_top1 for variant in plain_baselines(variants)}
        for variants in variants_at_values
    ]
    common = [t for t in top1_at_values[0] if all(t in top1 for top1 in top1_at_values)]
    if not common:
        raise InputError(
            f"no plain baseline at every value of {field}; train one at each, under one name"
        )
    return max(common, key=lambda t: float(np.mean([top1[t] for top1 in top1_at_values])))


def _curve_notes(points: Sequence[CurvePoint], field: str) -> list[str]:
    num_seeds = {len(paired_runs(p.reference, variant)) for p in points for variant in p.others}
    notes = [sections.interval_note(max(num_seeds), seeds_differ=len(num_seeds) > 1)]
    first = points[0].reference.first_run
    for point in points[1:]:
        changes = config_differences(first, point.reference.first_run).split(", ")
        further = [c for c in changes if not c.startswith((f"{field} ", "data "))]
        if further:
            notes.append(
                f"Besides {field} this differs between {points[0].value:g} and {point.value:g}: "
                f"{', '.join(further)}."
            )
    return notes


def _training_blocks(points: Sequence[CurvePoint], name: str) -> list[Block]:
    """Notes on training and learning rates at each value."""
    blocks: list[Block] = []
    for point in points:
        notes = sections.training_notes(point.variants)
        if table := tables.learning_rate_table(point.variants):
            notes.append(table)
        if notes:
            blocks += [Heading(f"Training at {name} {point.value:g}"), *notes]
    return blocks


def _gain_lines(points: Sequence[CurvePoint]) -> dict[str, list[tuple[float, GroupDifferences]]]:
    """Title of a variant -> (value, gains) of the points that have it."""
    lines: dict[str, list[tuple[float, GroupDifferences]]] = {}
    for point in points:
        for variant in point.others:
            gains = variant_differences(point.reference, variant)
            lines.setdefault(variant.title, []).append((point.value, gains))
    return lines


def _curve_table(points: Sequence[CurvePoint], name: str) -> Table:
    rows = []
    for point in points:
        value, reference = f"{point.value:g}", point.reference
        rows += [[value, v.title, *tables.accuracy_cells(v)] for v in point.variants]
        rows += [
            [value, f"{v.title} - {reference.title}", *tables.difference_cells(reference, v)]
            for v in point.others
        ]
    return Table([name, *tables.HEADER], rows, num_text_columns=2)
