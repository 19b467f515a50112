"""A report as a list of blocks, written as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path

from sicot_jax.common.text import markdown_table


@dataclasses.dataclass(frozen=True)
class Heading:
    """A heading of the level that Markdown counts in #."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table whose first `num_text_columns` columns hold text, the others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text_columns: int = 1


@dataclasses.dataclass(frozen=True)
class Figure:
    """A PNG file in the folder of the page; an HTML page embeds it."""

    file: str
    alt: str


@dataclasses.dataclass(frozen=True)
class WeightedTitles:
    """Titles with the attention weight of each word, a multiple of the equal weight.

    Attributes:
      rows: (class name, (word, weight) pairs), shown with the largest weight first.
    """

    rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]


Block = Heading | Paragraph | Table | Figure | WeightedTitles


def render_markdown(blocks: Sequence[Block]) -> str:
    """Renders blocks as Markdown.

    Args:
      blocks: content of a page in order.

    Returns:
      Markdown text with an empty line between blocks.
    """
    return "\n\n".join(map(_block_markdown, blocks)) + "\n"


def sort_by_weight(words: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Sorts words by weight.

    Args:
      words: (word, weight) pairs.

    Returns:
      The pairs, largest weight first.
    """
    return sorted(words, key=lambda pair: -pair[1])


def _block_markdown(block: Block) -> str:
    match block:
        case Heading():
            return "#" * block.level + " " + block.text
        case Paragraph():
            return block.text
        case Table():
            return markdown_table(block.header, block.rows, texts=block.num_text_columns)
        case Figure():
            return f"![{block.alt}]({block.file})"
        case WeightedTitles():
            return "\n".join(
                f"- {name}: "
                + " ".join(f"{word} ({weight:.2f})" for word, weight in sort_by_weight(words))
                for name, words in block.rows
            )


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; text-align: right; white-space: nowrap; }
th, td { border-bottom: 1px solid #e4e4e4; }
th.text, td.text { text-align: left; }
thead th { border-bottom: 2px solid #888; }
td.uncertain { color: #888; } td.up { color: #1a6b2d; } td.down { color: #a32020; }
img { max-width: 100%; }
.title { margin: .3rem 0; } .title small { color: #666; margin-right: .6rem; }
.title span { padding: .05rem .3rem; margin-right: .2rem; border-radius: .25rem; }
"""
_DIFFERENCE_CLASSES = {"~": "uncertain", "+": "up", "-": "down"}


def render_html(blocks: Sequence[Block], folder: Path, *, title: str) -> str:
    """Renders blocks as an HTML page that needs no other file.

    Args:
      blocks: content of the page in order.
      folder: folder of the figures' files.
      title: title of the page.

    Returns:
      HTML text.
    """
    body = "\n".join(_block_html(block, folder) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n"
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _block_html(block: Block, folder: Path) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
        case Paragraph():
            return f"<p>{escape(block.text)}</p>"
        case Table():
            return _table_html(block)
        case Figure():
            data = base64.b64encode((folder / block.file).read_bytes()).decode()
            return f'<p><img alt="{escape(block.alt)}" src="data:image/png;base64,{data}"></p>'
        case WeightedTitles():
            return "\n".join(
                f'<p class="title"><small>{escape(name)}</small>'
                + "".join(_word_html(word, weight) for word, weight in sort_by_weight(words))
                + "</p>"
                for name, words in block.rows
            )


def _table_html(table: Table) -> str:
    classes = [
        " class=text" if i < table.num_text_columns else "" for i in range(len(table.header))
    ]
    head = "".join(
        f"<th{attribute}>{escape(cell)}</th>"
        for attribute, cell in zip(classes, table.header, strict=True)
    )
    rows = "\n".join(
        "<tr>"
        + "".join(
            f"<td{attribute or _difference_class(cell)}>{escape(cell)}</td>"
            for attribute, cell in zip(classes, row, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _difference_class(cell: str) -> str:
    """Colours gains green, losses red, and uncertain differences grey."""
    kind = _DIFFERENCE_CLASSES.get(cell[:1]) if len(cell) > 1 else None
    return f" class={kind}" if kind else ""


def _word_html(word: str, weight: float) -> str:
    opacity = min(max(weight / 2, 0.0), 1.0)  # twice the equal weight has the full colour
    return (
        f'<span style="background: rgba(209, 73, 91, {opacity:.2f})" '
        f'title="{weight:.2f}">{escape(word)}</span>'
    )
