"""Interface of a title source used during import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol


class TransferredTitle(NamedTuple):
    """The title of another photo, given to a photo without one.

    Attributes:
      title: the title.
      similarity: cosine similarity of the two photos' embeddings, 0 to 1.
      image_id: the photo that the title comes from.
    """

    title: str
    similarity: float
    image_id: str


class TitleSource(Protocol):
    """Finds titles for photos that have none."""

    @property
    def provenance(self) -> Mapping[str, str]:
        """Where titles come from: {"run", "data_hash", "commit"}."""

    def find_titles(self, photos: Sequence[tuple[str, bytes]]) -> Sequence[TransferredTitle | None]:
        """Returns a title for each photo.

        Args:
          photos: (image_id, encoded photo) of N photos.

        Returns:
          N titles, None where there is none to give.
        """
        ...
