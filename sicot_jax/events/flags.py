"""The flags of `sicot events`; nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_events_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    help = "all events as a Parquet file, for ranking, learning and other systems"
    sub = kinds.add_parser("export", help=help, description=help, allow_abbrev=False)
    sub.set_defaults(run=_export_events)
    sub.add_argument("--events", type=Path, required=True, help="file of sicot serve --events")
    sub.add_argument("--out", type=Path, required=True, help="file to write, which must not exist")


def _export_events(args: argparse.Namespace, _) -> None:
    from sicot_jax.events.store import export_events

    print(f"wrote {args.out}: {export_events(args.events, args.out)} events")
