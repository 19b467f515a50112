"""Differences of arms, photo by photo and seed by seed: overall, head and tail, averaged over
classes, with intervals.
"""

from __future__ import annotations

import numpy as np

from sicot_jax.common.bootstrap import paired_interval
from sicot_jax.report.runs import Finished
from sicot_jax.report.variant_groups import Arm

GROUPS = ("overall", "head", "tail", "class_mean", "few")
FEW = 20  # training photos


def members(run: Finished) -> dict[str, np.ndarray]:
    """Group -> bool [N]; "class_mean" has all photos, weighed by class."""
    everything, head = np.ones(len(run.tested.label), bool), run.head
    few = run.tested.label_count <= FEW
    return {
        "overall": everything,
        "head": head,
        "tail": ~head,
        "class_mean": everything,
        "few": few,
    }


def mean_over(values: np.ndarray, run: Finished, group: str) -> float:
    """Mean over a group's photos (over classes for "class_mean"); nan without photos."""
    member, label = members(run)[group], run.tested.label
    if not member.any():
        return float("nan")
    if group != "class_mean":
        return float(values[member].mean())
    _, inverse, counts = np.unique(label, return_inverse=True, return_counts=True)
    return float(np.mean(np.bincount(inverse, values) / counts))


def mean_accuracy(arm: Arm, group: str, *, top: int = 1) -> float:
    """Per cent, the mean over the arm's seeds."""
    return float(
        np.mean(
            [
                100 * mean_over(run.tested.hits_within(top).astype(float), run, group)
                for run in arm.runs
            ]
        )
    )


def pairs(first: Arm, other: Arm) -> list[tuple[Finished, Finished]]:
    """Runs of one seed side by side; where the arms share none, each one's first."""
    shared = [seed for seed in first.seeds if seed in other.seeds]
    return [(first.seeds[s], other.seeds[s]) for s in shared] or [(first.first, other.first)]


def difference_rows(first: Arm, other: Arm) -> dict[str, tuple[float, float, float]]:
    """Group -> (top-1 difference in points, 95 % interval) of `other` minus `first`, photo by
    photo, seed by seed.
    """
    return difference_by_group(
        np.stack([_difference(a, b) for a, b in pairs(first, other)]), first.first
    )


def _difference(first: Finished, other: Finished) -> np.ndarray:
    """float64 [N]: of every photo, points."""
    return 100.0 * (other.tested.hits.astype(float) - first.tested.hits)


def difference_by_group(
    difference: np.ndarray, run: Finished
) -> dict[str, tuple[float, float, float]]:
    """Of [S, N] points: group -> (mean, 95 % interval)."""
    rows = {}
    for group, member in members(run).items():
        classes = run.tested.label if group == "class_mean" else None
        rows[group] = (
            mean_over(difference.mean(0), run, group),
            *paired_interval(difference[:, member], classes),
        )
    return rows


def at_equal_rates(first: Arm, other: Arm) -> tuple[np.ndarray, list[float], list[int]] | None:
    """(float64 [S, N], rates, seeds): the difference of every photo, the mean over the rates that
    both arms were trained at.

    Seeds are those that all of these rates have in both arms. None where they share fewer than two
    rates, or no seed.
    """
    two = [
        {some.config["optim.learning_rate"]: some.seeds for some in arm.rates}
        for arm in (first, other)
    ]
    rates = sorted(two[0].keys() & two[1].keys())
    seeds = (
        sorted(set.intersection(*(set(found[rate]) for found in two for rate in rates)))
        if rates
        else []
    )
    if len(rates) < 2 or not seeds:
        return None
    each = [
        [_difference(two[0][rate][seed], two[1][rate][seed]) for rate in rates] for seed in seeds
    ]
    return np.mean(each, 1), rates, seeds
