"""A report as a list of blocks, and the two ways it is written: Markdown and one self-contained
HTML page.
"""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Text:
    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """The first columns are text, the others figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


@dataclasses.dataclass(frozen=True)
class Figure:
    """A PNG beside the page; HTML holds it within."""

    file: str
    alt: str


@dataclasses.dataclass(frozen=True)
class Titles:
    """(what it is, its words with their weight as a multiple of equal weights); shown in the order
    of the weights.
    """

    rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]


Block = Heading | Text | Table | Figure | Titles


def markdown(blocks: Sequence[Block]) -> str:
    """Blocks with an empty line between them."""
    return "\n\n".join(map(_markdown_block, blocks)) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Heading():
            return "#" * block.level + " " + block.text
        case Text():
            return block.text
        case Table():
            return markdown_table(block.header, block.rows, texts=block.texts)
        case Figure():
            return f"![{block.alt}]({block.file})"
        case Titles():
            return "\n".join(
                f"- {what}: "
                + " ".join(f"{word} ({weight:.2f})" for word, weight in _ordered(words))
                for what, words in block.rows
            )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """Aligned columns, so that it reads well in a terminal too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row):
        return (
            "| "
            + " | ".join(
                f"{cell:<{w}}" if i < texts else f"{cell:>{w}}"
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            + " |"
        )

    rule = (
        "|"
        + "|".join(
            "-" * (w + 2) if i < texts else "-" * (w + 1) + ":" for i, w in enumerate(widths)
        )
        + "|"
    )
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th.text, td.text { text-align: left; }
thead th { border-bottom: 2px solid #888; }
td.uncertain { color: #888; } td.up { color: #1a6b2d; } td.down { color: #a32020; }
img { max-width: 100%; }
.title { margin: .3rem 0; } .title small { color: #666; margin-right: .6rem; }
.title span { padding: .05rem .3rem; margin-right: .2rem; border-radius: .25rem; }
"""


def html_page(blocks: Sequence[Block], folder: Path, *, title: str) -> str:
    """One file that needs no other: figures of `folder` are inside it."""
    body = "\n".join(_html_block(block, folder) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _html_block(block: Block, folder: Path) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
        case Text():
            return f"<p>{html.escape(block.text)}</p>"
        case Table():
            kinds = [" class=text" if i < block.texts else "" for i in range(len(block.header))]
            head = "".join(
                f"<th{k}>{html.escape(cell)}</th>"
                for k, cell in zip(kinds, block.header, strict=True)
            )
            rows = "\n".join(
                "<tr>"
                + "".join(
                    f"<td{k or _sign(c)}>{html.escape(c)}</td>"
                    for k, c in zip(kinds, row, strict=True)
                )
                + "</tr>"
                for row in block.rows
            )
            return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
        case Figure():
            data = base64.b64encode((folder / block.file).read_bytes()).decode()
            return f'<p><img alt="{html.escape(block.alt)}" src="data:image/png;base64,{data}"></p>'
        case Titles():
            return "\n".join(
                f'<p class="title"><small>{html.escape(what)}</small>'
                + "".join(_html_word(*w) for w in _ordered(words))
                + "</p>"
                for what, words in block.rows
            )


def _sign(cell: str) -> str:
    """Differences in green, red, or grey where the interval holds zero."""
    kind = {"~": "uncertain", "+": "up", "-": "down"}.get(cell[:1]) if len(cell) > 1 else None
    return f" class={kind}" if kind else ""


def _html_word(word: str, weight: float) -> str:
    share = min(max(weight / 2, 0.0), 1.0)  # twice the equal weight is as dark as it gets
    return f'<span style="background: rgba(209, 73, 91, {share:.2f})" title="{weight:.2f}">{html.escape(word)}</span>'


def _ordered(words: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    return sorted(words, key=lambda pair: -pair[1])
