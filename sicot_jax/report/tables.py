"""Accuracy of arms side by side: overall, head and tail, averaged over classes, with intervals of the paired differences."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence

import numpy as np

from sicot_jax.config import FREE_ON_RESUME
from sicot_jax.report.document import Table
from sicot_jax.report.finished import SWEPT, Finished
from sicot_jax.report.intervals import paired_interval

GROUPS = ("overall", "head", "tail", "class_mean", "few")
FEW = 20  # training photos
_FREE = {"seed", *FREE_ON_RESUME}  # what does not make another arm
UNCERTAIN = "~"  # marks a difference whose interval holds zero


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ in their seed alone.

    changed_to: variant of the finished classifier. rates: of a sweep, the same arm at every learning rate that was tried.
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
        terms = ("loss.semantic", "loss.mixed", "loss.title_words", "model.word_rows")
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
        return dataclasses.replace(self, changed_to=name, runs=tuple(run.variant(name) for run in self.runs))


def arms_of(runs: Sequence[Finished]) -> list[Arm]:
    """Runs of one config but for the seed become one arm, in the order of their first; runs of one seed stay apart.

    An arm is called what its runs' names begin with, without a sweep's learning rate and seed where arms can do without.
    Of an arm that a sweep trained at several rates, the one that is best on validation stands for it.
    """
    together: dict[tuple, list[Finished]] = {}
    for run in runs:
        key = json.dumps(_fields(run), sort_keys=True), run.results["hashes"]["data"]
        same = sum(other.seed == run.seed for (k, h, _), found in together.items() if (k, h) == key for other in found)
        together.setdefault((*key, same), []).append(run)
    whole = [Arm("/".join(_common([run.name.split("/") for run in runs])), tuple(runs)) for runs in together.values()]
    arms = _at_their_best_rate(whole)
    for found in ([_without_rate_and_seed(arm) for arm in arms], [arm.name for arm in arms]):
        if len(set(found)) == len(found) and all(found):
            return [dataclasses.replace(arm, name=name) for arm, name in zip(arms, found, strict=True)]
    return [dataclasses.replace(arm, name=arm.first.name) for arm in arms]


def _without_rate_and_seed(arm: Arm) -> str:
    """A sweep's folders are ARM/rate_X/seed_N: the arm says it all where there is one rate of each."""
    return "/".join(part for part in arm.name.split("/") if not SWEPT.match(part))


def _fields(run: Finished) -> dict:
    """What all seeds of an arm have in common."""
    # Runs that go on from another one do so from the one of their seed.
    source = re.sub(r"seed_\d+$", "", str(run.config.get("model.init_from", "")))
    return {name: value for name, value in run.config.items() if name not in _FREE} | {"model.init_from": source}


def _at_their_best_rate(arms: Sequence[Arm]) -> list[Arm]:
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        fields = _fields(arm.first) | {"optim.learning_rate": None}
        name = _without_rate_and_seed(arm)
        key = [fields, arm.first.results["hashes"]["data"], name] if name != arm.name else [arm.name, len(groups)]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(arm)
    chosen = []
    for rates in groups.values():
        judged = [_of_shared_seeds(arm, rates) for arm in rates]
        if len(rates) == 1 or not all(arm.runs and all(run.validation for run in arm.runs) for arm in judged):
            chosen += rates
            continue
        # Of equal ones the one that the sweep went on with.
        place = max(range(len(rates)), key=lambda i: (mean_validation(judged[i]), len(rates[i].runs)))
        chosen.append(dataclasses.replace(rates[place], rates=tuple(rates)))
    return chosen


def _of_shared_seeds(arm: Arm, rates: Sequence[Arm]) -> Arm:
    """The arm's runs of the seeds that every rate has."""
    shared = set.intersection(*(set(other.seeds) for other in rates))
    return dataclasses.replace(arm, runs=tuple(run for run in arm.runs if run.seed in shared))


