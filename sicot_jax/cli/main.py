"""The `sicot` command. Every sub-command is flags and one call; ConfigError and its like become one
line and exit code 2.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sicot_jax._version import __version__
from sicot_jax.errors import InputError, TrainingStopped

INPUT_ERROR, STOPPED, INTERRUPTED = 2, 3, 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sicot",
        description="Trains and serves recognisers of products, on photos and titles.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sicot_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    def config_arguments(
        sub: argparse.ArgumentParser, *, required: bool = True, note: str = ""
    ) -> None:
        sub.add_argument(
            "--config",
            required=required,
            help=f"config file, bundled name or a run's config.json{note}; --config.a.b=VALUE overrides a field",
        )

    def distributed_argument(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--distributed",
            action="store_true",
            help="this is one of several processes of one run: meet the others first",
        )

    def workdir_argument(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--workdir", type=Path, help="run folder; default runs/NAME of the config or manifest"
        )

    command_import = command(
        "import", _import, "import a manifest (CSV, Parquet, JSONL) or a folder per SKU"
    )
    from sicot_jax.catalog.importing.run import add_import_arguments

    add_import_arguments(command_import)

    sub = command("train", _train, "train one run and evaluate it; the same command resumes")
    config_arguments(sub)
    workdir_argument(sub)
    distributed_argument(sub)

    sub = command(
        "plan",
        _plan,
        "what a run of a config takes of each device, and what fits; nothing is allocated",
    )
    config_arguments(sub)
    sub.add_argument(
        "--devices",
        type=int,
        default=0,
        help="as many of the kind here, there or not; default: those here",
    )

    sub = command(
        "compare",
        _compare,
        "train and evaluate with and without text on one catalogue, write a report",
    )
    config_arguments(sub, required=False, note=" (default: generated, or base with --manifest)")
    workdir_argument(sub)
    sub.add_argument(
        "--manifest",
        type=Path,
        help="manifest or folder per SKU to import first, into WORKDIR/catalog (see sicot import)",
    )

    sub = command(
        "sweep",
        _sweep,
        "arms x learning rates x seeds on one catalogue, a run each, and their report; resumes",
    )
    config_arguments(sub)
    workdir_argument(sub)
    from sicot_jax.experiments.variants import ARMS

    sub.add_argument(
        "--arms",
        nargs="+",
        default=["baseline", "doubled_baseline", "co_training", "title_words"],
        metavar="ARM",
        help=f"of {', '.join(ARMS)} (default: baseline doubled_baseline co_training title_words)",
    )
    sub.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="X",
        help="times the config's learning rate; each arm takes the best on validation (default: 1)",
    )
    sub.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2"
    )
    sub.add_argument(
        "--run-table",
        type=Path,
        help="run table (Parquet) to add the runs to; default WORKDIR/runs.parquet",
    )

    sub = command(
        "evaluate",
        _evaluate,
        "evaluate a finished run's best checkpoint on the test split; `sicot evaluate search`: the index's search on it",
    )
    sub.add_argument(
        "what", nargs="?", choices=("run", "search"), default="run", help="default: run"
    )
    sub.add_argument("--workdir", type=Path, help="run: its folder")
    sub.add_argument(
        "--path",
        default="",
        help="run: where its catalogue is now, if it was moved; search: the catalogue",
    )
    sub.add_argument(
        "--index",
        type=Path,
        nargs="+",
        help="search: folders of sicot index build, of one seed each",
    )
    distributed_argument(sub)

    sub = command(
        "report",
        _report,
        "tables and figures from finished runs; `sicot report uv`: conversion from events",
    )
    sub.add_argument(
        "runs",
        type=Path,
        nargs="+",
        help='run folders, folders of them, or run tables; gains are against the best baseline. "uv": unique-visitor conversion',
    )
    sub.add_argument(
        "--out",
        type=Path,
        help="folder for report.md, report.html and figures; of runs it is needed",
    )
    sub.add_argument(
        "--select",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="of run tables: names of runs or of their folders, such as 'grocery_small/*/rate_0.1'",
    )
    sub.add_argument(
        "--over",
        metavar="FIELD",
        help="gains as a curve over a field of the config, for runs of several catalogues or settings",
    )
    sub.add_argument(
        "--events",
        type=Path,
        nargs="+",
        help="uv: files of sicot serve --events, one a machine, or folders of sicot events import",
    )
    sub.add_argument(
        "--kind",
        default="purchase",
        help="uv: what converts a visitor, purchase (default) or click",
    )
    sub.add_argument(
        "--control", default="", help="uv: variant that gains are over; default: the first by name"
    )

    sub = command(
        "convert",
        None,
        "weights from PyTorch, and runs to PyTorch; both sides are compared at the end",
    )
    from sicot_jax.cli import convert as flags

    flags.add_convert_arguments(sub)

    sub = command("index", None, "the product index of the service: build, change, check")
    from sicot_jax.cli.index import add_index_arguments

    add_index_arguments(sub)

    from sicot_jax.cli.serve import add_serve_arguments, add_serve_key_arguments

    add_serve_arguments(command("serve", None, "recognise photos over HTTP, with a page to try it"))
    add_serve_key_arguments(command("serve-key", None, "make an API key for sicot serve --keys"))

    from sicot_jax.cli.events import add_events_arguments

    add_events_arguments(
        command("events", None, "what visitors saw and did: import, export, triplets to learn from")
    )

    sub = command("export-arrays", _export_arrays, "write a config's catalogue as one array file")
    config_arguments(sub)
    sub.add_argument("--out", type=Path, required=True, help="file to write, e.g. fashion.npz")
    return parser


def _import(args: argparse.Namespace, _) -> None:
    from sicot_jax.catalog.importing.run import run_import

    titles = None
    if args.titles_from is not None:
        from sicot_jax.experiments.title_transfer import open_title_transfer

        titles = open_title_transfer(args.titles_from, path=args.titles_path)
    run_import(args, title_source=titles)


def _workdir(args: argparse.Namespace) -> Path:
    return args.workdir or Path("runs") / Path(getattr(args, "manifest", None) or args.config).stem


def _print_accuracy(results: dict) -> None:
    from sicot_jax.parallel import distributed
    from sicot_jax.training import evaluate

    if distributed.is_primary():
        print("\n".join(evaluate.accuracy_lines(results)))


def _train(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from sicot_jax import config
    from sicot_jax.training import loop as train

    _print_accuracy(train.train(config.load_config(args.config, overrides), _workdir(args)))


def _plan(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from sicot_jax import config
    from sicot_jax.catalog.open import open_catalog
    from sicot_jax.training.memory import report as plan_report
    from sicot_jax.training.model import DataShape

    chosen = config.load_config(args.config, overrides)
    for line in plan_report.plan_lines(
        chosen, DataShape.of(open_catalog(chosen.data)), devices=args.devices
    ):
        print(line, flush=True)  # the rest waits for a compiler


def _compare(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from sicot_jax import config
    from sicot_jax.experiments import compare

    args.config = args.config or ("base" if args.manifest else "generated")
    workdir = _workdir(args)
    if args.manifest:
        overrides = [
            f"--config.data.path={_imported(args.manifest, workdir / 'catalog')}",
            *overrides,
        ]
        overrides = ["--config.data.source=imported", *overrides]
    compare.compare(config.load_config(args.config, overrides), workdir)


def _sweep(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from sicot_jax import config
    from sicot_jax.experiments import sweep
    from sicot_jax.report import page

    workdir = _workdir(args)
    table = args.run_table or workdir / "runs.parquet"
    names = sweep.run(
        config.load_config(args.config, overrides),
        arms=args.arms,
        rates=args.rates,
        seeds=args.seeds,
        workdir=workdir / "runs",
        table=table,
    )
    print(page.write_report([table], workdir / "report", select=names))
    print(f"\nReport: {workdir / 'report' / 'report.md'}")


def _imported(manifest: Path, catalog: Path) -> Path:
    """`manifest` imported into `catalog`, unless that very import stands there."""
    from sicot_jax.catalog.importing.fingerprint import source_sha256
    from sicot_jax.catalog.importing.run import import_catalog
    from sicot_jax.catalog.sources.imported import read_import_source

    there = read_import_source(catalog)
    if there is None:
        print(import_catalog(manifest, catalog).report.summary(), file=sys.stderr)
    elif there["source_sha256"] != source_sha256(manifest):
        raise InputError(
            f"{manifest} or its photos changed since the import of {there['source']} into {catalog}; give another --workdir, "
            f"or remove {catalog.parent}"
        )
    return catalog


def _evaluate(args: argparse.Namespace, _) -> None:
    if args.what == "search":
        from sicot_jax.indexing import evaluate as evaluation

        if not args.index or not args.path:
            raise InputError("evaluate search: --index DIR... and --path CATALOG are needed")
        print(evaluation.evaluate(args.index, args.path))
        return
    from sicot_jax.training import loop as train

    if args.workdir is None:
        raise InputError("evaluate: --workdir RUN is needed")
    _print_accuracy(train.test(args.workdir, path=args.path))


def _report(args: argparse.Namespace, _) -> None:
    if args.runs == [Path("uv")]:
        from sicot_jax.events import conversion as uv

        if args.events is None:
            raise InputError("report uv: --events FILE is needed, the one of sicot serve")
        print(uv.report(args.events, kind=args.kind, control=args.control))
        return
    if args.out is None:
        raise InputError("report: --out DIR is needed, for the report and its figures")
    from sicot_jax.report import curve, page

    if args.over is not None:
        print(curve.write_curve(args.runs, args.out, field=args.over, select=args.select))
    else:
        print(page.write_report(args.runs, args.out, select=args.select))


def _export_arrays(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from sicot_jax import config
    from sicot_jax.catalog.open import open_catalog
    from sicot_jax.catalog.sources.resized import resize_catalog
    from sicot_jax.catalog.sources.arrays import write_array_file

    chosen = config.load_config(args.config, overrides)
    write_array_file(resize_catalog(open_catalog(chosen.data), chosen.preprocessing), args.out)
    path = shlex.quote(f"--config.data.path={args.out}")
    print(f"wrote {args.out}: train with --config.data.source=arrays {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 wrong input, 3 training stopped (signal or a loss that is not finite),
    130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Overrides are not argparse's: their names come from the config.
    overrides = [a for a in argv if a.startswith("--config.")]
    args = _parser().parse_args([a for a in argv if not a.startswith("--config.")])
    if overrides and not hasattr(args, "config"):
        print(
            f"sicot {args.command}: {overrides[0]} is for commands that take --config",
            file=sys.stderr,
        )
        return INPUT_ERROR
    _quiet()
    try:
        if not getattr(args, "distributed", False):
            args.run(args, overrides)
        else:
            from sicot_jax.parallel import distributed

            distributed.initialize()
            args.run(args, overrides)
            distributed.barrier("the end")  # the first may still write
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except InputError as error:
        print(f"sicot {args.command}: {error}", file=sys.stderr)
        return INPUT_ERROR
    except OSError as error:
        print(
            f"sicot {args.command}: {error.filename or ''}: {error.strerror or error}",
            file=sys.stderr,
        )
        return INPUT_ERROR
    except TrainingStopped as error:
        print(f"sicot {args.command}: {error}", file=sys.stderr)
        return STOPPED
    return 0


def _quiet() -> None:
    """Libraries log what a user can do nothing about."""
    import logging

    logging.getLogger("absl").setLevel(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


if __name__ == "__main__":
    sys.exit(main())
