"""Runs that differ in their seed alone, and which part each group of them plays in a report."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence

import numpy as np

from sicot_jax.config import FREE_ON_RESUME
from sicot_jax.report.runs import SWEPT, Finished

FREE = {"seed", *FREE_ON_RESUME}  # what does not make another arm


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ in their seed alone.

    changed_to: variant of the finished classifier. rates: of a sweep, the same arm at every
      learning rate that was tried.
    """

    name: str
    runs: tuple[Finished, ...]
    changed_to: str = ""
    rates: tuple[Arm, ...] = ()

    @property
    def title(self) -> str:
        return self.name.replace("_", "-")

    @property
    def first(self) -> Finished:
        return self.runs[0]

    @property
    def config(self) -> Mapping:
        return self.first.config

    @property
    def seeds(self) -> dict[int, Finished]:
        return {run.seed: run for run in self.runs}

    @property
    def with_text(self) -> bool:
        """Whether titles took part in its training."""
        terms = ("loss.mixed", "loss.tag_prediction", "model.shared_word_weights")
        return any(self.config.get(term) for term in terms)

    @property
    def changed_by_hand(self) -> bool:
        """Whether the run was made for the tail in another way than by text."""
        config = self.config
        return (
            bool(config.get("loss.logit_adjustment") or config.get("loss.label_smoothing"))
            or bool(config.get("optim.trainable") or config.get("model.init_from"))
            or config.get("data.sampling", "uniform") != "uniform"
        )

    def variant(self, name: str) -> Arm:
        """The same runs with their classifier changed after training (`post_hoc.VARIANTS`)."""
        return dataclasses.replace(
            self, changed_to=name, runs=tuple(run.variant(name) for run in self.runs)
        )


def arms_of(runs: Sequence[Finished]) -> list[Arm]:
    """Runs of one config but for the seed become one arm, in the order of their first; runs of one
    seed stay apart.

    An arm is called what its runs' names begin with, without a sweep's learning rate and seed where
    arms can do without. Of an arm that a sweep trained at several rates, the one that is best on
    validation stands for it.
    """
    together: dict[tuple, list[Finished]] = {}
    for run in runs:
        key = json.dumps(_fields(run), sort_keys=True), run.results["hashes"]["data"]
        same = sum(
            other.seed == run.seed
            for (k, h, _), found in together.items()
            if (k, h) == key
            for other in found
        )
        together.setdefault((*key, same), []).append(run)
    whole = [
        Arm("/".join(_common([run.name.split("/") for run in runs])), tuple(runs))
        for runs in together.values()
    ]
    arms = _at_their_best_rate(whole)
    for found in ([_without_rate_and_seed(arm) for arm in arms], [arm.name for arm in arms]):
        if len(set(found)) == len(found) and all(found):
            return [
                dataclasses.replace(arm, name=name) for arm, name in zip(arms, found, strict=True)
            ]
    return [dataclasses.replace(arm, name=arm.first.name) for arm in arms]


def _without_rate_and_seed(arm: Arm) -> str:
    """A sweep's folders are ARM/rate_X/seed_N: the arm says it all where there is one rate of each."""
    return "/".join(part for part in arm.name.split("/") if not SWEPT.match(part))


def _fields(run: Finished) -> dict:
    """What all seeds of an arm have in common."""
    # Runs that go on from another one do so from the one of their seed.
    source = re.sub(r"seed_\d+$", "", str(run.config.get("model.init_from", "")))
    return {name: value for name, value in run.config.items() if name not in FREE} | {
        "model.init_from": source
    }


def _at_their_best_rate(arms: Sequence[Arm]) -> list[Arm]:
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        fields = _fields(arm.first) | {"optim.learning_rate": None}
        name = _without_rate_and_seed(arm)
        key = (
            [fields, arm.first.results["hashes"]["data"], name]
            if name != arm.name
            else [arm.name, len(groups)]
        )
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(arm)
    chosen = []
    for rates in groups.values():
        judged = [of_shared_seeds(arm, rates) for arm in rates]
        if len(rates) == 1 or not all(
            arm.runs and all(run.validation for run in arm.runs) for arm in judged
        ):
            chosen += rates
            continue
        # Of equal ones the one that the sweep went on with.
        place = max(
            range(len(rates)), key=lambda i: (mean_validation(judged[i]), len(rates[i].runs))
        )
        chosen.append(dataclasses.replace(rates[place], rates=tuple(rates)))
    return chosen


def of_shared_seeds(arm: Arm, rates: Sequence[Arm]) -> Arm:
    """The arm's runs of the seeds that every rate has."""
    shared = set.intersection(*(set(other.seeds) for other in rates))
    return dataclasses.replace(arm, runs=tuple(run for run in arm.runs if run.seed in shared))


def _common(names: Sequence[Sequence[str]]) -> list[str]:
    """The parts that all begin with; a single name's own."""
    alike = [
        part[0]
        for part in itertools.takewhile(lambda part: len(set(part)) == 1, zip(*names, strict=False))
    ]
    return alike or list(names[0])


def reference(arms: Sequence[Arm]) -> Arm:
    """What gains are against: of the arms without text and without another remedy the most
    accurate, else the first.

    Two loss terms double the classifier's gradient, so that a baseline with a doubled loss may be
    the better one.
    """
    return max(plain_arms(arms), key=mean_validation, default=arms[0])


def plain_arms(arms: Sequence[Arm]) -> list[Arm]:
    """Without text, without another remedy, and not those that only train for longer."""
    longer = [pair[1] for pair in longer_pairs(arms)]
    return [
        arm for arm in arms if not arm.with_text and not arm.changed_by_hand and arm not in longer
    ]


