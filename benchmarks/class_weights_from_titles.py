"""How much of a finished classifier the titles of its classes tell, by a linear map that other
classes have taught.

python -m benchmarks.class_weights_from_titles RUN... (run folders, not records)

Each class row w_c of the run (brought to length 1) is predicted from the direction of the class's
mean title vector (`word_rows.class_words` times the word vectors, less the mean over classes) by
ridge regression on four fifths of the classes, and judged on the last fifth, in turn: R^2 = 1 - sum
|w_c - prediction|^2 / sum |w_c - mean row|^2 of the classes left out. 1: titles tell the row; 0:
nothing;
below: they mislead. Classes weigh min(photos, 20) in the fit. The penalty is the best of four for
  all classes, which flatters; the same with titles dealt out to other classes says by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.finished_runs import ENOUGH, GROUPS, catalog_of, class_groups, print_of_each
from sicot_jax import config
from sicot_jax.catalog.catalog import Catalog
from sicot_jax.classifier.shared_word_weights import class_words
from sicot_jax.config import Config
from sicot_jax.errors import InputError
from sicot_jax.parallel import mesh
from sicot_jax.training import run as runs

PENALTIES = (1.0, 10.0, 100.0, 1000.0)
FOLDS = 5


def predicted(
    titles: np.ndarray, rows: np.ndarray, counts: np.ndarray, penalty: float
) -> tuple[np.ndarray, np.ndarray]:
    """(rows predicted, mean row) of every class from the others' folds: [C, E], [C, D], [C] -> [C,
    D] each.
    """
    fold = np.random.default_rng(0).integers(0, FOLDS, len(rows))
    found, means = np.zeros_like(rows), np.zeros_like(rows)
    for left_out in range(FOLDS):
        fit = fold != left_out
        weight = np.minimum(counts, ENOUGH)[fit, None]
        mean = (weight * rows[fit]).sum(0) / weight.sum()
        x, y = titles[fit], rows[fit] - mean
        solved = np.linalg.solve(
            (weight * x).T @ x + penalty * np.eye(x.shape[1]), (weight * x).T @ y
        )
        found[~fit], means[~fit] = titles[~fit] @ solved + mean, mean
    return found, means


def explained(
    titles: np.ndarray, rows: np.ndarray, counts: np.ndarray, groups: dict[str, np.ndarray]
) -> dict[str, float]:
    """Group -> R^2 of its classes, at the penalty that is best for all."""

    def of(penalty: float) -> dict[str, float]:
        found, means = predicted(titles, rows, counts, penalty)
        error, spread = np.square(rows - found).sum(1), np.square(rows - means).sum(1)
        return {
            name: 1 - error[member].sum() / spread[member].sum() for name, member in groups.items()
        }

    return max((of(penalty) for penalty in PENALTIES), key=lambda found: found["all"])


def title_directions(catalog: Catalog, config: Config) -> np.ndarray:
    """float64 [C, E], of length 1, or zero for a class without a known word."""
    vectors = np.asarray(catalog.word_vectors, np.float64)
    words = class_words(catalog, config, len(vectors) - 1)
    known = words.any(1)
    if not known.any():
        return np.zeros((len(words), vectors.shape[1]))
    means = words @ vectors[1:]
    centred = np.where(known[:, None], means - means[known].mean(0), 0.0)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return centred / np.where(length > 1e-9, length, 1.0)


def measure(workdir: Path) -> list[list[str]]:
    run = runs.read_run(workdir)
    device_mesh = mesh.make_mesh(devices=jax.devices()[:1])
    run = runs.on_devices_here(run, device_mesh)
    if run.config.model.shared_word_weights:
        raise InputError(
            f"{workdir}: its rows hold words of titles; give a run with model.shared_word_weights=False"
        )
    catalog = catalog_of(run)
    with jax.set_mesh(device_mesh):
        _, state = runs.restore_finished(run, device_mesh)
    counts = catalog.classes.counts["train"]
    rows = np.asarray(state.classifier.kernel)[: len(counts)].astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    titles = title_directions(catalog, config.override_config(run.config, ["data.title=raw"]))
    groups = class_groups(catalog, run)
    dealt = titles[np.random.default_rng(1).permutation(len(titles))]
    table = []
    for name, given in {"its titles": titles, "titles of other classes": dealt}.items():
        found = explained(given, rows, counts, groups)
        table.append([f"{workdir}: {name}", *(f"{found[group]:.3f}" for group in groups)])
    return table


def main(argv: Sequence[str] | None = None) -> None:
    header = ["R^2 of classes left out", *GROUPS]
    print_of_each(
        argv,
        measure,
        description=__doc__,
        title="Classifier rows predicted from class titles",
        header=header,
    )


if __name__ == "__main__":
    main()
