"""Adds records of query photos, labelled with clicked products, to the training split."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sicot_jax.catalog.catalog import Record, Split
from sicot_jax.errors import InputError


@dataclasses.dataclass
class SplitWithQueryPhotos:
    """The N records of the training split, followed by M records of query photos.

    A query record has the label of a product that was clicked, no title and no known box.

    Attributes:
      split: the training split.
      folder: holds the files of query photos.
      sources: [M], the name of a file in `folder`, or the index of the training record whose photo
        it is.
      sku: [M], the products clicked.
      labels: int32 [N + M].
    """

    split: Split
    folder: Path
    sources: Sequence[str | int]
    sku: Sequence[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        """Returns a record. Raises InputError where a query photo is missing or broken."""
        number = index - len(self.split)
        if number < 0:
            return self.split[index]
        source = self.sources[number]
        if isinstance(source, str):
            image_id, image = source, self._read_photo(source)
        else:
            record = self.split[source]
            image_id, image = record["image_id"], record["image"]  # type: ignore[assignment]
        return Record(
            image_id=image_id,
            image=image,
            sku=self.sku[number],
            class_id=int(self.labels[index]),
            title="",
            tags="",
            token_ids=np.zeros(0, np.int32),
            category="",
            box=np.zeros(4, np.float32),
            role="query",
            reference=str(source),
        )

    def _read_photo(self, name: str) -> np.ndarray:
        from sicot_jax.catalog.importing.photos import FolderPhotos
        from sicot_jax.common import image

        try:
            return image.decode_photo(FolderPhotos(self.folder).read(name))
        except (OSError, InputError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(
                f"query photo {self.folder / name}: {reason}; photos have to stay until the run "
                "has ended: train on a copy of the folder without broken ones"
            ) from error
