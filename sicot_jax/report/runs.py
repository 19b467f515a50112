"""Finished runs as the report sees them, and the checks that they can be compared."""

from __future__ import annotations

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.catalog.statistics import head_mask
from sicot_jax.common.files import read_json
from sicot_jax.config import FREE_ON_RESUME, read_flat_config
from sicot_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class TestSet:
    """Labels of the test photos, sorted by (image id, label), and the training photos per class.

    Attributes:
      label: int64 [N], class of each test photo.
      label_count: int64 [N], training photos of that class.
      class_counts: int64 [C], training photos per class in descending order.
    """

    label: np.ndarray
    label_count: np.ndarray
    class_counts: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class FinishedRun:
    """A trained and tested run.

    Attributes:
      name: path that tells the run from the others of a report, such as `baseline/seed_0`.
      config: config fields by dotted name, such as `optim.learning_rate`.
      results: content of the run's `results.json`.
      validation_log: one record per validation: `step`, `overall_top1` and other accuracies in %.
      test_set: labels of the test photos.
      top1_hits: bool [N], whether the predicted class is the label.
      top3_hits: bool [N], whether the label is among the best three classes; None where the best
        class alone is known.
      adjusted_hits: post-hoc adjustment -> bool [N], top-1 hits of the adjusted classifier.
      triplets_hash: SHA-256 of the file of `data.triplets`, "" without one.
    """

    name: str
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    validation_log: Sequence[Mapping[str, float]]
    test_set: TestSet
    top1_hits: np.ndarray
    top3_hits: np.ndarray | None = None
    adjusted_hits: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    triplets_hash: str = ""

    @property
    def seed(self) -> int:
        """Random seed of the run."""
        return self.config["seed"]

    @property
    def learning_rate(self) -> float:
        """Base learning rate of the run, nan where its config has none."""
        return self.config.get("optim.learning_rate", float("nan"))

    @property
    def head_boundary(self) -> int:
        """Training photos above which a class belongs to the head."""
        return self.results["head_boundary"]

    @property
    def head_photos(self) -> np.ndarray:
        """Test photos of head classes, bool [N]."""
        return head_mask(self.test_set.label_count, self.head_boundary)

    @property
    def validation_curve(self) -> list[tuple[float, float]]:
        """Points (fraction of the run, validation top-1 in %) in the order of training."""
        end = self.results["step_of_end"]
        return [(record["step"] / end, record["overall_top1"]) for record in self.validation_log]

    @property
    def best_validation_top1(self) -> float:
        """Highest validation top-1 in %; 0 without validation photos."""
        return max((top1 for _, top1 in self.validation_curve), default=0.0)

    def with_adjustment(self, name: str) -> FinishedRun:
        """Returns the run with the hits of its classifier after a post-hoc adjustment.

        Args:
          name: key of `adjusted_hits`.

        Returns:
          A copy whose top-1 hits are those of the adjusted classifier, without top-3 hits.
        """
        return dataclasses.replace(self, top1_hits=self.adjusted_hits[name], top3_hits=None)


def is_still_improving(run: FinishedRun) -> bool:
    """Returns whether validation top-1 rose by over half a point in the last quarter of the run.

    Args:
      run: run to judge by its validation curve.

    Returns:
      True for an under-trained run, False also where there are no validations to judge by.
    """
    late = [top1 for fraction, top1 in run.validation_curve if fraction > 0.75]
    early = [top1 for fraction, top1 in run.validation_curve if fraction <= 0.75]
    return bool(late and early and max(late) - max(early) > 0.5)


def config_differences(first: FinishedRun, other: FinishedRun) -> str:
    """Returns the config fields in which two runs differ.

    Args:
      first: run whose values come first.
      other: run compared with it.

    Returns:
      "seed 0 -> 1, ..." of the fields that affect results and of the data hash; "" without any.
    """
    before, after = (
        {**run.config, "data": run.results["hashes"]["data"][:12]} for run in (first, other)
    )
    return ", ".join(
        f"{name} {before.get(name)} -> {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and name not in FREE_ON_RESUME
    )


def check_comparable(runs: Sequence[FinishedRun]) -> None:
    """Raises InputError unless all runs share test set, class table and head boundary.

    Args:
      runs: runs that one table is to hold.

    Raises:
      InputError: names the first run that differs and what differs.
    """
    for key in ("test_set", "class_table"):
        for run in runs[1:]:
            if run.results["hashes"][key] != runs[0].results["hashes"][key]:
                raise InputError(
                    f"{run.name} and {runs[0].name} have another {key.replace('_', ' ')}; report "
                    "them apart, or train both on one catalogue"
                )
    boundaries = {run.head_boundary for run in runs}
    if len(boundaries) > 1:
        raise InputError(
            f"runs with head boundaries {sorted(boundaries)} in one table; set one "
            "data.head_boundary"
        )


