"""Figures of a report, drawn with matplotlib into PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.report.differences import GroupDifferences
from sicot_jax.report.variant_roles import VariantRuns

# Okabe & Ito's palette, distinct for colour-blind readers and in print.
_COLORS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
MAX_LINES = len(_COLORS)
_DPI = 130
_LINEAR_CLASSES = 5000  # up to which a class axis is linear
_LOGIT_ADJUSTMENT = "logit_adjustment_"


def plot_histogram(
    class_counts: np.ndarray,
    head_boundary: int,
    path: Path,
    *,
    word_counts: np.ndarray | None = None,
) -> None:
    """Draws training photos per class with the head/tail boundary, and word counts (SICoT, Fig. 6).

    Args:
      class_counts: int [C], training photos per class.
      head_boundary: training photos above which a class belongs to the head.
      path: PNG file to write.
      word_counts: int [V], occurrences of each word in titles; no second panel without them.
    """
    figure, axes = _axes(7, 3.6) if word_counts is None else _axes(12, 3.6, 2)
    _plot_class_counts(axes[0], class_counts, head_boundary)
    if word_counts is not None:
        _plot_stairs(
            axes[1],
            np.sort(word_counts)[::-1],
            color="#5b8c5a",
            label=f"{len(word_counts):,} words",
        )
        axes[1].set(
            ylabel="occurrences in titles", xlabel="word, most frequent first", ylim=(0.5, None)
        )
        axes[1].set_title(
            f"{int(word_counts.sum()):,} words in titles, {len(word_counts):,} of them different",
            fontsize=10,
        )
    _save_png(figure, path)


def plot_frequency(variants: Sequence[VariantRuns], path: Path) -> None:
    """Draws top-1 against the training photos of the class, averaged over seeds.

    Args:
      variants: one line each, at most `MAX_LINES`; all tested on the same photos.
      path: PNG file to write; points are means over the photos of classes with 2^k to 2^(k+1) - 1
        training photos.
    """
    figure, (axes,) = _axes(7, 4)
    counts = np.maximum(variants[0].first_run.test_set.label_count, 1)
    bins = np.floor(np.log2(counts)).astype(int)
    used_bins, photos = np.unique(bins, return_counts=True)
    centers = [np.exp(np.mean(np.log(counts[bins == b]))) for b in used_bins]
    for variant, color in zip(variants, _COLORS, strict=False):
        hits = np.mean([run.top1_hits for run in variant.runs], 0)
        accuracy = [100 * hits[bins == b].mean() for b in used_bins]
        axes.plot(centers, accuracy, "o-", color=color, label=variant.title, ms=4)
    for x, number in zip(centers, photos, strict=True):
        at_bottom = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
        axes.annotate(f"{number:,}", (x, 0), fontsize=7, **at_bottom)
    boundary = variants[0].first_run.head_boundary + 0.5
    axes.axvline(boundary, color="black", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlabel="training photos of the class", ylabel="top-1, %")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.set_title(
        "accuracy against class frequency; below: test photos; dashed: head boundary", fontsize=10
    )
    axes.legend(frameon=False, fontsize=8)
    _save_png(figure, path)


def plot_trade_off(variants: Sequence[VariantRuns], path: Path) -> None:
    """Draws head against tail accuracy over the strength of the post-hoc logit adjustment.

    Args:
      variants: one line each, at most `MAX_LINES`, with adjusted hits.
      path: PNG file to write; a ring marks the classifier as trained.
    """
    figure, (axes,) = _axes(7, 4.6)
    names = variants[0].first_run.adjusted_hits
    taus = sorted(
        float(name.removeprefix(_LOGIT_ADJUSTMENT))
        for name in names
        if name.startswith(_LOGIT_ADJUSTMENT)
    )
    for variant, color in zip(variants, _COLORS, strict=False):
        adjusted = [variant.with_adjustment(f"{_LOGIT_ADJUSTMENT}{tau:g}") for tau in taus]
        tail, head = ([v.mean_accuracy(group) for v in adjusted] for group in ("tail", "head"))
        axes.plot(tail, head, "o-", color=color, label=variant.title, ms=3)
        zero = taus.index(0.0)
        axes.plot(tail[zero], head[zero], "o", color=color, mfc="none", ms=10)
    axes.set(xlabel="tail top-1, %", ylabel="head top-1, %")
    axes.set_title(
        f"logits less tau times log prior, tau from {taus[0]:g} to {taus[-1]:g}", fontsize=10
    )
    axes.legend(frameon=False, fontsize=8)
    _save_png(figure, path)


def plot_learning(variants: Sequence[VariantRuns], path: Path) -> None:
    """Draws validation top-1 through training, averaged over seeds.

    Args:
      variants: one line each, at most `MAX_LINES`, with validations.
      path: PNG file to write.
    """
    figure, (axes,) = _axes(7, 4)
    for variant, color in zip(variants, _COLORS, strict=False):
        curves = [np.array(run.validation_curve) for run in variant.runs]
        fractions = curves[0][:, 0]
        mean = np.mean([np.interp(fractions, *curve.T) for curve in curves], 0)
        axes.plot(100 * fractions, mean, ".-", ms=3, color=color, label=variant.title)
    axes.set(xlabel="% of the run", ylabel="validation top-1, %")
    axes.legend(frameon=False, fontsize=8)
    _save_png(figure, path)


def plot_gains(
    lines: Mapping[str, Sequence[tuple[float, GroupDifferences]]],
    path: Path,
    *,
    xlabel: str,
    ylabel: str,
) -> None:
    """Draws gains with their intervals against a number: overall, tail and class mean side by side.

    Args:
      lines: title of a variant -> its points (number, gains by group).
      path: PNG file to write.
      xlabel: what the number is.
      ylabel: what the gains are over.
    """
    figure, panels = _axes(11, 3.6, 3)
    numbers = sorted({value for points in lines.values() for value, _ in points})
    # Intervals of several variants must not cover each other.
    spacing = 0.012 * (numbers[-1] - numbers[0])
    for axes, group in zip(panels, ("overall", "tail", "class_mean"), strict=True):
        axes.axhline(0, color="black", linewidth=0.8)
        for i, ((title, points), color) in enumerate(zip(lines.items(), _COLORS[1:], strict=False)):
            offset = (i - (len(lines) - 1) / 2) * spacing
            values = np.array([value for value, _ in points]) + offset
            gain, low, high = np.array([gains[group] for _, gains in points]).T
            # Rounding may put a gain just outside its interval.
            error = np.maximum(0, [gain - low, high - gain])
            axes.errorbar(values, gain, error, fmt="o-", ms=4, capsize=2, color=color, label=title)
        axes.set(xlabel=xlabel, ylabel=ylabel, xticks=numbers)
        axes.set_title(group.replace("_", " "), fontsize=10)
    panels[0].legend(frameon=False, fontsize=8)
    _save_png(figure, path)


def _axes(width: float, height: float, count: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(1, count, i + 1) for i in range(count)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _save_png(figure: Any, path: Path) -> None:
    """Writes a figure in 256 colours, a third of the size of one in all colours."""
    from PIL import Image

    figure.set_dpi(_DPI)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(np.int32)
    codes = pixels @ np.array([1 << 16, 1 << 8, 1])
    colors, index, counts = np.unique(codes, return_inverse=True, return_counts=True)
    channels = np.stack([colors >> 16, colors >> 8 & 255, colors & 255], -1)
    # The most frequent colours stay exact, so those of lines and areas; blends take the nearest.
    palette = channels[np.argsort(-counts, stable=True)[:256]]
    nearest = [np.argmin(((palette - color) ** 2).sum(-1)) for color in channels]
    image = Image.fromarray(np.array(nearest, np.uint8)[index].reshape(codes.shape), "P")
    image.putpalette(palette.astype(np.uint8).tobytes())
    image.save(path, optimize=True)


def _plot_class_counts(axes: Any, class_counts: np.ndarray, head_boundary: int) -> None:
    ordered = np.sort(class_counts)[::-1]
    total, num_head = len(ordered), int((ordered > head_boundary).sum())
    for name, first, last, color in [
        ("head", 0, num_head, "#d1495b"),
        ("tail", num_head, total, "#30638e"),
    ]:
        if first < last:
            label = f"{name}: {last - first:,} {'class' if last - first == 1 else 'classes'}"
            _plot_stairs(axes, ordered, color=color, label=label, span=(first, last))
    boundary = f"head: more than {head_boundary:,} photos"
    axes.axhline(head_boundary + 0.5, color="black", linewidth=0.8, linestyle="--", label=boundary)
    # Leaves room for the legend above counts that do not fall.
    axes.set(ylim=(0.5, 6 * max(ordered[0], head_boundary, 1)), ylabel="training photos")
    axes.set(xlabel="class, most frequent first")
    num_empty = int((ordered == 0).sum())
    empty = f", {num_empty:,} without a photo" if num_empty else ""
    classes = f"{total:,} {'class' if total == 1 else 'classes'}"
    axes.set_title(f"{int(class_counts.sum()):,} training photos in {classes}{empty}", fontsize=10)
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def _plot_stairs(
    axes: Any,
    ordered: np.ndarray,
    *,
    color: str,
    label: str,
    span: tuple[int, int] | None = None,
) -> None:
    """Draws descending counts as filled steps; both axes are logarithmic for many of them."""
    from matplotlib.ticker import MaxNLocator

    total = len(ordered)
    first, last = span or (0, total)
    # One step for all of equal count, so that a million are some thousand; the tail begins a step.
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    steps = np.union1d(starts[(first <= starts) & (starts < last)], [first] if first < last else [])
    values, edges = np.maximum(ordered[steps], 0.5), np.append(steps, last) + 0.5
    axes.stairs(values, edges, baseline=0.5, fill=True, color=color, label=label)
    is_linear = total <= _LINEAR_CLASSES  # the head of more classes would be but a line
    axes.set(yscale="log", xscale="linear" if is_linear else "log", xlim=(0.5, total + 0.5))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    if is_linear:
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
