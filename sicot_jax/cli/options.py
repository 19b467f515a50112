"""Builds sub-commands and the options that several of them share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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


def add_workdir_option(parser: argparse.ArgumentParser) -> None:
    """Adds an optional `--workdir`.

    Args:
      parser: parser of the command.
    """
    parser.add_argument(
        "--workdir", type=Path, help="run folder; default: runs/NAME of the config or manifest"
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
    """Returns the run folder: `--workdir`, or one named after the manifest or config.

    Args:
      args: parsed arguments with `workdir`, `config` and perhaps `manifest`.

    Returns:
      The folder.
    """
    return args.workdir or Path("runs") / Path(getattr(args, "manifest", None) or args.config).stem
