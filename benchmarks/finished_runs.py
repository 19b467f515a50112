"""What the benchmarks over finished runs share: the groups of classes, the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.timing import print_machine, print_table
from sicot_jax.catalog.catalog import Catalog
from sicot_jax.catalog.open import open_catalog
from sicot_jax.catalog.statistics import head_mask
from sicot_jax.training import run as runs
from sicot_jax.training.evaluate import head_boundary

ENOUGH = 20  # photos; classes of so many and fewer are a group of their own
GROUPS = ("all", "head", "tail", f"{ENOUGH} photos or fewer")


def catalog_of(run: runs.Run) -> Catalog:
    """The one it was trained on, or InputError."""
    catalog = open_catalog(run.config.data)
    runs.check_data(run, catalog, "measure on the catalogue it was trained on")
    return catalog


def class_groups(catalog: Catalog, run: runs.Run) -> dict[str, np.ndarray]:
    """Each of GROUPS -> bool [C], of the classes with training photos."""
    counts = catalog.classes.counts["train"]
    head, known = head_mask(counts, head_boundary(catalog, run.config)), counts > 0
    return dict(zip(GROUPS, (known, head, ~head & known, known & (counts <= ENOUGH)), strict=True))


def print_of_each(
    argv: Sequence[str] | None,
    measure: Callable[[Path], list[list[str]]],
    *,
    description: str,
    title: str,
    header: Sequence[str],
) -> None:
    """The rows of every run that the command line names, as one table."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    args = parser.parse_args(argv)
    print_machine()
    print_table(title, header, [row for run in args.runs for row in measure(run)])
