"""Arms x learning rates x seeds on one catalogue. Each cell is an ordinary run in its own folder;
what is done stays done.

    variants.py -> configs -> train (one run each) -> run table -> report

The learning rate of an arm is the one with the best validation accuracy of the first seed; the
other seeds train with it. So an arm costs rates + seeds - 1 runs, and no arm is held to a rate that
suits another.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from sicot_jax.catalog.catalog import Catalog
from sicot_jax.catalog.open import open_catalog
from sicot_jax.common.files import read_json, write_json
from sicot_jax.config import Config, ConfigError, config_to_dict, flatten_config
from sicot_jax.errors import InputError, NotFinite
from sicot_jax.experiments.variants import ARMS, arm
from sicot_jax.report.run_folder import DIVERGED_FILE, read_run_folder
from sicot_jax.report.run_table import add_to_run_table, config_hash, read_run_table
from sicot_jax.report.runs import FinishedRun
from sicot_jax.training import run as runs
from sicot_jax.training.loop import check_catalog, train
from sicot_jax.training.setup import make_setup
from sicot_jax.training.model import DataShape


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    arm: str
    config: Config
    after: Cell | None = None  # whose run it goes on from

    @property
    def folder(self) -> Path:
        """Under the sweep's workdir; says what differs."""
        after = f"after_rate_{self.after.config.optim.learning_rate:g}" if self.after else ""
        return (
            Path(self.arm)
            / after
            / f"rate_{self.config.optim.learning_rate:g}"
            / f"seed_{self.config.seed}"
        )

    def config_in(self, workdir: Path) -> Config:
        """Its config, told where the run is that it goes on from."""
        if self.after is None:
            return self.config
        model = dataclasses.replace(
            self.config.model, init_from=str(workdir.resolve() / self.after.folder)
        )
        return dataclasses.replace(self.config, model=model)


def cell(config: Config, name: str, rate: float, seed: int, *, after: Cell | None = None) -> Cell:
    """`rate` times the config's learning rate."""
    chosen = arm(config, name)
    optim = dataclasses.replace(
        chosen.optim, learning_rate=float(f"{rate * chosen.optim.learning_rate:.6g}")
    )
    return Cell(name, dataclasses.replace(chosen, optim=optim, seed=seed), after)


def check(
    config: Config, arms: Sequence[str], rates: Sequence[float], seeds: Sequence[int]
) -> None:
    """ConfigError before the first run for what would stop a later one."""
    for name, values in {"arms": arms, "rates": rates, "seeds": seeds}.items():
        if not values or len(set(values)) < len(values):
            raise ConfigError(
                f"--{name}={' '.join(map(str, values))}: wanted one or more, each once"
            )
    for place, name in enumerate(arms):
        for rate in rates:
            for seed in seeds:
                cell(config, name, rate, seed)
        if (before := ARMS[name].after) and before not in arms[:place]:
            raise ConfigError(f"arm {name} goes on from runs of {before}; name {before} before it")


def check_with(
    catalog: Catalog, config: Config, arms: Sequence[str], rates: Sequence[float]
) -> None:
    """InputError before the first run for what the catalogue lacks for a later one. Allocates
    nothing.
    """
    check_catalog(catalog, config)
    if len(rates) > 1 and not len(catalog.splits["validation"]):
        raise InputError(
            f"{catalog.name} has no validation photos, and a learning rate is chosen by them; give one of --rates"
        )
    device_mesh = runs.start_mesh(config)
    with jax.set_mesh(device_mesh):
        for name in arms:
            make_setup(arm(config, name), DataShape.of(catalog), device_mesh)


def run(
    config: Config,
    *,
    arms: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    workdir: Path,
    table: Path,
) -> list[str]:
    """Trains what is not trained yet and adds each run to a run table. Returns the runs' names.

    A row of the table without its run folder, from another machine, stands for the run where config
    and data are the same. Runs go seed by seed, so that a sweep that is stopped has all arms at the seeds that it
    has. Arms that go on from another one stand after it. Seeds and learning rates of an arm share
    its compiled step (`heads.Numbers`), which is kept in `workdir`, or where JAX's compilation
    cache is already.
    """
    check(config, arms, rates, seeds)
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(workdir.resolve() / "compiled"))
    catalog = open_catalog(config.data)
    check_with(catalog, config, arms, rates)
    total = len(arms) * (len(rates) + len(seeds) - 1)
    number = 0
    best: dict[str, float] = {}
    sources = {ARMS[name].after for name in arms}  # a row of the table has no weights to start from
    rows = {run.name: run for run in read_run_table(table)} if table.exists() else {}

    def one(name: str, rate: float, seed: int) -> FinishedRun:
        nonlocal number
        number += 1
        before = ARMS[name].after
        this = cell(
            config,
            name,
            rate,
            seed,
            after=cell(config, before, best[before], seed) if before else None,
        )
        print(f"\n[{number}/{total}] {this.folder}", file=sys.stderr)
        folder, row = workdir / this.folder, rows.get(this.folder.as_posix())
        if (
            row is not None
            and name not in sources
            and not before
            and not folder.exists()
            and _is_same_run(row, this.config_in(workdir), catalog)
        ):
            print(f"{row.name}: finished elsewhere; its row in {table} stands", file=sys.stderr)
            return row
        _train_or_recall(this.config_in(workdir), folder, catalog)
        return record_run(folder, this.folder.as_posix(), table)

    finished: list[FinishedRun] = []
    for name in arms:
        tried, diverged = {}, None
        for rate in rates:
            try:
                tried[rate] = one(name, rate, seeds[0])
            except NotFinite as error:  # a rate that is too high is an answer
                print(f"{name} at {rate:g} times the learning rate: {error}", file=sys.stderr)
                diverged = error
        if diverged is not None and not tried:
            raise diverged
        best[name] = (
            max(tried, key=lambda rate: tried[rate].best_validation_top1)
            if len(rates) > 1
            else rates[0]
        )
        finished += tried.values()
    finished += [one(name, best[name], seed) for seed in seeds[1:] for name in arms]
    return [run.name for run in finished]


def record_run(folder: Path, name: str, table: Path) -> FinishedRun:
    """Adds a finished run to a run table.

    Args:
      folder: run folder.
      name: name of the run in the table.
      table: run table to write, made where it is missing.

    Returns:
      The run under that name.
    """
    run = dataclasses.replace(read_run_folder(folder), name=name)
    add_to_run_table(table, [run])
    return run


def _is_same_run(row: FinishedRun, config: Config, catalog: Catalog) -> bool:
    fields = flatten_config(json.loads(json.dumps(config_to_dict(config))))
    return (
        config_hash(row.config) == config_hash(fields)
        and row.results["hashes"]["data"] == catalog.data_hash
        and row.triplets_hash == runs.triplets_hash(config.data)
    )


def _train_or_recall(config: Config, folder: Path, catalog: Catalog) -> None:
    """Train, unless that very config is known to diverge: raises NotFinite then, as when it does."""
    mark, written = folder / DIVERGED_FILE, json.loads(json.dumps(config_to_dict(config)))
    if mark.exists():
        known = read_json(mark, "what a diverged run left behind")
        if known["config"] == written:
            raise NotFinite(known["error"])
        mark.unlink()
    try:
        train(config, folder, catalog=catalog)
    except NotFinite as error:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(mark, {"error": str(error), "config": written})
        raise
