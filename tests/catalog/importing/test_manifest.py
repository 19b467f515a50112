from __future__ import annotations

import decimal
import gzip
import json
import random
import re

import pyarrow as pa
import pytest
from helpers.damage import damaged_bytes, result_or_one_line
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import parquet

from sicot_jax.catalog.importing.manifest import read_manifest
from sicot_jax.catalog.importing.manifest_rows import (
    MANIFEST_COLUMNS,
    NO_BOX,
    DroppedRow,
    ManifestError,
    ManifestRow,
    SourceNotes,
)
from sicot_jax.common.table_files import TableError, read_table


def rows_of(tmp_path, text, name="m.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return list(read_manifest(path))


def test_values_stay_text(tmp_path):
    rows = rows_of(
        tmp_path, 'image,sku,title,price\na.jpg,0012,NA,1\nb.jpg,NA,"a, b\nc",2\nc.jpg,1e5,null,3\n'
    )
    assert [(row.sku, row.title) for row in rows] == [
        ("0012", "NA"),
        ("NA", "a, b\nc"),
        ("1e5", "null"),
    ]
    assert rows[0].role == "catalogue"
    assert rows[0].box == NO_BOX
    assert rows[0].split == ""


def test_byte_order_mark_and_all_columns(tmp_path):
    text = (
        "\ufeffimage,sku,title,tags,category,box,role,split\n"
        "a.jpg,S,t,u,c,0.1 0.2 0.5 1,query,test\n"
    )
    expected = ManifestRow("a.jpg", "S", "t", "u", "c", (0.1, 0.2, 0.5, 1.0), "query", "test")
    assert rows_of(tmp_path, text) == [expected]


def test_parquet_and_jsonl_read_like_csv(tmp_path):
    table = pa.table(
        {"image": ["a.jpg", "b.jpg"], "sku": ["0012", "7"], "title": ["NA", None], "other": [1, 2]}
    )
    parquet.write_table(table, tmp_path / "m.parquet")
    records = [
        {"image": "a.jpg", "sku": "0012", "title": "NA"},
        {"image": "b.jpg", "sku": 7, "title": None},
    ]
    from_json = rows_of(tmp_path, "\n".join(map(json.dumps, records)), "m.jsonl")
    assert list(read_manifest(tmp_path / "m.parquet")) == from_json
    assert [(row.sku, row.title) for row in from_json] == [("0012", "NA"), ("7", "")]


def test_parquet_lists_read_like_those_of_jsonl(tmp_path):
    columns = {"image": ["a", "b"], "sku": [1, 2], "tags": [["x", None, "y"], None]}
    for box in (pa.list_(pa.float32()), pa.list_(pa.float64(), 4)):
        boxes = pa.array([[0, 0, 0.5, 1], [0.25, 0, 0.5, 1]], box)
        parquet.write_table(pa.table({**columns, "box": boxes}), tmp_path / "m.parquet")
        rows = list(read_manifest(tmp_path / "m.parquet"))
        assert rows == [
            ManifestRow("a", "1", tags="x y", box=(0, 0, 0.5, 1)),
            ManifestRow("b", "2", box=(0.25, 0, 0.5, 1)),
        ]


@pytest.mark.parametrize("value", [{"a": 1}, [{"a": 1}], b"\xff"])
def test_a_parquet_column_of_another_type_is_named(tmp_path, value):
    parquet.write_table(
        pa.table({"image": ["a"], "sku": ["A"], "tags": [value]}), tmp_path / "m.parquet"
    )
    with pytest.raises(
        TableError, match=r"column tags is (list<)?(struct|element: struct|binary).*; convert it"
    ):
        list(read_manifest(tmp_path / "m.parquet"))


def test_parquet_rows_are_numbered(tmp_path):
    parquet.write_table(
        pa.table({"image": ["a", "b", "c"], "sku": ["A", "", None]}), tmp_path / "m.parquet"
    )
    rows = list(read_manifest(tmp_path / "m.parquet"))
    assert [row.row for row in rows if isinstance(row, DroppedRow)] == ["row 2", "row 3"]


def test_csv_rows_are_named_by_their_line(tmp_path):
    """Line breaks in cells, empty lines, rows with a wrong number of fields and every kind of line
    end count.
    """
    text = (
        '\ufeff"image","sku","ti\ntle"\n\na.jpg,A,"two\r\nlines ""here"""\r\nb.jpg\r,,7\n'
        'c.jpg,,"5"" screen"\nd.jpg,D,5"\n"one\ntwo",,3\nlast\nreally,'
    )
    rows = rows_of(tmp_path, text)
    assert [(row.row, row.reason) for row in rows if isinstance(row, DroppedRow)] == [
        ("line 6", "wrong number of fields"),
        ("line 7", "empty SKU"),
        ("line 8", "empty SKU"),
        ("line 10", "empty SKU"),
        ("line 12", "wrong number of fields"),
        ("line 13", "wrong number of fields"),
    ]


def test_line_numbers_are_right_in_any_text(tmp_path):
    generator = random.Random(0)
    for _ in range(30):
        text, expected = "image,sku\n", {}
        for i in range(40):
            cells = generator.choices(
                ["a", '"b"', '"c\nd"', '"e"",\r\n"', '"f" g'], k=generator.choice([1, 1, 1, 0, 2])
            )
            expected[f"line {len(text.splitlines()) + 1}"] = (
                f"{i}.jpg" if len(cells) == 1 else "wrong number of fields"
            )
            text += ",".join([f"{i}.jpg", *cells]) + generator.choice(
                ["\n", "\r\n", "\r", "\n\n", "\r\n\n"]
            )
        (tmp_path / "m.csv").write_bytes(text.encode())
        numbered = read_table(tmp_path / "m.csv", MANIFEST_COLUMNS, [])
        assert {
            where: row.reason if isinstance(row, DroppedRow) else row["image"]
            for where, row in numbered
        } == expected


def test_columns_that_are_not_read_are_named(tmp_path):
    notes = SourceNotes()
    (tmp_path / "m.csv").write_text("image,sku,titel,Split,price,category\na.jpg,A,t,test,1,c\n")
    list(read_manifest(tmp_path / "m.csv", notes))
    assert notes.unused_columns == [
        "titel (did you mean title?)",
        "Split (did you mean split?)",
        "price",
    ]
    for name, write in [("m.jsonl", None), ("m.parquet", parquet.write_table)]:
        notes = SourceNotes()
        if write:
            write(pa.table({"image": ["a"], "sku": ["b"], "Boxes": ["c"]}), tmp_path / name)
        else:
            (tmp_path / name).write_text('{"image": "a", "sku": "b", "Boxes": "c"}\n')
        list(read_manifest(tmp_path / name, notes))
        assert notes.unused_columns == ["Boxes (did you mean box?)"]


def test_one_sku_written_in_two_ways_is_one(tmp_path):
    rows = rows_of(tmp_path, "image,sku\na.jpg,caf\u00e9\nb.jpg,cafe\u0301\n")
    assert [row.sku for row in rows] == ["caf\u00e9"] * 2


def float_table(path, skus, kind):
    images = [f"{i}.jpg" for i in range(len(skus))]
    array = pa.array(skus, kind, from_pandas=False)
    parquet.write_table(pa.table({"image": images, "sku": array, "title": array}), path)
    return list(read_manifest(path))


def test_numbers_in_a_float_column_are_the_texts_they_were(tmp_path):
    """What pandas makes of a column of barcodes with a gap; above 2^53 digits are lost."""
    rows = float_table(
        tmp_path / "m.parquet", [4006381333931.0, float("nan"), None, 1.1, 2.0**60], pa.float64()
    )
    assert [(row.sku, row.title) for row in rows if isinstance(row, ManifestRow)] == [
        ("4006381333931", "4006381333931"),
        ("1.1", "1.1"),
    ]
    dropped = [(row.row, row.reason) for row in rows if isinstance(row, DroppedRow)]
    assert dropped == [
        ("row 2", "empty SKU"),
        ("row 3", "empty SKU"),
        ("row 5", "SKU in scientific notation"),
    ]
    (exact, lost) = float_table(tmp_path / "m.parquet", [2.0**24, 4006381333931.0], pa.float32())
    assert exact.sku == "16777216"
    assert lost.reason == "SKU in scientific notation"
    (row,) = float_table(
        tmp_path / "m.parquet", [decimal.Decimal(4006381333931)], pa.decimal128(20, 2)
    )
    assert row.sku == "4006381333931"


def test_categorical_columns_of_pandas(tmp_path):
    columns = {"image": ["a", "b"], "sku": pa.array(["0012", "7"]).dictionary_encode()}
    columns["title"] = pa.array([1.0, None]).dictionary_encode()
    parquet.write_table(pa.table(columns), tmp_path / "m.parquet")
    rows = list(read_manifest(tmp_path / "m.parquet"))
    assert [(row.sku, row.title) for row in rows] == [("0012", "1"), ("7", "")]


def test_numbers_of_json(tmp_path):
    numbers = ("4006381333931.0", "4.006381333931e12", "0.10", "12", "NaN", "1e999", '"1e5"')
    text = "".join(f'{{"image": "{i}.jpg", "sku": {n}}}\n' for i, n in enumerate(numbers))
    rows = rows_of(tmp_path, text, "m.jsonl")
    assert [getattr(row, "sku", "dropped") for row in rows] == [
        *("4006381333931", "4006381333931", "0.10", "12", "dropped", "1e999", "1e5")
    ]


@pytest.mark.parametrize("name", ["m.json", "m.jsonl"])
def test_a_json_array(tmp_path, name):
    text = '\n[{"image": "a", "sku": 12.0},\n {"image": "b"}, 7,\n {"image": "c", " sku ": "C"}]\n'
    rows = rows_of(tmp_path, text, name)
    assert [getattr(row, "sku", "") for row in rows] == ["12", "", "", "C"]
    assert [row.row for row in rows if isinstance(row, DroppedRow)] == ["row 2", "row 3"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_compressed_manifest(tmp_path, suffix):
    plain = VALID[suffix]
    (tmp_path / f"m{suffix}").write_bytes(plain)
    packed = tmp_path / f"m{suffix}.gz"
    packed.write_bytes(gzip.compress(plain))
    assert list(read_manifest(packed)) == list(read_manifest(tmp_path / f"m{suffix}"))
    packed.write_bytes(gzip.compress(b"image,code\na,b\n" if suffix == ".csv" else b"{}"))
    with pytest.raises(TableError, match=re.escape(str(packed))):
        list(read_manifest(packed))
    packed.write_bytes(gzip.compress(plain)[:-9])
    with pytest.raises(TableError, match="cannot be unpacked"):
        list(read_manifest(packed))


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_with_the_list_of_rows(tmp_path, indent):
    rows = [{"image": f"{n}.jpg", "sku": "a", "title": "x"} for n in range(2)]
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"total": 2, "products": rows}, indent=indent))
    assert [row.image for row in read_manifest(path)] == ["0.jpg", "1.jpg"]


