"""Figures of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.classifier.posthoc import ADJUSTMENTS
from sicot_jax.report.differences import mean_accuracy
from sicot_jax.report.variant_groups import Arm

# Okabe & Ito: told apart by colour-blind readers, and in print.
_COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
MOST_LINES = len(_COLOURS)


def _axes(width: float, height: float, count: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, count, place + 1) for place in range(count)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_histogram(
    class_counts: np.ndarray,
    head_boundary: int,
    path: Path,
    *,
    word_counts: np.ndarray | None = None,
) -> None:
    """Training photos per class, most frequent first, with the head/tail boundary; beside it times
    per word (SICoT Fig. 6).
    """
    figure, axes = _axes(7, 3.6) if word_counts is None else _axes(12, 3.6, 2)
    _photos_of_classes(axes[0], class_counts, head_boundary)
    if word_counts is not None:
        _stairs(axes[1], np.sort(word_counts)[::-1], "#5b8c5a", f"{len(word_counts):,} words")
        axes[1].set(
            ylabel="times in the titles read", xlabel="word, most frequent first", ylim=(0.5, None)
        )
        axes[1].set_title(
            f"{int(word_counts.sum()):,} words in titles, {len(word_counts):,} of them different",
            fontsize=10,
        )
    figure.savefig(path, dpi=130)


def _photos_of_classes(axes: Any, class_counts: np.ndarray, head_boundary: int) -> None:
    ordered = np.sort(class_counts)[::-1]
    total, head = len(ordered), int((ordered > head_boundary).sum())
    for name, first, last, colour in [
        ("head", 0, head, "#d1495b"),
        ("tail", head, total, "#30638e"),
    ]:
        if first < last:
            label = f"{name}: {last - first:,} {'class' if last - first == 1 else 'classes'}"
            _stairs(axes, ordered, colour, label, first=first, last=last)
    boundary = f"head: more than {head_boundary:,} photos"
    axes.axhline(head_boundary + 0.5, color="black", linewidth=0.8, linestyle="--", label=boundary)
    # Room for the legend above counts that do not fall.
    axes.set(ylim=(0.5, 6 * max(ordered[0], head_boundary, 1)), ylabel="training photos")
    axes.set(xlabel="class, most frequent first")
    empty = int((ordered == 0).sum())
    without = f", {empty:,} without a photo" if empty else ""
    classes = f"{total:,} {'class' if total == 1 else 'classes'}"
    axes.set_title(
        f"{int(class_counts.sum()):,} training photos in {classes}{without}", fontsize=10
    )
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def _stairs(
    axes: Any,
    ordered: np.ndarray,
    colour: str,
    label: str,
    *,
    first: int = 0,
    last: int | None = None,
) -> None:
    """Counts in falling order as filled steps, on a logarithmic axis; many of them on two."""
    from matplotlib.ticker import MaxNLocator

    total, last = len(ordered), len(ordered) if last is None else last
    # One step for all of equal count, so that a million are some thousand; the tail begins at a
    # step.
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    steps = np.union1d(starts[(first <= starts) & (starts < last)], [first] if first < last else [])
    values, edges = np.maximum(ordered[steps], 0.5), np.append(steps, last) + 0.5
    axes.stairs(values, edges, baseline=0.5, fill=True, color=colour, label=label)
    axes.set(yscale="log", xscale="log" if total > 5000 else "linear", xlim=(0.5, total + 0.5))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    if total <= 5000:  # of many the head is but a line on a linear axis
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def plot_frequency(arms: Sequence[Arm], path: Path) -> None:
    """Top-1 against training photos of the class: means over the test photos of classes from 2^k
    on, and over seeds.
    """
    figure, (axes,) = _axes(7, 4)
    counts = arms[0].first.tested.label_count
    bins = np.floor(np.log2(np.maximum(counts, 1))).astype(int)
    found, photos = np.unique(bins, return_counts=True)
    centres = [np.exp(np.mean(np.log(np.maximum(counts[bins == b], 1)))) for b in found]
    for arm, colour in zip(arms, _COLOURS, strict=False):
        hits = np.mean([run.tested.hits for run in arm.runs], 0)
        axes.plot(
            centres,
            [100 * hits[bins == b].mean() for b in found],
            "o-",
            color=colour,
            label=arm.title,
            ms=4,
        )
    for x, number in zip(centres, photos, strict=True):
        axes.annotate(
            f"{number:,}",
            (x, 0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=7,
        )
    axes.axvline(
        arms[0].first.results["head_boundary"] + 0.5, color="black", linewidth=0.8, linestyle="--"
    )
    axes.set(xscale="log", xlabel="training photos of the class", ylabel="top-1, %")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.set_title(
        "accuracy against class frequency; below: test photos; dashed: head boundary", fontsize=10
    )
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def plot_trade_off(arms: Sequence[Arm], path: Path) -> None:
    """Head against tail as the prior is taken away after training, tau from -1 to 1.5; a ring where
    nothing is changed.
    """
    figure, (axes,) = _axes(7, 4.6)
    for arm, colour in zip(arms, _COLOURS, strict=False):
        variants = [arm.variant(f"logit_adjustment_{tau:g}") for tau in ADJUSTMENTS]
        tail, head = ([mean_accuracy(v, group) for v in variants] for group in ("tail", "head"))
        axes.plot(tail, head, "o-", color=colour, label=arm.title, ms=3)
        zero = ADJUSTMENTS.index(0.0)
        axes.plot(tail[zero], head[zero], "o", color=colour, mfc="none", ms=10)
    axes.set(xlabel="tail top-1, %", ylabel="head top-1, %")
    axes.set_title("head against tail: log prior times tau taken away, tau -1 to 1.5", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def plot_learning(arms: Sequence[Arm], path: Path) -> None:
    """Validation top-1 through the run, the mean over seeds."""
    figure, (axes,) = _axes(7, 4)
    for arm, colour in zip(arms, _COLOURS, strict=False):
        curves = [np.array(run.validation) for run in arm.runs]
        shares = curves[0][:, 0]
        mean = np.mean([np.interp(shares, *curve.T) for curve in curves], 0)
        axes.plot(100 * shares, mean, ".-", ms=3, color=colour, label=arm.title)
    axes.set(xlabel="% of the run", ylabel="validation top-1, %")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def plot_gains(
    lines: Mapping[str, Sequence[tuple[float, Mapping[str, tuple[float, float, float]]]]],
    path: Path,
    *,
    xlabel: str,
    ylabel: str,
) -> None:
    """Gains of arms against a number, with their intervals: overall, tail and class mean side by
    side.

    Args:
      lines: title of an arm -> (number, group -> (gain in points, interval)) of every point.
    """
    figure, panels = _axes(11, 3.6, 3)
    numbers = sorted({value for points in lines.values() for value, _ in points})
    apart = 0.012 * (
        numbers[-1] - numbers[0]
    )  # so that intervals of several arms do not cover one another
    for axes, group in zip(panels, ("overall", "tail", "class_mean"), strict=True):
        axes.axhline(0, color="black", linewidth=0.8)
        for place, ((title, points), colour) in enumerate(
            zip(lines.items(), _COLOURS[1:], strict=False)
        ):
            values = (
                np.array([value for value, _ in points]) + (place - (len(lines) - 1) / 2) * apart
            )
            gain, low, high = np.array([gains[group] for _, gains in points]).T
            error = np.maximum(
                0, [gain - low, high - gain]
            )  # rounding may put a gain beside its interval
            axes.errorbar(values, gain, error, fmt="o-", ms=4, capsize=2, color=colour, label=title)
        axes.set(xlabel=xlabel, ylabel=ylabel, xticks=numbers)
        axes.set_title(group.replace("_", " "), fontsize=10)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