def mean_validation(arm: Arm) -> float:
    """The best validation top-1, the mean over seeds; 0 without validation."""
    return float(
        np.mean([max((top1 for _, top1 in run.validation), default=0.0) for run in arm.runs])
    )


def plainest_with_text(arms: Sequence[Arm], first: Arm) -> Arm | None:
    """Of the arms with text the one that differs least from `first`: co-training as the paper has
    it, where it is there.
    """

    def differences(arm: Arm) -> tuple[bool, int]:
        names = (first.config.keys() | arm.config.keys()) - FREE
        return not arm.config.get("loss.mixed"), sum(
            first.config.get(name) != arm.config.get(name) for name in names
        )

    return min((arm for arm in arms if arm.with_text), key=differences, default=None)


def shown_with_text(arms: Sequence[Arm], first: Arm) -> list[Arm]:
    """What stands for text where there is no room for all: the plainest arm with it, and of those
    that read their own titles, without a remedy, the most accurate on validation, where that is
    another.
    """
    plain = plainest_with_text(arms, first)
    own = [
        a
        for a in arms
        if a.with_text and not a.changed_by_hand and a.config.get("data.title", "raw") == "raw"
    ]
    best = max(own, key=mean_validation, default=plain)
    return [arm for arm in (plain, best if best is not plain else None) if arm is not None]


def longer_pairs(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """(arm, the same for half as many epochs again)."""

    def length(arm: Arm) -> float:
        return arm.config.get("train.steps") or arm.config.get("train.epochs") or 0

    def others(arm: Arm) -> str:
        left_out = {"train.epochs", "train.steps", "optim.learning_rate", *FREE}
        return json.dumps(
            {k: v for k, v in arm.config.items() if k not in left_out}, sort_keys=True
        )

    return [
        (arm, longer)
        for arm in arms
        for longer in arms
        # Steps are whole numbers.
        if others(arm) == others(longer)
        and abs(length(longer) - 1.5 * length(arm)) <= 0.5
        and length(longer) > length(arm)
    ]


def converged(arm: Arm, longer: Arm) -> tuple[bool, float]:
    """Whether half as many epochs again gain less than half a point on validation, and what they
    gain.

    Of a sweep's learning rates those count that both were trained at, each arm's best of them;
    where there is none, the arms as they are.
    """

    def by_rate(arm: Arm) -> dict[float | None, Arm]:
        return {some.config.get("optim.learning_rate"): some for some in (arm, *arm.rates)}

    def at_best(arms: Sequence[Arm]) -> float:
        """On validation, the mean over seeds that all have."""
        best = [
            [max(top1 for _, top1 in some.seeds[seed].validation) for seed in seeds]
            for some in arms
        ]
        return float(np.mean(max(best, key=np.mean)))

    two = by_rate(arm), by_rate(longer)
    shared = [[found[rate] for rate in two[0] if rate in two[1]] for found in two]
    if not shared[0]:
        shared = [[arm], [longer]]
    seeds = sorted(set.intersection(*(set(some.seeds) for arms in shared for some in arms)))
    if seeds:
        gain = at_best(shared[1]) - at_best(shared[0])
    else:
        gain = max(top1 for _, top1 in longer.first.validation) - max(
            top1 for _, top1 in arm.first.validation
        )
    return gain < 0.5, gain


# What makes an arm one with text, and what each arm has of its own.
_OF_TEXT = {
    *("loss.visual", "loss.mixed", "loss.tag_prediction"),
    "data.title",
    *("model.text.encoder", "model.text.windows", "model.text.hidden", "model.text.weighting"),
    *("model.tag_vocabulary", "model.shared_word_weights"),
}
_OF_ITS_OWN = {"optim.learning_rate", "model.init_from", *FREE}


def without_its_text(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm that is the same but for text: of a remedy with text the remedy alone. None for an
    arm without text of its own, like one that goes on from a run with text.
    """

    def remedy(arm: Arm) -> dict[str, object]:
        return {
            name: value for name, value in arm.config.items() if name not in _OF_TEXT | _OF_ITS_OWN
        }

    def plain(arm: Arm) -> bool:
        return not arm.with_text and arm.config.get("loss.visual", 1.0) == 1.0

    if not arm.with_text:
        return None
    return next((other for other in arms if plain(other) and remedy(other) == remedy(arm)), None)


def with_its_own_titles(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm that is the same but reads every photo's own title, whole. None for such an arm
    itself, or one without text.
    """

    def others(arm: Arm) -> dict[str, object]:
        return {
            name: value
            for name, value in arm.config.items()
            if name not in {"data.title"} | _OF_ITS_OWN
        }

    if not arm.with_text or arm.config.get("data.title", "raw") == "raw":
        return None
    alike = (
        other
        for other in arms
        if other.config.get("data.title", "raw") == "raw" and others(other) == others(arm)
    )
    return next(alike, None)


def chosen_variant(arm: Arm, kind: str) -> str | None:
    """The variant of that kind with the best class mean on validation, the mean over seeds, of
    equal ones the smallest change; None without validation.
    """
    seen = [run.results.get("post_hoc_on_validation") or {} for run in arm.runs]
    names = [name for name in seen[0] if name.startswith(kind)]
    if not names or not all(name in found for found in seen for name in names):
        return None
    return max(
        names,
        key=lambda name: (
            np.mean([found[name]["class_mean"] for found in seen]),
            -abs(float(name.rpartition("_")[2])),
        ),
    )
