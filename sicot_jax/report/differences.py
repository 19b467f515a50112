"""Paired differences of two variants with bootstrap intervals; the paper's results beside them."""

from __future__ import annotations

import numpy as np

from sicot_jax.common.bootstrap import paired_interval
from sicot_jax.report.document import Table
from sicot_jax.report.runs import FinishedRun, group_masks, mean_over_group
from sicot_jax.report.variant_roles import VariantRuns

GroupDifferences = dict[str, tuple[float, float, float]]
"""Group -> (mean difference in points, lower and upper end of its 95 % interval)."""


def paired_runs(
    reference: VariantRuns, other: VariantRuns
) -> list[tuple[FinishedRun, FinishedRun]]:
    """Pairs the runs of two variants by seed.

    Args:
      reference: variant whose run comes first in each pair.
      other: variant compared with it.

    Returns:
      Pairs of the seeds that both have; the first run of each where they share none.
    """
    shared = [seed for seed in reference.by_seed if seed in other.by_seed]
    return [(reference.by_seed[seed], other.by_seed[seed]) for seed in shared] or [
        (reference.first_run, other.first_run)
    ]


def variant_differences(reference: VariantRuns, other: VariantRuns) -> GroupDifferences:
    """Returns the top-1 gains of a variant over the reference.

    Args:
      reference: variant that gains are measured against.
      other: variant compared with it, tested on the same photos.

    Returns:
      Group -> (difference in points, 95 % interval over photos and seeds).
    """
    difference = np.stack([_hit_difference(a, b) for a, b in paired_runs(reference, other)])
    return differences_by_group(difference, reference.first_run)


def differences_by_group(difference: np.ndarray, run: FinishedRun) -> GroupDifferences:
    """Returns the mean difference of every group of photos, with its interval.

    Args:
      difference: float64 [S, N], points per seed and photo.
      run: run whose test photos they are.

    Returns:
      Group -> (mean over photos and seeds, 95 % interval); "class_mean" is a mean over classes.
    """
    rows = {}
    for group, member in group_masks(run).items():
        classes = run.test_set.label if group == "class_mean" else None
        rows[group] = (
            mean_over_group(difference.mean(0), run, group),
            *paired_interval(difference[:, member], classes),
        )
    return rows


def difference_at_equal_rates(
    reference: VariantRuns, other: VariantRuns
) -> tuple[np.ndarray, list[float], list[int]] | None:
    """Returns the difference of two variants averaged over the learning rates both were trained at.

    Args:
      reference: variant that gains are measured against.
      other: variant compared with it.

    Returns:
      (float64 [S, N] points per seed and photo, learning rates, seeds that all of these rates have
      in both variants); None where they share fewer than two rates, or no seed.
    """
    first, second = (
        {same.first_run.learning_rate: same.by_seed for same in variant.rates}
        for variant in (reference, other)
    )
    rates = sorted(first.keys() & second.keys())
    if len(rates) < 2:
        return None
    seeds = sorted(
        set.intersection(*(set(by_rate[rate]) for by_rate in (first, second) for rate in rates))
    )
    if not seeds:
        return None
    each = [
        [_hit_difference(first[rate][seed], second[rate][seed]) for rate in rates] for seed in seeds
    ]
    return np.mean(each, 1), rates, seeds


def _hit_difference(first: FinishedRun, other: FinishedRun) -> np.ndarray:
    """Points per photo, float64 [N]."""
    return 100.0 * (other.top1_hits.astype(float) - first.top1_hits)


HEADER = ("paper: top-1 (top-3), %", "overall", "head", "tail")

# Name of the TFDS builder -> rows. iMaterialist's tail is 43 test photos; the paper gives neither
# seeds nor intervals. Its other two data sets are private.
RESULTS: dict[str, list[list[str]]] = {
    "imaterialist": [
        ["baseline", "57.29 (83.77)", "57.38 (83.49)", "37.21 (81.40)"],
        ["co-training", "58.30 (85.45)", "58.37 (85.08)", "41.86 (83.72)"],
        ["gain", "+1.01 (+1.68)", "+0.99 (+1.59)", "+4.65 (+2.32)"],
    ],
    "webvision1k": [
        ["baseline", "62.68 (79.02)", "55.18 (72.91)", "63.04 (79.26)"],
        ["co-training", "65.95 (80.93)", "55.86 (72.55)", "66.23 (81.11)"],
        ["gain", "+3.27 (+1.91)", "+0.68 (-0.36)", "+3.19 (+1.85)"],
    ],
}


def paper_table(data_set: str) -> Table | None:
    """Returns the paper's results on a data set.

    Args:
      data_set: name of the data set as its TFDS builder is called.

    Returns:
      The paper's rows; None for a data set that the paper does not have.
    """
    return Table(HEADER, RESULTS[data_set]) if data_set in RESULTS else None
