"""Accuracy overall, for head and tail, and averaged over classes; from per-photo predictions, as
sums and counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sicot_jax.catalog.statistics import head_mask


def accuracy(
    label: np.ndarray, top_classes: np.ndarray, train_counts: np.ndarray, head_boundary: int
) -> dict[str, Any]:
    """Top-1 and top-3 in per cent with the number of photos (or classes) behind each figure.

    Args:
      label: int [N]; top_classes: int [N, K], best first; train_counts: int [C].
      head_boundary: head = classes with more training photos than this.

    Returns: {"overall" | "head" | "tail" | "class_mean": {"top1", "top3", "photos", "classes"}}; a
      group without a photo has None for its figures.
    """
    hit1 = top_classes[:, 0] == label
    hit3 = (top_classes[:, :3] == label[:, None]).any(-1)
    in_head = head_mask(train_counts, head_boundary)[label]
    groups = {"overall": np.ones(len(label), bool), "head": in_head, "tail": ~in_head}
    result = {name: _share(hit1, hit3, label, member) for name, member in groups.items()}
    photos = np.bincount(label, minlength=len(train_counts))
    tested = photos > 0
    per_class = [
        np.bincount(label, hit, len(train_counts))[tested] / photos[tested] for hit in (hit1, hit3)
    ]
    result["class_mean"] = {
        "top1": _percent(per_class[0]),
        "top3": _percent(per_class[1]),
        "photos": len(label),
        "classes": int(tested.sum()),
    }
    return result


def _percent(values: np.ndarray) -> float | None:
    return round(100 * float(np.mean(values)), 4) if len(values) else None


def _share(hit1, hit3, label, member) -> dict[str, Any]:
    return {
        "top1": _percent(hit1[member]),
        "top3": _percent(hit3[member]),
        "photos": int(member.sum()),
        "classes": len(np.unique(label[member])),
    }