@pytest.mark.parametrize("first", ["sep=,\n", '\ufeff"sep=,"\r\n'])
def test_the_line_by_which_excel_names_the_separator(tmp_path, first):
    path = tmp_path / "m.csv"
    path.write_text(f"{first}image,sku\na.jpg,1\nb.jpg\nc.jpg,2\n", encoding="utf-8")
    one, broken, two = read_manifest(path)
    assert (one.sku, two.sku) == ("1", "2")
    assert (broken.row, broken.reason) == ("line 4", "wrong number of fields")


def test_blanks_around_column_names(tmp_path):
    notes = SourceNotes()
    (tmp_path / "m.csv").write_text("image, sku,\u00a0title , price\na.jpg,A,t,1\n")
    (row,) = read_manifest(tmp_path / "m.csv", notes)
    assert (row.image, row.sku, row.title) == ("a.jpg", "A", "t")
    assert notes.unused_columns == ["price"]
    with pytest.raises(TableError, match="'sku' more than once"):
        rows_of(tmp_path, "image,sku, sku\na,b,c\n")
    with pytest.raises(TableError, match="no column sku; found 'image', 'SKU;x'"):
        rows_of(tmp_path, "image, SKU;x\na,b\n")


def test_html_in_texts_is_shown_as_text_and_counted(tmp_path):
    notes = SourceNotes()
    text = "image,sku,title,category\na,A,<b>Gr&uuml;n</b>,Tea &amp; Co\nb,B,5 < 6,Tea\n"
    (tmp_path / "m.csv").write_text(text)
    rows = list(read_manifest(tmp_path / "m.csv", notes))
    assert [(row.title, row.category) for row in rows] == [
        ("Gr\u00fcn", "Tea & Co"),
        ("5 < 6", "Tea"),
    ]
    assert notes.remarks() == ["HTML turned into text: 1 row, such as '<b>Gr&uuml;n</b>'"]


