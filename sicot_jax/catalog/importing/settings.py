"""Settings of an import, and the interface of a source of titles; without heavy imports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from sicot_jax.errors import InputError


class CatalogImportError(InputError):
    """An import that stopped and left nothing behind; the message is one line."""


@dataclasses.dataclass(frozen=True)
class ImportSettings:
    """How photos, words and splits of a catalogue are made.

    Attributes:
      seed: seed of the splits, the record order and the word vectors.
      short_side: photos are shrunk to this shorter side, pixels; never enlarged.
      test_per_class: number of test photos of every class that has enough of them.
      test_share: share of every class's photos to test; without both, 20 % and at most 20 photos.
      tail_cut: training photos of the largest class under an exponential tail; None keeps all.
      min_photos: classes with fewer photos are left out; None takes the data set's default.
      tokenizer: "words" or "sentencepiece".
      drop_top_share: share of the most frequent words that are left out of the vocabulary.
      min_count: words that occur less often in training titles are left out.
      max_vocabulary: maximum number of words.
      word_width: numbers per word vector.
      word_epochs: epochs of word vector training.
      max_bad_share: an import stops when more than this share of rows is bad.
      max_rows: only so many usable rows are read.
      titles_min_similarity: minimum cosine similarity of a transferred title.

    Raises:
      CatalogImportError: a value outside its range.
    """

    seed: int = 0
    short_side: int = 256
    test_per_class: int | None = None
    test_share: float | None = None
    tail_cut: int | None = None
    min_photos: int | None = None
    tokenizer: str = "words"
    drop_top_share: float = 0.001
    min_count: int = 3
    max_vocabulary: int = 400_000
    word_width: int = 128
    word_epochs: int = 5
    max_bad_share: float = 0.05
    max_rows: int | None = None
    titles_min_similarity: float = 0.0

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_test_size()
        if self.tokenizer not in ("words", "sentencepiece"):
            raise CatalogImportError(f"tokenizer={self.tokenizer!r}, wanted words or sentencepiece")
        if not 0 <= self.drop_top_share < 1:
            raise CatalogImportError(
                f"drop_top_share={self.drop_top_share}, wanted 0 to less than 1; "
                "the default is 0.001"
            )
        if not 0 <= self.max_bad_share <= 1:
            raise CatalogImportError(
                f"max_bad_share={self.max_bad_share}, wanted a share from 0 to 1; "
                "the default is 0.05"
            )
        if not 0 <= self.titles_min_similarity <= 1:
            raise CatalogImportError(
                f"titles_min_similarity={self.titles_min_similarity}, wanted a cosine from 0 to 1; "
                "the default is 0"
            )

    def _check_counts(self) -> None:
        for name in ("short_side", "word_width", "word_epochs", "min_count", "max_vocabulary"):
            if getattr(self, name) < 1:
                raise CatalogImportError(f"{name}={getattr(self, name)}, wanted at least 1")
        for name in ("test_per_class", "tail_cut", "min_photos", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CatalogImportError(f"{name}={value}, wanted at least 1, or leave it out")

    def _check_test_size(self) -> None:
        if self.test_share is None:
            return
        if not 0 < self.test_share < 1:
            raise CatalogImportError(
                f"test_share={self.test_share}, wanted above 0 and below 1, or leave it out"
            )
        if self.test_per_class is not None:
            raise CatalogImportError(
                f"test_share={self.test_share} with test_per_class={self.test_per_class}; "
                "give one of the two"
            )


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
