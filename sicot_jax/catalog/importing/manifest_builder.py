"""The builder behind `sicot import MANIFEST` and `sicot import FOLDER`."""

from __future__ import annotations

from collections.abc import Iterable

from sicot_jax.catalog.importing.builder import CatalogBuilder
from sicot_jax.catalog.importing.manifest import (
    DroppedRow,
    ManifestRow,
    read_folders,
    read_manifest,
)
from sicot_jax.catalog.importing.photos import FolderPhotos


class ManifestBuilder(CatalogBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A catalogue from a manifest file, or from a folder with one folder per SKU."""

    def rows(self) -> Iterable[ManifestRow | DroppedRow]:
        return (
            read_folders(self.source)
            if self.source.is_dir()
            else read_manifest(self.source, self.unused_columns)
        )

    def photos(self) -> FolderPhotos:
        return FolderPhotos(self.source if self.source.is_dir() else self.source.parent)
