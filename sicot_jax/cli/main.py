"""The `sicot` command: parses arguments, runs a sub-command and turns errors into exit codes.

Wrong input becomes one line on standard error and exit code 2. Sub-commands import what they need
when they run, so that the command line answers quickly.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from sicot_jax._version import __version__
from sicot_jax.cli.convert import add_convert_commands
from sicot_jax.cli.data import add_data_commands
from sicot_jax.cli.events import add_events_commands
from sicot_jax.cli.index import add_index_commands
from sicot_jax.cli.report import add_report_commands
from sicot_jax.cli.serve import add_serve_commands
from sicot_jax.cli.train import add_train_commands
from sicot_jax.errors import InputError, TrainingStopped

INPUT_ERROR, STOPPED, INTERRUPTED = 2, 3, 130


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all sub-commands."""
    parser = argparse.ArgumentParser(
        prog="sicot",
        description="Trains and serves product recognisers, on photos and titles.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sicot_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_data_commands(commands)
    add_train_commands(commands)
    add_report_commands(commands)
    add_convert_commands(commands)
    add_index_commands(commands)
    add_serve_commands(commands)
    add_events_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the `sicot` command.

    Args:
      argv: arguments; those of the process by default.

    Returns:
      Exit code: 0 done, 2 wrong input, 3 training stopped (by a signal, or a loss that is not
      finite), 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Overrides are not argparse's: their names come from the config.
    overrides = [a for a in argv if a.startswith("--config.")]
    args = make_parser().parse_args([a for a in argv if not a.startswith("--config.")])
    _quiet_libraries()
    try:
        if overrides and not hasattr(args, "config"):
            raise InputError(f"{overrides[0]} is for commands that take --config")
        _run(args, overrides)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except InputError as error:
        return _fail(args, str(error), INPUT_ERROR)
    except OSError as error:
        return _fail(args, f"{error.filename or ''}: {error.strerror or error}", INPUT_ERROR)
    except TrainingStopped as error:
        return _fail(args, str(error), STOPPED)
    return 0


def _run(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    if not getattr(args, "distributed", False):
        args.run(args, overrides)
        return
    from sicot_jax.parallel import distributed

    distributed.initialize()
    args.run(args, overrides)
    distributed.barrier("end of the command")  # the primary process may still write


def _fail(args: argparse.Namespace, message: str, code: int) -> int:
    print(f"sicot {args.command}: {message}", file=sys.stderr)
    return code


def _quiet_libraries() -> None:
    """Hides log lines of libraries that a user can do nothing about."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


if __name__ == "__main__":
    sys.exit(main())
