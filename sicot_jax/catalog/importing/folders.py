"""Reads a folder of photos with one folder per SKU, or with split folders that hold those.

Whatever is passed over is named: as a dropped row, and as a warning where photos may be lost.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from sicot_jax.catalog.importing.manifest_rows import (
    ManifestError,
    ManifestRow,
    SourceNotes,
    check_rows,
)
from sicot_jax.common.table_files import DroppedRow, RawRow, printable
from sicot_jax.common.text import pluralize

PHOTO_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".pjpeg", ".png", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff"),
)
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
# What NAS, archives and systems put between photos, besides names with a dot in front.
SYSTEM_FOLDERS = (
    *("@eadir", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "lost+found"),
    "system volume information",
)
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_HIDDEN = "hidden folder"
_NAMED = 3


@dataclasses.dataclass(frozen=True, slots=True)
class FolderEntry:
    """A file or folder below a folder.

    Attributes:
      name: path relative to that folder.
      status: of the file; of its target where it is a link; None where it cannot be read.
      fault: why it is passed over, or empty.
    """

    name: str
    status: os.stat_result | None
    fault: str = ""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, or a link to one."""
        return self.status is not None and stat.S_ISDIR(self.status.st_mode)


def walk_folder(root: Path) -> Iterator[FolderEntry]:
    """Yields all files and folders below a folder in the order of their paths.

    Links to files and folders are followed. Hidden files are left out without a word; hidden
    folders, those of `SYSTEM_FOLDERS`, broken links and what cannot be read come with a fault, and
    nothing below them comes.

    Args:
      root: the folder.

    Yields:
      Entries; a folder comes before what is in it.
    """
    status = os.stat(root)
    yield from _walk(os.fspath(root), "", ((status.st_dev, status.st_ino),))


def _walk(folder: str, name: str, above: tuple[tuple[int, int], ...]) -> Iterator[FolderEntry]:
    try:
        with os.scandir(folder) as opened:
            entries = sorted(opened, key=lambda entry: entry.name)
    except OSError:
        yield FolderEntry(name, None, "folder that cannot be read")
        return
    for entry in entries:
        inner, hidden = os.path.join(name, entry.name), entry.name.startswith(".")
        try:
            status = entry.stat()
        except OSError:
            if not hidden:
                fault = "broken link" if entry.is_symlink() else "file that cannot be read"
                yield FolderEntry(inner, None, fault)
            continue
        identity = status.st_dev, status.st_ino
        if not stat.S_ISDIR(status.st_mode):
            if not hidden:
                yield FolderEntry(inner, status)
        elif hidden or entry.name.lower() in SYSTEM_FOLDERS:
            yield FolderEntry(inner, status, _HIDDEN)
        elif identity in above:
            yield FolderEntry(inner, status, "link to a folder that it is in")
        else:
            yield FolderEntry(inner, status)
            yield from _walk(entry.path, inner, (*above, identity))


def read_folders(
    root: Path, notes: SourceNotes | None = None
) -> Iterator[ManifestRow | DroppedRow]:
    """Returns an iterator over the photos of a folder with one folder per SKU.

    The folder name is the SKU, the title is empty. Photos may be deeper inside a SKU's folder.
    Folders named as splits (two or more of train, val and test, or alike), with a folder per SKU in
    them, give the split. Links are followed; hidden files are ignored; all else that is no photo
    comes as a dropped row.

    Args:
      root: folder of SKU folders.
      notes: receives doubtful SKUs, and warnings of photos that may be lost.

    Returns:
      Rows whose `image` is relative to `root`.

    Raises:
      ManifestError: `root` is no folder or holds none.
    """
    root = Path(root)
    if not root.is_dir():
        raise ManifestError(f"folder {root} not found; wanted one folder per SKU in it")
    if not any(entry.is_dir() and not entry.name.startswith(".") for entry in root.iterdir()):
        raise ManifestError(
            f"folder {root} has no folders in it; wanted one folder per SKU, each with its photos"
        )
    notes = SourceNotes() if notes is None else notes
    return check_rows(_FolderReader(root, notes).rows(), notes)


def _split_folders(root: Path) -> list[str]:
    """Returns the folders that stand for splits: none, or two and more."""
    named = [entry for entry in root.iterdir() if entry.name.lower() in SPLIT_FOLDERS]
    named = [entry for entry in named if entry.is_dir()]
    inside = [[(file.is_dir(), file.suffix.lower()) for file in entry.iterdir()] for entry in named]
    hold_folders = any(
        any(is_folder for is_folder, _ in files)
        and not any(suffix in PHOTO_SUFFIXES for _, suffix in files)
        for files in inside
    )
    return [entry.name for entry in named] if len(named) > 1 and hold_folders else []


