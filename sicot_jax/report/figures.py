"""Figures of the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def plot_histogram(class_counts: np.ndarray, head_boundary: int, path: Path) -> None:
    """Training photos per class, most frequent first, with the head/tail boundary (SICoT Fig. 6)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ordered = np.sort(class_counts)[::-1]
    total, head = len(ordered), int((ordered > head_boundary).sum())
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # One step for all classes of equal count, so that a million classes are some thousand; the tail begins at a step.
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    for name, first, last, colour in [("head", 0, head, "#d1495b"), ("tail", head, total, "#30638e")]:
        if first < last:
            label = f"{name}: {last - first:,} {'class' if last - first == 1 else 'classes'}"
            steps = starts[(first <= starts) & (starts < last)]
            values, edges = np.maximum(ordered[steps], 0.5), np.append(steps, last) + 0.5
            axes.stairs(values, edges, baseline=0.5, fill=True, color=colour, label=label)
    boundary = f"head: more than {head_boundary:,} photos"
    axes.axhline(head_boundary + 0.5, color="black", linewidth=0.8, linestyle="--", label=boundary)
    # Room for the legend above counts that do not fall. Of many classes the head is but a line on a linear axis.
    axes.set(yscale="log", ylim=(0.5, 6 * max(ordered[0], head_boundary, 1)), ylabel="training photos")
    axes.set(xscale="log" if total > 5000 else "linear", xlim=(0.5, total + 0.5), xlabel="class, most frequent first")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    if total <= 5000:
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    empty = int((ordered == 0).sum())
    without = f", {empty:,} without a photo" if empty else ""
    classes = f"{total:,} {'class' if total == 1 else 'classes'}"
    axes.set_title(f"{int(class_counts.sum()):,} training photos in {classes}{without}", fontsize=10)
    axes.legend(frameon=False, loc="upper right", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
