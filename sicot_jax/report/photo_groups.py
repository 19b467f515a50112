"""Groups of test photos that accuracy is reported for: head, tail, few-shot, mean over classes."""

from __future__ import annotations

import numpy as np

from sicot_jax.report.runs import FinishedRun

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
