"""Text helpers: plurals, one-line errors, Markdown tables, text without HTML markup."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_HIDDEN_MARKUP = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
# Of elements inside a word nothing remains; others separate words.
_INLINE_TAG = re.compile(
    r"</?(?:a|abbr|b|big|em|font|i|mark|small|span|strong|strike|sub|sup|u|wbr)"
    r"(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
# Only with its end: a title may name the size <S>.
_STRUCK = re.compile(r"<s(?:\s[^<>]*)?>(.*?)</s\s*>", re.DOTALL | re.IGNORECASE)
_BLOCK_TAG = re.compile(
    r"<!\[CDATA\[|\]\]>|</?(?:article|blockquote|body|br|center|code|dd|div|dl|dt|footer|h[1-6]|head|"
    r"header|hr|html|img|label|li|link|meta|nav|ol|p|pre|section|table|tbody|td|tfoot|th|thead|"
    r"title|tr|ul)(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
_MAX_ESCAPES = 3  # of text that was escaped again by each program it went through


def strip_markup(text: str) -> str:
    """Returns the text that HTML shows; text without tags and entities is returned as it is.

    Args:
      text: `<b>Salt &amp; Pepper</b><br/>Gr&uuml;n`; may have been escaped several times.

    Returns:
      `Salt & Pepper Grün`; angle brackets that are no tag of HTML, as in `5 < 6`, stay.
    """
    if "&" not in text and "<" not in text:
        return text
    shown = text
    for _ in range(_MAX_ESCAPES):
        unescaped = _ENTITY.sub(lambda match: html.unescape(match[0]), shown)
        if unescaped == shown:
            break
        shown = unescaped
    shown = _STRUCK.sub(r"\1", _HIDDEN_MARKUP.sub(" ", shown))
    shown = _BLOCK_TAG.sub(" ", _INLINE_TAG.sub("", shown))
    return text if shown == text else " ".join(shown.split())


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
