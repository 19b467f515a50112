"""Builds sub-commands and the options that several of them share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sicot_jax.events.bots import BotLimits

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

# Runs a command from its parsed arguments and the `--config.a.b=value` overrides.
Handler = Callable[[argparse.Namespace, Sequence[str]], None]


def add_command(
    commands: Commands, name: str, handler: Handler, description: str
) -> argparse.ArgumentParser:
    """Adds a sub-command to a command.

    Args:
      commands: sub-parsers object that the command is added to.
      name: name of the sub-command.
      handler: runs it.
      description: text for `--help`, one sentence without a full stop.

    Returns:
      Its parser, to add options to.
    """
    parser = commands.add_parser(
        name, help=description, description=description, allow_abbrev=False
    )
    parser.set_defaults(run=handler)
    return parser


def add_group(commands: Commands, name: str, description: str) -> Commands:
    """Adds a sub-command that groups further sub-commands.

    Args:
      commands: sub-parsers object that the command is added to.
      name: name of the group.
      description: text for `--help`, one sentence without a full stop.

    Returns:
      The group's sub-commands, to add to.
    """
    parser = commands.add_parser(
        name, help=description, description=description, allow_abbrev=False
    )
    return parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")


def add_config_option(
    parser: argparse.ArgumentParser, *, required: bool = True, note: str = ""
) -> None:
    """Adds `--config`.

    Args:
      parser: parser of the command.
      required: whether it must be given.
      note: text for the help, about the default.
    """
    parser.add_argument(
        "--config",
        required=required,
        help=f"config file, bundled name or a run's config.json{note}; --config.a.b=VALUE "
        "overrides a field",
    )


def add_workdir_option(parser: argparse.ArgumentParser, what: str, *, named_after: str) -> None:
    """Adds an optional `--workdir`; see `default_workdir`.

    Args:
      parser: parser of the command.
      what: what the command writes there, for the help.
      named_after: what gives the default folder its name, for the help.
    """
    parser.add_argument(
        "--workdir",
        type=Path,
        help=f"{what} (default: runs/NAME, NAME being {named_after} without suffix)",
    )


def add_bot_options(parser: argparse.ArgumentParser) -> None:
    """Adds the limits beyond which a visitor counts as a bot, whose events are left out.

    Args:
      parser: parser of the command.
    """
    parser.add_argument(
        "--max-views-per-day",
        type=int,
        default=BotLimits.max_views_per_day,
        help="visitors with more result lists on a day are bots (default: 200)",
    )
    parser.add_argument(
        "--max-clicks-per-day",
        type=int,
        default=BotLimits.max_clicks_per_day,
        help="visitors with more clicks on a day are bots (default: 100)",
    )
    parser.add_argument(
        "--max-click-share",
        type=float,
        default=BotLimits.max_click_share,
        help="visitors who click a larger share of what they are shown on a day are bots "
        "(default: 0.5)",
    )
    parser.add_argument(
        "--min-interval",
        type=float,
        default=BotLimits.min_interval,
        help="visitors with a shorter median interval between events of a day, in seconds, are "
        "bots (default: 1)",
    )
    parser.add_argument(
        "--min-events",
        type=int,
        default=BotLimits.min_events,
        help="events of a day from which click share and interval are judged (default: 20)",
    )


def bot_limits(args: argparse.Namespace) -> BotLimits:
    """Returns the limits given by the options of `add_bot_options`.

    Args:
      args: parsed arguments.

    Returns:
      The limits.
    """
    return BotLimits(
        max_views_per_day=args.max_views_per_day,
        max_clicks_per_day=args.max_clicks_per_day,
        max_click_share=args.max_click_share,
        min_interval=args.min_interval,
        min_events=args.min_events,
    )


def add_distributed_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--distributed`.

    Args:
      parser: parser of the command.
    """
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="connect with the other processes of the same run before starting",
    )


def add_out_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds a required `--out` for something that must not exist yet.

    Args:
      parser: parser of the command.
      what: "file" or "folder".
    """
    parser.add_argument(
        "--out", type=Path, required=True, help=f"{what} to write, which must not exist"
    )


def default_workdir(args: argparse.Namespace) -> Path:
    """Returns the folder to write: `--workdir`, or one named after the manifest or config.

    Args:
      args: parsed arguments with `workdir`, `config` and perhaps `manifest`.

    Returns:
      The folder.
    """
    return args.workdir or Path("runs") / Path(getattr(args, "manifest", None) or args.config).stem
