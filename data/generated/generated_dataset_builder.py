"""Writes a generated catalogue to disk, so that it is read like an imported one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from sicot_jax.catalog.catalog import SPLITS
from sicot_jax.catalog.importing.builder import CatalogBuilder
from sicot_jax.catalog.importing.manifest_rows import DroppedRow, ManifestError, ManifestRow
from sicot_jax.catalog.importing.photos import PhotoReader
from sicot_jax.catalog.sources.generated import GeneratedPhotoReader, open_generated
from sicot_jax.config import GeneratedSpec

SPEC_FILE = "spec.json"


def read_spec(folder: Path) -> GeneratedSpec:
    """Returns the settings in a folder's `spec.json`.

    Args:
      folder: folder with a `spec.json`: fields of GeneratedSpec that differ from their defaults.

    Returns:
      The settings, with random word vectors: an import trains its own.

    Raises:
      ManifestError: no such file, or unknown fields.
    """
    path = folder / SPEC_FILE
    known = [field.name for field in dataclasses.fields(GeneratedSpec)]
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if "box_area" in fields:
            fields["box_area"] = tuple(fields["box_area"])
        return GeneratedSpec(**{**fields, "word_vectors": "random"})
    except FileNotFoundError:
        raise ManifestError(
            f'no {SPEC_FILE} in {folder}; write one, such as {{"num_classes": 100}}'
        ) from None
    except (ValueError, TypeError) as error:
        raise ManifestError(
            f"{path}: {error}; wanted a JSON object with any of {', '.join(known)}"
        ) from None


class Builder(CatalogBuilder, skip_registration=True):
    """Generates photos from the `spec.json` in the source folder."""

    name = "generated"

    def rows(self) -> Iterable[ManifestRow | DroppedRow]:
        """Yields one row per generated photo."""
        try:
            splits = open_generated(read_spec(self.source)).splits
        except ManifestError:
            raise
        except ValueError as error:
            raise ManifestError(f"{self.source / SPEC_FILE}: {error}") from None
        for name in SPLITS:
            for index, record in enumerate(splits[name]):
                yield ManifestRow(
                    image=f"{name}/{index}",
                    sku=record["sku"],
                    title=record["title"],
                    category=record["category"],
                    box=tuple(record["box"].tolist()),
                    split=name,
                )

    def photos(self) -> PhotoReader:
        """Returns a reader that draws photos."""
        return GeneratedPhotoReader(read_spec(self.source))
