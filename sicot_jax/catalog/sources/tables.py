"""Reads and writes the tables of an imported catalogue; strings are decoded one at a time."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from sicot_jax.catalog.catalog import SPLITS, ClassTable
from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError

FORMAT_VERSION = 1
CATALOG_FILE = "catalog.json"
CLASSES_FILE = "classes.csv"
VECTORS_FILE = "word_vectors.npy"
SPLITS_FILE = "splits.csv"
CLASS_COLUMNS = ("class_id", "sku", "title", "category", *SPLITS, "discontinued")


def write_class_table(path: Path, table: ClassTable) -> None:
    """Writes `classes.csv`, one row per class in the order of ids.

    Args:
      path: path of the file.
      table: the classes.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CLASS_COLUMNS)
        for c in range(len(table)):
            counts = [int(table.counts[split][c]) for split in SPLITS]
            texts = (table.sku[c], table.title[c], table.category[c])
            writer.writerow([c, *texts, *counts, int(table.discontinued[c])])


def read_class_table(path: Path) -> ClassTable:
    """Reads the table that `write_class_table` wrote, also where a spreadsheet saved it again.

    Args:
      path: path of the file; a byte order mark does not count.

    Returns:
      The classes.

    Raises:
      InputError: other columns, a row that is cut, classes in another order, a SKU twice (a
        spreadsheet took them for numbers), or not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = [*csv.reader(file)] or [[]]
        if tuple(header) != CLASS_COLUMNS:
            raise ValueError(f"columns {header}, wanted {list(CLASS_COLUMNS)}")
        if any(len(row) != len(CLASS_COLUMNS) for row in rows):
            raise ValueError("a row of another length than the header")
        columns = list(zip(*rows, strict=True)) or [()] * len(CLASS_COLUMNS)
        values = dict(zip(CLASS_COLUMNS, columns, strict=True))
        if values["class_id"] != tuple(map(str, range(len(rows)))):
            raise ValueError("class ids in another order than 0, 1, 2")
        (sku, count), *_ = [*Counter(values["sku"]).most_common(1), ("", 1)]
        if count > 1:
            raise ValueError(f"SKU {sku!r} {count} times, as a spreadsheet makes of long numbers")
        return ClassTable(
            sku=list(values["sku"]),
            title=list(values["title"]),
            category=list(values["category"]),
            counts={split: np.array(values[split], np.int64) for split in SPLITS},
            discontinued=np.array(values["discontinued"], np.int64).astype(bool),
        )
    except (ValueError, csv.Error) as error:
        raise InputError(
            f"{path}: {one_line_error(error)}; wanted the table of classes as it was written: take "
            "it from a copy, or make the catalogue, run or export again"
        ) from error


def write_split_table(path: Path, splits: Mapping[str, str]) -> None:
    """Writes `splits.csv`, the splits that the next version of the catalogue keeps.

    Args:
      path: path of the file.
      splits: image_id -> split, of every photo of this version and of earlier ones.
    """
    path.write_text(
        "".join(f"{image},{split}\n" for image, split in sorted(splits.items())), encoding="ascii"
    )


def read_split_table(path: Path) -> dict[str, str]:
    """Reads the table that `write_split_table` wrote.

    Args:
      path: path of the file.

    Returns:
      image_id -> split.

    Raises:
      InputError: another line than image id and split.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return {image_id: split for image_id, split in (line.split(",") for line in lines)}
    except ValueError as error:
        raise InputError(
            f"{path}: {one_line_error(error)}; wanted an image id and a split in every line: take "
            "it from a copy"
        ) from error


class LazyStrings(Sequence[str]):
    """A sequence of strings, each computed when it is read.

    Args:
      length: number of strings.
      make: index in 0..length-1 -> string.
    """

    def __init__(self, length: int, make: Callable[[int], str]) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._length))]
        return self._make(checked_index(index, self._length))


def checked_index(index: int, length: int) -> int:
    """Returns the index counted from the front.

    Args:
      index: may be negative, counted from the end.
      length: number of items.

    Returns:
      0..length-1.

    Raises:
      IndexError: there is no such item, which also ends iteration.
    """
    if not -length <= index < length:
        raise IndexError(f"index {index} of {length}")
    return int(index) % length


def pack_strings(strings: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encodes strings as one array of bytes.

    Args:
      strings: [N].

    Returns:
      UTF-8 of all strings, uint8 [bytes], and their offsets, int64 [N + 1].
    """
    flat, ends = bytearray(), [0]
    for string in strings:
        flat += string.encode("utf-8", "surrogatepass")
        ends.append(len(flat))
    return np.frombuffer(bytes(flat), np.uint8), np.array(ends, np.int64)


def unpack_strings(flat: np.ndarray, offsets: np.ndarray) -> LazyStrings:
    """Returns the strings that `pack_strings` packed, decoded when they are read.

    Args:
      flat: uint8 [bytes], UTF-8.
      offsets: int64 [N + 1].

    Returns:
      [N] strings.
    """

    def make(index: int) -> str:
        return flat[offsets[index] : offsets[index + 1]].tobytes().decode("utf-8", "surrogatepass")

    return LazyStrings(len(offsets) - 1, make)
