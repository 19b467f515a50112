"""The command line's structure: every command has help, and answers without heavy imports."""

import argparse
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sicot_jax.cli import main as cli


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """All parsers without sub-commands."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for group in groups:
        for child in group.choices.values():
            yield from parsers(child)
    if not groups:
        yield parser


def test_every_argument_has_help():
    for parser in parsers(cli.make_parser()):
        assert parser.description, parser.prog
        assert callable(parser.get_default("run")), parser.prog
        for action in parser._actions:
            assert action.help, (parser.prog, action.dest)
        assert parser.format_help()


@pytest.mark.parametrize("command", ["report", "evaluate", "convert", "index", "events"])
def test_a_group_needs_a_command(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([command])
    assert "the following arguments are required: COMMAND" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    program = (
        "import sys\nfrom sicot_jax.cli.main import make_parser\nmake_parser().format_help()\n"
        "heavy = {'jax', 'tensorflow_datasets', 'PIL', 'pyarrow', 'gensim', 'fastapi'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