def rates_table(arms: Sequence[Arm]) -> Table | None:
    """The learning rates that a sweep tried, and which it took; None where there was no choice."""
    rows = []
    for arm in arms:
        for tried in sorted(arm.rates, key=lambda tried: tried.config["optim.learning_rate"]):
            judged, rate = _of_shared_seeds(tried, arm.rates), tried.config["optim.learning_rate"]
            tested = [f"{mean_accuracy(tried, group):.2f}" for group in ("overall", "class_mean")]
            seeds = [", ".join(map(str, sorted(some.seeds))) for some in (judged, tried)]
            taken = "taken" if tried.runs == arm.runs else ""
            rows.append([arm.title, f"{rate:g}", taken, *seeds, f"{mean_validation(judged):.2f}", *tested])
    seeds = ["seeds judged", "seeds tested"]
    header = ["arm", "learning rate", "", *seeds, "validation top-1", "test top-1", "test class mean"]
    return Table(header, rows, texts=5) if rows else None


def _common(names: Sequence[Sequence[str]]) -> list[str]:
    """The parts that all begin with; a single name's own."""
    alike = [part[0] for part in itertools.takewhile(lambda part: len(set(part)) == 1, zip(*names, strict=False))]
    return alike or list(names[0])


def reference(arms: Sequence[Arm]) -> Arm:
    """What gains are against: of the arms without text and without another remedy the most accurate, else the first.

    Two loss terms double the classifier's gradient, so that a baseline with a doubled loss may be the better one.
    """
    return max(plain_arms(arms), key=mean_validation, default=arms[0])


def plain_arms(arms: Sequence[Arm]) -> list[Arm]:
    """Without text, without another remedy, and not those that only train for longer."""
    longer = [pair[1] for pair in longer_pairs(arms)]
    return [arm for arm in arms if not arm.with_text and not arm.changed_by_hand and arm not in longer]


def mean_validation(arm: Arm) -> float:
    """The best validation top-1, the mean over seeds; 0 without validation."""
    return float(np.mean([max((top1 for _, top1 in run.validation), default=0.0) for run in arm.runs]))


def plainest_with_text(arms: Sequence[Arm], first: Arm) -> Arm | None:
    """Of the arms with text the one that differs least from `first`: co-training as the paper has it, where it is there."""

    def differences(arm: Arm) -> tuple[bool, int]:
        names = (first.config.keys() | arm.config.keys()) - _FREE
        return not arm.config.get("loss.mixed"), sum(first.config.get(name) != arm.config.get(name) for name in names)

    return min((arm for arm in arms if arm.with_text), key=differences, default=None)


def shown_with_text(arms: Sequence[Arm], first: Arm) -> list[Arm]:
    """What stands for text where there is no room for all: the plainest arm with it, and of those that read their own titles,
    without a remedy, the most accurate on validation, where that is another.
    """
    plain = plainest_with_text(arms, first)
    own = [a for a in arms if a.with_text and not a.changed_by_hand and a.config.get("data.title", "raw") == "raw"]
    best = max(own, key=mean_validation, default=plain)
    return [arm for arm in (plain, best if best is not plain else None) if arm is not None]


