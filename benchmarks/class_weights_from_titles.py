"""Measures how well class titles predict the classifier's rows, by a linear map over other classes.

Command:  python -m benchmarks.class_weights_from_titles RUN...        (run folders)

Each class row w_c of the run (scaled to length 1) is predicted from the direction of the class's
mean title vector (`shared_word_weights.class_word_shares` times the word vectors, less the mean
over classes) by ridge regression on four fifths of the classes, and tested on the last fifth, in
turn: R^2 = 1 - sum |w_c - prediction|^2 / sum |w_c - mean row|^2 of the classes left out. 1:
titles predict the row; 0: they say nothing; below: they mislead. Classes weigh min(photos, 20) in
the fit. The penalty is the best of four for all classes, which is optimistic; the same with titles
permuted among classes says by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.finished_runs import (
    CLASS_GROUPS,
    FEW_PHOTOS,
    class_groups,
    open_run_catalog,
    print_run_table,
)
from sicot_jax import config
from sicot_jax.catalog.catalog import Catalog
from sicot_jax.classifier.class_weights import class_word_shares
from sicot_jax.config import Config
from sicot_jax.errors import InputError
from sicot_jax.parallel import mesh
from sicot_jax.training.restore import restore_params
from sicot_jax.training.run import fit_run_to_devices, read_run

PENALTIES = (1.0, 10.0, 100.0, 1000.0)
FOLDS = 5


def cross_validated_rows(
    titles: np.ndarray, rows: np.ndarray, counts: np.ndarray, penalty: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns predicted rows and mean rows of every class from the others' folds, [C, D] each.

    `titles` are [C, E], `rows` [C, D] and `counts` training photos [C].
    """
    fold = np.random.default_rng(0).integers(0, FOLDS, len(rows))
    predictions, means = np.zeros_like(rows), np.zeros_like(rows)
    for number in range(FOLDS):
        in_fit = fold != number
        weight = np.minimum(counts, FEW_PHOTOS)[in_fit, None]
        mean = (weight * rows[in_fit]).sum(0) / weight.sum()
        x, y = titles[in_fit], rows[in_fit] - mean
        coefficients = np.linalg.solve(
            (weight * x).T @ x + penalty * np.eye(x.shape[1]), (weight * x).T @ y
        )
        predictions[~in_fit], means[~in_fit] = titles[~in_fit] @ coefficients + mean, mean
    return predictions, means


def r_squared_by_group(
    titles: np.ndarray, rows: np.ndarray, counts: np.ndarray, groups: dict[str, np.ndarray]
) -> dict[str, float]:
    """Returns group -> R^2 of its classes, at the penalty that is best for all."""

    def r_squared(penalty: float) -> dict[str, float]:
        predictions, means = cross_validated_rows(titles, rows, counts, penalty)
        error, variance = np.square(rows - predictions).sum(1), np.square(rows - means).sum(1)
        return {
            name: 1 - error[member].sum() / variance[member].sum()
            for name, member in groups.items()
        }

    return max(
        (r_squared(penalty) for penalty in PENALTIES), key=lambda predictions: predictions["all"]
    )


def title_directions(catalog: Catalog, config: Config) -> np.ndarray:
    """Returns float64 [C, E], of length 1, or zero for a class without a known word."""
    vectors = np.asarray(catalog.word_vectors, np.float64)
    words = class_word_shares(catalog, config, len(vectors) - 1)
    known = words.any(1)
    if not known.any():
        return np.zeros((len(words), vectors.shape[1]))
    means = words @ vectors[1:]
    centred = np.where(known[:, None], means - means[known].mean(0), 0.0)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return centred / np.where(length > 1e-9, length, 1.0)


def measure(workdir: Path) -> list[list[str]]:
    run = read_run(workdir)
    device_mesh = mesh.make_mesh(devices=jax.devices()[:1])
    run = fit_run_to_devices(run, device_mesh)
    if run.config.model.shared_word_weights:
        raise InputError(
            f"{workdir}: its rows are shared word weights; give a run with "
            "model.shared_word_weights=False"
        )
    catalog = open_run_catalog(run)
    with jax.set_mesh(device_mesh):
        model = restore_params(run, device_mesh)
    counts = catalog.classes.counts["train"]
    rows = np.asarray(model.classifier.weights.kernel)[: len(counts)].astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    titles = title_directions(catalog, config.override_config(run.config, ["data.title=raw"]))
    groups = class_groups(catalog, run)
    permuted = titles[np.random.default_rng(1).permutation(len(titles))]
    table = []
    for name, class_titles in {"its titles": titles, "titles of other classes": permuted}.items():
        r_squared = r_squared_by_group(class_titles, rows, counts, groups)
        table.append([f"{workdir}: {name}", *(f"{r_squared[group]:.3f}" for group in groups)])
    return table


def main(argv: Sequence[str] | None = None) -> None:
    header = ["R^2 of classes left out", *CLASS_GROUPS]
    print_run_table(
        argv,
        measure,
        description=__doc__,
        title="Classifier rows predicted from class titles",
        header=header,
    )


if __name__ == "__main__":
    main()
