"""Trains variants x learning rates x seeds on one catalogue, each cell a run in a separate folder.

    variants.py -> configs -> train (one run each) -> run table -> report

The learning rate of a variant is the one with the best validation accuracy of the first seed; the
other seeds train with it. So a variant costs rates + seeds - 1 runs, and none is held to a rate
that suits another. A sweep that was stopped resumes; what is trained is not trained again.
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
from sicot_jax.experiments.variants import VARIANTS, make_variant
from sicot_jax.report.page import write_report
from sicot_jax.report.run_table import add_to_run_table, config_hash, read_run_table
from sicot_jax.report.runs import DIVERGED_FILE, FinishedRun, read_run_folder
from sicot_jax.training.loop import train
from sicot_jax.training.model import DataShape
from sicot_jax.training.provenance import triplets_hash
from sicot_jax.training.run import mesh_of_config
from sicot_jax.training.setup import make_setup
from sicot_jax.training.start import check_catalog


@dataclasses.dataclass(frozen=True)
class SweepGrid:
    """What a sweep trains.

    Attributes:
      variants: names of VARIANTS; one that starts from another's run comes after it.
      rates: factors of the config's learning rate.
      seeds: the learning rate of each variant is chosen with the first.
    """

    variants: Sequence[str]
    rates: Sequence[float]
    seeds: Sequence[int]

    @property
    def num_runs(self) -> int:
        """Runs of the complete sweep."""
        return len(self.variants) * (len(self.rates) + len(self.seeds) - 1)


@dataclasses.dataclass(frozen=True)
class SweepCell:
    """One run of a sweep.

    Attributes:
      variant: name of VARIANTS.
      config: the run's config.
      starts_from: cell whose run it starts from; None for random weights.
    """

    variant: str
    config: Config
    starts_from: SweepCell | None = None

    @property
    def folder(self) -> Path:
        """Run folder under the sweep's workdir, named by what differs between cells."""
        before = self.starts_from
        after = f"after_rate_{before.config.optim.learning_rate:g}" if before else ""
        rate = f"rate_{self.config.optim.learning_rate:g}"
        return Path(self.variant) / after / rate / f"seed_{self.config.seed}"

    def config_in(self, workdir: Path) -> Config:
        """Returns the config, with the folder of the run that it starts from.

        Args:
          workdir: folder of the sweep's run folders.

        Returns:
          The config.
        """
        if self.starts_from is None:
            return self.config
        source = workdir.resolve() / self.starts_from.folder
        model = dataclasses.replace(self.config.model, init_from=str(source))
        return dataclasses.replace(self.config, model=model)


def make_cell(
    config: Config,
    variant: str,
    rate: float,
    seed: int,
    *,
    starts_from: SweepCell | None = None,
) -> SweepCell:
    """Builds one cell of a sweep.

    Args:
      config: the sweep's config.
      variant: name of VARIANTS.
      rate: factor of the config's learning rate.
      seed: seed of the run.
      starts_from: cell whose run it starts from.

    Returns:
      The cell.

    Raises:
      ConfigError: a variant, rate or seed that this config cannot have.
    """
    chosen = make_variant(config, variant)
    learning_rate = float(f"{rate * chosen.optim.learning_rate:.6g}")
    optim = dataclasses.replace(chosen.optim, learning_rate=learning_rate)
    chosen = dataclasses.replace(chosen, optim=optim, seed=seed)
    return SweepCell(variant, chosen, starts_from)


def check_grid(config: Config, grid: SweepGrid) -> None:
    """Raises ConfigError before the first run for what would stop a later one.

    Args:
      config: the sweep's config.
      grid: what it trains.

    Raises:
      ConfigError: nothing to train, something twice, or a cell that this config cannot have.
    """
    options = {"variants": grid.variants, "rates": grid.rates, "seeds": grid.seeds}
    for name, values in options.items():
        if not values or len(set(values)) < len(values):
            raise ConfigError(
                f"--{name}={' '.join(map(str, values))}: wanted one or more, each once"
            )
    for position, name in enumerate(grid.variants):
        for rate in grid.rates:
            for seed in grid.seeds:
                make_cell(config, name, rate, seed)
        source = VARIANTS[name].starts_from
        if source and source not in grid.variants[:position]:
            raise ConfigError(
                f"variant {name} starts from runs of {source}; name {source} before it"
            )


def check_grid_with_catalog(catalog: Catalog, config: Config, grid: SweepGrid) -> None:
    """Raises InputError before the first run for what the catalogue lacks for a later one.

    Allocates nothing on the devices.

    Args:
      catalog: catalogue that the sweep trains on.
      config: the sweep's config.
      grid: what it trains.

    Raises:
      InputError: no validation photos to choose a rate by, or no test photos.
      ConfigError: a variant wants text, and the catalogue has none.
    """
    check_catalog(catalog, config)
    if len(grid.rates) > 1 and not len(catalog.splits["validation"]):
        raise InputError(
            f"{catalog.name} has no validation photos, and a learning rate is chosen by them; give "
            "one of --rates"
        )
    device_mesh = mesh_of_config(config)
    with jax.set_mesh(device_mesh):
        for name in grid.variants:
            make_setup(make_variant(config, name), DataShape.of(catalog), device_mesh)


