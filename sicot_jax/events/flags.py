"""The flags of `sicot events`; nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_events_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    help = "page-view logs of other systems as events of the service's schema, with a report of what was wrong"
    sub = kinds.add_parser("import", help=help, description=help, allow_abbrev=False)
    sub.set_defaults(run=_import_logs)
    sub.add_argument("logs", type=Path, nargs="+", help="CSV, JSONL, Parquet, or the file of sicot serve --events")
    sub.add_argument("--out", type=Path, required=True, help="folder to make, with events.parquet and report.md")
    sub.add_argument(
        "--column", type=_pair, action="append", default=[], metavar="FIELD=COLUMN", help="a field's name in the log"
    )
    sub.add_argument(
        "--kind-word",
        type=_pair,
        action="append",
        default=[],
        metavar="KIND=WORD",
        help="the log's word for impression, click or purchase",
    )
    sub.add_argument("--time-unit", default="s", help="of times that are numbers: s (default), ms, us since 1970")
    sub.add_argument("--split", default="|", help="between the SKUs of a list that is a text (default: |)")
    sub.add_argument("--variant", default="imported", help="of logs without that column (default: imported)")
    sub.add_argument("--max-bad-share", type=float, default=0.05, help="of rows, beyond which all is refused")
    _add_limits(sub)

    help = "all events as a Parquet file, for ranking, learning and other systems"
    sub = kinds.add_parser("export", help=help, description=help, allow_abbrev=False)
    sub.set_defaults(run=_export_events)
    sub.add_argument("--events", type=Path, required=True, help="file of sicot serve --events")
    sub.add_argument("--out", type=Path, required=True, help="file to write, which must not exist")


def _add_limits(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--memory-mb", type=int, default=1000, help="of tables held in memory; more goes to disk")
    sub.add_argument("--threads", type=int, default=0, help="default: as many as there are cores")


def _pair(text: str) -> tuple[str, str]:
    first, found, second = text.partition("=")
    if not (first and found and second):
        raise argparse.ArgumentTypeError(f"{text!r}, wanted two names with = between them")
    return first, second


def _import_logs(args: argparse.Namespace, _) -> None:
    from sicot_jax.events import logs

    settings = logs.LogSettings(
        columns=dict(args.column),
        kinds={word: kind for kind, word in args.kind_word},
        time_unit=args.time_unit,
        split=args.split,
        variant=args.variant,
        max_bad_share=args.max_bad_share,
        memory_mb=args.memory_mb,
        threads=args.threads,
    )
    report = logs.import_logs(args.logs, args.out, settings)
    print(f"wrote {args.out / logs.EVENTS_FILE}: {report.summary()}")


def _export_events(args: argparse.Namespace, _) -> None:
    from sicot_jax.events.store import export_events

    print(f"wrote {args.out}: {export_events(args.events, args.out)} events")