class _FolderReader:
    """Turns the entries of a folder into rows, and counts what is passed over."""

    def __init__(self, root: Path, notes: SourceNotes):
        # Not at the top: Pillow, which the command line does without.
        from sicot_jax.common.image import HEIF_FORMATS, HEIF_REMEDY

        self.root, self.notes = root, notes
        self.suffixes = PHOTO_SUFFIXES + (HEIF_SUFFIXES if HEIF_FORMATS else ())
        self.heif = f"HEIC photo ({HEIF_REMEDY})"
        self.splits = _split_folders(root)
        self.depth = 2 if self.splits else 1  # path parts of a SKU's folder
        self.folders: dict[str, str] = {}  # SKU -> its folder, the first of several
        self.photos: Counter[str] = Counter()
        self.direct: set[str] = set()  # SKUs with photos in their folder itself
        self.inner: defaultdict[str, set[str]] = defaultdict(set)  # SKU -> folders with photos
        self.lost: defaultdict[str, list[str]] = defaultdict(list)  # reason -> names

    def rows(self) -> Iterator[RawRow]:
        for entry in walk_folder(self.root):
            parts = entry.name.split(os.sep)
            outside = bool(self.splits) and parts[0] not in self.splits
            if outside and len(parts) > 1:
                continue  # its folder was named
            if entry.fault:
                yield self._drop(entry.name, entry.fault, lost=entry.fault != _HIDDEN)
            elif outside and entry.is_folder:
                yield self._drop(entry.name, "folder outside of the folders of the splits")
            elif entry.is_folder:
                if len(parts) == self.depth:
                    self.folders.setdefault(parts[-1], entry.name)
            elif (row := self._file(entry.name, parts)) is not None:
                yield row
        for sku, folder in self.folders.items():
            if not self.photos[sku]:
                yield self._drop(folder, "SKU folder without a photo")
        self.notes.folders += [*self._loss_warnings(), *self._category_warnings()]

    def _file(self, name: str, parts: list[str]) -> RawRow | None:
        suffix = os.path.splitext(name)[1].lower()
        is_heif = suffix in HEIF_SUFFIXES
        if len(parts) <= self.depth:
            if not is_heif and suffix not in self.suffixes:
                return None
            shown = _printable_name(name)
            return shown, DroppedRow(shown, "photo outside a SKU folder")
        if suffix not in self.suffixes:
            if is_heif:
                return self._drop(name, self.heif)
            kind = suffix if suffix[1:].isalnum() and suffix.isascii() and len(suffix) < 7 else ""
            return self._drop(name, f"no photo file ({kind or 'other'})", lost=False)
        if (shown := _printable_name(name)) != name:
            return shown, DroppedRow(shown, "file name is not UTF-8", "rename the file or folder")
        sku = parts[self.depth - 1]
        self.photos[sku] += 1
        if len(parts) == self.depth + 1:
            self.direct.add(sku)
        else:
            self.inner[sku].add(parts[self.depth])
        # A blank in front would be taken for one between the cells of a table.
        values = {"image": name if name == name.strip() else os.path.join(".", name), "sku": sku}
        if self.splits:
            values["split"] = SPLIT_FOLDERS[parts[0].lower()]
        return name, values

    def _drop(self, name: str, reason: str, *, lost: bool = True) -> RawRow:
        shown = _printable_name(name)
        if lost:
            self.lost[reason].append(shown)
        return shown, DroppedRow(shown, reason, bad=False)

    def _loss_warnings(self) -> Iterator[str]:
        for reason, names in sorted(self.lost.items()):
            yield f"{reason}, left out: {len(names)} ({_first(names)})"

    def _category_warnings(self) -> Iterator[str]:
        """Warns where the folders taken as SKUs may be categories, with a folder per SKU in each.

        Views of a product (SKU/front, SKU/back) have the same names in every SKU's folder.
        """
        doubtful = [sku for sku, inner in self.inner.items() if len(inner) > 1]
        doubtful = [sku for sku in doubtful if sku not in self.direct]
        inner = [name for sku in doubtful for name in self.inner[sku]]
        repeated = len(doubtful) > 1 and 2 * len(set(inner)) <= len(inner)
        if 2 * len(doubtful) > len(self.photos) and not repeated:
            examples = [f"{self.folders[sku]}/{min(self.inner[sku])}" for sku in doubtful]
            yield (
                f"{pluralize(len(doubtful), 'folder')} taken as a SKU each, with photos in folders "
                f"inside: {_first(examples)}; if those are the SKUs, give a manifest with the "
                "columns image, sku and category, or the folder one level down"
            )


def _printable_name(name: str) -> str:
    """A name that can be written as UTF-8; names of another encoding show their bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return printable(", ".join(names[:_NAMED])) + more
