"""Computes the fingerprint of an import source."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path

from sicot_jax.catalog.importing.manifest import read_manifest
from sicot_jax.catalog.importing.manifest_rows import ManifestRow
from sicot_jax.catalog.importing.settings import CatalogImportError


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
      ManifestError: a manifest that cannot be read.
    """
    source = Path(source)
    digest = hashlib.sha256()
    if source.is_dir():
        # The walk of read_folders: hidden files are ignored, a SKU's folder may be a link.
        entries = [entry for entry in source.iterdir() if not entry.name.startswith(".")]
        files = [
            file for entry in entries for file in (entry.rglob("*") if entry.is_dir() else [entry])
        ]
        root = source
        names = [
            os.fspath(file.relative_to(root)) for file in files if not file.name.startswith(".")
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
            status = (root / name).stat()
            if not stat.S_ISDIR(status.st_mode):
                digest.update(os.fsencode(f"{name}\0{status.st_size} {status.st_mtime_ns}\0"))
    return digest.hexdigest()