DIVERGED_FILE = "diverged.json"  # file in a run folder whose training diverged
_PREDICTIONS = ("label", "image_id", "top_classes", "train_counts")
_ADJUSTED = ("post_hoc_names", "post_hoc")


def read_run_folder(workdir: Path) -> FinishedRun:
    """Reads a finished run.

    Args:
      workdir: run folder with `config.json`, `results.json`, `log.jsonl` and `predictions.npz`.

    Returns:
      The run, named after its folder, with the test photos sorted by (image id, label).

    Raises:
      InputError: the run is not finished, or one of its files is damaged.
    """
    try:
        for name in ("results.json", "config.json"):
            if not (workdir / name).exists():
                raise FileNotFoundError(2, "missing", name)
        results = read_json(workdir / "results.json", "the results of a finished run")
        description = read_json(workdir / "config.json", "the config of a run")
        config = read_flat_config(workdir / "config.json")
        predictions = _read_predictions(workdir)
        log = (workdir / "log.jsonl").read_text()
    except FileNotFoundError as error:
        raise InputError(
            f"{workdir}: not a finished run, {Path(error.filename).name} is missing; train it to "
            "its end"
        ) from error
    return FinishedRun(
        name=workdir.name,
        config=config,
        results=results,
        validation_log=_validation_log(workdir, log),
        triplets_hash=description.get("data", {}).get("triplets", ""),
        **predictions,
    )


def _validation_log(workdir: Path, log: str) -> list[dict[str, float]]:
    validations = []
    for line in log.splitlines():
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{workdir}/log.jsonl: a line is no JSON ({line[:40]!r}); remove that line"
            ) from error
        if record.pop("kind") == "validation":
            validations.append(record)
    return validations


def _read_predictions(workdir: Path) -> dict[str, Any]:
    """Reads `predictions.npz`: test set and hits, as arguments of `FinishedRun`."""
    advice = f"write it again: sicot evaluate run --workdir={workdir}"
    with (workdir / "predictions.npz").open("rb") as file:
        try:
            with np.load(file) as arrays:
                stored = {
                    name: arrays[name] for name in (*_PREDICTIONS, *_ADJUSTED) if name in arrays
                }
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
            raise InputError(f"{file.name} is damaged ({error}); {advice}") from error
    if missing := [name for name in _PREDICTIONS if name not in stored]:
        raise InputError(f"{workdir}/predictions.npz lacks {', '.join(missing)}; {advice}")
    order = np.lexsort((stored["label"], stored["image_id"]))
    label = stored["label"][order].astype(np.int64)
    top_classes, counts = stored["top_classes"][order], stored["train_counts"].astype(np.int64)
    hits = top_classes == label[:, None]
    adjusted = {}
    if "post_hoc_names" in stored:
        classes = stored["post_hoc"][order].T
        adjusted = dict(zip(stored["post_hoc_names"].tolist(), classes == label, strict=True))
    return {
        "test_set": TestSet(label, counts[label], np.sort(counts)[::-1]),
        "top1_hits": hits[:, 0],
        "top3_hits": hits[:, :3].any(-1) if hits.shape[1] > 1 else None,
        "adjusted_hits": adjusted,
    }


GROUPS = ("overall", "head", "tail", "class_mean", "few")
FEW = 20  # training photos up to which a class is "few"


def group_masks(run: FinishedRun) -> dict[str, np.ndarray]:
    """Returns the test photos of each group.

    Args:
      run: run whose test photos are grouped.

    Returns:
      Group -> bool [N]; "class_mean" has all photos, which `mean_over_group` weighs by class.
    """
    everything, head = np.ones(len(run.test_set.label), bool), run.head_photos
    return {
        "overall": everything,
        "head": head,
        "tail": ~head,
        "class_mean": everything,
        "few": run.test_set.label_count <= FEW,
    }


def mean_over_group(values: np.ndarray, run: FinishedRun, group: str) -> float:
    """Returns the mean of a value per photo over a group.

    Args:
      values: float [N], one value per test photo.
      run: run whose test photos they are.
      group: one of `GROUPS`; "class_mean" averages over classes instead of photos.

    Returns:
      The mean, nan for a group without photos.
    """
    member, label = group_masks(run)[group], run.test_set.label
    if not member.any():
        return float("nan")
    if group != "class_mean":
        return float(values[member].mean())
    _, inverse, counts = np.unique(label, return_inverse=True, return_counts=True)
    return float(np.mean(np.bincount(inverse, values) / counts))


def run_accuracy(run: FinishedRun, group: str, *, top: int = 1) -> float:
    """Returns the accuracy of one run on a group of its test photos.

    Args:
      run: tested run.
      group: one of `GROUPS`.
      top: 1 or 3, how many of the best classes may be the right one.

    Returns:
      Accuracy in %, nan for a group without photos.
    """
    hits = run.top1_hits if top == 1 else run.top3_hits
    assert hits is not None, f"{run.name} has no top-{top} hits"
    return 100 * mean_over_group(hits.astype(float), run, group)
