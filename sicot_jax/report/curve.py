"""Gains as a curve over one field of the config: runs of several catalogues, or of several settings, a point each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sicot_jax.errors import InputError
from sicot_jax.report import figures, tables
from sicot_jax.report.document import Block, Figure, Heading, Table, Text
from sicot_jax.report.finished import Finished, all_runs, check_comparable, read_finished, run_names
from sicot_jax.report.page import write_pages
from sicot_jax.report.tables import HEADER, UNCERTAIN, Arm, arms_of, reference

Gains = dict[str, tuple[float, float, float]]  # group -> (difference in points, 95 % interval)


@dataclasses.dataclass(frozen=True)
class Point:
    """The runs at one value of the field."""

    value: float
    first: Arm
    others: tuple[Arm, ...]

    def gains(self, arm: Arm) -> Gains:
        return tables.difference_rows(self.first, arm)


def write_curve(workdirs: Sequence[Path], out: Path, *, over: str) -> str:
    """`report.md`, `report.html` and a PNG in `out`; returns the table.

    Runs of one value of the field are set side by side as in the report of one catalogue: against the plain baseline that is
    best on validation there. InputError for a field that the runs do not have, that is no number, or that has one value.
    """
    workdirs = all_runs(workdirs)
    run_names(workdirs)  # refuses one that is given twice
    points = _points(workdirs, over)
    out.mkdir(parents=True, exist_ok=True)
    lines = _lines(points)
    name = over.rpartition(".")[2].replace("_", " ")
    figures.plot_gains(lines, out / "gains.png", xlabel=name)
    explained = Text(
        f"One row for each {name} and arm; differences are paired, photo by photo, with a 95 % bootstrap interval over photos "
        f"and the seeds that both arms have. {UNCERTAIN} marks those that hold zero: no difference is shown."
    )
    runs = [run for point in points for arm in (point.first, *point.others) for run in arm.runs]
    accuracy: list[Block] = [_table(points, name), explained]
    blocks: list[Block] = [
        Heading(f"Gains over {name}", 1),
        *accuracy,
        Figure("gains.png", f"gains in points over {name}, with their intervals"),
        Heading("Runs"),
        tables.runs_table(runs),
    ]
    return write_pages(blocks, out, title=f"Gains over {name}", shown=accuracy)


def _points(workdirs: Sequence[Path], over: str) -> list[Point]:
    at: dict[float, list[tuple[Path, Finished]]] = {}
    for path in workdirs:
        run = read_finished(path)
        value: Any = run.config.get(over)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{path}: {over} is {value!r}, wanted a number; name a field of the config that is one")
        at.setdefault(float(value), []).append((path, run))
    if len(at) < 2:
        raise InputError(f"{over} is {next(iter(at)):g} in all of these runs; a curve wants runs of several values")
    points = []
    for value, found in sorted(at.items()):
        names = run_names([path for path, _ in found])
        runs = [dataclasses.replace(run, name=name) for (_, run), name in zip(found, names, strict=True)]
        check_comparable(runs)
        arms = arms_of(runs)
        first = reference(arms)
        points.append(Point(value, first, tuple(arm for arm in arms if arm is not first)))
    return points


def _lines(points: Sequence[Point]) -> dict[str, list[tuple[float, Gains]]]:
    """Title of an arm -> (value, gains) of the points that have it."""
    lines: dict[str, list[tuple[float, Gains]]] = {}
    for point in points:
        for arm in point.others:
            lines.setdefault(arm.title, []).append((point.value, point.gains(arm)))
    return lines


def _table(points: Sequence[Point], name: str) -> Table:
    rows = []
    for point in points:
        rows += [[f"{point.value:g}", arm.title, *tables.accuracy_cells(arm)] for arm in (point.first, *point.others)]
        rows += [
            [f"{point.value:g}", f"{arm.title} - {point.first.title}", *tables.difference_cells(point.first, arm)]
            for arm in point.others
        ]
    return Table([name, *HEADER], rows, texts=2)
