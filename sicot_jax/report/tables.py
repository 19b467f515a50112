"""The tables of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from sicot_jax.report.differences import (
    FEW,
    GROUPS,
    at_equal_rates,
    difference_by_group,
    difference_rows,
    mean_accuracy,
    members,
)
from sicot_jax.report.document import Table
from sicot_jax.report.runs import Finished
from sicot_jax.report.variant_groups import (
    FREE,
    Arm,
    chosen_variant,
    mean_validation,
    of_shared_seeds,
    with_its_own_titles,
    without_its_text,
)

UNCERTAIN = "~"  # marks a difference whose interval holds zero
HEADER = ["top-1 (top-3), %", "overall", "head", "tail", "class mean", f"few: {FEW} or under"]


def rates_table(arms: Sequence[Arm]) -> Table | None:
    """The learning rates that a sweep tried, and which it took; None where there was no choice."""
    rows = []
    for arm in arms:
        for tried in sorted(arm.rates, key=lambda tried: tried.config["optim.learning_rate"]):
            judged, rate = of_shared_seeds(tried, arm.rates), tried.config["optim.learning_rate"]
            tested = [f"{mean_accuracy(tried, group):.2f}" for group in ("overall", "class_mean")]
            seeds = [", ".join(map(str, sorted(some.seeds))) for some in (judged, tried)]
            taken = "taken" if tried.runs == arm.runs else ""
            rows.append(
                [arm.title, f"{rate:g}", taken, *seeds, f"{mean_validation(judged):.2f}", *tested]
            )
    seeds = ["seeds judged", "seeds tested"]
    header = [
        "arm",
        "learning rate",
        "",
        *seeds,
        "validation top-1",
        "test top-1",
        "test class mean",
    ]
    return Table(header, rows, texts=5) if rows else None


def equal_rates_table(arms: Sequence[Arm], first: Arm) -> Table | None:
    """Differences without a choice of rate: to `first`, and of remedies with text to the remedy
    alone; None without any.
    """
    rows = []
    for arm in arms:
        alone = without_its_text(arm, arms)
        for other in dict.fromkeys([first, *([alone] if alone is not None else [])]):
            if arm is not other and (found := at_equal_rates(other, arm)):
                difference, rates, seeds = found
                tried = ", ".join(f"{rate:g}" for rate in rates), ", ".join(map(str, seeds))
                rows.append(
                    [
                        f"{arm.title} - {other.title}",
                        *tried,
                        *_gain_cells(difference_by_group(difference, other.first)),
                    ]
                )
    return Table(["top-1, points", "rates", "seeds", *HEADER[1:]], rows, texts=3) if rows else None


def accuracy_cells(arm: Arm) -> list[str]:
    """Top-1 (top-3) by group; top-1 alone where no more classes are known."""

    def cell(group: str) -> str:
        top1 = mean_accuracy(arm, group)
        if np.isnan(top1):
            return "-"
        several = arm.first.tested.top_classes.shape[1] > 1
        return f"{top1:.2f}" + (f" ({mean_accuracy(arm, group, top=3):.2f})" if several else "")

    return [cell(group) for group in GROUPS]


def difference_cells(first: Arm, other: Arm) -> list[str]:
    """Gains with their intervals; those that hold zero are marked."""
    return _gain_cells(difference_rows(first, other))


def _gain_cells(rows: Mapping[str, tuple[float, float, float]]) -> list[str]:

    def cell(gain: float, low: float, high: float) -> str:
        mark = UNCERTAIN if low <= 0 <= high else ""
        return "-" if np.isnan(gain) else f"{mark}{gain:+.2f} [{low:+.2f}, {high:+.2f}]"

    return [cell(*rows[group]) for group in GROUPS]


def added_text_table(arms: Sequence[Arm], first: Arm) -> Table | None:
    """What text adds to a remedy: each arm with both against the remedy alone. None where there is
    none.
    """
    rows = []
    for arm in arms:
        alone = without_its_text(arm, arms)
        if alone is not None and alone is not first and alone.changed_by_hand:
            rows.append([f"{arm.title} - {alone.title}", *difference_cells(alone, arm)])
    return Table(["top-1, points", *HEADER[1:]], rows) if rows else None


def other_titles_table(arms: Sequence[Arm]) -> Table | None:
    """Arms with text against the same with other titles (of other photos, without some words). None
    where there is none.
    """
    rows = []
    for arm in arms:
        own = with_its_own_titles(arm, arms)
        if own is not None:
            rows.append([f"{own.title} - {arm.title}", *difference_cells(arm, own)])
    return Table(["top-1, points", *HEADER[1:]], rows) if rows else None


def count_cells(run: Finished) -> list[str]:
    found = members(run)
    return [
        f"{len(np.unique(run.tested.label)):,} classes"
        if group == "class_mean"
        else f"{int(found[group].sum()):,}"
        for group in GROUPS
    ]


def accuracy_table(arms: Sequence[Arm], first: Arm) -> Table:
    """Tables 2 and 4 of SICoT: every arm, the mean over its seeds; under them the difference of
    each to `first`.
    """
    rows = [[arm.title, *accuracy_cells(arm)] for arm in arms]
    rows += [
        [f"{arm.title} - {first.title}", *difference_cells(first, arm)]
        for arm in arms
        if arm is not first
    ]
    rows.append(["test photos", *count_cells(first.first)])
    return Table(HEADER, rows)


def post_hoc_table(arms: Sequence[Arm]) -> Table | None:
    """Remedies on finished classifiers; tau of tau-normalisation by the class mean of validation.
    None without any.

    Under the arms the difference between the last and the first with the same remedy: what text
      adds to it.
    """
    found: dict[str, list[Arm]] = {}
    for arm in arms:
        if not all(run.tested.post_hoc for run in arm.runs):
            continue
        found.setdefault("logit adjustment, tau 1", []).append(arm.variant("logit_adjustment_1"))
        for kind, title in [("logit_adjustment_", "logit adjustment"), ("tau_norm_", "tau-norm")]:
            if chosen := chosen_variant(arm, kind):
                found.setdefault(f"{title}, tau by validation", []).append(arm.variant(chosen))
    rows = []
    for remedy, variants in found.items():
        for arm in variants:
            tau = (
                f" ({float(arm.changed_to.rpartition('_')[2]):g})" if "validation" in remedy else ""
            )
            rows.append([f"{arm.title}, {remedy}{tau}", *accuracy_cells(arm)])
        how = "each with its tau" if "validation" in remedy else "both so"
        for other in variants[1:]:
            rows.append(
                [
                    f"{other.title} - {variants[0].title}, {how}",
                    *difference_cells(variants[0], other),
                ]
            )
    return Table(["top-1, %", *HEADER[1:]], rows) if rows else None


def catalogue_table(run: Finished) -> Table | None:
    """Table 1 of SICoT; None for runs of before it was kept."""
    facts = run.results.get("catalog")
    if not facts:
        return None
    photos, words, counts = facts["photos"], facts["words"], run.tested.class_counts
    header = [
        "data set",
        "classes",
        "train",
        "validation",
        "test",
        "vocabulary",
        "shared by head and tail",
        "head: more than",
    ]
    row = [
        facts["name"],
        f"{facts['classes']:,} ({int((counts > run.results['head_boundary']).sum()):,} head)",
        *(f"{photos[split]:,}" for split in ("train", "validation", "test")),
        f"{facts['vocabulary']:,}",
        f"{words['both']:,} words ({words['share']:.1%})",
        f"{run.results['head_boundary']:,}",
    ]
    return Table(header, [row])


def encoder_table(arms: Sequence[Arm], first: Arm) -> Table | None:
    """Table 3 of SICoT: arms that differ in their text encoder alone; None where there is one."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm.with_text:
            left_out = {"optim.learning_rate", *FREE}
            fields = {
                k: v
                for k, v in arm.config.items()
                if not k.startswith("model.text.") and k not in left_out
            }
            groups.setdefault(json.dumps(fields, sort_keys=True), []).append(arm)
    several = max(groups.values(), key=len, default=[])
    if len({arm.config.get("model.text.encoder") for arm in several}) < 2:
        return None
    rows = [["none (" + first.title + ")", *accuracy_cells(first)]]
    for arm in several:
        name = arm.config["model.text.encoder"].replace("_", " ")
        rows += [[name, *accuracy_cells(arm)], [f"{name} - none", *difference_cells(first, arm)]]
    return Table(["text encoder", *HEADER[1:]], rows)


