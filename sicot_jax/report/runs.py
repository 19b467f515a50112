"""Finished runs as the report reads them: a run's folder, or the record that it left."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.catalog.statistics import head_mask
from sicot_jax.common.files import read_json
from sicot_jax.config import FREE_ON_RESUME, read_flat_config
from sicot_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Tested:
    """What a run said of its test photos, in the order of (image id, label): equal test sets are in
    equal order.

    label: int [N]; top_classes: int [N, K], best first; label_count: int [N], training photos of
      the label's class.
    class_counts: int [C], training photos of every class, most first.
    post_hoc: variant of the finished classifier -> its best classes, int [N]; empty where none was
      tested.
    """

    label: np.ndarray
    top_classes: np.ndarray
    label_count: np.ndarray
    class_counts: np.ndarray
    post_hoc: dict[str, np.ndarray]

    @property
    def hits(self) -> np.ndarray:
        """bool [N]: whether the best class is the right one."""
        return self.top_classes[:, 0] == self.label

    def hits_within(self, top: int) -> np.ndarray:
        """bool [N]: whether the right class is among the best `top`."""
        return (self.top_classes[:, :top] == self.label[:, None]).any(-1)


@dataclasses.dataclass(frozen=True, eq=False)  # one is itself alone: arrays have no single answer
class Finished:
    """What a finished run left behind."""

    name: str
    results: dict[str, Any]
    config: dict[str, Any]  # flat
    tested: Tested
    validation: list[tuple[float, float]]  # (share of the run, top-1)

    @property
    def seed(self) -> int:
        return self.config["seed"]

    def variant(self, name: str) -> Finished:
        """As if tested with that variant of its classifier: the best class alone is known."""
        return dataclasses.replace(
            self,
            tested=dataclasses.replace(
                self.tested, top_classes=self.tested.post_hoc[name][:, None]
            ),
        )

    @property
    def head(self) -> np.ndarray:
        """bool [N]: test photos of head classes."""
        return head_mask(self.tested.label_count, self.results["head_boundary"])


def all_runs(folders: Sequence[Path]) -> list[Path]:
    """Run folders and records as they are; any other folder stands for all of them below it.

    Of a sweep's folder the runs count, not their records beside them; what has diverged left
    nothing to report.
    """
    found = []
    for folder in folders:
        if (folder / "config.json").exists():
            found.append(folder)
            continue
        below = sorted(path.parent for path in folder.rglob("config.json"))
        twins = {path for path in below if _run_of(path, folder) in below}
        found += [
            path for path in below if path not in twins and not (path / DIVERGED).exists()
        ] or [folder]
    return found


def _run_of(record: Path, folder: Path) -> Path | None:
    """Where the run of a sweep's record lies."""
    parts = list(record.relative_to(folder).parts)
    if "records" not in parts:
        return None
    parts[parts.index("records")] = "runs"
    return folder.joinpath(*parts)


DIVERGED = "diverged.json"  # what a sweep leaves in a run folder instead of results
SWEPT = re.compile(r"(after_rate|rate|seed)_")  # folders of a sweep below that of an arm


def run_names(workdirs: Sequence[Path]) -> list[str]:
    """Their paths below the folder that holds them all, from the arm on in a sweep. InputError
    where a run is given twice.
    """
    paths = [path.resolve() for path in workdirs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise InputError(f"{path} is given twice; name each run once")
    parent = Path(os.path.commonpath([path.parent for path in paths]))
    while any(SWEPT.match(path.relative_to(parent).parts[0]) for path in paths):
        parent = parent.parent
    return [path.relative_to(parent).as_posix() for path in paths]


def read_finished(workdir: Path) -> Finished:
    """InputError by name for a run that is not finished."""
    try:
        for name in ("results.json", "config.json"):
            if not (workdir / name).exists():
                raise InputError(
                    f"{workdir}: not a finished run, {name} is missing; train it to its end"
                )
        results = read_json(workdir / "results.json", "the results of a finished run")
        config = read_flat_config(workdir / "config.json")
        tested = read_tested(workdir)
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
            raise InputError(
                f"{workdir}/log.jsonl: a line is no JSON ({line[:40]!r}); remove that line"
            ) from error
        if record["kind"] == "validation":
            validation.append((record["step"] / results["step_of_end"], record["overall_top1"]))
    return Finished(workdir.name, results, config, tested, validation)


def read_tested(workdir: Path) -> Tested:
    """`predictions.npz` of a run folder or of a record. InputError where it is damaged."""
    with (workdir / "predictions.npz").open("rb") as file:
        try:
            with np.load(file) as arrays:
                found = {
                    name: arrays[name]
                    for name in arrays
                    if name not in ("embedding", "top_logits", "hashes")
                }
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
            raise InputError(
                f"{file.name} is damaged ({error}); write it again: sicot evaluate --workdir={workdir}"
            ) from error
    # Records have them in bytes, which overflow.
    whole = {
        name: array.astype(np.int64) for name, array in found.items() if array.dtype.kind in "iu"
    }
    names = found.get("post_hoc_names", np.zeros(0)).tolist()
    try:
        label, top_classes = whole["label"], whole["top_classes"]
        if "image_id" not in found:
            counts = np.repeat(whole["count_values"], whole["count_classes"])
            changed = (
                dict(zip(names, filled_in(top_classes[:, 0], whole["post_hoc"]), strict=True))
                if names
                else {}
            )
            return Tested(label, top_classes, whole["label_count"], counts, changed)
        order, counts = np.lexsort((label, found["image_id"])), whole["train_counts"]
        changed = dict(zip(names, whole["post_hoc"][order].T, strict=True)) if names else {}
        return Tested(
            label[order], top_classes[order], counts[label][order], np.sort(counts)[::-1], changed
        )
    except KeyError as error:
        raise InputError(
            f"{workdir}/predictions.npz lacks {error}; write it again: sicot evaluate --workdir={workdir}"
        ) from error


def changes(start: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """What differs from the row before: int [N], [V, N] -> [V, N], 0 for the same class, else class
    + 1.
    """
    before = np.concatenate([start[None], rows[:-1]])
    return np.where(rows == before, 0, rows + 1)


def filled_in(start: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """The rows of which `changes` were kept."""
    rows: list[np.ndarray] = []
    for row in changed:
        rows.append(np.where(row, row - 1, rows[-1] if rows else start))
    return np.array(rows)


def still_improving(run: Finished) -> bool:
    """Whether validation top-1 rose by more than half a point in the last quarter of the run: it is
    under-trained.
    """
    late = [value for share, value in run.validation if share > 0.75]
    early = [value for share, value in run.validation if share <= 0.75]
    return bool(late and early and max(late) - max(early) > 0.5)


def config_differences(first: Finished, other: Finished) -> str:
    """ "seed 0 -> 1, ..." of the fields that decide a result, and of the data; empty where nothing
    differs.
    """
    before, now = (
        {**run.config, "data": run.results["hashes"]["data"][:12]} for run in (first, other)
    )
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
        raise InputError(
            f"runs with head boundaries {sorted(boundaries)} in one table; set one data.head_boundary"
        )
