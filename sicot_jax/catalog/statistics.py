"""Computes class counts, head and tail, class priors and the words that head and tail share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def class_counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns photos per class.

    Args:
      labels: int [N], class ids.
      num_classes: C.

    Returns:
      int64 [C].

    Raises:
      ValueError: a label outside 0..C-1.
    """
    labels = np.asarray(labels)
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()}, wanted 0 to {num_classes - 1}"
        )
    return np.bincount(labels, minlength=num_classes).astype(np.int64)


def default_head_boundary(train_counts: np.ndarray) -> int:
    """Returns the head boundary at which the head has half of the training photos.

    The head is the smallest set of most frequent classes with at least half of the photos; classes
    of equal count stay together.

    Args:
      train_counts: int [C], training photos per class.

    Returns:
      b such that `count > b` is the head: one less than the smallest count in the head, and 0
      without photos.
    """
    ordered = np.sort(np.asarray(train_counts, dtype=np.int64))[::-1]
    total = int(ordered.sum())
    if total == 0:
        return 0
    last = int(np.searchsorted(2 * np.cumsum(ordered), total))
    return int(ordered[last]) - 1


def head_mask(train_counts: np.ndarray, head_boundary: int) -> np.ndarray:
    """Returns which classes are head.

    Args:
      train_counts: int [C], training photos per class.
      head_boundary: a class with more photos is head.

    Returns:
      bool [C].
    """
    return np.asarray(train_counts) > head_boundary


def log_prior(train_counts: np.ndarray) -> np.ndarray:
    """Returns the log prior of each class, log(n_c / sum n).

    A class without a training photo (discontinued, or in the test split only) counts as having
    one: with prior 0 it would leave the softmax, learn nothing, and win against trained classes.

    Args:
      train_counts: int [C], training photos per class.

    Returns:
      float64 [C].

    Raises:
      ValueError: no training photo at all.
    """
    counts = np.asarray(train_counts, dtype=np.float64)
    total = counts.sum()
    if total <= 0:
        raise ValueError(
            f"{int(total)} training photos, wanted at least 1; "
            "import a catalogue with a train split"
        )
    return np.log(np.maximum(counts, 1)) - np.log(total)


def vocabulary_overlap(
    token_ids: Sequence[np.ndarray], labels: np.ndarray, head: np.ndarray
) -> Mapping[str, float]:
    """Counts the words that titles of head classes and of tail classes have in common.

    Args:
      token_ids: [N], int token ids of each training title.
      labels: int [N], class ids.
      head: bool [C].

    Returns:
      "head", "tail", "both": numbers of distinct words; "share": both / (head or tail), 0 without
      words.
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
