"""Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """Formats a Markdown table with aligned columns, so that it reads well in a terminal too.

    Args:
      header: title of every column.
      rows: cells of every row, as many as titles.
      texts: leading columns that are aligned to the left; the others, of numbers, to the right.

    Returns:
      The lines of the table, without a final line break.
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    dashes = (
        "-" * (width + 2) if i < texts else "-" * (width + 1) + ":"
        for i, width in enumerate(widths)
    )
    return "\n".join([line(cells[0]), f"|{'|'.join(dashes)}|", *map(line, cells[1:])])
