"""The report of finished runs: Markdown and figures in a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sicot_jax.catalog.strings import counted
from sicot_jax.report.figures import plot_histogram
from sicot_jax.report.finished import check_comparable, config_differences, read_finished, run_names, still_improving
from sicot_jax.report.tables import UNCERTAIN, accuracy_table, arms_of


def write_report(workdirs: Sequence[Path], out: Path) -> str:
    """`report.md` and `class_histogram.png` in `out`; returns the table. InputError where runs cannot be compared."""
    names = run_names(workdirs)
    runs = [dataclasses.replace(read_finished(path), name=name) for path, name in zip(workdirs, names, strict=True)]
    check_comparable(runs)
    out.mkdir(parents=True, exist_ok=True)
    first, arms = runs[0], arms_of(runs)
    counts, boundary = first.tested.class_counts, first.results["head_boundary"]
    plot_histogram(counts, boundary, out / "class_histogram.png")
    table = accuracy_table(arms)
    without = len(counts) - len(np.unique(first.tested.label))
    head, photos = int((counts > boundary).sum()), counted(int(counts.sum()), "training photo")
    notes = [
        f"{counted(len(counts), 'class')}, {head} of them head (more than {counted(boundary, 'training photo')}), {photos}, "
        f"{counted(without, 'class')} without a test photo."
    ]
    if len(arms) > 1:
        shared = set.intersection(*(set(arm.seeds) for arm in arms))
        notes.append(
            "Differences are paired, photo by photo, with a 95 % bootstrap interval over photos"
            + (
                f" and {len(shared)} seeds; few seeds make it too narrow."
                if len(shared) > 1
                else "; one seed each, so the interval does not hold the luck of training."
            )
            + f" {UNCERTAIN} marks those that hold zero: no difference is shown."
        )
    for arm in arms[1:]:
        if differences := config_differences(arms[0].first, arm.first):
            notes.append(f"{arm.title} differs from {arms[0].title} in: {differences}.")
    for run in runs:
        if still_improving(run):
            notes.append(
                f"{run.name.replace('_', '-')} is under-trained: its validation top-1 was still rising at the end."
            )
    origin = [
        f"- {run.name}: seed {run.config['seed']}, {run.results['step']} of {run.results['step_of_end']} steps "
        f"({'best on validation' if run.validation else 'the last: no validation photos'}), data "
        f"{run.results['hashes']['data'][:12]}, commit {run.results['commit'][:12] or 'unknown'}, {run.results['hardware']}"
        for run in runs
    ]
    text = "\n\n".join(["# Report", table, *notes, "![class histogram](class_histogram.png)", "\n".join(origin)]) + "\n"
    temporary = out / "report.tmp"
    temporary.write_text(text)
    temporary.replace(out / "report.md")
    return "\n".join(["", table, "", *notes])
