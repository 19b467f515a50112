"""Holds decoded photos in one temporary file between decoding and writing a catalogue."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

from sicot_jax.catalog.importing.manifest_rows import ManifestRow

SPOOL_FILE = "spool.tmp"
# A shard is held in memory while it is written, and is the unit that machines divide among each
# other.
_SHARD_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class StoredPhoto:
    """A decoded photo.

    Attributes:
      row: its row of the source.
      image_id: hash of its pixels.
      offset: first byte in the spool file.
      size: number of bytes; the photo's fingerprint follows them.
    """

    row: ManifestRow
    image_id: str
    offset: int
    size: int


PhotosBySplit = Mapping[str, Sequence[StoredPhoto]]


@dataclasses.dataclass(frozen=True)
class SpooledPhotos(Sequence[tuple[str, bytes]]):
    """(image_id, bytes) of photos in the spool file; each read opens it, so that threads may read.

    Attributes:
      spool: path of the spool file.
      photos: the photos.
    """

    spool: Path
    photos: Sequence[StoredPhoto]

    def __len__(self) -> int:
        return len(self.photos)

    @overload
    def __getitem__(self, index: int) -> tuple[str, bytes]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, bytes]]: ...

    def __getitem__(self, index: int | slice) -> tuple[str, bytes] | list[tuple[str, bytes]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        photo = self.photos[index]
        with self.spool.open("rb") as file:
            file.seek(photo.offset)
            return photo.image_id, file.read(photo.size)


def split_shards(photos: Sequence[StoredPhoto]) -> Iterator[Sequence[StoredPhoto]]:
    """Yields consecutive parts of about 256 MiB of photos each.

    Args:
      photos: photos in the order in which they are written.

    Yields:
      At least one part; its photos in order.
    """
    start, size = 0, 0
    for end, photo in enumerate(photos):
        if size + photo.size > _SHARD_BYTES and end > start:
            yield photos[start:end]
            start, size = end, 0
        size += photo.size
    yield photos[start:]