def swallowed_table(arm: Arm) -> Table | None:
    """Which head classes swallow which tail classes, in the arm's first run."""
    found = arm.first.results.get("swallowed")
    if not found:
        return None
    rows = [
        [
            row["class"],
            "; ".join(
                f"{source['class']} ({source['photos']} of {source['tested']})"
                for source in row["from"]
            ),
            f"{row['photos']:,}",
        ]
        for row in found
    ]
    return Table(
        ["head class", "most from (photos of those tested)", "tail photos taken"], rows, texts=2
    )


def runs_table(runs: Sequence[Finished]) -> Table:
    """Where every figure comes from."""
    header = [
        "run",
        "seed",
        "learning rate",
        "tested step",
        "data",
        "commit",
        "version",
        "hardware",
    ]
    rows = [
        [
            run.name,
            str(run.seed),
            f"{run.config.get('optim.learning_rate', float('nan')):g}",
            f"{run.results['step']:,} of {run.results['step_of_end']:,}"
            + (" (best on validation)" if run.validation else " (the last: no validation photos)"),
            run.results["hashes"]["data"][:12],
            run.results["commit"][:12] or "unknown",
            run.results.get("version", "unknown"),
            run.results["hardware"],
        ]
        for run in runs
    ]
    return Table(header, rows)
