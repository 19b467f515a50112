"""Whole runs side by side: the accuracy of each, and its difference to the first over the same
photos.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sicot_jax.config import Config
from sicot_jax.report.differences import variant_differences
from sicot_jax.report.run_folder import read_run_folder
from sicot_jax.report.variant_groups import VariantRuns

HEADER = ("top-1", "top-3", "head", "tail", "class mean", "top-1 less the first's")


def tested_at_the_end(config: Config) -> Config:
    """One validation, at the end: what is tested is the last state, of the same step for all."""
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, evaluate_every_epochs=1e6)
    )


def row(workdir: Path, results: dict[str, Any], first: Path) -> tuple[str, ...]:
    """Cells under `HEADER`: per cent, and the difference with its 95 % interval over photos."""
    accuracy = results["accuracy"]
    before, now = (VariantRuns(path.name, (read_run_folder(path),)) for path in (first, workdir))
    gain, low, high = variant_differences(before, now)["overall"]
    return (
        f"{accuracy['overall']['top1']:.2f}",
        f"{accuracy['overall']['top3']:.2f}",
        *(f"{accuracy[group]['top1']:.2f}" for group in ("head", "tail", "class_mean")),
        "" if workdir == first else f"{gain:+.2f} [{low:+.2f}, {high:+.2f}]",
    )


def title(name: str, config: Config, results: dict[str, Any]) -> str:
    photos, steps = results["accuracy"]["overall"]["photos"], results["step_of_end"]
    return f"{name}: {photos:,} test photos, {steps:,} steps, seed {config.seed}, {results['hardware']}"
