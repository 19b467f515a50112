"""The tables beside the records of an imported catalogue; only numpy and the standard library read them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from sicot_jax.catalog.catalog import SPLITS, ClassTable

FORMAT_VERSION = 1
CATALOG_FILE = "catalog.json"
CLASSES_FILE = "classes.csv"
VECTORS_FILE = "word_vectors.npy"
REPORT_FILES = ("report.json", "report.md")
CLASS_COLUMNS = ("class_id", "sku", "title", "category", *SPLITS, "withdrawn")


def write_class_table(path: Path, table: ClassTable) -> None:
    """`classes.csv`, one row per class in the order of ids."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CLASS_COLUMNS)
        for c in range(len(table)):
            counts = [int(table.counts[split][c]) for split in SPLITS]
            described = (table.sku[c], table.title[c], table.category[c])
            writer.writerow([c, *described, *counts, int(table.withdrawn[c])])


def read_class_table(path: Path) -> ClassTable:
    """The table that `write_class_table` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if tuple(header) != CLASS_COLUMNS:
            raise ValueError(f"{path} has columns {header}, wanted {list(CLASS_COLUMNS)}; import the catalogue again")
        columns = list(zip(*rows, strict=True)) or [()] * len(CLASS_COLUMNS)
    values = dict(zip(CLASS_COLUMNS, columns, strict=True))
    return ClassTable(
        sku=list(values["sku"]),
        title=list(values["title"]),
        category=list(values["category"]),
        counts={split: np.array(values[split], np.int64) for split in SPLITS},
        withdrawn=np.array(values["withdrawn"], np.int64).astype(bool),
    )
