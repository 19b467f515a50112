"""What an import wants of one who lends titles to photos that have none; who that is, is none of
the catalogue's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol


class Borrowed(NamedTuple):
    """A title, how like its photo is to the one that gets it (cosine, 0 to 1), and that photo's
    image_id.
    """

    title: str
    similarity: float
    image_id: str


class TitleLender(Protocol):
    """(image_id, encoded photo) of N photos -> a title for each, None where there is none to lend.

    `about` says where titles come from: {"run", "data_hash", "commit"}.
    """

    @property
    def about(self) -> Mapping[str, str]: ...

    def __call__(self, photos: Sequence[tuple[str, bytes]]) -> Sequence[Borrowed | None]: ...
