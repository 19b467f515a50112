"""`sicot report runs` and `sicot report conversion`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sicot_jax.cli.options import add_command, add_group

if TYPE_CHECKING:
    from sicot_jax.cli.options import Commands


def add_report_commands(commands: Commands) -> None:
    """Adds `sicot report runs` and `sicot report conversion`.

    Args:
      commands: sub-parsers object that the command is added to.
    """
    group = add_group(
        commands, "report", "report on finished runs, or on conversion rates of the service"
    )

    parser = add_command(group, "runs", _report_runs, "write tables and figures of finished runs")
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        help="run folders, folders of them, or run tables; gains are over the best baseline",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for report.md, report.html and figures"
    )
    parser.add_argument(
        "--select",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="runs to read from run tables: names of runs or of their folders, such as "
        "'grocery_small/*/rate_0.1'",
    )
    parser.add_argument(
        "--x",
        metavar="FIELD",
        help="plot gains over a field of the config, for runs of several catalogues or settings",
    )

    parser = add_command(
        group,
        "conversion",
        _report_conversion,
        "compare the conversion rate of unique visitors between variants of the service",
    )
    parser.add_argument(
        "--events",
        type=Path,
        nargs="+",
        required=True,
        help="files of sicot serve --events, one per machine, or folders of sicot events import",
    )
    parser.add_argument(
        "--kind",
        default="purchase",
        help="event that counts as a conversion: purchase (default) or click",
    )
    parser.add_argument(
        "--control",
        default="",
        help="variant that the others are compared with; default: the first by name",
    )


def _report_runs(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.report.curve import write_curve
    from sicot_jax.report.page import write_report

    if args.x is not None:
        print(write_curve(args.runs, args.out, field=args.x, select=args.select))
    else:
        print(write_report(args.runs, args.out, select=args.select))


def _report_conversion(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.events.conversion import conversion_report

    print(conversion_report(args.events, kind=args.kind, control=args.control))
