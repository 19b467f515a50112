"""Finished runs as the report sees them, and the checks that they can be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sicot_jax.catalog.statistics import head_mask
from sicot_jax.config import FREE_ON_RESUME
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
