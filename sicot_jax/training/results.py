"""Accuracy of predictions, and the result files of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.catalog.catalog import Catalog
from sicot_jax.classifier.posthoc import POSTHOC_VARIANTS
from sicot_jax.common.files import atomic_file, write_json
from sicot_jax.config import Config
from sicot_jax.parallel import distributed
from sicot_jax.training.metrics import accuracy
from sicot_jax.training.predict import Predictions
from sicot_jax.training.provenance import class_table_hash

RESULTS_FORMAT = 1


def head_boundary(catalog: Catalog, config: Config) -> int:
    """Returns the number of training photos above which a class belongs to the head.

    Args:
      catalog: it has a default (half of the photos).
      config: `data.head_boundary` replaces it, unless negative.

    Returns:
      Number of photos.
    """
    return catalog.head_boundary if config.data.head_boundary < 0 else config.data.head_boundary


def summarize_accuracy(
    predictions: Predictions, catalog: Catalog, config: Config
) -> dict[str, Any]:
    """Returns the accuracy of predictions overall, for head and tail, and averaged over classes.

    Args:
      predictions: predictions of photos of this catalogue.
      catalog: counts of training photos.
      config: head boundary.

    Returns:
      As `metrics.accuracy`, in per cent.
    """
    return accuracy(
        predictions.label,
        predictions.top_classes,
        catalog.classes.counts["train"],
        head_boundary(catalog, config),
    )


def post_hoc_accuracy(
    predictions: Predictions, catalog: Catalog, config: Config
) -> dict[str, dict[str, float | None]]:
    """Returns the top-1 accuracy of every post-hoc variant, by which one of them is chosen.

    Args:
      predictions: predictions of validation photos, with `post_hoc`.
      catalog: counts of training photos.
      config: head boundary.

    Returns:
      Variant -> group ("overall", "head", "tail", "class_mean") -> per cent, None without a photo.
    """
    assert predictions.post_hoc is not None
    result = {}
    for name, classes in zip(POSTHOC_VARIANTS, predictions.post_hoc.T, strict=True):
        adjusted = dataclasses.replace(predictions, top_classes=classes[:, None])
        groups = summarize_accuracy(adjusted, catalog, config)
        result[name] = {group: row["top1"] for group, row in groups.items()}
    return result


def test_set_hash(predictions: Predictions) -> str:
    """Returns a hash that is equal for runs that were tested on the same photos and labels.

    Args:
      predictions: predictions of the test photos.

    Returns:
      SHA-256 of the sorted (photo, label) pairs, 64 hexadecimal digits.
    """
    pairs = sorted(
        f"{image}\t{label}"
        for image, label in zip(predictions.image_id, predictions.label, strict=True)
    )
    return hashlib.sha256("\n".join(pairs).encode()).hexdigest()


def write_results(
    workdir: Path,
    predictions: Predictions,
    catalog: Catalog,
    config: Config,
    *,
    split: str,
    info: dict[str, Any],
) -> dict[str, Any]:
    """Writes `predictions.npz` and `results.json` of a run, each atomically.

    Args:
      workdir: the run folder.
      predictions: predictions of the split's photos.
      catalog: catalogue that they are of.
      config: the run's config.
      split: name of the split.
      info: further entries of `results.json`.

    Returns:
      What `results.json` holds.
    """
    hashes = {"class_table": class_table_hash(catalog), "test_set": test_set_hash(predictions)}
    results = {
        "format": RESULTS_FORMAT,
        "split": split,
        "accuracy": summarize_accuracy(predictions, catalog, config),
        "head_boundary": head_boundary(catalog, config),
        "hashes": {"data": catalog.data_hash, **hashes},
        **info,
    }
    if distributed.is_primary():
        arrays = {name: value for name, value in vars(predictions).items() if value is not None}
        if predictions.post_hoc is not None:
            arrays["post_hoc_names"] = np.array(list(POSTHOC_VARIANTS))
        with atomic_file(workdir / "predictions.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                **arrays,
                train_counts=catalog.classes.counts["train"],
                hashes=json.dumps(hashes),
                format=RESULTS_FORMAT,
            )
        write_json(workdir / "results.json", results)
    return results


def accuracy_lines(results: dict[str, Any]) -> list[str]:
    """Returns the accuracies of a run as a small table for the terminal.

    Args:
      results: results, as returned by `write_results`.

    Returns:
      Lines of text.
    """
    lines = [f"{'':<12}{'top-1':>8}{'top-3':>8}{'photos':>9}{'classes':>9}"]
    for name, row in results["accuracy"].items():
        figures = "".join(
            "       -" if row[k] is None else f"{row[k]:8.2f}" for k in ("top1", "top3")
        )
        lines.append(f"{name.replace('_', ' '):<12}{figures}{row['photos']:>9}{row['classes']:>9}")
    return lines