def test_doubtful_skus_are_named(tmp_path):
    notes = SourceNotes()
    (tmp_path / "m.csv").write_text("image,sku\na,0012\nb,12\nc,NA\nd,#N/A\n")
    rows = list(read_manifest(tmp_path / "m.csv", notes))
    assert [getattr(row, "sku", "dropped") for row in rows] == ["0012", "12", "NA", "dropped"]
    assert [line.partition(":")[2] for line in notes.warnings()] == [
        " '0012' and '12'; check the source",
        " 'NA'; check the source",
    ]


def test_jsonl_lists_and_broken_lines(tmp_path):
    good = '{"image": "a", "sku": "A", "tags": ["x", "y"], "box": [0, 0, 0.5, 1]}'
    lines = [good, '{"image": ', "[1]", '{"image": "b", "sku": {}}']
    rows = rows_of(tmp_path, "\n".join(lines), "m.jsonl")
    assert rows[0].tags == "x y"
    assert rows[0].box == (0, 0, 0.5, 1)
    assert [row.row for row in rows[1:]] == ["line 2", "line 3", "line 4"]
    assert all(isinstance(row, DroppedRow) and row.reason == "unreadable JSON" for row in rows[1:])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a.jpg,  ,t,,,", "empty SKU"),
        ('a.jpg,"x\ny",t,,,', "SKU with a line break, tab or invisible character"),
        ("a.jpg,x\ty,t,,,", "SKU with a line break, tab or invisible character"),
        ("a.jpg,OK\u200b,t,,,", "SKU with a line break, tab or invisible character"),
        ("a.jpg,\ufeffOK,t,,,", "SKU with a line break, tab or invisible character"),
        ("a.jpg,O\u202eK,t,,,", "SKU with a line break, tab or invisible character"),
        ("a.jpg,x\u2028y,t,,,", "SKU with a line break, tab or invisible character"),
        (f"a.jpg,{'x' * 257},t,,,", "SKU too long"),
        (",S,t,,,", "no image path"),
        ("a.jpg,S,t,0 0 1,,", "bad box"),
        ("a.jpg,S,t,0.5 0 0.5 1,,", "bad box"),
        ("a.jpg,S,t,0 0 nan 1,,", "bad box"),
        ("a.jpg,S,t,0 0 10 20,,", "bad box"),
        ("a.jpg,S,t,a b c d,,", "bad box"),
        ("a.jpg,S,t,,seller,", "unknown role"),
        ("a.jpg,S,t,,,dev", "unknown split"),
        ("./ok.jpg,OK,t,,,", "duplicate row"),
        (f"a.jpg,S,{'t' * 20_001},,,", "text too long"),
        ("a.jpg,S", "wrong number of fields"),
    ],
)
def test_a_bad_row_is_dropped_and_named(tmp_path, row, reason):
    rows = rows_of(
        tmp_path,
        f"image,sku,title,box,role,split\nok.jpg,OK,fine,,,\n{row}\nother.jpg,OK,fine,,,\n",
    )
    dropped = [row for row in rows if isinstance(row, DroppedRow)]
    assert [row.image for row in rows if isinstance(row, ManifestRow)] == ["ok.jpg", "other.jpg"]
    assert [drop.reason for drop in dropped] == [reason]
    assert dropped[0].bad
    assert dropped[0].row == "line 3"
    assert "\n" not in str(dropped[0])


