"""The report of finished runs: Markdown, one HTML page and figures in a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sicot_jax.catalog.sources.lazy_strings import counted
from sicot_jax.report import figures, tables
from sicot_jax.report.differences import difference_rows, pairs
from sicot_jax.report.document import Block, Figure, Heading, Text, Titles, html_page, markdown
from sicot_jax.report.paper import paper_table
from sicot_jax.report.runs import (
    Finished,
    all_runs,
    check_comparable,
    config_differences,
    read_finished,
    run_names,
    still_improving,
)
from sicot_jax.report.tables import UNCERTAIN
from sicot_jax.report.variant_groups import (
    Arm,
    arms_of,
    converged,
    longer_pairs,
    plainest_with_text,
    reference,
    shown_with_text,
    with_its_own_titles,
)


def write_report(workdirs: Sequence[Path], out: Path) -> str:
    """`report.md`, `report.html` and PNGs in `out`; returns the main table. InputError where runs
    cannot be compared.

    A folder that is no run stands for all runs below it.
    """
    workdirs = all_runs(workdirs)
    names = run_names(workdirs)
    runs = [
        dataclasses.replace(read_finished(path), name=name)
        for path, name in zip(workdirs, names, strict=True)
    ]
    check_comparable(runs)
    out.mkdir(parents=True, exist_ok=True)
    arms = arms_of(runs)
    first = reference(arms)
    arms = [first, *(arm for arm in arms if arm is not first)]
    training = told_of_training(arms)
    accuracy: list[Block] = [tables.accuracy_table(arms, first), *map(Text, _notes(arms, first))]
    blocks: list[Block] = [
        Heading("Report", 1),
        *training,
        *accuracy,
        *_catalogue(first.first, out),
        *_paper(first.first),
        *_encoders(arms, first),
        *_added(arms, first),
        *_other_titles(arms, first),
        *_rates(arms, first),
        *_controls(arms, first, out),
        *_curves(arms, first, out),
        *_mistakes(arms, first),
        *_words(arms, first),
        Heading("Runs"),
        tables.runs_table(runs),
    ]
    return write_pages(blocks, out, title="Report", shown=[*training, *accuracy])


def write_pages(blocks: Sequence[Block], out: Path, *, title: str, shown: Sequence[Block]) -> str:
    """`report.md` and `report.html` in `out`; returns what the terminal shows of it."""
    for name, text in {
        "report.md": markdown(blocks),
        "report.html": html_page(blocks, out, title=title),
    }.items():
        temporary = out / "report.tmp"
        temporary.write_text(text)
        temporary.replace(out / name)
    return "\n" + markdown(shown).rstrip()


def told_of_training(arms: Sequence[Arm]) -> list[Block]:
    """Whether longer training would change the picture: by a longer run of that length where there
    is one, else by the end of the curve.
    """
    longer = [(a, b) for a, b in longer_pairs(arms) if a.first.validation and b.first.validation]
    told = []
    for arm, after in longer:
        done, gain = converged(arm, after)
        state = "has converged" if done else "is under-trained"
        alike = [
            other.title for other in arms if other is not arm and _length(other) == _length(arm)
        ]
        so = f" So it is taken to be with {', '.join(alike)}, of the same length." if alike else ""
        told.append(
            f"{arm.title} {state}: half as many epochs again ({after.title}) gain {gain:+.2f} on validation.{so}"
        )
    judged = {_length(arm) for two in longer for arm in two}
    rising = [
        arm.title
        for arm in arms
        if _length(arm) not in judged and any(map(still_improving, arm.runs))
    ]
    if rising:
        told.append(
            f"{', '.join(rising)} {'is' if len(rising) == 1 else 'are'} under-trained: validation top-1 was still rising at "
            "the end (by more than half a point in the last quarter, where a falling learning rate makes every run rise)."
        )
    return [Text(text) for text in told]


def _length(arm: Arm) -> tuple:
    return tuple(
        arm.first.config[name]
        for name in ("train.epochs", "train.steps", "train.batch_size", "optim.schedule")
    )


def _notes(arms: Sequence[Arm], first: Arm) -> list[str]:
    counts, boundary = first.first.tested.class_counts, first.first.results["head_boundary"]
    without = len(counts) - len(np.unique(first.first.tested.label))
    head, photos = int((counts > boundary).sum()), counted(int(counts.sum()), "training photo")
    notes = [
        f"{counted(len(counts), 'class')}, {head} of them head (more than {counted(boundary, 'training photo')}), {photos}, "
        f"{counted(without, 'class')} without a test photo."
    ]
    if len(arms) < 2:
        return notes
    most = max(len(pairs(first, arm)) for arm in arms if arm is not first)
    different = len({tuple(sorted(arm.seeds)) for arm in arms}) > 1
    notes.append(of_intervals(most, different=different))
    if different:
        have = "; ".join(f"{arm.title}: {', '.join(map(str, sorted(arm.seeds)))}" for arm in arms)
        notes.append(
            f"Seeds ({have}): a difference is over the seeds that both arms have, a row over all of its own."
        )
    if len(tried := {len(arm.rates) or 1 for arm in arms}) > 1:
        several = ", ".join(f"{arm.title} ({len(arm.rates)})" for arm in arms if arm.rates)
        notes.append(
            f"Up to {max(tried)} learning rates were tried: {several}; the other arms have one, a handicap."
        )
    if sum(not a.with_text and not a.changed_by_hand for a in arms) > 1:
        notes.append(
            f"Differences are against {first.title}, of the arms without text or remedy the most accurate on validation."
        )
    for arm in arms:
        if arm is not first and (differences := config_differences(first.first, arm.first)):
            notes.append(f"{arm.title} differs from {first.title} in: {differences}.")
    return notes


def of_intervals(most: int, *, different: bool) -> str:
    """What the intervals of differences over up to `most` seeds hold."""
    return (
        "Differences are paired, photo by photo, with a 95 % bootstrap interval over photos"
        + (
            f" and {'up to ' if different else ''}{most} seeds; few seeds make it too narrow."
            if most > 1
            else "; one seed each, so the interval does not hold the luck of training."
        )
        + f" {UNCERTAIN} marks those that hold zero: no difference is shown."
    )


def _catalogue(run: Finished, out: Path) -> list[Block]:
    facts = run.results.get("catalog")
    words = np.repeat(*np.array(facts["word_counts"]).T) if facts and facts["word_counts"] else None
    boundary = run.results["head_boundary"]
    figures.plot_histogram(
        run.tested.class_counts, boundary, out / "class_histogram.png", word_counts=words
    )
    table = tables.catalogue_table(run)
    shown = Figure(
        "class_histogram.png",
        "training photos of every class, most frequent first; times of every word",
    )
    return [Heading("Catalogue"), *([table] if table else []), shown]


def _paper(run: Finished) -> list[Block]:
    table = paper_table((run.results.get("catalog") or {}).get("name", ""))
    return [Heading("The paper's figures on this data set"), table] if table else []


def _encoders(arms: Sequence[Arm], first: Arm) -> list[Block]:
    table = tables.encoder_table(arms, first)
    return [Heading("Text encoders"), table] if table else []


def _added(arms: Sequence[Arm], first: Arm) -> list[Block]:
    table = tables.added_text_table(arms, first)
    return [Heading("What text adds to a remedy"), table] if table else []


def _other_titles(arms: Sequence[Arm], first: Arm) -> list[Block]:
    """Whether what text gains is knowledge: what remains of the gain with the titles of other
    photos is none.
    """
    table = tables.other_titles_table(arms)
    if table is None:
        return []
    told = []
    for arm in arms:
        own = with_its_own_titles(arm, arms)
        if own is not None and str(arm.config["data.title"]).startswith("shuffled"):
            whose = (
                "other photos"
                if arm.config["data.title"] == "shuffled"
                else "other photos of the class"
            )
            told.append(Text(_origin(own, arm, first, whose)))
    return [Heading("With other titles"), table, *told]


def _origin(own: Arm, shuffled: Arm, first: Arm, whose: str) -> str:
    gains, remains, lost = (
        difference_rows(a, b)["overall"][1] > 0
        for a, b in [(first, own), (first, shuffled), (shuffled, own)]
    )
    if remains:
        rest = "; its own titles gain more" if lost else ""
        return f"{own.title} gains overall with titles of {whose} too ({shuffled.title}): regularisation, not knowledge{rest}."
    if not gains:
        return f"{own.title} shows no gain over {first.title} overall, with its own titles or with those of {whose}."
    certain = (
        "with a difference that is certain"
        if lost
        else "but the difference between the two is not certain"
    )
    return (
        f"{own.title} gains overall with its own titles and not with those of {whose}, {certain}."
    )


def _rates(arms: Sequence[Arm], first: Arm) -> list[Block]:
    table, equal = tables.rates_table(arms), tables.equal_rates_table(arms, first)
    told = "Each arm takes the rate that is best on validation with the seeds that all of its rates have."
    blocks: list[Block] = [Heading("Learning rates"), Text(told), table] if table else []
    if equal:
        told = (
            "Where validation photos are few, lots are drawn for the rate. These differences take every rate that both arms "
            "were trained at, and choose none: photo by photo, the mean over rates, with intervals over photos and seeds."
        )
        blocks += [Heading("At equal learning rates"), Text(told), equal]
    return blocks


def _controls(arms: Sequence[Arm], first: Arm, out: Path) -> list[Block]:
    """Remedies after training for the reference and what stands for text; the trade-off of the main
    arms.
    """
    table = tables.post_hoc_table(
        [first, *(arm for arm in shown_with_text(arms, first) if arm is not first)]
    )
    if table is None:
        return []
    blocks: list[Block] = [
        Heading("Remedies after training"),
        Text(
            "The same runs with another classifier made from theirs: log prior times tau taken away (logit adjustment), rows "
            "divided by their length to the power of tau (tau-norm); tau with the best class mean on validation."
        ),
        table,
    ]
    shown = _main_arms([arm for arm in arms if all(run.tested.post_hoc for run in arm.runs)], first)
    figures.plot_trade_off(shown, out / "trade_off.png")
    return [
        *blocks,
        Figure("trade_off.png", "head against tail accuracy as the prior is taken away"),
    ]


def _main_arms(arms: Sequence[Arm], first: Arm) -> list[Arm]:
    """As many as a figure has colours: the reference and what stands for text before the others."""
    text = shown_with_text(arms, first)
    return sorted(arms, key=lambda arm: (arm is not first, arm not in text))[: figures.MOST_LINES]


def _curves(arms: Sequence[Arm], first: Arm, out: Path) -> list[Block]:
    blocks: list[Block] = [Heading("Curves")]
    if len(first.first.tested.label):
        figures.plot_frequency(_main_arms(arms, first), out / "frequency.png")
        blocks.append(Figure("frequency.png", "accuracy against training photos of the class"))
    if validated := [arm for arm in arms if all(run.validation for run in arm.runs)]:
        figures.plot_learning(_main_arms(validated, first), out / "learning.png")
        blocks.append(Figure("learning.png", "validation accuracy through the run"))
    if len(arms) > figures.MOST_LINES:
        blocks.append(
            Text(f"Figures show {figures.MOST_LINES} of the {len(arms)} arms; the table has all.")
        )
    return blocks if len(blocks) > 1 else []


def _mistakes(arms: Sequence[Arm], first: Arm) -> list[Block]:
    """Of the reference and of what stands for text."""
    blocks: list[Block] = []
    for arm in dict.fromkeys([first, *shown_with_text(arms, first)]):
        if table := tables.swallowed_table(arm):
            blocks += [Text(f"{arm.title}, {arm.first.name}:"), table]
    return [Heading("Head classes that swallow tail classes"), *blocks] if blocks else []


def _words(arms: Sequence[Arm], first: Arm) -> list[Block]:
    """Fig. 7: of the plainest arm that reads titles word by word."""
    plain = plainest_with_text([arm for arm in arms if arm.first.results.get("attention")], first)
    for arm in [plain] if plain else []:
        if found := arm.first.results.get("attention"):
            listed = [
                f"{title}: "
                + ", ".join(f"{row['word']} ({row['weight']:.2f})" for row in found[name])
                + "."
                for name, title in [
                    ("highest", "Highest mean weight"),
                    ("lowest", "Lowest mean weight"),
                ]
                if found[name]
            ]
            rows = [
                (row["class"], [(word, weight) for word, weight in row["words"]])
                for row in found["titles"]
            ]
            explained = (
                "Words in the order of their weight, told as a multiple of that of equal weights."
            )
            return [
                Heading("What the attention reads"),
                Text(f"{arm.first.name}. {explained}"),
                Titles(rows),
                *map(Text, listed),
            ]
    return []