def longer_pairs(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """(arm, the same for half as many epochs again)."""

    def length(arm: Arm) -> float:
        return arm.config.get("train.steps") or arm.config.get("train.epochs") or 0

    def others(arm: Arm) -> str:
        left_out = {"train.epochs", "train.steps", "optim.learning_rate", *_FREE}
        return json.dumps({k: v for k, v in arm.config.items() if k not in left_out}, sort_keys=True)

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
    """Whether half as many epochs again gain less than half a point on validation, and what they gain.

    Of a sweep's learning rates those count that both were trained at, each arm's best of them; where there is none, the arms
    as they are.
    """

    def by_rate(arm: Arm) -> dict[float | None, Arm]:
        return {some.config.get("optim.learning_rate"): some for some in (arm, *arm.rates)}

    def at_best(arms: Sequence[Arm]) -> float:
        """On validation, the mean over seeds that all have."""
        best = [[max(top1 for _, top1 in some.seeds[seed].validation) for seed in seeds] for some in arms]
        return float(np.mean(max(best, key=np.mean)))

    two = by_rate(arm), by_rate(longer)
    shared = [[found[rate] for rate in two[0] if rate in two[1]] for found in two]
    if not shared[0]:
        shared = [[arm], [longer]]
    seeds = sorted(set.intersection(*(set(some.seeds) for arms in shared for some in arms)))
    if seeds:
        gain = at_best(shared[1]) - at_best(shared[0])
    else:
        gain = max(top1 for _, top1 in longer.first.validation) - max(top1 for _, top1 in arm.first.validation)
    return gain < 0.5, gain


def members(run: Finished) -> dict[str, np.ndarray]:
    """Group -> bool [N]; "class_mean" has all photos, weighed by class."""
    everything, head = np.ones(len(run.tested.label), bool), run.head
    few = run.tested.label_count <= FEW
    return {"overall": everything, "head": head, "tail": ~head, "class_mean": everything, "few": few}


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
    return float(np.mean([100 * mean_over(run.tested.hits_within(top).astype(float), run, group) for run in arm.runs]))


def pairs(first: Arm, other: Arm) -> list[tuple[Finished, Finished]]:
    """Runs of one seed side by side; where the arms share none, each one's first."""
    shared = [seed for seed in first.seeds if seed in other.seeds]
    return [(first.seeds[s], other.seeds[s]) for s in shared] or [(first.first, other.first)]


def difference_rows(first: Arm, other: Arm) -> dict[str, tuple[float, float, float]]:
    """Group -> (top-1 difference in points, 95 % interval) of `other` minus `first`, photo by photo, seed by seed."""
    return _rows_of(np.stack([_difference(a, b) for a, b in pairs(first, other)]), first.first)


def _difference(first: Finished, other: Finished) -> np.ndarray:
    """float64 [N]: of every photo, points."""
    return 100.0 * (other.tested.hits.astype(float) - first.tested.hits)


def _rows_of(difference: np.ndarray, run: Finished) -> dict[str, tuple[float, float, float]]:
    """Of [S, N] points: group -> (mean, 95 % interval)."""
    rows = {}
    for group, member in members(run).items():
        classes = run.tested.label if group == "class_mean" else None
        rows[group] = (mean_over(difference.mean(0), run, group), *paired_interval(difference[:, member], classes))
    return rows


def at_equal_rates(first: Arm, other: Arm) -> tuple[np.ndarray, list[float], list[int]] | None:
    """(float64 [S, N], rates, seeds): the difference of every photo, the mean over the rates that both arms were trained at.

    Seeds are those that all of these rates have in both arms. None where they share fewer than two rates, or no seed.
    """
    two = [{some.config["optim.learning_rate"]: some.seeds for some in arm.rates} for arm in (first, other)]
    rates = sorted(two[0].keys() & two[1].keys())
    seeds = sorted(set.intersection(*(set(found[rate]) for found in two for rate in rates))) if rates else []
    if len(rates) < 2 or not seeds:
        return None
    each = [[_difference(two[0][rate][seed], two[1][rate][seed]) for rate in rates] for seed in seeds]
    return np.mean(each, 1), rates, seeds


def equal_rates_table(arms: Sequence[Arm], first: Arm) -> Table | None:
    """Differences without a choice of rate: to `first`, and of remedies with text to the remedy alone; None without any."""
    rows = []
    for arm in arms:
        alone = without_its_text(arm, arms)
        for other in dict.fromkeys([first, *([alone] if alone is not None else [])]):
            if arm is not other and (found := at_equal_rates(other, arm)):
                difference, rates, seeds = found
                tried = ", ".join(f"{rate:g}" for rate in rates), ", ".join(map(str, seeds))
                rows.append([f"{arm.title} - {other.title}", *tried, *_gain_cells(_rows_of(difference, other.first))])
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


# What makes an arm one with text, and what each arm has of its own.
_OF_TEXT = {
    *("loss.visual", "loss.semantic", "loss.mixed", "loss.mixed_schedule", "loss.title_words"),
    *("data.title", "data.title_dropout", "data.word_dropout"),
    *("model.text.encoder", "model.text.windows", "model.text.hidden", "model.text.weighting"),
    *("model.title_words", "model.word_rows"),
}
_OF_ITS_OWN = {"optim.learning_rate", "model.init_from", *_FREE}


def without_its_text(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm that is the same but for text: of a remedy with text the remedy alone. None for an arm without text of its
    own, like one that goes on from a run with text.
    """

    def remedy(arm: Arm) -> dict[str, object]:
        return {name: value for name, value in arm.config.items() if name not in _OF_TEXT | _OF_ITS_OWN}

    def plain(arm: Arm) -> bool:
        return not arm.with_text and arm.config.get("loss.visual", 1.0) == 1.0

    if not arm.with_text:
        return None
    return next((other for other in arms if plain(other) and remedy(other) == remedy(arm)), None)


def added_text_table(arms: Sequence[Arm], first: Arm) -> Table | None:
    """What text adds to a remedy: each arm with both against the remedy alone. None where there is none."""
    rows = []
    for arm in arms:
        alone = without_its_text(arm, arms)
        if alone is not None and alone is not first and alone.changed_by_hand:
            rows.append([f"{arm.title} - {alone.title}", *difference_cells(alone, arm)])
    return Table(["top-1, points", *HEADER[1:]], rows) if rows else None


def count_cells(run: Finished) -> list[str]:
    found = members(run)
    return [
        f"{len(np.unique(run.tested.label)):,} classes" if group == "class_mean" else f"{int(found[group].sum()):,}"
        for group in GROUPS
    ]


def accuracy_table(arms: Sequence[Arm], first: Arm) -> Table:
    """Tables 2 and 4 of SICoT: every arm, the mean over its seeds; under them the difference of each to `first`."""
    rows = [[arm.title, *accuracy_cells(arm)] for arm in arms]
    rows += [[f"{arm.title} - {first.title}", *difference_cells(first, arm)] for arm in arms if arm is not first]
    rows.append(["test photos", *count_cells(first.first)])
    return Table(HEADER, rows)


HEADER = ["top-1 (top-3), %", "overall", "head", "tail", "class mean", f"few: {FEW} or under"]


def post_hoc_table(arms: Sequence[Arm]) -> Table | None:
    """Remedies on finished classifiers; tau of tau-normalisation by the class mean of validation. None without any.

    Under the arms the difference between the last and the first with the same remedy: what text adds to it.
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
            tau = f" ({float(arm.changed_to.rpartition('_')[2]):g})" if "validation" in remedy else ""
            rows.append([f"{arm.title}, {remedy}{tau}", *accuracy_cells(arm)])
        how = "each with its tau" if "validation" in remedy else "both so"
        for other in variants[1:]:
            rows.append([f"{other.title} - {variants[0].title}, {how}", *difference_cells(variants[0], other)])
    return Table(["top-1, %", *HEADER[1:]], rows) if rows else None


def chosen_variant(arm: Arm, kind: str) -> str | None:
    """The variant of that kind with the best class mean on validation, the mean over seeds, of equal ones the smallest
    change; None without validation."""
    seen = [run.results.get("post_hoc_on_validation") or {} for run in arm.runs]
    names = [name for name in seen[0] if name.startswith(kind)]
    if not names or not all(name in found for found in seen for name in names):
        return None
    return max(
        names,
        key=lambda name: (np.mean([found[name]["class_mean"] for found in seen]), -abs(float(name.rpartition("_")[2]))),
    )


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
            left_out = {"optim.learning_rate", *_FREE}
            fields = {k: v for k, v in arm.config.items() if not k.startswith("model.text.") and k not in left_out}
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
            "; ".join(f"{source['class']} ({source['photos']} of {source['tested']})" for source in row["from"]),
            f"{row['photos']:,}",
        ]
        for row in found
    ]
    return Table(["head class", "most from (photos of those tested)", "tail photos taken"], rows, texts=2)


def runs_table(runs: Sequence[Finished]) -> Table:
    """Where every figure comes from."""
    header = ["run", "seed", "learning rate", "tested step", "data", "commit", "version", "hardware"]
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
