"""Compares the accuracy of runs, each with its difference to the first over the same photos."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sicot_jax.config import Config
from sicot_jax.report.differences import variant_differences
from sicot_jax.report.runs import read_run_folder
from sicot_jax.report.variant_roles import VariantRuns

HEADER = ("top-1", "top-3", "head", "tail", "class mean", "difference of top-1 to the first")


def with_one_validation(config: Config) -> Config:
    """Returns the config with one validation, at the end.

    So the last state is tested, of the same step for all runs.
    """
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, evaluate_every_epochs=1e6)
    )


def accuracy_row(workdir: Path, results: dict[str, Any], first: Path) -> tuple[str, ...]:
    """Returns the cells under `HEADER`, in per cent; the difference with its 95 % interval."""
    accuracy = results["accuracy"]
    before, now = (VariantRuns(path.name, (read_run_folder(path),)) for path in (first, workdir))
    difference, low, high = variant_differences(before, now)["overall"]
    return (
        f"{accuracy['overall']['top1']:.2f}",
        f"{accuracy['overall']['top3']:.2f}",
        *(f"{accuracy[group]['top1']:.2f}" for group in ("head", "tail", "class_mean")),
        "" if workdir == first else f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]",
    )


def table_title(name: str, config: Config, results: dict[str, Any]) -> str:
    """Returns the title of the table: photos, steps, seed and hardware."""
    photos, steps = results["accuracy"]["overall"]["photos"], results["step_of_end"]
    return (
        f"{name}: {photos:,} test photos, {steps:,} steps, seed {config.seed}, "
        f"{results['hardware']}"
    )
