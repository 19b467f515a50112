"""Blocks of a report (headings, tables, figures) and their rendering as Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sicot_jax.common.markdown import markdown_table


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
