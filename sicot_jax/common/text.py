"""Text helpers: plurals, one-line errors, Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def pluralize(number: int, noun: str) -> str:
    """Returns a number with its noun in the singular or plural: "1 class", "2 classes", "3 photos".

    Args:
      number: how many.
      noun: noun in the singular.

    Returns:
      Number and noun.
    """
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{ending}"


def one_line(text: object, limit: int = 200) -> str:
    """Folds text to one line: every run of white space becomes one space.

    Args:
      text: any object with a text form.
      limit: characters that are kept.

    Returns:
      The line.
    """
    return " ".join(str(text).split())[:limit]


def one_line_error(error: BaseException, limit: int = 200) -> str:
    """Returns the message of an exception on one line, or its type where it has no message.

    Args:
      error: the exception, of a library whose messages may span lines.
      limit: characters that are kept.

    Returns:
      The line.
    """
    return one_line(error, limit) or type(error).__name__


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
