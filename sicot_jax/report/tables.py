"""Tables of a report, made from finished runs grouped by variant."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from sicot_jax.report.differences import (
    GroupDifferences,
    difference_at_equal_rates,
    differences_by_group,
    variant_differences,
)
from sicot_jax.report.document import Table
from sicot_jax.report.runs import FEW, GROUPS, FinishedRun, group_masks
from sicot_jax.report.variant_roles import (
    SEED_FIELDS,
    VariantRuns,
    choose_adjustment,
    counterpart_with_raw_titles,
    counterpart_without_text,
    restrict_to_shared_seeds,
)

UNCERTAIN = "~"  # marks a difference whose interval contains zero
HEADER = ["top-1 (top-3), %", "overall", "head", "tail", "class mean", f"few: {FEW} or under"]
_DIFFERENCE_HEADER = ["top-1, points", *HEADER[1:]]


def accuracy_cells(variant: VariantRuns) -> list[str]:
    """Returns the accuracy of a variant in every group.

    Args:
      variant: variant to show.

    Returns:
      "top-1 (top-3)" per group in %, "-" without photos; top-1 alone where top-3 is unknown.
    """
    has_top3 = variant.first_run.top3_hits is not None

    def cell(group: str) -> str:
        top1 = variant.mean_accuracy(group)
        if np.isnan(top1):
            return "-"
        return f"{top1:.2f}" + (f" ({variant.mean_accuracy(group, top=3):.2f})" if has_top3 else "")

    return [cell(group) for group in GROUPS]


def difference_cells(reference: VariantRuns, other: VariantRuns) -> list[str]:
    """Returns the gains of a variant over the reference in every group.

    Args:
      reference: variant that gains are measured against.
      other: variant compared with it.

    Returns:
      "gain [low, high]" per group in points; `UNCERTAIN` marks intervals that contain zero.
    """
    return _interval_cells(variant_differences(reference, other))


def accuracy_table(variants: Sequence[VariantRuns], reference: VariantRuns) -> Table:
    """Builds the main table (SICoT, Tables 2 and 4): accuracies, then gains over the reference.

    Args:
      variants: all variants of a report.
      reference: variant that gains are measured against.

    Returns:
      A row per variant, a row per gain, and the number of test photos.
    """
    rows = [[variant.title, *accuracy_cells(variant)] for variant in variants]
    rows += [
        [f"{variant.title} - {reference.title}", *difference_cells(reference, variant)]
        for variant in variants
        if variant is not reference
    ]
    rows.append(["test photos", *_photo_count_cells(reference.first_run)])
    return Table(HEADER, rows)


def learning_rate_table(variants: Sequence[VariantRuns]) -> Table | None:
    """Builds the table of the learning rates that a sweep tried and the ones it chose.

    Args:
      variants: all variants of a report.

    Returns:
      A row per variant and rate; None where there was no choice.
    """
    rows = []
    for variant in variants:
        for tried in sorted(variant.rates, key=lambda same: same.first_run.learning_rate):
            judged = restrict_to_shared_seeds(tried, variant.rates)
            rows.append(
                [
                    variant.title,
                    f"{tried.first_run.learning_rate:g}",
                    "chosen" if tried.runs == variant.runs else "",
                    *(", ".join(map(str, sorted(runs.by_seed))) for runs in (judged, tried)),
                    f"{judged.mean_validation_top1:.2f}",
                    *(f"{tried.mean_accuracy(group):.2f}" for group in ("overall", "class_mean")),
                ]
            )
    header = ["variant", "learning rate", "", "seeds judged", "seeds tested"]
    header += ["validation top-1", "test top-1", "test class mean"]
    return Table(header, rows, num_text_columns=5) if rows else None


def equal_rates_table(variants: Sequence[VariantRuns], reference: VariantRuns) -> Table | None:
    """Builds the table of differences averaged over the learning rates both variants have.

    Args:
      variants: all variants of a report.
      reference: variant that gains are measured against; long-tail methods with text are also
        compared with the method alone.

    Returns:
      A row per pair of variants; None where no two share several rates.
    """
    rows = []
    for variant in variants:
        method_alone = counterpart_without_text(variant, variants)
        for other in dict.fromkeys([reference, method_alone]):
            if other is None or variant is other:
                continue
            if (equal := difference_at_equal_rates(other, variant)) is None:
                continue
            difference, rates, seeds = equal
            cells = _interval_cells(differences_by_group(difference, other.first_run))
            rate_list = ", ".join(f"{rate:g}" for rate in rates)
            seed_list = ", ".join(map(str, seeds))
            rows.append([f"{variant.title} - {other.title}", rate_list, seed_list, *cells])
    header = ["top-1, points", "rates", "seeds", *HEADER[1:]]
    return Table(header, rows, num_text_columns=3) if rows else None


def added_text_table(variants: Sequence[VariantRuns], reference: VariantRuns) -> Table | None:
    """Builds the table of what text adds to long-tail methods.

    Args:
      variants: all variants of a report.
      reference: variant that gains are measured against.

    Returns:
      A row per method with text, compared with the method alone; None without any.
    """
    rows = []
    for variant in variants:
        alone = counterpart_without_text(variant, variants)
        if alone is not None and alone is not reference and alone.uses_long_tail_method:
            rows.append([f"{variant.title} - {alone.title}", *difference_cells(alone, variant)])
    return Table(_DIFFERENCE_HEADER, rows) if rows else None


def changed_titles_table(variants: Sequence[VariantRuns]) -> Table | None:
    """Builds the table of variants with text against the same with shuffled or masked titles.

    Args:
      variants: all variants of a report.

    Returns:
      A row per variant with changed titles; None without any.
    """
    rows = []
    for variant in variants:
        raw = counterpart_with_raw_titles(variant, variants)
        if raw is not None:
            rows.append([f"{raw.title} - {variant.title}", *difference_cells(variant, raw)])
    return Table(_DIFFERENCE_HEADER, rows) if rows else None


def post_hoc_table(variants: Sequence[VariantRuns]) -> Table | None:
    """Builds the table of post-hoc adjustments, tau chosen by the class mean on validation.

    Args:
      variants: variants to show; gains under an adjustment are against the first.

    Returns:
      Rows per adjustment: each variant, then the gains of the later ones; None without any.
    """
    adjusted: dict[str, list[VariantRuns]] = {}
    for variant in variants:
        if not all(run.adjusted_hits for run in variant.runs):
            continue
        fixed = adjusted.setdefault("logit adjustment, tau 1", [])
        fixed.append(variant.with_adjustment("logit_adjustment_1"))
        for kind, title in [("logit_adjustment_", "logit adjustment"), ("tau_norm_", "tau-norm")]:
            if chosen := choose_adjustment(variant, kind):
                by_validation = adjusted.setdefault(f"{title}, tau by validation", [])
                by_validation.append(variant.with_adjustment(chosen))
    rows = []
    for title, group in adjusted.items():
        is_chosen = "validation" in title
        for variant in group:
            tau = f" ({float(variant.adjustment.rpartition('_')[2]):g})" if is_chosen else ""
            rows.append([f"{variant.title}, {title}{tau}", *accuracy_cells(variant)])
        suffix = "each at its tau" if is_chosen else "both adjusted"
        rows += [
            [f"{other.title} - {group[0].title}, {suffix}", *difference_cells(group[0], other)]
            for other in group[1:]
        ]
    return Table(["top-1, %", *HEADER[1:]], rows) if rows else None


def catalog_table(run: FinishedRun) -> Table | None:
    """Builds the table of the data set (SICoT, Table 1).

    Args:
      run: run that was trained on it.

    Returns:
      One row; None for a run without facts about its catalogue.
    """
    facts = run.results.get("catalog")
    if not facts:
        return None
    photos, words = facts["photos"], facts["words"]
    num_head = int((run.test_set.class_counts > run.head_boundary).sum())
    header = ["data set", "classes", "train", "validation", "test", "vocabulary"]
    header += ["shared by head and tail", "head: more than"]
    row = [
        facts["name"],
        f"{facts['classes']:,} ({num_head:,} head)",
        *(f"{photos[split]:,}" for split in ("train", "validation", "test")),
        f"{facts['vocabulary']:,}",
        f"{words['both']:,} words ({words['share']:.1%})",
        f"{run.head_boundary:,}",
    ]
    return Table(header, [row])


def encoder_table(variants: Sequence[VariantRuns], reference: VariantRuns) -> Table | None:
    """Builds the table of variants that differ in their text encoder alone (SICoT, Table 3).

    Args:
      variants: all variants of a report.
      reference: variant that gains are measured against.

    Returns:
      Two rows per encoder, accuracy and gain; None where there are not several encoders.
    """
    groups: dict[str, list[VariantRuns]] = {}
    for variant in variants:
        if variant.uses_text:
            left_out = {"optim.learning_rate", *SEED_FIELDS}
            fields = {
                name: value
                for name, value in variant.config.items()
                if not name.startswith("model.text.") and name not in left_out
            }
            groups.setdefault(json.dumps(fields, sort_keys=True), []).append(variant)
    largest = max(groups.values(), key=len, default=[])
    if len({variant.config.get("model.text.encoder") for variant in largest}) < 2:
        return None
    rows = [["none (" + reference.title + ")", *accuracy_cells(reference)]]
    for variant in largest:
        name = variant.config["model.text.encoder"].replace("_", " ")
        rows.append([name, *accuracy_cells(variant)])
        rows.append([f"{name} - none", *difference_cells(reference, variant)])
    return Table(["text encoder", *HEADER[1:]], rows)


def confusion_table(variant: VariantRuns) -> Table | None:
    """Builds the table of the head classes that tail photos are mistaken for most often.

    Args:
      variant: variant whose first run is shown.

    Returns:
      A row per head class; None for a run without any.
    """
    confusions = variant.first_run.results.get("tail_to_head_confusions")
    if not confusions:
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
        for row in confusions
    ]
    header = ["head class", "most from (photos of those tested)", "tail photos taken"]
    return Table(header, rows, num_text_columns=2)


def runs_table(runs: Sequence[FinishedRun]) -> Table:
    """Builds the table of runs: where every number of the report comes from.

    Args:
      runs: all runs of a report.

    Returns:
      A row per run with seed, learning rate, tested step, data hash, commit and hardware.
    """
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
            f"{run.learning_rate:g}",
            f"{run.results['step']:,} of {run.results['step_of_end']:,}"
            + (" (best on validation)" if run.validation_log else " (last: no validation photos)"),
            run.results["hashes"]["data"][:12],
            run.results["commit"][:12] or "unknown",
            run.results.get("version", "unknown"),
            run.results["hardware"],
        ]
        for run in runs
    ]
    return Table(header, rows)


def _interval_cells(differences: GroupDifferences) -> list[str]:
    def cell(gain: float, low: float, high: float) -> str:
        mark = UNCERTAIN if low <= 0 <= high else ""
        return "-" if np.isnan(gain) else f"{mark}{gain:+.2f} [{low:+.2f}, {high:+.2f}]"

    return [cell(*differences[group]) for group in GROUPS]


def _photo_count_cells(run: FinishedRun) -> list[str]:
    masks = group_masks(run)
    return [
        f"{len(np.unique(run.test_set.label)):,} classes"
        if group == "class_mean"
        else f"{int(masks[group].sum()):,}"
        for group in GROUPS
    ]
