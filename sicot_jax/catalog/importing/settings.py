"""Settings of an import; light, so that the command line knows its flags without the libraries
behind them.
"""

from __future__ import annotations

import dataclasses

from sicot_jax.errors import InputError


class ImportFailed(InputError):
    """An import that stopped; nothing of it is left. The message is one line."""


@dataclasses.dataclass(frozen=True)
class ImportSettings:
    """How photos, words and splits are made. `min_photos` None: what the data set's builder says (1
    for a manifest).
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
        for name in ("short_side", "word_width", "word_epochs", "min_count", "max_vocabulary"):
            if getattr(self, name) < 1:
                raise ImportFailed(f"{name}={getattr(self, name)}, wanted at least 1")
        for name in ("test_per_class", "tail_cut", "min_photos", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ImportFailed(f"{name}={value}, wanted at least 1, or leave it out")
        if self.test_share is not None and not 0 < self.test_share < 1:
            raise ImportFailed(
                f"test_share={self.test_share}, wanted above 0 and below 1, or leave it out"
            )
        if self.test_share is not None and self.test_per_class is not None:
            raise ImportFailed(
                f"test_share={self.test_share} with test_per_class={self.test_per_class}; give one of the two"
            )
        if self.tokenizer not in ("words", "sentencepiece"):
            raise ImportFailed(f"tokenizer={self.tokenizer!r}, wanted words or sentencepiece")
        if not 0 <= self.drop_top_share < 1:
            raise ImportFailed(
                f"drop_top_share={self.drop_top_share}, wanted 0 to less than 1; the default is 0.001"
            )
        if not 0 <= self.max_bad_share <= 1:
            raise ImportFailed(
                f"max_bad_share={self.max_bad_share}, wanted a share from 0 to 1; the default is 0.05"
            )
        if not 0 <= self.titles_min_similarity <= 1:
            raise ImportFailed(
                f"titles_min_similarity={self.titles_min_similarity}, wanted a cosine from 0 to 1; the default is 0"
            )
