"""Text of messages and tables."""

import pytest

from sicot_jax.common.text import (
    markdown_table,
    one_line,
    one_line_error,
    pluralize,
    strip_markup,
)


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<b>Salt &amp; Pepper</b><br/>Gr&uuml;n", "Salt & Pepper Gr\u00fcn"),
        ("Gr<b>\u00fcn</b>, 5&nbsp;kg", "Gr\u00fcn, 5 kg"),
        (
            "a &lt;b&gt;word&lt;/b&gt; escaped twice: Gr&amp;uuml;n",
            "a word escaped twice: Gr\u00fcn",
        ),
        ("<p>one</p><p class='x'>two</p><script>if (a<b) {}</script>", "one two"),
        ("<![CDATA[shoe]]><!-- <b>no</b> -->", "shoe"),
        ("&#214;l &#x26; Essig", "\u00d6l & Essig"),
    ],
)
def test_markup_becomes_the_text_that_it_shows(text, shown):
    assert strip_markup(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "5 < 6 & 7 > 2",
        "AT&T, R&D",
        "I <3 it",
        "<new>  two  blanks",
        "a&b;",
        '15" screen',
        "Shirt <S>",
    ],
)
def test_text_without_markup_stays(text):
    assert strip_markup(text) == text
