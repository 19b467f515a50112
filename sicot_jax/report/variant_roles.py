"""Groups runs by variant and finds each one's part in a report: reference, use of text, control."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sicot_jax.config import FREE_ON_RESUME
from sicot_jax.report.run_table import is_sweep_folder
from sicot_jax.report.runs import FinishedRun, run_accuracy

# Fields in which runs of one variant may differ.
SEED_FIELDS = {"seed", *FREE_ON_RESUME}


@dataclasses.dataclass(frozen=True, eq=False)
class VariantRuns:
    """Runs of one variant, which differ in their seed alone.

    Attributes:
      name: what the names of the runs have in common.
      runs: the runs, at least one, in the order given.
      adjustment: post-hoc adjustment that the hits are of, "" for the classifier as trained.
      rates: the same variant at every learning rate that was tried.
    """

    name: str
    runs: tuple[FinishedRun, ...]
    adjustment: str = ""
    rates: tuple[VariantRuns, ...] = ()

    @property
    def title(self) -> str:
        """Name as tables show it."""
        return self.name.replace("_", "-")

    @property
    def first_run(self) -> FinishedRun:
        """The run that represents the variant where one is enough."""
        return self.runs[0]

    @property
    def config(self) -> Mapping[str, Any]:
        """Config of the first run by dotted name."""
        return self.first_run.config

    @property
    def by_seed(self) -> dict[int, FinishedRun]:
        """Seed -> run."""
        return {run.seed: run for run in self.runs}

    @property
    def uses_text(self) -> bool:
        """Whether titles took part in training."""
        terms = ("loss.mixed", "loss.tag_prediction", "model.shared_word_weights")
        return any(self.config.get(term) for term in terms)

    @property
    def uses_long_tail_method(self) -> bool:
        """Whether it uses logit adjustment, label smoothing, balanced sampling or retraining."""
        config = self.config
        return (
            bool(config.get("loss.logit_adjustment") or config.get("loss.label_smoothing"))
            or bool(config.get("optim.trainable") or config.get("model.init_from"))
            or config.get("data.sampling", "uniform") != "uniform"
        )

    @property
    def mean_validation_top1(self) -> float:
        """Best validation top-1 in %, mean over seeds; 0 without validation photos."""
        return float(np.mean([run.best_validation_top1 for run in self.runs]))

    def mean_accuracy(self, group: str, *, top: int = 1) -> float:
        """Returns the test accuracy, averaged over seeds.

        Args:
          group: one of `photo_groups.GROUPS`.
          top: 1 or 3, how many of the best classes may be the right one.

        Returns:
          Accuracy in %, nan for a group without photos.
        """
        return float(np.mean([run_accuracy(run, group, top=top) for run in self.runs]))

    def with_adjustment(self, name: str) -> VariantRuns:
        """Returns the same runs after a post-hoc adjustment of their classifiers.

        Args:
          name: name of the adjustment, such as `logit_adjustment_1`.

        Returns:
          A copy whose runs have the hits of the adjusted classifiers.
        """
        runs = tuple(run.with_adjustment(name) for run in self.runs)
        return dataclasses.replace(self, adjustment=name, runs=runs)


def group_by_variant(runs: Sequence[FinishedRun]) -> list[VariantRuns]:
    """Groups runs whose configs differ in the seed alone.

    Of a variant that a sweep trained at several learning rates, the one that is best on validation
    represents all. A second run of the same config and seed becomes a separate variant.

    Args:
      runs: runs to group.

    Returns:
      Variants in the order of their first runs, named by what the names of their runs begin with,
      without a sweep's learning rate and seed where names stay distinct without them.
    """
    groups: dict[tuple[str, str, int], list[FinishedRun]] = {}
    for run in runs:
        key = json.dumps(_variant_fields(run), sort_keys=True), run.results["hashes"]["data"]
        repeats = sum(
            other.seed == run.seed
            for group_key, group in groups.items()
            if group_key[:2] == key
            for other in group
        )
        groups.setdefault((*key, repeats), []).append(run)
    variants = _choose_rates(
        [
            VariantRuns(_common_name([run.name for run in group]), tuple(group))
            for group in groups.values()
        ]
    )
    for names in (
        [_name_without_sweep_folders(variant) for variant in variants],
        [variant.name for variant in variants],
    ):
        if len(set(names)) == len(names) and all(names):
            break
    else:
        names = [variant.first_run.name for variant in variants]
    return [
        dataclasses.replace(variant, name=name)
        for variant, name in zip(variants, names, strict=True)
    ]


def restrict_to_shared_seeds(variant: VariantRuns, rates: Sequence[VariantRuns]) -> VariantRuns:
    """Returns the runs of the seeds that every learning rate was trained with.

    Args:
      variant: runs to choose from.
      rates: the same variant at each learning rate.

    Returns:
      A copy with fewer runs, possibly none.
    """
    shared = set.intersection(*(set(other.by_seed) for other in rates))
    return dataclasses.replace(
        variant, runs=tuple(run for run in variant.runs if run.seed in shared)
    )


def _variant_fields(run: FinishedRun) -> dict[str, Any]:
    """Config fields that all seeds of a variant have in common."""
    # Runs that start from another run do so from the one of their seed.
    source = re.sub(r"seed_\d+$", "", str(run.config.get("model.init_from", "")))
    fields = {name: value for name, value in run.config.items() if name not in SEED_FIELDS}
    return {**fields, "model.init_from": source}


def _name_without_sweep_folders(variant: VariantRuns) -> str:
    """Folders of a sweep are VARIANT/rate_X/seed_N: the variant is enough where it has one rate."""
    return "/".join(part for part in variant.name.split("/") if not is_sweep_folder(part))


def _common_name(names: Sequence[str]) -> str:
    """Folders that all names begin with; the first name where there is none."""
    parts = [name.split("/") for name in names]
    common = itertools.takewhile(lambda part: len(set(part)) == 1, zip(*parts, strict=False))
    return "/".join([part[0] for part in common] or parts[0])


def _choose_rates(variants: Sequence[VariantRuns]) -> list[VariantRuns]:
    """Keeps the best learning rate of each variant of a sweep, by validation over shared seeds."""
    groups: dict[str, list[VariantRuns]] = {}
    for variant in variants:
        fields = _variant_fields(variant.first_run) | {"optim.learning_rate": None}
        name = _name_without_sweep_folders(variant)
        key = (
            [fields, variant.first_run.results["hashes"]["data"], name]
            if name != variant.name
            else [variant.name, len(groups)]
        )
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(variant)
    chosen = []
    for rates in groups.values():
        judged = [restrict_to_shared_seeds(variant, rates) for variant in rates]
        if len(rates) == 1 or not all(
            variant.runs and all(run.validation_log for run in variant.runs) for variant in judged
        ):
            chosen += rates
            continue
        # Of equally good rates the one that the sweep trained further seeds with.
        scores = [
            (restricted.mean_validation_top1, len(variant.runs))
            for restricted, variant in zip(judged, rates, strict=True)
        ]
        best = max(range(len(rates)), key=scores.__getitem__)
        chosen.append(dataclasses.replace(rates[best], rates=tuple(rates)))
    return chosen


# Fields of the use of text, and fields that each variant sets for itself.
_TEXT_FIELDS = {
    *("loss.visual", "loss.mixed", "loss.tag_prediction", "data.title"),
    *("model.text.encoder", "model.text.windows", "model.text.hidden", "model.text.weighting"),
    *("model.tag_vocabulary", "model.shared_word_weights"),
}
_VARIANT_FIELDS = {"optim.learning_rate", "model.init_from", *SEED_FIELDS}
_LENGTH_FIELDS = {"train.epochs", "train.steps", "optim.learning_rate", *SEED_FIELDS}


def choose_reference(variants: Sequence[VariantRuns]) -> VariantRuns:
    """Returns the variant that gains are measured against.

    Two loss terms double the classifier's gradient, so that a baseline with a doubled loss may be
    the better one.

    Args:
      variants: all variants of a report.

    Returns:
      The plain baseline that is best on validation, else the first variant.
    """
    return max(
        plain_baselines(variants),
        key=lambda variant: variant.mean_validation_top1,
        default=variants[0],
    )


def plain_baselines(variants: Sequence[VariantRuns]) -> list[VariantRuns]:
    """Returns the variants without text, without a long-tail method and of ordinary length.

    Args:
      variants: all variants of a report.

    Returns:
      Candidates for the reference.
    """
    longer = [pair[1] for pair in longer_training_pairs(variants)]
    return [
        variant
        for variant in variants
        if not variant.uses_text and not variant.uses_long_tail_method and variant not in longer
    ]


def simplest_text_variant(
    variants: Sequence[VariantRuns], reference: VariantRuns
) -> VariantRuns | None:
    """Returns the variant with text that differs least from the reference.

    Args:
      variants: all variants of a report.
      reference: variant that gains are measured against.

    Returns:
      Co-training as in the SICoT paper where it is there; None without any use of text.
    """

    def differences(variant: VariantRuns) -> tuple[bool, int]:
        names = (reference.config.keys() | variant.config.keys()) - SEED_FIELDS
        return not variant.config.get("loss.mixed"), sum(
            reference.config.get(name) != variant.config.get(name) for name in names
        )

    return min((v for v in variants if v.uses_text), key=differences, default=None)


def main_text_variants(
    variants: Sequence[VariantRuns], reference: VariantRuns
) -> list[VariantRuns]:
    """Returns the variants that represent the use of text where there is no room for all.

    Args:
      variants: all variants of a report.
      reference: variant that gains are measured against.

    Returns:
      The simplest variant with text, then the one that is best on validation among those that read
      each photo's title unchanged and use no long-tail method, where that is another.
    """
    simplest = simplest_text_variant(variants, reference)
    candidates = [
        variant
        for variant in variants
        if variant.uses_text and not variant.uses_long_tail_method and _reads_raw_titles(variant)
    ]
    best = max(candidates, key=lambda variant: variant.mean_validation_top1, default=simplest)
    chosen = (simplest, best if best is not simplest else None)
    return [variant for variant in chosen if variant is not None]


def longer_training_pairs(
    variants: Sequence[VariantRuns],
) -> list[tuple[VariantRuns, VariantRuns]]:
    """Returns pairs of a variant and the same variant trained for half as many epochs again.

    Args:
      variants: all variants of a report.

    Returns:
      Pairs (variant, longer variant).
    """

    def length(variant: VariantRuns) -> float:
        return variant.config.get("train.steps") or variant.config.get("train.epochs") or 0

    def other_fields(variant: VariantRuns) -> str:
        fields = {k: v for k, v in variant.config.items() if k not in _LENGTH_FIELDS}
        return json.dumps(fields, sort_keys=True)

    return [
        (variant, longer)
        for variant in variants
        for longer in variants
        if other_fields(variant) == other_fields(longer)
        and abs(length(longer) - 1.5 * length(variant)) <= 0.5  # steps are rounded
        and length(longer) > length(variant)
    ]


def judge_convergence(variant: VariantRuns, longer: VariantRuns) -> tuple[bool, float]:
    """Returns whether longer training changes little.

    Of a sweep's learning rates those count that both were trained at, each variant's best of them;
    where there is none, the variants as they are.

    Args:
      variant: variant to judge.
      longer: the same variant trained for half as many epochs again.

    Returns:
      (whether the gain is below half a point, gain in validation top-1 in points).
    """

    def by_rate(variant: VariantRuns) -> dict[float | None, VariantRuns]:
        return {same.config.get("optim.learning_rate"): same for same in (variant, *variant.rates)}

    def best_top1(runs: Sequence[FinishedRun]) -> list[float]:
        return [max(top1 for _, top1 in run.validation_curve) for run in runs]

    short_rates, long_rates = by_rate(variant), by_rate(longer)
    shared = [rate for rate in short_rates if rate in long_rates]
    sides = [[rates[rate] for rate in shared] for rates in (short_rates, long_rates)]
    if not shared:
        sides = [[variant], [longer]]
    seeds = sorted(set.intersection(*(set(same.by_seed) for side in sides for same in side)))
    if seeds:
        before, after = (
            max(float(np.mean(best_top1([same.by_seed[seed] for seed in seeds]))) for same in side)
            for side in sides
        )
    else:
        ((before,), (after,)) = (best_top1([same.first_run]) for same in (variant, longer))
    return after - before < 0.5, after - before


def counterpart_without_text(
    variant: VariantRuns, variants: Sequence[VariantRuns]
) -> VariantRuns | None:
    """Returns the variant that is the same but for the use of text.

    Args:
      variant: variant with text.
      variants: all variants of a report.

    Returns:
      Of a long-tail method with text the method alone; None where there is none, or for a variant
      whose text was used by the run that it started from alone.
    """

    def other_fields(variant: VariantRuns) -> dict[str, Any]:
        left_out = _TEXT_FIELDS | _VARIANT_FIELDS
        return {name: value for name, value in variant.config.items() if name not in left_out}

    if not variant.uses_text:
        return None
    counterparts = (
        other
        for other in variants
        if not other.uses_text
        and other.config.get("loss.visual", 1.0) == 1.0
        and other_fields(other) == other_fields(variant)
    )
    return next(counterparts, None)


def counterpart_with_raw_titles(
    variant: VariantRuns, variants: Sequence[VariantRuns]
) -> VariantRuns | None:
    """Returns the variant that is the same but reads each photo's title unchanged.

    Args:
      variant: variant with shuffled or masked titles.
      variants: all variants of a report.

    Returns:
      None where there is none, and for variants that read such titles, or none, themselves.
    """

    def other_fields(variant: VariantRuns) -> dict[str, Any]:
        left_out = {"data.title"} | _VARIANT_FIELDS
        return {name: value for name, value in variant.config.items() if name not in left_out}

    if not variant.uses_text or _reads_raw_titles(variant):
        return None
    counterparts = (
        other
        for other in variants
        if _reads_raw_titles(other) and other_fields(other) == other_fields(variant)
    )
    return next(counterparts, None)


def choose_adjustment(variant: VariantRuns, kind: str) -> str | None:
    """Returns the post-hoc adjustment with the best class mean on validation.

    Args:
      variant: variant whose classifiers were adjusted.
      kind: prefix of the adjustments to choose from, such as `logit_adjustment_`.

    Returns:
      Name of the adjustment with the best mean over seeds, of equal ones the smallest change; None
      without validation.
    """
    by_run = [run.results.get("post_hoc_on_validation") or {} for run in variant.runs]
    names = [name for name in by_run[0] if name.startswith(kind)]
    if not names or not all(name in measured for measured in by_run for name in names):
        return None
    return max(
        names,
        key=lambda name: (
            np.mean([measured[name]["class_mean"] for measured in by_run]),
            -abs(float(name.rpartition("_")[2])),
        ),
    )


def _reads_raw_titles(variant: VariantRuns) -> bool:
    return variant.config.get("data.title", "raw") == "raw"
