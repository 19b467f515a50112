"""Text of messages and tables."""

import pytest

from sicot_jax.common.text import markdown_table, one_line, one_line_error, pluralize


@pytest.mark.parametrize(
    ("number", "noun", "wanted"),
    [(0, "photo", "0 photos"), (1, "class", "1 class"), (2, "class", "2 classes")],
)
def test_pluralize(number, noun, wanted):
    assert pluralize(number, noun) == wanted


def test_one_line():
    assert one_line(" a\n\tb  c ", 4) == "a b "
    assert one_line_error(ValueError("first\nsecond")) == "first second"
    assert one_line_error(KeyError()) == "KeyError"


def test_markdown_table():
    table = markdown_table(["name", "x"], [["a|b", "1.25"], ["longer", "-"]])
    assert table.splitlines() == [
        "| name   |    x |",
        "|--------|-----:|",
        "| a\\|b   | 1.25 |",
        "| longer |    - |",
    ]
