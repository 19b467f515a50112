"""Arms x learning rates x seeds on one catalogue. Each cell is an ordinary run in its own folder; what is done stays done.

    arms.py -> configs -> train (one run each) -> records -> report

The learning rate of an arm is the one with the best validation accuracy of the first seed; the other seeds train with it.
So an arm costs rates + seeds - 1 runs, and no arm is held to a rate that suits another.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from sicot_jax.arms import arm
from sicot_jax.catalog.opening import open_catalog
from sicot_jax.config import Config, ConfigError
from sicot_jax.errors import InputError
from sicot_jax.report.finished import read_finished
from sicot_jax.report.record import write_record
from sicot_jax.train import train


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    arm: str
    config: Config

    @property
    def folder(self) -> Path:
        """Under the sweep's workdir; says what differs."""
        return Path(self.arm) / f"rate_{self.config.optim.learning_rate:g}" / f"seed_{self.config.seed}"


def cell(config: Config, name: str, rate: float, seed: int) -> Cell:
    """`rate` times the config's learning rate."""
    chosen = arm(config, name)
    optim = dataclasses.replace(chosen.optim, learning_rate=float(f"{rate * chosen.optim.learning_rate:.6g}"))
    return Cell(name, dataclasses.replace(chosen, optim=optim, seed=seed))


def check(config: Config, arms: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> None:
    """ConfigError before the first run for what would stop a later one."""
    for name, values in {"arms": arms, "rates": rates, "seeds": seeds}.items():
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"--{name}={' '.join(map(str, values))}: wanted one or more, each once")
    for name in arms:
        for rate in rates:
            for seed in seeds:
                cell(config, name, rate, seed)


def run(
    config: Config, *, arms: Sequence[str], rates: Sequence[float], seeds: Sequence[int], workdir: Path, records: Path
) -> list[Path]:
    """Train what is not trained yet; a record of each run in `records` when it ends. Returns the records of the chosen rates.

    Runs go seed by seed, so that a sweep that is stopped has all arms at the seeds that it has.
    """
    check(config, arms, rates, seeds)
    catalog = open_catalog(config.data)
    total = len(arms) * (len(rates) + len(seeds) - 1)
    number = 0

    def one(cell: Cell) -> Path:
        nonlocal number
        number += 1
        print(f"\n[{number}/{total}] {cell.folder}", file=sys.stderr)
        train(cell.config, workdir / cell.folder, catalog=catalog)
        return write_record(workdir / cell.folder, records / cell.folder)

    first = {name: [one(cell(config, name, rate, seeds[0])) for rate in rates] for name in arms}
    chosen = {name: max(found, key=validation_top1) if len(found) > 1 else found[0] for name, found in first.items()}
    best = {name: rates[first[name].index(record)] for name, record in chosen.items()}
    others = [one(cell(config, name, best[name], seed)) for seed in seeds[1:] for name in arms]
    return [*chosen.values(), *others]


def validation_top1(record: Path) -> float:
    """The best validation accuracy of a finished run; InputError without one where a rate has to be chosen."""
    validation = read_finished(record).validation
    if not validation:
        raise InputError(f"{record}: no validation photos, and a learning rate is chosen by them; give one rate")
    return max(top1 for _, top1 in validation)
