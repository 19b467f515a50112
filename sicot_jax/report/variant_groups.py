"""Groups runs by variant: equal configs but for the seed, at the best learning rate."""

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
