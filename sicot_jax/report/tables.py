"""Accuracy of arms side by side, head and tail, with intervals of the paired differences."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from sicot_jax.config import FREE_ON_RESUME
from sicot_jax.report.finished import Finished
from sicot_jax.report.intervals import paired_interval

GROUPS = ("overall", "head", "tail", "class_mean")
UNCERTAIN = "~"  # marks a difference whose interval holds zero


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone."""

    name: str
    runs: tuple[Finished, ...]

    @property
    def title(self) -> str:
        return self.name.replace("_", "-")

    @property
    def first(self) -> Finished:
        return self.runs[0]

    @property
    def seeds(self) -> dict[int, Finished]:
        return {run.seed: run for run in self.runs}


def arms_of(runs: Sequence[Finished]) -> list[Arm]:
    """Runs of one config but for the seed become one arm, in the order of their first; runs of one seed stay apart.

    Where every arm is one run it has that run's name, else what its runs' names begin with, as far as arms need it.
    """
    together: dict[tuple, list[Finished]] = {}
    for run in runs:
        fields = {name: value for name, value in run.config.items() if name not in (*FREE_ON_RESUME, "seed")}
        key = json.dumps(fields, sort_keys=True), run.results["hashes"]["data"]
        same = sum(other.seed == run.seed for (k, h, _), found in together.items() if (k, h) == key for other in found)
        together.setdefault((*key, same), []).append(run)
    groups = list(together.values())
    if all(len(group) == 1 for group in groups):
        return [Arm(group[0].name, tuple(group)) for group in groups]
    parts = [_common([run.name.split("/") for run in group]) for group in groups]
    for length in range(1, 1 + max(map(len, parts))):
        names = ["/".join(part[:length]) for part in parts]
        if len(set(names)) == len(names):
            return [Arm(name, tuple(group)) for name, group in zip(names, groups, strict=True)]
    return [Arm(group[0].name, tuple(group)) for group in groups]


def _common(names: Sequence[Sequence[str]]) -> list[str]:
    """The parts that all begin with; a single name's own."""
    alike = [part[0] for part in zip(*names, strict=False) if len(set(part)) == 1]
    return alike or list(names[0])


def difference_rows(first: Arm, other: Arm) -> dict[str, tuple[float, float, float]]:
    """Group -> (top-1 difference in points, 95 % interval) of `other` minus `first`, photo by photo, seed by seed.

    Over the seeds that both have; where they share none, each one's first.
    """
    shared = [seed for seed in first.seeds if seed in other.seeds]
    pairs = [(first.seeds[s], other.seeds[s]) for s in shared] or [(first.first, other.first)]
    difference = np.stack([100.0 * (b.tested.hits.astype(float) - a.tested.hits) for a, b in pairs])
    label, head = first.first.tested.label, first.first.head
    members = {"overall": np.ones(len(label), bool), "head": head, "tail": ~head}
    rows = {
        name: (float(difference[:, m].mean()) if m.any() else float("nan"), *paired_interval(difference[:, m]))
        for name, m in members.items()
    }
    mean = float("nan")
    if len(label):
        _, inverse, counts = np.unique(label, return_inverse=True, return_counts=True)
        mean = float(np.mean(np.bincount(inverse, difference.mean(0)) / counts))
    rows["class_mean"] = (mean, *paired_interval(difference, label))
    return rows


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, so that it reads well in a terminal too."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row):
        return (
            "| "
            + " | ".join(
                f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            + " |"
        )

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def accuracy_table(arms: Sequence[Arm]) -> str:
    """Top-1 (top-3) of every arm, the mean over its seeds; under them the difference of each to the first with its interval."""

    def figure(arm: Arm, group: str) -> str:
        rows = [run.results["accuracy"][group] for run in arm.runs]
        if rows[0]["top1"] is None:
            return "-"
        return f"{np.mean([r['top1'] for r in rows]):.2f} ({np.mean([r['top3'] for r in rows]):.2f})"

    rows = [[arm.title, *(figure(arm, g) for g in GROUPS)] for arm in arms]
    for arm in arms[1:]:
        gains = difference_rows(arms[0], arm)
        cells = []
        for group in GROUPS:
            gain, low, high = gains[group]
            mark = UNCERTAIN if low <= 0 <= high else ""
            cells.append("-" if np.isnan(gain) else f"{mark}{gain:+.2f} [{low:+.2f}, {high:+.2f}]")
        rows.append([f"{arm.title} - {arms[0].title}", *cells])
    first = arms[0].first.results["accuracy"]
    rows.append(["test photos", *(str(first[g]["photos"]) for g in GROUPS)])
    return markdown_table(["top-1 (top-3), %", "overall", "head", "tail", "class mean"], rows)
