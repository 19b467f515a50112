"""The command line's structure: every command has help, and answers without heavy imports."""

import argparse
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sicot_jax.cli import main as cli
from sicot_jax.cli.options import bot_limits
from sicot_jax.events.bots import BotLimits


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


_LIMITS = BotLimits(
    max_views_per_day=7, max_clicks_per_day=6, max_click_share=0.25, min_interval=2.5, min_events=5
)
_LIMIT_OPTIONS = [
    *("--max-views-per-day=7", "--max-clicks-per-day=6", "--max-click-share=0.25"),
    *("--min-interval=2.5", "--min-events=5"),
]
_RANK = ["index", "rank", "--index=i", "--events", "e", "--queries=q"]


@pytest.mark.parametrize("command", [["events", "triplets", "e", "--out=o"], _RANK])
def test_triplets_and_ranker_have_the_same_bot_options(command):
    parser = cli.make_parser()
    assert bot_limits(parser.parse_args(command)) == BotLimits()
    assert bot_limits(parser.parse_args([*command, *_LIMIT_OPTIONS])) == _LIMITS


def test_ranker_is_given_the_bot_limits(monkeypatch, capsys):
    fit_ranker = pytest.importorskip("sicot_jax.indexing.fit_ranker")
    monkeypatch.setattr(fit_ranker, "fit_index_ranker", lambda *arguments: arguments[-1])
    assert cli.main([*_RANK, *_LIMIT_OPTIONS]) == 0
    assert capsys.readouterr().out == f"{_LIMITS}\n"
