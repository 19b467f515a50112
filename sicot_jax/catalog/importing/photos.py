"""Reads photos from folders or zip files, decodes them in processes, fingerprints the source."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import signal
import stat
import threading
import unicodedata
import zipfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Protocol

from sicot_jax.catalog.importing.folders import walk_folder
from sicot_jax.catalog.importing.manifest import read_manifest
from sicot_jax.catalog.importing.manifest_rows import ManifestRow
from sicot_jax.catalog.importing.settings import CatalogImportError
from sicot_jax.common.image import ImageError, prepare_photo
from sicot_jax.common.text import one_line_error

MAX_FILE_BYTES = 512 << 20
_CHUNK = 32
_PHOTOS_PER_WORKER = 100


class PhotoReader(Protocol):
    """Reads the bytes of a photo by its name in the source; picklable for worker processes."""

    def read(self, image: str) -> bytes:
        """Returns the bytes of a photo file.

        Args:
          image: name of the photo, `ManifestRow.image`.

        Returns:
          The file's content.
        """
        ...


def _unicode_forms(name: str) -> tuple[str, str, str]:
    return name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)


def photo_path(root: Path, image: str) -> Path:
    """Returns the path of a photo, also where an accent is one character here and two there.

    Archives of a Mac hold decomposed names (NFD), tables composed ones (NFC); they look the same.

    Args:
      root: folder that `image` may be relative to.
      image: path of the photo, as a table has it.

    Returns:
      The path; `root / image` where there is no such file in any form.
    """
    wanted = root / image
    if image.isascii() or wanted.exists():
        return wanted
    paths = [root]  # both forms of a folder may be there
    for part in Path(image).parts:
        forms = dict.fromkeys(path / form for path in paths for form in _unicode_forms(part))
        paths = [form for form in forms if form.exists()]
    return paths[0] if paths else wanted


@dataclasses.dataclass(frozen=True)
class FolderPhotos:
    """Photos by path, relative to `root` or absolute."""

    root: Path

    def read(self, image: str) -> bytes:
        """Returns the bytes of a photo file.

        Args:
          image: path, relative to `root` or absolute.

        Returns:
          The file's content.

        Raises:
          ImageError: not a regular file, or larger than MAX_FILE_BYTES.
          OSError: missing or unreadable.
        """
        path = photo_path(self.root, image)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            # A pipe would block forever, a device may have no end.
            raise ImageError("not a file: wanted a photo file, not a folder, pipe or device")
        size = status.st_size
        if size > MAX_FILE_BYTES:
            raise ImageError(f"file too large: {size} bytes, at most {MAX_FILE_BYTES}")
        return path.read_bytes()


@dataclasses.dataclass
class ZipPhotos:
    """Photos by member name of a zip file."""

    path: Path
    _file: zipfile.ZipFile | None = dataclasses.field(default=None, repr=False, compare=False)

    def read(self, image: str) -> bytes:
        """Returns the bytes of a member; the zip file stays open.

        Args:
          image: name of the member.

        Returns:
          The member's content.

        Raises:
          ImageError: larger than MAX_FILE_BYTES.
          KeyError: no such member.
        """
        if self._file is None:
            self._file = zipfile.ZipFile(self.path)
        members = self._file.NameToInfo
        info = self._file.getinfo(next((n for n in _unicode_forms(image) if n in members), image))
        if info.file_size > MAX_FILE_BYTES:
            raise ImageError(f"file too large: {info.file_size} bytes, at most {MAX_FILE_BYTES}")
        return self._file.read(info)

    def close(self) -> None:
        """Closes the zip file; the next read opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_file": None}


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedPhoto:
    """A photo ready to be stored.

    Attributes:
      image_id: hash of the decoded pixels.
      image: bytes of the stored JPEG.
      fingerprint: `photo_fingerprint` of the photo.
      error: why the photo cannot be used; the other fields are then empty.
    """

    image_id: str = ""
    image: bytes = b""
    fingerprint: bytes = b""
    error: str = ""


def _prepare_one(reader: PhotoReader, image: str, short_side: int) -> PreparedPhoto:
    try:
        return PreparedPhoto(*prepare_photo(reader.read(image), short_side=short_side))
    except ImageError as error:
        return PreparedPhoto(error=str(error))
    except (FileNotFoundError, NotADirectoryError, KeyError):
        return PreparedPhoto(error="photo missing: no such file")
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        return PreparedPhoto(error=f"photo unreadable: {one_line_error(error, 120)}")


class _WorkerState:
    """What a worker process keeps between chunks."""

    reader: PhotoReader
    short_side: int


def _prepare_chunk(images: Sequence[str]) -> list[PreparedPhoto]:
    return [_prepare_one(_WorkerState.reader, image, _WorkerState.short_side) for image in images]


def _start_worker(reader: PhotoReader, short_side: int) -> None:
    _WorkerState.reader, _WorkerState.short_side = reader, short_side
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops the pool
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """Ends this worker process when its parent ends; blocks until then.

    A pool's workers would outlive a parent that was killed.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def prepare_photos(
    reader: PhotoReader, images: Sequence[str], *, short_side: int, workers: int
) -> Iterator[PreparedPhoto]:
    """Yields decoded, shrunk and encoded photos; few are held in memory.

    One worker decodes in this process. More are started by `spawn`: forking a process that has
    threads (jax, grain, the progress bar) can hang.

    Args:
      reader: reads the photo files.
      images: names of N photos.
      short_side: shorter side of a stored photo at most, pixels.
      workers: number of processes.

    Yields:
      N prepared photos in the order of `images`, whatever the number of workers.
    """
    # Starting a process takes about a second: not worth it for a few photos.
    workers = min(workers, 1 + len(images) // _PHOTOS_PER_WORKER)
    if workers == 1:
        for image in images:
            yield _prepare_one(reader, image, short_side)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(reader, short_side),
    )
    pending: deque[Future[list[PreparedPhoto]]] = deque()
    try:
        for start in range(0, len(images), _CHUNK):
            pending.append(pool.submit(_prepare_chunk, images[start : start + _CHUNK]))
            if len(pending) > 4 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def source_sha256(source: Path) -> str:
    """Returns a hash that changes when the source of an import changes.

    It covers a manifest's bytes, and path, size and modification time of every photo (in a folder:
    of every file). The photos themselves are not read.

    Args:
      source: manifest file or folder.

    Returns:
      64 hexadecimal digits.

    Raises:
      CatalogImportError: neither a file nor a folder.
      TableError: a manifest that cannot be read.
    """
    source = Path(source)
    digest = hashlib.sha256()
    if source.is_dir():
        root = source
        names = [
            entry.name for entry in walk_folder(source) if not entry.fault and not entry.is_folder
        ]
    elif source.is_file():
        with source.open("rb") as manifest:
            while block := manifest.read(1 << 20):
                digest.update(block)
        root = source.parent
        names = [row.image for row in read_manifest(source) if isinstance(row, ManifestRow)]
    else:
        raise CatalogImportError(
            f"{source} not found as a file or folder; wanted a manifest, or a folder with photos"
        )
    for name in sorted(set(names)):
        with contextlib.suppress(OSError):  # a missing photo counts once it appears
            status = photo_path(root, name).stat()
            if not stat.S_ISDIR(status.st_mode):
                digest.update(os.fsencode(f"{name}\0{status.st_size} {status.st_mtime_ns}\0"))
    return digest.hexdigest()
