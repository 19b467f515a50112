"""Makes the word vectors that initialise the text encoder, random or by word2vec."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

# Below this many tokens no occurrence is dropped: subsampling would leave a small catalogue hardly
# any pairs.
_SUBSAMPLE_FROM = 1_000_000
_MAX_SENTENCE_WORDS = 10_000  # gensim ignores what a longer sentence holds beyond


def random_word_vectors(vocabulary_size: int, width: int, seed: int) -> np.ndarray:
    """Returns normal word vectors of norm about 1.

    Args:
      vocabulary_size: V.
      width: E.
      seed: seed of the random numbers.

    Returns:
      float32 [V, E], standard deviation 1 / sqrt(E); row 0 (padding) is zero.

    Raises:
      ValueError: a size below 1.
    """
    if vocabulary_size < 1 or width < 1:
        raise ValueError(
            f"vocabulary_size={vocabulary_size}, width={width}, wanted both at least 1"
        )
    vectors = np.random.default_rng(seed).standard_normal(
        (vocabulary_size, width), dtype=np.float32
    )
    vectors /= np.float32(width) ** 0.5
    vectors[0] = 0
    return vectors


class _Sentences:
    """Token ids as strings, which gensim wants; re-iterable, one pass per epoch."""

    def __init__(self, token_ids: Sequence[np.ndarray], vocabulary_size: int) -> None:
        self._token_ids = token_ids
        self._names = [str(i) for i in range(vocabulary_size)]

    def __iter__(self) -> Iterator[list[str]]:
        for ids in self._token_ids:
            yield [self._names[i] for i in ids]


def _parts(ids: np.ndarray) -> Sequence[np.ndarray]:
    """Returns a title in parts of about equal length that gensim reads to their ends."""
    if len(ids) <= _MAX_SENTENCE_WORDS:
        return [ids]
    return np.array_split(ids, -(-len(ids) // _MAX_SENTENCE_WORDS))


def train_word_vectors(
    token_ids: Sequence[np.ndarray],
    *,
    vocabulary_size: int,
    width: int,
    epochs: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """Trains word2vec (skip-gram, 5 negatives; Mikolov et al. 2013) over titles.

    Equal input gives equal vectors on one machine (one worker is used). Another processor gives
    vectors that differ by rounding: BLAS has other routines for it.

    Args:
      token_ids: [N], int [number of words] of each title, ids in 1..V-1.
      vocabulary_size: V.
      width: E.
      epochs: passes over the titles.
      seed: seed of the random numbers.

    Returns:
      float32 [V, E], row 0 (padding) zero. Words that no title of two or more words contains keep
      a small random vector.

    Raises:
      ValueError: a token id outside 1..V-1.
    """
    vectors = random_word_vectors(vocabulary_size, width, seed) * np.float32(0.1)
    lengths = [len(ids) for ids in token_ids]
    low = min((int(ids.min()) for ids in token_ids if len(ids)), default=1)
    high = max((int(ids.max()) for ids in token_ids if len(ids)), default=1)
    if low < 1 or (high >= vocabulary_size and any(lengths)):
        raise ValueError(
            f"token ids from {low} to {high}, wanted 1 to {vocabulary_size - 1}: "
            "encode with one tokenizer"
        )
    # A lone word has no context.
    titles = [part for ids in token_ids if len(ids) > 1 for part in _parts(ids)]
    if not titles:
        return vectors
    log = logging.getLogger("gensim")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of every small corpus
    try:
        from gensim.models import Word2Vec

        model = Word2Vec(
            sentences=_Sentences(titles, vocabulary_size),
            vector_size=width,
            sg=1,
            negative=5,
            window=10,  # the order of a title's words means little: let nearly all of them meet
            min_count=1,
            sample=0 if sum(lengths) < _SUBSAMPLE_FROM else 1e-3,
            epochs=epochs,
            seed=seed,
            workers=1,
        )
    finally:
        log.setLevel(level)
    vectors[[int(name) for name in model.wv.index_to_key]] = model.wv.vectors
    return vectors
