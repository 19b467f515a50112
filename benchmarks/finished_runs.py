"""Shares class groups and the command line among benchmarks of finished runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.timing import print_machine, print_table
from sicot_jax.catalog.catalog import Catalog
from sicot_jax.catalog.open import open_catalog
from sicot_jax.catalog.statistics import head_mask
from sicot_jax.training.results import head_boundary
from sicot_jax.training.run import Run, check_catalog_of_run

FEW_PHOTOS = 20  # classes with at most so many training photos form a group
CLASS_GROUPS = ("all", "head", "tail", f"{FEW_PHOTOS} photos or fewer")


def open_run_catalog(run: Run) -> Catalog:
    """Opens the catalogue that a run was trained on.

    Raises:
      InputError: it is missing or has other data.
    """
    catalog = open_catalog(run.config.data)
    check_catalog_of_run(run, catalog, "measure on the catalogue it was trained on")
    return catalog


def class_groups(catalog: Catalog, run: Run) -> dict[str, np.ndarray]:
    """Returns each of `CLASS_GROUPS` -> bool [C], of the classes with training photos."""
    counts = catalog.classes.counts["train"]
    head, known = head_mask(counts, head_boundary(catalog, run.config)), counts > 0
    return dict(
        zip(CLASS_GROUPS, (known, head, ~head & known, known & (counts <= FEW_PHOTOS)), strict=True)
    )


def print_run_table(
    argv: Sequence[str] | None,
    measure: Callable[[Path], list[list[str]]],
    *,
    description: str,
    title: str,
    header: Sequence[str],
) -> None:
    """Prints the rows of every run that the command line names, as one table."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    args = parser.parse_args(argv)
    print_machine()
    print_table(title, header, [row for run in args.runs for row in measure(run)])
