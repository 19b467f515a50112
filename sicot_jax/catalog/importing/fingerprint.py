"""Fingerprint of what is imported."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path

from sicot_jax.catalog.importing.manifest import ManifestRow, read_manifest
from sicot_jax.catalog.importing.settings import ImportFailed


def source_sha256(source: Path) -> str:
    """Fingerprint of what is imported: a manifest's bytes, and path, size and time of change of
    every photo (in a
    folder: of every file). Photos themselves are not read.

    Raises ImportFailed: neither a file nor a folder; ManifestError: a manifest that cannot be read.
    """
    source = Path(source)
    digest = hashlib.sha256()
    if source.is_dir():
        # The walk of read_folders: hidden files are passed over, a SKU's folder may be a link.
        entries = [entry for entry in source.iterdir() if not entry.name.startswith(".")]
        found = [
            file for entry in entries for file in (entry.rglob("*") if entry.is_dir() else [entry])
        ]
        root = source
        names = [
            os.fspath(file.relative_to(root)) for file in found if not file.name.startswith(".")
        ]
    elif source.is_file():
        with source.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        root = source.parent
        names = [row.image for row in read_manifest(source) if isinstance(row, ManifestRow)]
    else:
        raise ImportFailed(
            f"{source} not found as a file or folder; wanted a manifest, or a folder with photos"
        )
    for name in sorted(set(names)):
        with contextlib.suppress(OSError):  # a photo that is missing counts when it comes
            status = (root / name).stat()
            if not stat.S_ISDIR(status.st_mode):
                digest.update(os.fsencode(f"{name}\0{status.st_size} {status.st_mtime_ns}\0"))
    return digest.hexdigest()
