"""One spelling of a product number; what cannot be one, and what is doubtful."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sicot_jax.common.sku import SkuError, SkuReader, normalize_category, normalize_sku, read_sku
from sicot_jax.events.duckdb_engine import open_duckdb, sku_key_sql


@pytest.mark.parametrize(
    "text",
    [
        "St\u00fchle 1",
        "Stu\u0308hle 1",
        "St\u00fchle\u00a01",
        " St\u00fchle\u20091\u3000",
        "\u00a0Stu\u0308hle\u202f1",
    ],
)
def test_unicode_forms_and_kinds_of_blanks_are_one_key(text):
    assert normalize_sku(text) == read_sku(text) == "St\u00fchle 1"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (" Stu\u0308hle\u00a0 und \n Tische ", "St\u00fchle und Tische"),
        ("NULL", ""),
        ("#N/A", ""),
        (" ", ""),
        ("A > B", "A > B"),
    ],
)
def test_spelling_of_a_category(text, key):
    assert normalize_category(text) == key


@pytest.mark.parametrize("text", ["0012", "12", "1e5", "1E5", "1.10", "NA", "nan-1", "4E+1", "a b"])
def test_text_stays_as_it_is(text):
    assert read_sku(text) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("4.00638E+12", "SKU in scientific notation: '4.00638E+12', whose digits are lost"),
        ("4,00638E+12", "SKU in scientific notation"),
        ("4.006381333931e+12", "SKU in scientific notation"),
        *((word, "placeholder in place of a SKU") for word in ("nan", "#N/A", "NULL", "None")),
        *((word, "placeholder in place of a SKU") for word in ("#NV", "#WERT!", "[NULL]", "####")),
        *((word, "SKU in scientific notation") for word in ("4.00638133393E12", "4,006E12")),
        *((word, "placeholder in place of a SKU") for word in (" NaN ", "#REF!", "<NA>", "\\N")),
        ("x\u200by", "SKU with a line break, tab or invisible character"),
        ("x" * 257, "SKU too long"),
    ],
)
def test_what_cannot_be_a_sku(text, reason):
    with pytest.raises(SkuError, match=reason.replace("+", r"\+")):
        read_sku(text)


def test_doubtful_keys_are_named_once():
    skus = SkuReader()
    for text in (
        "A1",
        "A1",
        "NA",
        "4006381333931.0",
        '="0012"',
        "0012",
        "12",
        "a1",
        "\uff11\uff12",
    ):
        assert skus.key(text) == normalize_sku(text)
    alike = "differ from another only in case, blanks, width or leading zeros"
    assert skus.warnings() == [
        "SKUs that may stand for a missing one: 'NA'; check the source",
        "SKUs that are whole numbers with .0, as a program writes that took them for numbers: "
        "'4006381333931.0'; check the source",
        "SKUs that begin like a formula or quote of a spreadsheet: '=\"0012\"'; check the source",
        f"SKUs that {alike}: '0012' and '12', 'A1' and 'a1', '0012' and '\uff11\uff12'; check "
        "the source",
    ]


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=8))
def test_a_key_is_its_own_key(text):
    assert normalize_sku(normalize_sku(text)) == normalize_sku(text)


def test_sql_spells_as_python_does(tmp_path):
    blanks = "\u00a0\u1680\u2000\u2003\u200a\u202f\u205f\u3000 "
    texts = [f"{blank}Stu\u0308hle{blank}1{blank}" for blank in blanks] + [
        " a b ",
        "",
        "\u1e9b\u0323",
    ]
    with open_duckdb(tmp_path, memory_mb=200, threads=1) as database:
        rows = database.execute(
            f"SELECT {sku_key_sql('x')} FROM (SELECT unnest(?) AS x)", [texts]
        ).fetchall()
    assert [row[0] for row in rows] == [normalize_sku(text) for text in texts]