def test_lone_surrogate_is_a_bad_row(tmp_path):
    (row,) = rows_of(tmp_path, '{"image": "a", "sku": "A", "title": "\\ud800"}\n', "m.jsonl")
    assert isinstance(row, DroppedRow)
    assert row.reason == "text is not valid Unicode"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.csv", b"image,title\na,b\n", ["no column sku", "found 'image', 'title'"]),
        (
            "m.csv",
            b"image;sku\na;b\n",
            ["separates columns by semicolons, wanted commas; save it with commas"],
        ),
        (
            "m.csv",
            b'"image"\t"sku"\t"title"\na\tb\tc, d\n',
            ["separates columns by tabs, wanted commas"],
        ),
        ("m.csv", b"image,sku,sku\na,b,c\n", ["'sku' more than once"]),
        (
            "m.csv",
            "image,sku,title\na,b,ok\na,b,caf\u00e9\n".encode("latin-1"),
            ["not UTF-8 (line 3)"],
        ),
        ("m.csv", "image,sku\na,b\n".encode("utf-16"), ["not UTF-8 (line 1)"]),
        ("m.csv", b"", ["cannot be read"]),
        ("m.csv", b"image,sku\n", ["no rows"]),
        ("m.jsonl", b"", ["no rows"]),
        ("m.jsonl", b'{"image": "a", "code": "b"}\n', ["no column sku"]),
        ("m.jsonl", '{"image": "caf\u00e9"}\n'.encode("latin-1"), ["not UTF-8 (line 1)"]),
        ("m.parquet", b"not parquet", ["cannot be read"]),
        ("m.xlsx", b"", ["'.xlsx'", ".csv, .parquet, .jsonl", "save it as 'CSV UTF-8'"]),
        ("m.tsv", b"", ["'.tsv'", "save it as CSV"]),
        ("m.feed", b"", ["'.feed'", "convert it to one of them"]),
        ("m.csv", b"PK\3\4 excel", ["is a spreadsheet or zip file", "save it as 'CSV UTF-8'"]),
        ("m.csv", b"\x1f\x8b", ["is compressed by gzip", "let its name end in .gz"]),
        ("m.jsonl", b"PAR1", ["is a Parquet file"]),
        ("m.json", b'{\n"products": [\n{"image": 1}\n]}', ["no column sku; found 'image'"]),
        ("m.json", b'[{"image": "a", "sku"', ["nothing in it can be read, such as line 1:"]),
        ("m.csv", b"a,b\n1,2\n", ["no column image and sku; found 'a', 'b', wanted"]),
    ],
)
def test_unreadable_manifest_is_one_line(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TableError) as caught:
        list(read_manifest(path))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert all(word in message for word in words), message


