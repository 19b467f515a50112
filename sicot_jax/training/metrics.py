"""Accuracy overall, for head and tail classes, and averaged over classes, from predictions."""

from __future__ import annotations

from typing import Any

import numpy as np

from sicot_jax.catalog.statistics import head_mask
from sicot_jax.parallel.array_types import Bool, Int, Shaped


def accuracy(
    label: Int[np.ndarray, " N"],
    top_classes: Int[np.ndarray, "N K"],
    train_counts: Int[np.ndarray, " C"],
    head_boundary: int,
) -> dict[str, Any]:
    """Returns top-1 and top-3 accuracy in per cent, with the numbers of photos and classes.

    Args:
      label: class of each photo, int [N].
      top_classes: predicted classes, best first, int [N, K].
      train_counts: training photos per class, int [C].
      head_boundary: head = classes with more training photos than this.

    Returns:
      {"overall" | "head" | "tail" | "class_mean": {"top1", "top3", "photos", "classes"}}; a group
      without a photo has None for its accuracies.
    """
    hit1 = top_classes[:, 0] == label
    hit3 = (top_classes[:, :3] == label[:, None]).any(-1)
    in_head = head_mask(train_counts, head_boundary)[label]
    groups = {"overall": np.ones(len(label), bool), "head": in_head, "tail": ~in_head}
    result = {name: _group_accuracy(hit1, hit3, label, group) for name, group in groups.items()}
    photos = np.bincount(label, minlength=len(train_counts))
    is_tested = photos > 0
    per_class = [
        np.bincount(label, hit, len(train_counts))[is_tested] / photos[is_tested]
        for hit in (hit1, hit3)
    ]
    result["class_mean"] = {
        "top1": _percent(per_class[0]),
        "top3": _percent(per_class[1]),
        "photos": len(label),
        "classes": int(is_tested.sum()),
    }
    return result


def _percent(values: Shaped[np.ndarray, " N"]) -> float | None:
    return round(100 * float(np.mean(values)), 4) if len(values) else None


def _group_accuracy(
    hit1: Bool[np.ndarray, " N"],
    hit3: Bool[np.ndarray, " N"],
    label: Int[np.ndarray, " N"],
    group: Bool[np.ndarray, " N"],
) -> dict[str, Any]:
    return {
        "top1": _percent(hit1[group]),
        "top3": _percent(hit3[group]),
        "photos": int(group.sum()),
        "classes": len(np.unique(label[group])),
    }
