"""Text for messages: counts of nouns, and errors on one line."""

from __future__ import annotations


def pluralize(number: int, noun: str) -> str:
    """Returns a number with its noun in the singular or plural: "1 class", "2 classes", "3 photos".

    Args:
      number: how many.
      noun: in the singular.

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