def stray(quote_row=11, later="plain"):
    rows = [f"{i}.jpg,S{i},plain" for i in range(60)]
    rows[quote_row - 1] = f'{quote_row - 1}.jpg,S{quote_row - 1},"plain'
    rows[39] = f"39.jpg,S39,{later}"
    return "\n".join(["image,sku,title", *rows]) + "\n"


@pytest.mark.parametrize("later", ["plain", '"a, b"', '",x"', '"two ""words"""', 'a 15" screen, "'])
def test_an_unclosed_quote_is_refused_where_it_begins(tmp_path, later):
    with pytest.raises(
        TableError, match=r"the quote that begins in line 12 is not closed"
    ) as caught:
        rows_of(tmp_path, stray(later=later))
    assert "\n" not in str(caught.value)


def test_quotes_that_are_no_mistake(tmp_path):
    titles = [
        '15" screen',
        'a "b" c',
        '"two\nlines, ""quoted"""',
        '"3""\r\n"',
        '""',
        '"a"',
        '"same line" after',
    ]
    text = "image,sku,title\n" + "".join(f"{i}.jpg,S,{title}\n" for i, title in enumerate(titles))
    expected = [
        '15" screen',
        'a "b" c',
        'two\nlines, "quoted"',
        '3"\r\n',
        "",
        "a",
        "same line after",
    ]
    assert [row.title for row in rows_of(tmp_path, text)] == expected
    assert [row.title for row in rows_of(tmp_path, 'image,sku,title\na.jpg,S,"b\nc"')] == ["b\nc"]
    assert [
        row.title for row in rows_of(tmp_path, 'image,sku,title\na.jpg,S,"b\nc"\nd.jpg,S,5"\n')
    ] == ["b\nc", '5"']


