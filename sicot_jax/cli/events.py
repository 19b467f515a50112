"""`sicot events`: what visitors saw and did."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sicot_jax.cli.options import (
    add_bot_options,
    add_command,
    add_group,
    add_out_option,
    bot_limits,
)
from sicot_jax.events.store import PURCHASE_WEIGHT

if TYPE_CHECKING:
    from sicot_jax.cli.options import Commands


def add_events_commands(commands: Commands) -> None:
    """Adds `sicot events import`, `triplets` and `export`.

    Args:
      commands: sub-parsers object that the command is added to.
    """
    group = add_group(
        commands,
        "events",
        "import and export what visitors saw and did; make training triplets",
    )
    _add_import(group)
    _add_triplets(group)

    parser = add_command(
        group, "export", _export, "write all events as a Parquet file, for other systems"
    )
    parser.add_argument("--events", type=Path, required=True, help="file of sicot serve --events")
    add_out_option(parser, "file")


def _add_import(group: Commands) -> None:
    parser = add_command(
        group,
        "import",
        _import,
        "convert page-view logs of other systems to events, with a report of bad rows",
    )
    parser.add_argument(
        "logs",
        type=Path,
        nargs="+",
        help="CSV, JSONL, Parquet, or a file of sicot serve --events",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write, for events.parquet and report.md"
    )
    parser.add_argument(
        "--column",
        type=_pair,
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help="column of the log that holds a field; can be repeated",
    )
    parser.add_argument(
        "--kind-name",
        type=_pair,
        action="append",
        default=[],
        metavar="KIND=NAME",
        help="the log's name of impression, click or purchase; can be repeated",
    )
    parser.add_argument(
        "--time-unit",
        default="s",
        help="unit of numeric times since 1970: s (default), ms or us",
    )
    parser.add_argument(
        "--split", default="|", help="separator of SKUs in a list given as text (default: |)"
    )
    parser.add_argument(
        "--variant",
        default="imported",
        help="variant of the service, for logs without that column (default: imported)",
    )
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=0.05,
        help="refuse the logs if more than this share of rows is bad (default: 0.05)",
    )
    _add_resource_options(parser)


def _add_triplets(group: Commands) -> None:
    parser = add_command(
        group,
        "triplets",
        _triplets,
        "make training triplets (query, clicked, skipped) from events, with a report",
    )
    parser.add_argument(
        "events",
        type=Path,
        help="Parquet file, folder of sicot events import, or file of sicot serve --events",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="Parquet file to write; the report gets the same name with .md",
    )
    add_bot_options(parser)
    parser.add_argument(
        "--eta",
        type=float,
        help="examination propensity of position r is r^-eta; default: estimated from the log",
    )
    parser.add_argument(
        "--max-weight",
        type=float,
        default=10.0,
        help="largest inverse propensity weight of a click (default: 10)",
    )
    parser.add_argument(
        "--purchase-weight",
        type=float,
        default=PURCHASE_WEIGHT,
        help="clicks that a purchase counts as (default: 5)",
    )
    parser.add_argument(
        "--max-skips",
        type=int,
        default=10,
        help="positions above a click that count as examined and skipped (default: 10)",
    )
    parser.add_argument(
        "--products",
        type=Path,
        help="CSV, Parquet or JSON with columns sku, product: SKUs of one product are no negatives "
        "of each other",
    )
    _add_resource_options(parser)


def _add_resource_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-mb",
        type=int,
        default=1000,
        help="memory for tables; more goes to disk (default: 1000)",
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="default: one per core, if the memory has room"
    )


def _pair(text: str) -> tuple[str, str]:
    first, equals, second = text.partition("=")
    if not (first and equals and second):
        raise argparse.ArgumentTypeError(f"{text!r}, wanted two names with = between them")
    return first, second


def _import(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.events import logs
    from sicot_jax.events.log_readers import LogSettings

    settings = LogSettings(
        columns=dict(args.column),
        kinds={name: kind for kind, name in args.kind_name},
        time_unit=args.time_unit,
        split=args.split,
        variant=args.variant,
        max_bad_share=args.max_bad_share,
        memory_mb=args.memory_mb,
        threads=args.threads,
    )
    report = logs.import_logs(args.logs, args.out, settings)
    print(f"wrote {args.out / logs.EVENTS_FILE}: {report.summary()}")


def _triplets(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.events import triplets

    settings = triplets.TripletSettings(
        bot_limits=bot_limits(args),
        eta=args.eta,
        max_weight=args.max_weight,
        purchase_weight=args.purchase_weight,
        max_skips=args.max_skips,
        products=args.products,
        memory_mb=args.memory_mb,
        threads=args.threads,
    )
    print(f"wrote {args.out}: {triplets.make_triplets(args.events, args.out, settings).summary()}")


def _export(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.events.store import export_events

    print(f"wrote {args.out}: {export_events(args.events, args.out)} events")
