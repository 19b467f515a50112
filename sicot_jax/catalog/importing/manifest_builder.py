"""TFDS builder behind `sicot import MANIFEST` and `sicot import FOLDER`."""

from __future__ import annotations

from collections.abc import Iterable

from sicot_jax.catalog.importing.builder import CatalogBuilder
from sicot_jax.catalog.importing.manifest import read_folders, read_manifest
from sicot_jax.catalog.importing.manifest_rows import DroppedRow, ManifestRow
from sicot_jax.catalog.importing.photos import FolderPhotos


class ManifestBuilder(CatalogBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builds a catalogue from a manifest file, or from a folder with one folder per SKU."""

    def rows(self) -> Iterable[ManifestRow | DroppedRow]:
        """Returns the rows of the manifest or folder."""
        if self.source.is_dir():
            return read_folders(self.source)
        return read_manifest(self.source, self.unused_columns)

    def photos(self) -> FolderPhotos:
        """Returns a reader of photos relative to the manifest or folder."""
        return FolderPhotos(self.source if self.source.is_dir() else self.source.parent)
