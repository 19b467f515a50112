"""`sicot train`, `plan`, `compare`, `sweep` and `evaluate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sicot_jax.cli.options import (
    add_command,
    add_config_option,
    add_distributed_option,
    add_group,
    add_workdir_option,
    default_workdir,
)
from sicot_jax.errors import InputError
from sicot_jax.experiments.variants import VARIANTS

if TYPE_CHECKING:
    from sicot_jax.cli.options import Commands

_DEFAULT_VARIANTS = ("baseline", "doubled_baseline", "co_training", "tag_prediction_shared_weights")


def add_train_commands(commands: Commands) -> None:
    """Adds `sicot train`, `plan`, `compare`, `sweep` and `evaluate`.

    Args:
      commands: sub-parsers object that the command is added to.
    """
    parser = add_command(
        commands, "train", _train, "train one run and evaluate it; the same command resumes it"
    )
    add_config_option(parser)
    add_workdir_option(parser, "run folder", named_after="the config's file name")
    add_distributed_option(parser)

    parser = add_command(
        commands,
        "plan",
        _plan,
        "estimate the memory and traffic of a run per device, without allocating anything",
    )
    add_config_option(parser)
    parser.add_argument(
        "--devices",
        type=int,
        default=0,
        help="number of devices of the attached kind, attached or not; default: those here",
    )

    parser = add_command(
        commands,
        "compare",
        _compare,
        "train and evaluate with and without text on one catalogue, and write a report",
    )
    add_config_option(parser, required=False, note=" (default: generated, or base with --manifest)")
    add_workdir_option(
        parser,
        "folder of the two run folders and of the report",
        named_after="the manifest's name, or else the config file's",
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        help="manifest or folder per SKU to import first, into WORKDIR/catalog (see sicot import)",
    )

    _add_sweep(commands)
    _add_evaluate(commands)


def _add_sweep(commands: Commands) -> None:
    parser = add_command(
        commands,
        "sweep",
        _sweep,
        "train variants x learning rates x seeds on one catalogue, and write a report; the same "
        "command resumes it",
    )
    add_config_option(parser)
    add_workdir_option(
        parser,
        "folder of the run folders, the run table and the report",
        named_after="the config file's name",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(_DEFAULT_VARIANTS),
        metavar="VARIANT",
        help=f"variants to train, of {', '.join(VARIANTS)} "
        f"(default: {' '.join(_DEFAULT_VARIANTS)})",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="X",
        help="factors of the config's learning rate; of each variant the best one on validation "
        "is reported (default: 1)",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2"
    )
    parser.add_argument(
        "--run-table",
        type=Path,
        help="Parquet table to add the runs to; default: WORKDIR/runs.parquet",
    )


def _add_evaluate(commands: Commands) -> None:
    group = add_group(commands, "evaluate", "evaluate a finished run, or the search of an index")

    parser = add_command(
        group, "run", _evaluate_run, "evaluate a run's best checkpoint on the test split"
    )
    parser.add_argument("--workdir", type=Path, required=True, help="run folder")
    parser.add_argument("--catalog", default="", help="its catalogue, if it was moved")
    add_distributed_option(parser)

    parser = add_command(
        group,
        "search",
        _evaluate_search,
        "search an index for the test photos of a catalogue, and report how often it answers "
        "right: with all modules, and with each module switched off in turn",
    )
    parser.add_argument(
        "--catalog", required=True, help="imported catalogue whose test photos are the queries"
    )
    parser.add_argument(
        "--index",
        type=Path,
        nargs="+",
        required=True,
        help="index folder, written by sicot index build; several, from runs that differ in their "
        "seed, are averaged",
    )


def _print_accuracy(results: dict[str, Any]) -> None:
    from sicot_jax.parallel import distributed
    from sicot_jax.training.results import accuracy_lines

    if distributed.is_primary():
        print("\n".join(accuracy_lines(results)))


def _train(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from sicot_jax.config import load_config
    from sicot_jax.training.loop import train

    _print_accuracy(train(load_config(args.config, overrides), default_workdir(args)))


def _plan(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from sicot_jax.catalog.open import open_catalog
    from sicot_jax.config import load_config
    from sicot_jax.training.memory.report import plan_lines
    from sicot_jax.training.model import DataShape

    config = load_config(args.config, overrides)
    shape = DataShape.of(open_catalog(config.data))
    for line in plan_lines(config, shape, devices=args.devices):
        print(line, flush=True)  # the rest waits for a compiler


def _compare(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from sicot_jax.config import load_config
    from sicot_jax.experiments.sweep import compare

    args.config = args.config or ("base" if args.manifest else "generated")
    workdir = default_workdir(args)
    if args.manifest:
        catalog = _imported(args.manifest, workdir / "catalog")
        overrides = [
            "--config.data.source=imported",
            f"--config.data.path={catalog}",
            *overrides,
        ]
    compare(load_config(args.config, overrides), workdir)


def _imported(manifest: Path, catalog: Path) -> Path:
    """Imports `manifest` into `catalog`, unless the same import is there already."""
    from sicot_jax.catalog.importing.photos import source_sha256
    from sicot_jax.catalog.importing.run import import_catalog
    from sicot_jax.catalog.sources.imported import read_import_source

    previous = read_import_source(catalog)
    if previous is None:
        print(import_catalog(manifest, catalog).report.summary(), file=sys.stderr)
    elif previous["source_sha256"] != source_sha256(manifest):
        raise InputError(
            f"{manifest} or its photos changed since the import of {previous['source']} into "
            f"{catalog}; give another --workdir, or remove {catalog.parent}"
        )
    return catalog


def _sweep(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from sicot_jax.config import load_config
    from sicot_jax.experiments.sweep import SweepGrid, run_sweep
    from sicot_jax.report.page import write_report

    workdir = default_workdir(args)
    table = args.run_table or workdir / "runs.parquet"
    grid = SweepGrid(args.variants, args.rates, args.seeds)
    config = load_config(args.config, overrides)
    names = run_sweep(config, grid, workdir=workdir / "runs", table=table)
    print(write_report([table], workdir / "report", select=names))
    print(f"\nReport: {workdir / 'report' / 'report.md'}")


def _evaluate_run(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.training.evaluate import evaluate_run

    _print_accuracy(evaluate_run(args.workdir, catalog_path=args.catalog))


def _evaluate_search(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.indexing.evaluate import evaluate_search

    print(evaluate_search(args.index, args.catalog))