@pytest.mark.parametrize("start", [b"", b"image,sku\n"])
def test_a_binary_csv_is_one_clean_line(tmp_path, capfd, start):
    path = tmp_path / "m.csv"
    path.write_bytes(start + random.Random(0).randbytes(5000))
    with pytest.raises(TableError, match=r"not UTF-8 \(line \d\)") as caught:
        list(read_manifest(path))
    assert str(caught.value).isprintable()
    assert capfd.readouterr().err == ""


def test_messages_hold_no_control_characters():
    drop = DroppedRow("\x1b[31m.jpg", "photo missing", "a\nb" + "x" * 1000)
    assert str(drop).isprintable()
    assert len(str(drop)) <= 300
    assert str(drop).startswith("?[31m.jpg: photo missing (a b")


def test_missing_manifest(tmp_path):
    with pytest.raises(ManifestError, match="not found"):
        read_manifest(tmp_path / "none.csv")


VALID = {
    ".csv": (
        "\ufeffimage,sku,title,tags,box,role,split,price\n"
        'a.jpg,0012,"a ""quoted"" title,\r\nin two lines",x y,0 0 0.5 1,catalogue,train,1\n'
        "b.jpg,caf\u00e9,,,,query,,\r\n\nc.jpg,7,5 inch,,0.1 0.2 0.3 0.4,,test,2.50\n"
    ).encode(),
    ".jsonl": (
        '{"image": "a.jpg", "sku": "0012", "title": "caf\u00e9", "tags": ["x", "y"]}\n\n'
        '{"image": "b.jpg", "sku": 12, "box": [0, 0, 0.5, 1], "split": "test", "price": 1e3}\r\n'
        '{"image": "c.jpg", "sku": "\\u0041", "role": "query", "title": null}\n'
    ).encode(),
}


def assert_rows_or_one_line(folder, capfd, suffix, content):
    path = folder / f"m{suffix}"
    path.write_bytes(content)
    rows = result_or_one_line(lambda: list(read_manifest(path)))
    for row in rows or []:
        if isinstance(row, DroppedRow):
            assert str(row).isprintable()
        else:
            assert row.image
            assert row.sku.isprintable()
    assert capfd.readouterr().err == ""  # pyarrow prints what it cannot raise


@pytest.mark.parametrize("suffix", VALID)
def test_a_valid_manifest_is_not_refused(tmp_path, suffix):
    (tmp_path / f"m{suffix}").write_bytes(VALID[suffix])
    assert len(list(read_manifest(tmp_path / f"m{suffix}"))) == 3


@pytest.mark.parametrize("suffix", VALID)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode()))
@example(content=b"\n\n")
@example(content=b"[" * 100_000)
@example(content=b'{"image": "a", "sku": %s}' % (b"9" * 5000))
def test_any_bytes_are_rows_or_an_error_of_one_line(tmp_path, capfd, suffix, content):
    assert_rows_or_one_line(tmp_path, capfd, suffix, content)


@given(data=st.data())
def test_a_damaged_parquet_manifest_is_rows_or_an_error_of_one_line(tmp_path, capfd, data):
    columns = {"image": ["a", "b"], "sku": ["A", "B"], "tags": [["x", "y"], None]}
    parquet.write_table(pa.table(columns), tmp_path / "valid.parquet")
    content = bytearray((tmp_path / "valid.parquet").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert_rows_or_one_line(tmp_path, capfd, ".parquet", bytes(content))


@pytest.mark.parametrize("suffix", VALID)
@given(data=st.data())
def test_a_damaged_manifest_is_rows_or_an_error_of_one_line(tmp_path, capfd, suffix, data):
    content = data.draw(damaged_bytes(VALID[suffix]))
    assert_rows_or_one_line(tmp_path, capfd, suffix, content)
