"""Tables of a catalogue that another program saved again."""

import numpy as np
import pytest

from sicot_jax.catalog.catalog import SPLITS, ClassTable
from sicot_jax.catalog.sources.tables import (
    read_class_table,
    read_split_table,
    write_class_table,
    write_split_table,
)
from sicot_jax.errors import InputError

MARK = b"\xef\xbb\xbf"


@pytest.fixture
def table(tmp_path):
    counts = {split: np.array([1, 2]) for split in SPLITS}
    path = tmp_path / "classes.csv"
    write_class_table(path, ClassTable(["a", "b"], ["x", "y"], ["", ""], counts, np.zeros(2, bool)))
    return path


def test_a_byte_order_mark_does_not_count(table, tmp_path):
    table.write_bytes(MARK + table.read_bytes())
    assert read_class_table(table).sku == ["a", "b"]
    write_split_table(tmp_path / "splits.csv", {"1f": "train"})
    (tmp_path / "splits.csv").write_bytes(MARK + (tmp_path / "splits.csv").read_bytes())
    assert read_split_table(tmp_path / "splits.csv") == {"1f": "train"}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (b",", b";", "columns .'class_id;sku;.*, wanted .'class_id'"),
        (b"1,b", b"1,a", "SKU 'a' 2 times, as a spreadsheet makes of long numbers"),
        (b"1,b", b"2,b", "class ids in another order"),
        (b",y", b"", "a row of another length"),
        (b"a", b"\xfc", "can't decode"),
        (b",1,", b",1.5,", "invalid literal"),
    ],
)
def test_a_changed_class_table_is_one_line(table, before, after, said):
    table.write_bytes(table.read_bytes().replace(before, after))
    with pytest.raises(InputError, match=f"classes.csv: .*{said}.*; wanted the table") as caught:
        read_class_table(table)
    assert "\n" not in str(caught.value)


def test_a_changed_split_table_is_one_line(tmp_path):
    (tmp_path / "splits.csv").write_text("1f;train\n")
    with pytest.raises(InputError, match="wanted an image id and a split in every line"):
        read_split_table(tmp_path / "splits.csv")
