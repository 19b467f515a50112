"""Fills the command-line and HTTP reference from the code when the documentation is built."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from typing import Any

CLI_MARK, HTTP_MARK = "<!-- command line -->", "<!-- http -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the marks in a page by what the code says.

    Args:
        markdown: the page's text.

    Returns:
        The text with the generated reference in the place of a mark.
    """
    if CLI_MARK in markdown:
        from sicot_jax.cli.main import make_parser

        markdown = markdown.replace(CLI_MARK, "\n".join(_commands(make_parser(), "sicot")))
    if HTTP_MARK in markdown:
        markdown = markdown.replace(HTTP_MARK, "\n".join(_routes()))
    return markdown


def _commands(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    subcommands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not subcommands:
        yield f"## {name}\n\n{parser.description or ''}\n"
        yield f"```\n{parser.format_usage().removeprefix('usage: ').strip()}\n```\n"
        yield "| argument | meaning | default |\n|---|---|---|"
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction):
                yield _argument(parser, action)
        yield ""
    for action in subcommands:
        for subname, subparser in action.choices.items():
            yield from _commands(subparser, f"{name} {subname}")


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    names = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.dest}`"
    if action.choices:
        names += f" ({', '.join(f'`{choice}`' for choice in action.choices)})"
    default = "required" if action.required else ""
    if not action.required and action.default not in (None, False, argparse.SUPPRESS, [], ""):
        default = f"`{action.default}`"
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    return f"| {names} | {text.replace('|', chr(92) + '|')} | {default} |"


def _routes() -> Iterator[str]:
    from sicot_jax.serve.app import create_app
    from sicot_jax.serve.settings import ServiceSettings

    with tempfile.TemporaryDirectory() as index:  # not read before the service starts
        schema = create_app(ServiceSettings(index=index)).openapi()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield f"## {method.upper()} {path}\n\n{operation.get('summary', '')}\n"
            if operation.get("description"):
                yield operation["description"] + "\n"
            if parameters := operation.get("parameters"):
                yield "| parameter | where | meaning |\n|---|---|---|"
                for parameter in parameters:
                    meaning = parameter.get("description", "").replace("|", "\\|")
                    yield f"| `{parameter['name']}` | {parameter['in']} | {meaning} |"
                yield ""
            yield "| status | answer |\n|---|---|"
            for status, response in operation.get("responses", {}).items():
                yield f"| {status} | {response.get('description', '')} |"
            yield ""
