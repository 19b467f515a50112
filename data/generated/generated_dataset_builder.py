"""A generated catalogue written to disk, to be read like an imported one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from sicot_jax.catalog.catalog import SPLITS
from sicot_jax.catalog.importing.builder import CatalogBuilder
from sicot_jax.catalog.importing.manifest_rows import DroppedRow, ManifestError, ManifestRow
from sicot_jax.catalog.importing.photos import PhotoReader
from sicot_jax.catalog.sources.generated import GeneratedPhotos, open_generated
from sicot_jax.config import GeneratedSpec

SPEC_FILE = "spec.json"


def read_spec(folder: Path) -> GeneratedSpec:
    """`spec.json` of a folder: fields of GeneratedSpec that differ from their defaults."""
    path = folder / SPEC_FILE
    known = [field.name for field in dataclasses.fields(GeneratedSpec)]
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if "box_area" in fields:
            fields["box_area"] = tuple(fields["box_area"])
        # The import makes vocabulary and vectors of its own.
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
    """Reads `spec.json` in the source folder."""

    name = "generated"

    def rows(self) -> Iterable[ManifestRow | DroppedRow]:
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
        return GeneratedPhotos(read_spec(self.source))
