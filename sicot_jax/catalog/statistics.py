"""Counts and what follows from them: head and tail, priors, shared words. Training photos only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def class_counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [C]: photos per class of int labels [N]. Raises ValueError on a label outside 0..C-1."""
    labels = np.asarray(labels)
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()}, wanted 0 to {num_classes - 1}"
        )
    return np.bincount(labels, minlength=num_classes).astype(np.int64)


def default_head_boundary(train_counts: np.ndarray) -> int:
    """The boundary b for which `count > b` is the smallest set of most frequent classes with half
    of the train photos.

    Classes of equal count stay together, so the set is the smallest such set that a boundary can
    express; b is the largest number that expresses it, one less than the smallest count in the
    head. Without photos b = 0.
    """
    ordered = np.sort(np.asarray(train_counts, dtype=np.int64))[::-1]
    total = int(ordered.sum())
    if total == 0:
        return 0
    last = int(np.searchsorted(2 * np.cumsum(ordered), total))
    return int(ordered[last]) - 1


def head_mask(train_counts: np.ndarray, head_boundary: int) -> np.ndarray:
    """bool [C]: True where a class has more training photos than the boundary."""
    return np.asarray(train_counts) > head_boundary


def log_prior(train_counts: np.ndarray) -> np.ndarray:
    """float64 [C]: log(n_c / sum n); a class without a training photo (discontinued, or only tested)
    counts as having one.

    With prior 0 it would leave the softmax, learn nothing, and win against what was trained; with
    no adjustment at all its prior would be 1, above that of any other.
    """
    counts = np.asarray(train_counts, dtype=np.float64)
    total = counts.sum()
    if total <= 0:
        raise ValueError(
            f"{int(total)} training photos, wanted at least 1; import a catalogue with a train split"
        )
    return np.log(np.maximum(counts, 1)) - np.log(total)


def shared_vocabulary(
    token_ids: Sequence[np.ndarray], labels: np.ndarray, head: np.ndarray
) -> Mapping[str, float]:
    """Words used by head classes, tail classes and both in the train titles, and both / either
    ("share", 0 if none).
    """
    head_words: set[int] = set()
    tail_words: set[int] = set()
    for ids, label in zip(token_ids, labels, strict=True):
        (head_words if head[label] else tail_words).update(ids.tolist())
    either = head_words | tail_words
    both = head_words & tail_words
    return {
        "head": len(head_words),
        "tail": len(tail_words),
        "both": len(both),
        "share": len(both) / len(either) if either else 0.0,
    }
