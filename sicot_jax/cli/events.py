"""The flags of `sicot events`; nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_events_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    help = "page-view logs of other systems as events of the service's schema, with a report of what was wrong"
    sub = kinds.add_parser("import", help=help, description=help, allow_abbrev=False)
    sub.set_defaults(run=_import_logs)
    sub.add_argument(
        "logs",
        type=Path,
        nargs="+",
        help="CSV, JSONL, Parquet, or the file of sicot serve --events",
    )
    sub.add_argument(
        "--out", type=Path, required=True, help="folder to make, with events.parquet and report.md"
    )
    sub.add_argument(
        "--column",
        type=_pair,
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help="a field's name in the log",
    )
    sub.add_argument(
        "--kind-word",
        type=_pair,
        action="append",
        default=[],
        metavar="KIND=WORD",
        help="the log's word for impression, click or purchase",
    )
    sub.add_argument(
        "--time-unit", default="s", help="of times that are numbers: s (default), ms, us since 1970"
    )
    sub.add_argument(
        "--split", default="|", help="between the SKUs of a list that is a text (default: |)"
    )
    sub.add_argument(
        "--variant", default="imported", help="of logs without that column (default: imported)"
    )
    sub.add_argument(
        "--max-bad-share", type=float, default=0.05, help="of rows, beyond which all is refused"
    )
    _add_limits(sub)

    help = "what was clicked rather than what, from events, as Parquet to learn from, with a report"
    sub = kinds.add_parser("triplets", help=help, description=help, allow_abbrev=False)
    sub.set_defaults(run=_triplets)
    sub.add_argument(
        "events",
        type=Path,
        help="Parquet, folder of sicot events import, or file of sicot serve --events",
    )
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        help="Parquet file to make; the report is beside it, as .md",
    )
    sub.add_argument(
        "--views-a-day", type=int, default=200, help="lists of a visitor; beyond that he is a bot"
    )
    sub.add_argument("--clicks-a-day", type=int, default=100, help="likewise")
    sub.add_argument(
        "--click-share",
        type=float,
        default=0.5,
        help="of things shown on a day, from --least clicks on",
    )
    sub.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        help="median between events of a day, from --least events on",
    )
    sub.add_argument("--least", type=int, default=20, help="events that share and pace are told by")
    sub.add_argument(
        "--eta",
        type=float,
        help="places are looked at as r^-eta, in place of an estimate from the log",
    )
    sub.add_argument(
        "--largest-weight", type=float, default=10.0, help="of a click, before that of a purchase"
    )
    sub.add_argument(
        "--purchase-weight", type=float, default=3.0, help="clicks that a purchase is worth"
    )
    sub.add_argument(
        "--reach", type=int, default=10, help="places above a click that count as looked at"
    )
    sub.add_argument(
        "--products", type=Path, help="CSV or Parquet with sku, product: what is the same product"
    )
    _add_limits(sub)

    help = "all events as a Parquet file, for ranking, learning and other systems"
    sub = kinds.add_parser("export", help=help, description=help, allow_abbrev=False)
    sub.set_defaults(run=_export_events)
    sub.add_argument("--events", type=Path, required=True, help="file of sicot serve --events")
    sub.add_argument("--out", type=Path, required=True, help="file to write, which must not exist")


def _add_limits(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--memory-mb", type=int, default=1000, help="of tables held in memory; more goes to disk"
    )
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


def _triplets(args: argparse.Namespace, _) -> None:
    from sicot_jax.events import triplets

    settings = triplets.TripletSettings(
        limits=triplets.Limits(
            views=args.views_a_day,
            clicks=args.clicks_a_day,
            click_share=args.click_share,
            seconds=args.seconds,
            least=args.least,
        ),
        eta=args.eta,
        largest_weight=args.largest_weight,
        purchase_weight=args.purchase_weight,
        reach=args.reach,
        products=args.products,
        memory_mb=args.memory_mb,
        threads=args.threads,
    )
    print(f"wrote {args.out}: {triplets.make_triplets(args.events, args.out, settings).summary()}")


def _export_events(args: argparse.Namespace, _) -> None:
    from sicot_jax.events.store import export_events

    print(f"wrote {args.out}: {export_events(args.events, args.out)} events")
