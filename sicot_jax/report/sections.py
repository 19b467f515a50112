"""Sections of a report; each is a list of blocks, empty where the runs have nothing for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sicot_jax.common.text import pluralize
from sicot_jax.report import figures, tables
from sicot_jax.report.differences import paired_runs, paper_table, variant_differences
from sicot_jax.report.document import Block, Figure, Heading, Paragraph, WeightedTitles
from sicot_jax.report.runs import FinishedRun, config_differences, is_still_improving
from sicot_jax.report.tables import UNCERTAIN
from sicot_jax.report.variant_roles import (
    VariantRuns,
    counterpart_with_raw_titles,
    judge_convergence,
    longer_training_pairs,
    main_text_variants,
    simplest_text_variant,
)


def training_notes(variants: Sequence[VariantRuns]) -> list[Block]:
    """Says whether longer training would change the results.

    Args:
      variants: all variants of a report.

    Returns:
      A paragraph per variant that was also trained for longer, and one on the variants of other
      lengths whose validation accuracy was still rising at the end.
    """
    pairs = [
        (variant, longer)
        for variant, longer in longer_training_pairs(variants)
        if variant.first_run.validation_log and longer.first_run.validation_log
    ]
    notes = []
    for variant, longer in pairs:
        has_converged, gain = judge_convergence(variant, longer)
        state = "has converged" if has_converged else "is under-trained"
        same_length = [
            other.title
            for other in variants
            if other is not variant and _length(other) == _length(variant)
        ]
        conclusion = f" The same is assumed of {', '.join(same_length)}, trained as long."
        notes.append(
            f"{variant.title} {state}: half as many epochs again ({longer.title}) gain {gain:+.2f} "
            f"on validation.{conclusion if same_length else ''}"
        )
    judged = {_length(variant) for pair in pairs for variant in pair}
    rising = [
        variant.title
        for variant in variants
        if _length(variant) not in judged and any(map(is_still_improving, variant.runs))
    ]
    if rising:
        notes.append(
            f"{', '.join(rising)} {'is' if len(rising) == 1 else 'are'} under-trained: validation "
            "top-1 was still rising at the end (by more than half a point in the last quarter, "
            "where a falling learning rate makes every run rise)."
        )
    return [Paragraph(note) for note in notes]


def accuracy_notes(variants: Sequence[VariantRuns], reference: VariantRuns) -> list[str]:
    """Says what the main table compares: catalogue, intervals, seeds, rates, config differences.

    Args:
      variants: all variants of a report.
      reference: variant that gains are measured against.

    Returns:
      Paragraphs.
    """
    run = reference.first_run
    counts, boundary = run.test_set.class_counts, run.head_boundary
    num_untested = len(counts) - len(np.unique(run.test_set.label))
    num_head = int((counts > boundary).sum())
    notes = [
        f"{pluralize(len(counts), 'class')}, {num_head} of them head (more than "
        f"{pluralize(boundary, 'training photo')}), "
        f"{pluralize(int(counts.sum()), 'training photo')}, "
        f"{pluralize(num_untested, 'class')} without a test photo."
    ]
    if len(variants) < 2:
        return notes
    others = [variant for variant in variants if variant is not reference]
    num_seeds = max(len(paired_runs(reference, variant)) for variant in others)
    seeds_differ = len({tuple(sorted(variant.by_seed)) for variant in variants}) > 1
    notes.append(interval_note(num_seeds, seeds_differ=seeds_differ))
    if seeds_differ:
        listed = "; ".join(
            f"{variant.title}: {', '.join(map(str, sorted(variant.by_seed)))}"
            for variant in variants
        )
        notes.append(
            f"Seeds ({listed}): a difference is over the seeds that both variants have, a row over "
            "all seeds of its variant."
        )
    if len(num_rates := {len(variant.rates) or 1 for variant in variants}) > 1:
        several = ", ".join(f"{v.title} ({len(v.rates)})" for v in variants if v.rates)
        notes.append(
            f"Up to {max(num_rates)} learning rates were tried: {several}; the other variants have "
            "one, a handicap."
        )
    if sum(not v.uses_text and not v.uses_long_tail_method for v in variants) > 1:
        notes.append(
            f"Differences are against {reference.title}, of the variants without text or long-tail "
            "method the most accurate on validation."
        )
    notes += [
        f"{variant.title} differs from {reference.title} in: {differences}."
        for variant in others
        if (differences := config_differences(run, variant.first_run))
    ]
    return notes


def interval_note(num_seeds: int, *, seeds_differ: bool) -> str:
    """Says what the intervals of differences cover.

    Args:
      num_seeds: most seeds of a difference.
      seeds_differ: whether some differences are over fewer seeds.

    Returns:
      A paragraph.
    """
    if num_seeds > 1:
        scope = (
            f" and {'up to ' if seeds_differ else ''}{num_seeds} seeds; with few seeds it is too "
            "narrow."
        )
    else:
        scope = "; with one seed each the interval does not cover the variance between trainings."
    return (
        "Differences are paired, photo by photo, with a 95 % bootstrap interval over photos"
        f"{scope} {UNCERTAIN} marks intervals that contain zero: no difference is shown."
    )


def catalog_section(run: FinishedRun, out: Path) -> list[Block]:
    """Shows the data set: its table and the histogram of its classes.

    Args:
      run: run that was trained on it.
      out: folder for the figure.

    Returns:
      Blocks of the section.
    """
    facts = run.results.get("catalog")
    word_counts = None
    if facts and facts["word_counts"]:
        word_counts = np.repeat(*np.array(facts["word_counts"]).T)
    path = out / "class_histogram.png"
    figures.plot_histogram(
        run.test_set.class_counts, run.head_boundary, path, word_counts=word_counts
    )
    table = tables.catalog_table(run)
    figure = Figure(path.name, "training photos per class and occurrences per word")
    return [Heading("Catalogue"), *([table] if table else []), figure]


def paper_section(run: FinishedRun) -> list[Block]:
    """Shows the SICoT paper's results on the same data set.

    Args:
      run: run that was trained on it.

    Returns:
      Blocks of the section.
    """
    table = paper_table((run.results.get("catalog") or {}).get("name", ""))
    return [Heading("The paper's results on this data set"), table] if table else []


def encoder_section(variants: Sequence[VariantRuns], reference: VariantRuns) -> list[Block]:
    """Compares text encoders.

    Args:
      variants: all variants of a report.
      reference: variant that gains are measured against.

    Returns:
      Blocks of the section.
    """
    table = tables.encoder_table(variants, reference)
    return [Heading("Text encoders"), table] if table else []


def added_text_section(variants: Sequence[VariantRuns], reference: VariantRuns) -> list[Block]:
    """Shows what text adds to long-tail methods.

    Args:
      variants: all variants of a report.
      reference: variant that gains are measured against.

    Returns:
      Blocks of the section.
    """
    table = tables.added_text_table(variants, reference)
    return [Heading("What text adds to long-tail methods"), table] if table else []


def changed_titles_section(variants: Sequence[VariantRuns], reference: VariantRuns) -> list[Block]:
    """Says whether gains by text are knowledge or regularisation, by training with other titles.

    Args:
      variants: all variants of a report.
      reference: variant that gains are measured against.

    Returns:
      Blocks of the section.
    """
    table = tables.changed_titles_table(variants)
    if table is None:
        return []
    notes = []
    for variant in variants:
        raw = counterpart_with_raw_titles(variant, variants)
        if raw is not None and str(variant.config["data.title"]).startswith("shuffled"):
            notes.append(Paragraph(_shuffled_titles_note(raw, variant, reference)))
    return [Heading("Shuffled and masked titles"), table, *notes]


def learning_rate_section(variants: Sequence[VariantRuns], reference: VariantRuns) -> list[Block]:
    """Shows the learning rates that a sweep tried, and differences that choose none.

    Args:
      variants: all variants of a report.
      reference: variant that gains are measured against.

    Returns:
      Blocks of the section.
    """
    blocks: list[Block] = []
    if table := tables.learning_rate_table(variants):
        note = (
            "Each variant has the rate that is best on validation, judged by the seeds that all of "
            "its rates have."
        )
        blocks += [Heading("Learning rates"), Paragraph(note), table]
    if table := tables.equal_rates_table(variants, reference):
        note = (
            "With few validation photos the choice of the rate is noise. These differences choose "
            "none: they are means over every rate that both variants were trained at, photo by "
            "photo, with intervals over photos and seeds."
        )
        blocks += [Heading("At equal learning rates"), Paragraph(note), table]
    return blocks


def post_hoc_section(
    variants: Sequence[VariantRuns], reference: VariantRuns, out: Path
) -> list[Block]:
    """Shows post-hoc adjustments of the reference and of the main uses of text.

    Args:
      variants: all variants of a report.
      reference: variant that gains are measured against.
      out: folder for the figure.

    Returns:
      Blocks of the section.
    """
    shown = dict.fromkeys([reference, *main_text_variants(variants, reference)])
    table = tables.post_hoc_table(list(shown))
    if table is None:
        return []
    note = (
        "The same runs with adjusted classifiers: log prior times tau subtracted from the logits "
        "(logit adjustment), or class weights divided by their norm to the power of tau "
        "(tau-norm); tau with the best class mean on validation."
    )
    adjusted = [v for v in variants if all(run.adjusted_hits for run in v.runs)]
    path = out / "trade_off.png"
    figures.plot_trade_off(_drawn_variants(adjusted, reference), path)
    figure = Figure(path.name, "head against tail accuracy over tau of the logit adjustment")
    return [Heading("Post-hoc adjustments"), Paragraph(note), table, figure]


def curve_section(
    variants: Sequence[VariantRuns], reference: VariantRuns, out: Path
) -> list[Block]:
    """Draws accuracy against class frequency, and validation accuracy through training.

    Args:
      variants: all variants of a report.
      reference: variant that gains are measured against.
      out: folder for the figures.

    Returns:
      Blocks of the section.
    """
    blocks: list[Block] = [Heading("Curves")]
    if len(reference.first_run.test_set.label):
        figures.plot_frequency(_drawn_variants(variants, reference), out / "frequency.png")
        blocks.append(Figure("frequency.png", "accuracy against training photos of the class"))
    validated = [v for v in variants if all(run.validation_log for run in v.runs)]
    if validated:
        figures.plot_learning(_drawn_variants(validated, reference), out / "learning.png")
        blocks.append(Figure("learning.png", "validation accuracy through the run"))
    if len(variants) > figures.MAX_LINES:
        note = (
            f"Figures show {figures.MAX_LINES} of the {len(variants)} variants; the table has all."
        )
        blocks.append(Paragraph(note))
    return blocks if len(blocks) > 1 else []


def confusion_section(variants: Sequence[VariantRuns], reference: VariantRuns) -> list[Block]:
    """Shows the head classes that tail photos are mistaken for.

    Args:
      variants: all variants of a report.
      reference: variant that gains are measured against.

    Returns:
      Blocks of the section, for the reference and the main uses of text.
    """
    blocks: list[Block] = []
    for variant in dict.fromkeys([reference, *main_text_variants(variants, reference)]):
        if table := tables.confusion_table(variant):
            blocks += [Paragraph(f"{variant.title}, {variant.first_run.name}:"), table]
    return [Heading("Head classes predicted for tail photos"), *blocks] if blocks else []


def attention_section(variants: Sequence[VariantRuns], reference: VariantRuns) -> list[Block]:
    """Shows the attention weights of title words (SICoT, Fig. 7).

    Args:
      variants: all variants of a report.
      reference: variant that gains are measured against.

    Returns:
      Blocks of the section, for the simplest variant that reads titles word by word.
    """
    with_attention = [v for v in variants if v.first_run.results.get("attention")]
    variant = simplest_text_variant(with_attention, reference)
    if variant is None:
        return []
    attention = variant.first_run.results["attention"]
    extremes = [
        f"{title}: "
        + ", ".join(f"{row['word']} ({row['weight']:.2f})" for row in attention[key])
        + "."
        for key, title in [("highest", "Highest mean weight"), ("lowest", "Lowest mean weight")]
        if attention[key]
    ]
    rows = [
        (row["class"], [(word, weight) for word, weight in row["words"]])
        for row in attention["titles"]
    ]
    note = "Words by attention weight, as a multiple of the equal weight."
    return [
        Heading("Attention over title words"),
        Paragraph(f"{variant.first_run.name}. {note}"),
        WeightedTitles(rows),
        *map(Paragraph, extremes),
    ]


def _length(variant: VariantRuns) -> tuple[object, ...]:
    fields = ("train.epochs", "train.steps", "train.batch_size", "optim.schedule")
    return tuple(variant.config[name] for name in fields)


def _shuffled_titles_note(raw: VariantRuns, shuffled: VariantRuns, reference: VariantRuns) -> str:
    source = (
        "other photos"
        if shuffled.config["data.title"] == "shuffled"
        else "other photos of the class"
    )
    raw_gains, shuffled_gains, raw_is_better = (
        variant_differences(a, b)["overall"][1] > 0
        for a, b in [(reference, raw), (reference, shuffled), (shuffled, raw)]
    )
    if shuffled_gains:
        return (
            f"{raw.title} gains overall with titles of {source} too ({shuffled.title}): "
            f"regularisation, not knowledge{'; its own titles gain more' if raw_is_better else ''}."
        )
    if not raw_gains:
        return (
            f"{raw.title} shows no gain over {reference.title} overall, with its own titles or "
            f"with those of {source}."
        )
    certainty = (
        "with a difference that is certain"
        if raw_is_better
        else "but the difference between the two is not certain"
    )
    return (
        f"{raw.title} gains overall with its own titles and not with those of {source}, "
        f"{certainty}."
    )


def _drawn_variants(variants: Sequence[VariantRuns], reference: VariantRuns) -> list[VariantRuns]:
    """As many as a figure has colours: the reference and the main uses of text first."""
    text = main_text_variants(variants, reference)
    ordered = sorted(variants, key=lambda v: (v is not reference, v not in text))
    return ordered[: figures.MAX_LINES]
