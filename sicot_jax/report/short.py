"""The short report: accuracy of runs side by side for head and tail, and the class histogram."""

from __future__ import annotations

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.catalog.statistics import head_mask
from sicot_jax.catalog.strings import counted
from sicot_jax.config import FREE_ON_RESUME, stored
from sicot_jax.errors import InputError
from sicot_jax.evaluate import read_json
from sicot_jax.report.intervals import paired_interval

GROUPS = ("overall", "head", "tail", "class_mean")


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a finished run left behind."""

    name: str
    results: dict[str, Any]
    config: dict[str, Any]  # flat
    predictions: dict[str, np.ndarray]
    validation: list[tuple[float, float]]  # (share of the run, top-1)

    @property
    def title(self) -> str:
        return self.name.replace("_", "-")


def run_names(workdirs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart. InputError where a run is given twice."""
    parts = [path.resolve().parts for path in workdirs]
    for length in range(1, 1 + max(map(len, parts))):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(path for i, path in enumerate(workdirs) if parts[i] in parts[:i])
    raise InputError(f"{twice} is given twice; name each run once")


def read_finished(workdir: Path) -> Finished:
    """InputError by name for a run that is not finished."""
    try:
        for name in ("results.json", "config.json"):
            if not (workdir / name).exists():
                raise InputError(f"{workdir}: not a finished run, {name} is missing; train it to its end")
        results = read_json(workdir / "results.json", "the results of a finished run")
        config = stored(workdir / "config.json")
        predictions = _read_predictions(workdir)
        log = (workdir / "log.jsonl").read_text()
    except FileNotFoundError as error:
        raise InputError(
            f"{workdir}: not a finished run, {Path(error.filename).name} is missing; train it to its end"
        ) from error
    validation = []
    for line in log.splitlines():
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{workdir}/log.jsonl: a line is no JSON ({line[:40]!r}); remove that line") from error
        if record["kind"] == "validation":
            validation.append((record["step"] / results["step_of_end"], record["overall_top1"]))
    return Finished(workdir.name, results, config, predictions, validation)


def _read_predictions(workdir: Path) -> dict[str, np.ndarray]:
    with (workdir / "predictions.npz").open("rb") as file:
        try:
            with np.load(file) as arrays:
                return {name: arrays[name] for name in ("image_id", "label", "top_classes", "train_counts")}
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
            raise InputError(
                f"{file.name} is damaged ({error}); write it again: sicot evaluate --workdir={workdir}"
            ) from error


def still_improving(run: Finished) -> bool:
    """Whether validation top-1 rose by more than half a point in the last quarter of the run: it is under-trained."""
    late = [value for share, value in run.validation if share > 0.75]
    early = [value for share, value in run.validation if share <= 0.75]
    return bool(late and early and max(late) - max(early) > 0.5)


def config_differences(first: Finished, other: Finished) -> str:
    """ "seed 0 -> 1, ..." of the fields that decide a result, and of the data; empty where nothing differs."""
    before, now = ({**run.config, "data": run.results["hashes"]["data"][:12]} for run in (first, other))
    return ", ".join(
        f"{name} {before.get(name)} -> {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in FREE_ON_RESUME
    )


def check_comparable(runs: Sequence[Finished]) -> None:
    """InputError naming the runs that were tested on other photos or another class table."""
    for key in ("test_set", "class_table"):
        for run in runs[1:]:
            if run.results["hashes"][key] != runs[0].results["hashes"][key]:
                raise InputError(
                    f"{run.name} and {runs[0].name} have another {key.replace('_', ' ')}; report them apart, or train both on "
                    "one catalogue"
                )
    boundaries = {run.results["head_boundary"] for run in runs}
    if len(boundaries) > 1:
        raise InputError(f"runs with head boundaries {sorted(boundaries)} in one table; set one data.head_boundary")


def difference_rows(first: Finished, other: Finished) -> dict[str, tuple[float, float, float]]:
    """Group -> (top-1 difference in points, 95 % interval) of `other` minus `first`, photo by photo."""
    label, boundary = first.predictions["label"], first.results["head_boundary"]
    place = {
        image: i for i, image in enumerate(zip(other.predictions["image_id"], other.predictions["label"], strict=True))
    }
    order = np.asarray([place[key] for key in zip(first.predictions["image_id"], label, strict=True)], int)
    hits = [
        first.predictions["top_classes"][:, 0] == label,
        other.predictions["top_classes"][order, 0] == label,
    ]
    difference = 100.0 * (hits[1].astype(float) - hits[0])
    head = head_mask(first.predictions["train_counts"], boundary)[label]
    members = {"overall": np.ones(len(label), bool), "head": head, "tail": ~head}
    rows = {
        name: (float(difference[m].mean()) if m.any() else float("nan"), *paired_interval(difference[m]))
        for name, m in members.items()
    }
    if len(label):
        _, inverse, counts = np.unique(label, return_inverse=True, return_counts=True)
        mean = float(np.mean(np.bincount(inverse, difference) / counts))
        rows["class_mean"] = (mean, *paired_interval(difference, label))
    else:
        rows["class_mean"] = (float("nan"),) * 3
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


