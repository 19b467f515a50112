"""Reads import sources: a manifest (CSV, Parquet, JSON) or a folder with one folder per SKU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from sicot_jax.catalog.importing.folders import read_folders
from sicot_jax.catalog.importing.manifest_rows import (
    MANIFEST_COLUMNS,
    MAX_TEXT_LENGTH,
    ManifestError,
    ManifestRow,
    SourceNotes,
    check_rows,
)
from sicot_jax.common.table_files import DroppedRow, RawRow, read_table
from sicot_jax.common.text import strip_markup

TEXT_COLUMNS = ("title", "tags", "category")


def read_source(
    source: Path, notes: SourceNotes | None = None
) -> Iterator[ManifestRow | DroppedRow]:
    """Returns an iterator over the rows of a manifest, or of a folder with one folder per SKU.

    Args:
      source: manifest file or folder.
      notes: receives what was left out, changed or doubtful; complete after the last row.

    Returns:
      Rows in order; a row that cannot be used comes as a DroppedRow.

    Raises:
      ManifestError: (on the call or while iterating) no such file or folder.
      TableError: the manifest cannot be read.
    """
    source = Path(source)
    return read_folders(source, notes) if source.is_dir() else read_manifest(source, notes)


def read_manifest(
    path: Path, notes: SourceNotes | None = None
) -> Iterator[ManifestRow | DroppedRow]:
    """Returns an iterator over the rows of a manifest file.

    All values are text: SKU `0012` stays `0012`, title `NA` stays `NA`. Texts with HTML in them are
    replaced by what it shows.

    Args:
      path: table that `common.table_files` reads.
      notes: receives unknown columns, doubtful SKUs and the number of texts with HTML.

    Returns:
      Rows in the order of the file; a row that cannot be used comes as a DroppedRow.

    Raises:
      ManifestError: no such file.
      TableError: (on the call or while iterating) unknown suffix, unreadable, not UTF-8, a column
        missing, no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(
            f"manifest {path} not found; wanted a file or a folder with one folder per SKU"
        )
    notes = SourceNotes() if notes is None else notes
    rows = read_table(path, MANIFEST_COLUMNS, notes.unused_columns)
    return check_rows(_without_markup(rows, notes), notes)


def _without_markup(rows: Iterable[RawRow], notes: SourceNotes) -> Iterator[RawRow]:
    for location, values in rows:
        if isinstance(values, DroppedRow):
            yield location, values
            continue
        shown = {
            name: strip_markup(values[name])
            for name in TEXT_COLUMNS
            if len(values.get(name, "")) <= MAX_TEXT_LENGTH and name in values  # others are refused
        }
        if changed := [values[name] for name, text in shown.items() if text != values[name]]:
            notes.markup += 1
            notes.markup_example = notes.markup_example or changed[0]
            values = {**values, **shown}
        yield location, values
