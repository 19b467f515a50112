"""Gains as a curve over one field of the config: runs of several catalogues, or of several
settings, a point each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.errors import InputError
from sicot_jax.report import figures, tables
from sicot_jax.report.differences import difference_rows, pairs
from sicot_jax.report.document import Block, Figure, Heading, Table, Text
from sicot_jax.report.page import of_intervals, told_of_training, write_pages
from sicot_jax.report.runs import (
    Finished,
    all_runs,
    check_comparable,
    config_differences,
    read_finished,
    run_names,
)
from sicot_jax.report.tables import HEADER
from sicot_jax.report.variant_groups import Arm, arms_of, mean_validation, plain_arms

Gains = dict[str, tuple[float, float, float]]  # group -> (difference in points, 95 % interval)


@dataclasses.dataclass(frozen=True)
class Point:
    """The arms at one value of the field."""

    value: float
    first: Arm
    others: tuple[Arm, ...]

    @property
    def arms(self) -> tuple[Arm, ...]:
        return self.first, *self.others


def write_curve(workdirs: Sequence[Path], out: Path, *, over: str) -> str:
    """`report.md`, `report.html` and a PNG in `out`; returns the table.

    Gains are against one arm at every value: of the plain ones that all values have, the one that
      is best on validation, the mean over values. InputError for a field that the runs do not have,
      that is no number, or that has one value; for several catalogues at one value; where there is
      nothing to compare.
    """
    workdirs = all_runs(workdirs)
    names = run_names(workdirs)
    runs = [
        dataclasses.replace(read_finished(path), name=name)
        for path, name in zip(workdirs, names, strict=True)
    ]
    points = _points(runs, workdirs, over)
    out.mkdir(parents=True, exist_ok=True)
    name, against = over.rpartition(".")[2].replace("_", " "), points[0].first.title
    lines = _lines(points)
    figures.plot_gains(
        lines, out / "gains.png", xlabel=name, ylabel=f"gain over {against} in top-1, points"
    )
    accuracy: list[Block] = [_table(points, name), *map(Text, _notes(points, over))]
    shown = min(len(lines), figures.MOST_LINES - 1)
    few = (
        [Text(f"The figure shows {shown} of the {len(lines)} arms.")] if shown < len(lines) else []
    )
    blocks: list[Block] = [
        Heading(f"Gains over {name}", 1),
        *accuracy,
        Figure("gains.png", f"gains in points over {name}, with their intervals"),
        *few,
        *_training(points, name),
        Heading("Runs"),
        tables.runs_table(runs),
    ]
    return write_pages(blocks, out, title=f"Gains over {name}", shown=accuracy)


def _points(runs: Sequence[Finished], workdirs: Sequence[Path], over: str) -> list[Point]:
    at: dict[float, list[tuple[Path, Finished]]] = {}
    for path, run in zip(workdirs, runs, strict=True):
        value: Any = run.config.get(over)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(
                f"{path}: {over} is {value!r}, wanted a number; name a field of the config that is one"
            )
        at.setdefault(float(value), []).append((path, run))
    if len(at) < 2:
        raise InputError(
            f"{over} is {next(iter(at)):g} in all of these runs; a curve wants runs of several values"
        )
    arms_at: dict[float, list[Arm]] = {}
    for value, found in sorted(at.items()):
        here = [run for _, run in found]
        if len(hashes := {run.results["hashes"]["data"][:12] for run in here}) > 1:
            raise InputError(
                f"runs at {over}={value:g} are of several data ({', '.join(sorted(hashes))}); report them apart"
            )
        check_comparable(here)
        # Arms are called alike at every value, whatever folder holds it.
        named = run_names([path for path, _ in found])
        renamed = [
            dataclasses.replace(run, name=name) for run, name in zip(here, named, strict=True)
        ]
        arms_at[value] = arms_of(renamed)
    title = _reference(list(arms_at.values()), over)
    points = []
    for value, arms in arms_at.items():
        first = next(arm for arm in arms if arm.title == title)
        points.append(Point(value, first, tuple(arm for arm in arms if arm is not first)))
    if not any(point.others for point in points):
        raise InputError(f"no value of {over} has an arm beside {title}; give runs of two arms")
    return points


def _reference(arms_of_values: Sequence[Sequence[Arm]], over: str) -> str:
    """Title of the arm that gains are against."""
    plain = [
        {arm.title: mean_validation(arm) for arm in plain_arms(arms)} for arms in arms_of_values
    ]
    everywhere = [title for title in plain[0] if all(title in found for found in plain)]
    if not everywhere:
        raise InputError(
            f"no plain baseline at every value of {over}; train one at each, under one name"
        )
    return max(everywhere, key=lambda title: float(np.mean([found[title] for found in plain])))


def _notes(points: Sequence[Point], over: str) -> list[str]:
    seeds = {len(pairs(point.first, arm)) for point in points for arm in point.others}
    notes = [of_intervals(max(seeds), different=len(seeds) > 1)]
    first = points[0].first.first
    for point in points[1:]:
        listed = config_differences(first, point.first.first).split(", ")
        besides = [change for change in listed if not change.startswith((f"{over} ", "data "))]
        if besides:
            notes.append(
                f"Besides {over} this differs between {points[0].value:g} and {point.value:g}: {', '.join(besides)}."
            )
    return notes


def _training(points: Sequence[Point], name: str) -> list[Block]:
    """What each value's own report says of its training and its learning rates."""
    blocks: list[Block] = []
    for point in points:
        rates = tables.rates_table(point.arms)
        if told := [*told_of_training(point.arms), *([rates] if rates else [])]:
            blocks += [Heading(f"Training at {name} {point.value:g}"), *told]
    return blocks


def _lines(points: Sequence[Point]) -> dict[str, list[tuple[float, Gains]]]:
    """Title of an arm -> (value, gains) of the points that have it."""
    lines: dict[str, list[tuple[float, Gains]]] = {}
    for point in points:
        for arm in point.others:
            lines.setdefault(arm.title, []).append((point.value, difference_rows(point.first, arm)))
    return lines


def _table(points: Sequence[Point], name: str) -> Table:
    rows = []
    for point in points:
        rows += [[f"{point.value:g}", arm.title, *tables.accuracy_cells(arm)] for arm in point.arms]
        rows += [
            [
                f"{point.value:g}",
                f"{arm.title} - {point.first.title}",
                *tables.difference_cells(point.first, arm),
            ]
            for arm in point.others
        ]
    return Table([name, *HEADER], rows, texts=2)