def run_sweep(config: Config, grid: SweepGrid, *, workdir: Path, table: Path) -> list[str]:
    """Trains what is not trained yet and adds each run to a run table.

    A row of the table without its run folder, from another machine, counts as the run where config
    and data are the same. Runs go seed by seed, so that a sweep that is stopped has all variants at
    the seeds that it has. Seeds and learning rates of a variant share its compiled step, which is
    kept in `workdir`, or where JAX's compilation cache is already.

    Args:
      config: the sweep's config.
      grid: what it trains.
      workdir: folder of the run folders.
      table: the run table, made where it is missing.

    Returns:
      Names of the runs in the table.

    Raises:
      ConfigError: see `check_grid`.
      InputError: see `check_grid_with_catalog`.
      NotFinite: a variant diverges at every rate.
    """
    check_grid(config, grid)
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(workdir.resolve() / "compiled"))
    catalog = open_catalog(config.data)
    check_grid_with_catalog(catalog, config, grid)
    return [run.name for run in _Sweep(config, grid, catalog, workdir, table).run()]


class _Sweep:
    """A sweep in progress: counts its runs and keeps the best rate of each variant."""

    def __init__(
        self, config: Config, grid: SweepGrid, catalog: Catalog, workdir: Path, table: Path
    ):
        self.config, self.grid, self.catalog = config, grid, catalog
        self.workdir, self.table = workdir, table
        self.number = 0
        self.best_rate: dict[str, float] = {}
        # A row of the table has no weights to start from.
        self.sources = {VARIANTS[name].starts_from for name in grid.variants}
        self.rows = {run.name: run for run in read_run_table(table)} if table.exists() else {}

    def run(self) -> list[FinishedRun]:
        grid, finished = self.grid, []
        for name in grid.variants:
            finished += self._try_rates(name)
        for seed in grid.seeds[1:]:
            finished += [self._run_cell(name, self.best_rate[name], seed) for name in grid.variants]
        return finished

    def _try_rates(self, name: str) -> list[FinishedRun]:
        """Runs of a variant at all rates with the first seed; keeps the best rate."""
        rates, seed = self.grid.rates, self.grid.seeds[0]
        runs: dict[float, FinishedRun] = {}
        diverged = None
        for rate in rates:
            try:
                runs[rate] = self._run_cell(name, rate, seed)
            except NotFinite as error:  # a rate that is too high is a result
                print(f"{name} at {rate:g} times the learning rate: {error}", file=sys.stderr)
                diverged = error
        if diverged is not None and not runs:
            raise diverged
        self.best_rate[name] = (
            max(runs, key=lambda rate: runs[rate].best_validation_top1)
            if len(rates) > 1
            else rates[0]
        )
        return list(runs.values())

    def _run_cell(self, name: str, rate: float, seed: int) -> FinishedRun:
        self.number += 1
        source = VARIANTS[name].starts_from
        before = make_cell(self.config, source, self.best_rate[source], seed) if source else None
        cell = make_cell(self.config, name, rate, seed, starts_from=before)
        print(f"\n[{self.number}/{self.grid.num_runs}] {cell.folder}", file=sys.stderr)
        folder, config = self.workdir / cell.folder, cell.config_in(self.workdir)
        row = self.rows.get(cell.folder.as_posix())
        needs_weights = name in self.sources or source
        if (
            row is not None
            and not needs_weights
            and not folder.exists()
            and _is_same_run(row, config, self.catalog)
        ):
            print(
                f"{row.name}: finished elsewhere; its row in {self.table} is used", file=sys.stderr
            )
            return row
        _train_unless_diverged(config, folder, self.catalog)
        return record_run(folder, cell.folder.as_posix(), self.table)


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
        and row.triplets_hash == triplets_hash(config.data)
    )


def _train_unless_diverged(config: Config, folder: Path, catalog: Catalog) -> None:
    """Trains; raises NotFinite at once where a run of that very config is known to diverge."""
    path, stored = folder / DIVERGED_FILE, json.loads(json.dumps(config_to_dict(config)))
    if path.exists():
        diverged = read_json(path, "what a diverged run left behind")
        if diverged["config"] == stored:
            raise NotFinite(diverged["error"])
        path.unlink()
    try:
        train(config, folder, catalog=catalog)
    except NotFinite as error:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"error": str(error), "config": stored})
        raise


def compared_configs(config: Config) -> dict[str, Config]:
    """Returns the configs of a comparison, which differ in their use of text alone.

    Args:
      config: one that uses text.

    Returns:
      Name of the run -> config: "baseline", and "co_training" or "tag_prediction".

    Raises:
      ConfigError: the config uses no text.
    """
    if not (config.loss.with_text or config.model.shared_word_weights):
        raise ConfigError(
            "comparing needs a config that uses text, got loss.mixed and loss.tag_prediction 0 and "
            "model.shared_word_weights=False; set loss.mixed=1"
        )
    name = "co_training" if config.loss.with_semantic else "tag_prediction"
    return {"baseline": make_variant(config, "baseline"), name: config}


def compare(config: Config, workdir: Path) -> None:
    """Trains, evaluates and reports a config with text and its baseline; resumes what was stopped.

    Args:
      config: one that uses text.
      workdir: folder of the two run folders and of the report.

    Raises:
      ConfigError: the config uses no text.
      InputError: the catalogue has no title.
    """
    configs = compared_configs(config)
    catalog = open_catalog(config.data)
    if len(catalog.tokenizer.vocabulary) < 2:
        raise InputError(
            f"{catalog.name} has no title with a known word, and training with text wants some; "
            "add titles (by hand, or sicot import --titles-from RUN), keep rare words (sicot "
            "import --min-count=1, then sicot compare --config=base --config.data.path=DIR), or "
            "train the baseline alone: sicot train ... --config.loss.mixed=0 "
            "--config.loss.tag_prediction=0 --config.model.shared_word_weights=False"
        )
    for number, (name, chosen) in enumerate(configs.items(), 1):
        print(f"\n[{number}/{len(configs)}] {name.replace('_', '-')}", file=sys.stderr)
        train(chosen, workdir / name, catalog=catalog)
    print(write_report([workdir / name for name in configs], workdir / "report"))
    print(f"\nReport: {workdir / 'report' / 'report.md'}")