def accuracy_table(runs: Sequence[Finished]) -> str:
    """Top-1 (top-3) of every run; under them the difference of each to the first with its interval."""

    def figure(row):
        return "-" if row["top1"] is None else f"{row['top1']:.2f} ({row['top3']:.2f})"

    first = runs[0].results["accuracy"]
    rows = [[run.title, *(figure(run.results["accuracy"][g]) for g in GROUPS)] for run in runs]
    for run in runs[1:]:
        gains = difference_rows(runs[0], run)
        cells = []
        for group in GROUPS:
            gain, low, high = gains[group]
            cells.append("-" if np.isnan(gain) else f"{gain:+.2f} [{low:+.2f}, {high:+.2f}]")
        rows.append([f"{run.title} - {runs[0].title}", *cells])
    rows.append(["test photos", *(str(first[g]["photos"]) for g in GROUPS)])
    return markdown_table(["top-1 (top-3), %", "overall", "head", "tail", "class mean"], rows)


def plot_histogram(train_counts: np.ndarray, head_boundary: int, path: Path) -> None:
    """Training photos per class, most frequent first, with the head/tail boundary (SICoT Fig. 6)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ordered = np.sort(train_counts)[::-1]
    total, head = len(ordered), int((ordered > head_boundary).sum())
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # One step for all classes of equal count, so that a million classes are some thousand; the tail begins at a step.
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    for name, first, last, colour in [("head", 0, head, "#d1495b"), ("tail", head, total, "#30638e")]:
        if first < last:
            label = f"{name}: {last - first:,} {'class' if last - first == 1 else 'classes'}"
            steps = starts[(first <= starts) & (starts < last)]
            values, edges = np.maximum(ordered[steps], 0.5), np.append(steps, last) + 0.5
            axes.stairs(values, edges, baseline=0.5, fill=True, color=colour, label=label)
    boundary = f"head: more than {head_boundary:,} photos"
    axes.axhline(head_boundary + 0.5, color="black", linewidth=0.8, linestyle="--", label=boundary)
    # Room for the legend above counts that do not fall. Of many classes the head is but a line on a linear axis.
    axes.set(yscale="log", ylim=(0.5, 6 * max(ordered[0], head_boundary, 1)), ylabel="training photos")
    axes.set(xscale="log" if total > 5000 else "linear", xlim=(0.5, total + 0.5), xlabel="class, most frequent first")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    if total <= 5000:
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    empty = int((ordered == 0).sum())
    without = f", {empty:,} without a photo" if empty else ""
    classes = f"{total:,} {'class' if total == 1 else 'classes'}"
    axes.set_title(f"{int(train_counts.sum()):,} training photos in {classes}{without}", fontsize=10)
    axes.legend(frameon=False, loc="upper right", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def write_report(workdirs: Sequence[Path], out: Path) -> str:
    """`report.md` and `class_histogram.png` in `out`; returns the table. InputError where runs cannot be compared."""
    names = run_names(workdirs)
    runs = [dataclasses.replace(read_finished(path), name=name) for path, name in zip(workdirs, names, strict=True)]
    check_comparable(runs)
    out.mkdir(parents=True, exist_ok=True)
    first = runs[0]
    counts, boundary = first.predictions["train_counts"], first.results["head_boundary"]
    plot_histogram(counts, boundary, out / "class_histogram.png")
    table = accuracy_table(runs)
    head = head_mask(counts, boundary)
    photos = np.bincount(first.predictions["label"], minlength=len(counts))
    notes = [
        f"{counted(len(counts), 'class')}, {int(head.sum())} of them head (more than {counted(boundary, 'training photo')}), "
        f"{counted(int(counts.sum()), 'training photo')}, {counted(int((photos == 0).sum()), 'class')} without a test photo.",
    ]
    if len(runs) > 1:
        notes.append(
            "Differences are paired, photo by photo, with a 95 % bootstrap interval over photos; one seed each, so the "
            "interval does not hold the luck of training."
        )
    for run in runs[1:]:
        differences = config_differences(first, run)
        if differences:
            notes.append(f"{run.title} differs from {first.title} in: {differences}.")
    for run in runs:
        if still_improving(run):
            notes.append(f"{run.title} is under-trained: its validation top-1 was still rising at the end.")
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
