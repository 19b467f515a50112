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

from sicot_jax.arms import ARMS, arm
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


def cell(config: Config, name: str, rate: float, seed: int, *, init_from: str = "") -> Cell:
    """`rate` times the config's learning rate; `init_from` the run that an arm goes on from."""
    chosen = arm(config, name)
    optim = dataclasses.replace(chosen.optim, learning_rate=float(f"{rate * chosen.optim.learning_rate:.6g}"))
    model = dataclasses.replace(chosen.model, init_from=init_from or chosen.model.init_from)
    return Cell(name, dataclasses.replace(chosen, optim=optim, model=model, seed=seed))


def check(config: Config, arms: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> None:
    """ConfigError before the first run for what would stop a later one."""
    for name, values in {"arms": arms, "rates": rates, "seeds": seeds}.items():
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"--{name}={' '.join(map(str, values))}: wanted one or more, each once")
    for place, name in enumerate(arms):
        for rate in rates:
            for seed in seeds:
                cell(config, name, rate, seed)
        if (before := ARMS[name].after) and before not in arms[:place]:
            raise ConfigError(f"arm {name} goes on from runs of {before}; name {before} before it")


def run(
    config: Config, *, arms: Sequence[str], rates: Sequence[float], seeds: Sequence[int], workdir: Path, records: Path
) -> list[Path]:
    """Train what is not trained yet; a record of each run in `records` when it ends. Returns the records of the chosen rates.

    Runs go seed by seed, so that a sweep that is stopped has all arms at the seeds that it has. Arms that go on from
    another one stand after it.
    """
    check(config, arms, rates, seeds)
    catalog = open_catalog(config.data)
    total = len(arms) * (len(rates) + len(seeds) - 1)
    number = 0
    best: dict[str, float] = {}

    def one(name: str, rate: float, seed: int) -> Path:
        nonlocal number
        number += 1
        before = ARMS[name].after
        from_ = str(workdir / cell(config, before, best[before], seed).folder) if before else ""
        this = cell(config, name, rate, seed, init_from=from_)
        print(f"\n[{number}/{total}] {this.folder}", file=sys.stderr)
        train(this.config, workdir / this.folder, catalog=catalog)
        return write_record(workdir / this.folder, records / this.folder)

    chosen = []
    for name in arms:
        tried = {rate: one(name, rate, seeds[0]) for rate in rates}
        best[name] = max(tried, key=lambda rate: validation_top1(tried[rate])) if len(tried) > 1 else rates[0]
        chosen.append(tried[best[name]])
    return [*chosen, *(one(name, best[name], seed) for seed in seeds[1:] for name in arms)]


def validation_top1(record: Path) -> float:
    """The best validation accuracy of a finished run; InputError without one where a rate has to be chosen."""
    validation = read_finished(record).validation
    if not validation:
        raise InputError(f"{record}: no validation photos, and a learning rate is chosen by them; give one rate")
    return max(top1 for _, top1 in validation)
