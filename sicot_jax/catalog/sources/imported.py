"""Opens catalogues that `sicot import` wrote."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.catalog.catalog import SPLITS, Catalog, Record
from sicot_jax.catalog.sources.integrity import allow_open_files, check_shards, check_tables
from sicot_jax.catalog.sources.tables import (
    CATALOG_FILE,
    CLASSES_FILE,
    FORMAT_VERSION,
    VECTORS_FILE,
    read_class_table,
)
from sicot_jax.catalog.tokenizer import load_tokenizer
from sicot_jax.common.files import relative_note
from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


class CatalogError(InputError):
    """Raised for a folder that cannot be opened as a catalogue; the message is one line."""


@dataclasses.dataclass
class ImportedSplit:
    """Records of one split on disk, opened at the first read.

    Pickles without its open files: every process opens them itself.

    Attributes:
      folder: the version folder.
      split: name of the split.
      labels: int32 [N], class ids in the order of the records.
    """

    folder: Path
    split: str
    labels: np.ndarray
    _source: Any = dataclasses.field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of split {self.split}, wanted 0 to {len(self) - 1}")
        try:
            if self._source is None:
                self._source = _open_source(self.folder, self.split)
            stored = self._source[int(index)]
        except RuntimeError as error:  # of ArrayRecord
            raise CatalogError(
                f"{self.folder}: photo {index} of split {self.split} cannot be read "
                f"({one_line_error(error)}); restore its files, or import the catalogue again"
            ) from error
        return Record(
            image_id=stored["image_id"].decode(),
            image=stored["image"],
            sku=stored["sku"].decode(),
            class_id=int(stored["class_id"]),
            title=stored["title"].decode(),
            tags=stored["tags"].decode(),
            token_ids=np.asarray(stored["token_ids"], np.int32),
            category=stored["category"].decode(),
            box=np.asarray(stored["box"], np.float32),
            role=stored["role"].decode(),
            reference=stored["reference"].decode(),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}


_opening_lock = threading.Lock()


def _open_source(folder: Path, split: str) -> Any:
    # One thread at a time: TFDS imports its modules when they are first used, and two threads that
    # do so, one inside the other's import, deadlock (etils' lazy modules on Python 3.11). Reading
    # the first record imports the rest.
    with _opening_lock:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(folder)
        allow_open_files(sum(info.num_shards for info in builder.info.splits.values()))
        check_shards(folder, builder.info.splits[split].filenames)
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        if len(source):
            source[0]
        return source


def version_folders(data_set: Path) -> list[Path]:
    """Lists the complete versions of a data set folder, oldest first.

    Args:
      data_set: folder of one data set.

    Returns:
      Version folders; none where the folder does not exist.
    """
    if not data_set.is_dir():
        return []
    versions = [
        entry
        for entry in data_set.iterdir()
        if _VERSION.fullmatch(entry.name) and (entry / CATALOG_FILE).exists()
    ]
    return sorted(versions, key=lambda entry: tuple(map(int, entry.name.split("."))))


def data_set_folders(directory: Path) -> list[Path]:
    """Lists the data set folders under an import's output that hold a complete version.

    Args:
      directory: output folder of `sicot import`.

    Returns:
      Folders, sorted by name.
    """
    return sorted(
        entry for entry in directory.iterdir() if entry.is_dir() and version_folders(entry)
    )


def _find_version(directory: Path) -> Path | None:
    if (directory / CATALOG_FILE).exists() and not directory.name.startswith("incomplete."):
        return directory
    versions = version_folders(directory)
    if versions:
        return versions[-1]
    data_sets = data_set_folders(directory)
    if len(data_sets) > 1:
        names = ", ".join(entry.name for entry in data_sets)
        raise CatalogError(
            f"{directory} holds {len(data_sets)} catalogues ({names}), wanted one; name its folder"
        )
    return version_folders(data_sets[0])[-1] if data_sets else None


def newest_version(directory: Path) -> Path:
    """Returns the newest version folder of a catalogue.

    Args:
      directory: a version folder, a data set folder, or an import's output with one data set.

    Returns:
      `directory` itself, or the newest version in it or in its only data set.

    Raises:
      CatalogError: no such folder, nothing imported there, only an unfinished import, or several
        data sets.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CatalogError(
            f"catalogue {directory} not found{relative_note(directory)}; make one with `sicot "
            "import`, or say where it is now: --catalog, of sicot train --config.data.path"
        )
    version = _find_version(directory)
    if version is not None:
        return version
    unfinished = directory.name.startswith("incomplete.") or any(
        True for pattern in ("incomplete.*", "*/incomplete.*") for _ in directory.glob(pattern)
    )
    if unfinished:
        raise CatalogError(f"{directory} holds only an unfinished import; run `sicot import` again")
    raise CatalogError(
        f"{directory} is no catalogue: no {CATALOG_FILE} in it; make one with `sicot import`"
    )


def read_description(folder: Path) -> dict[str, Any]:
    """Reads `catalog.json` of a version folder.

    Args:
      folder: a version folder.

    Returns:
      Its fields.

    Raises:
      CatalogError: it cannot be read, or has a newer format.
    """
    try:
        description = json.loads((folder / CATALOG_FILE).read_text(encoding="utf-8-sig"))
        version = int(description["format_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CatalogError(
            f"{folder / CATALOG_FILE} cannot be read ({error}); import the catalogue again"
        ) from None
    if version > FORMAT_VERSION:
        raise CatalogError(
            f"{folder} has format {version}, this version reads up to {FORMAT_VERSION}; "
            "upgrade sicot or import again"
        )
    return description


def read_import_source(directory: Path | str) -> dict[str, str] | None:
    """Reads what the newest version was imported from.

    Args:
      directory: version folder, as returned by `newest_version`.

    Returns:
      "source" (a name) and "source_sha256" (its fingerprint), "" where the catalogue does not name
      them; None where the folder holds no complete version.

    Raises:
      CatalogError: several data sets, unreadable, or a newer format.
    """
    directory = Path(directory)
    folder = _find_version(directory) if directory.is_dir() else None
    if folder is None:
        return None
    description = read_description(folder)
    return {key: str(description.get(key, "")) for key in ("source", "source_sha256")}


def open_imported(directory: Path | str) -> Catalog:
    """Opens the newest version of an imported catalogue.

    Reads tables only; photos are opened at the first access of a split.

    Args:
      directory: version folder, as returned by `newest_version`.

    Returns:
      The catalogue.

    Raises:
      CatalogError: there is no catalogue, or it is damaged.
    """
    folder = newest_version(Path(directory)).absolute()
    description: Mapping[str, Any] = read_description(folder)
    check_tables(folder)
    try:
        classes = read_class_table(folder / CLASSES_FILE)
        splits = {
            split: ImportedSplit(folder, split, np.load(folder / f"labels_{split}.npy"))
            for split in SPLITS
        }
        return Catalog(
            name=description["name"],
            data_hash=description["data_hash"],
            classes=classes,
            head_boundary=description["head_boundary"],
            tokenizer=load_tokenizer(folder),
            word_vectors=np.load(folder / VECTORS_FILE),
            splits=splits,
        )
    except (OSError, EOFError, ValueError, KeyError) as error:
        detail = one_line_error(error)
        raise CatalogError(f"catalogue {folder} is damaged ({detail}); import it again") from error
