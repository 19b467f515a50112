from __future__ import annotations

import numpy as np
import pytest

from sicot_jax.catalog.word_vectors import random_word_vectors, train_word_vectors


def _titles() -> list[np.ndarray]:
    # Words 1-3 occur together, and so do 4-6; word 7 only alone, word 8 never.
    rng = np.random.default_rng(0)
    titles = [
        rng.permutation([1, 2, 3] if i % 2 else [4, 5, 6]).astype(np.int32) for i in range(400)
    ]
    return [*titles, np.array([7], np.int32), np.zeros(0, np.int32)]


def test_word2vec_groups_words_and_is_deterministic():
    vectors = train_word_vectors(_titles(), vocabulary_size=9, width=16, epochs=20, seed=3)
    assert vectors.shape == (9, 16)
    assert vectors.dtype == np.float32
    assert (vectors[0] == 0).all()
    unit = vectors[1:7] / np.linalg.norm(vectors[1:7], axis=1, keepdims=True)
    likeness = unit @ unit.T
    assert likeness[:3, :3].min() > likeness[:3, 3:].max() + 0.05
    np.testing.assert_array_equal(vectors[7:], random_word_vectors(9, 16, 3)[7:] * np.float32(0.1))
    np.testing.assert_array_equal(
        vectors, train_word_vectors(_titles(), vocabulary_size=9, width=16, epochs=20, seed=3)
    )


def test_words_beyond_gensims_longest_sentence_are_trained():
    """Words 3 and 4 follow 10,000 others in one title; gensim reads 10,000 of a sentence."""
    title = np.repeat([[1, 2], [3, 4]], 5_000, axis=0).ravel().astype(np.int32)
    vectors = train_word_vectors([title], vocabulary_size=5, width=16, epochs=1)
    unit = vectors[1:] / np.linalg.norm(vectors[1:], axis=1, keepdims=True)
    assert unit[0] @ unit[1] > 0.5
    assert unit[2] @ unit[3] > 0.5


def test_nothing_to_train():
    for titles in ([], [np.zeros(0, np.int32)]):
        vectors = train_word_vectors(titles, vocabulary_size=1, width=4)
        assert vectors.shape == (1, 4)
        assert (vectors == 0).all()


def test_random_vectors():
    vectors = random_word_vectors(1000, 64, seed=1)
    assert vectors.dtype == np.float32
    assert (vectors[0] == 0).all()
    assert abs(np.linalg.norm(vectors[1:], axis=1).mean() - 1) < 0.05
    assert not np.array_equal(vectors, random_word_vectors(1000, 64, seed=2))


def test_bad_ids():
    for bad in ([0, 1], [1, 3]):
        with pytest.raises(ValueError, match="wanted 1 to 2"):
            train_word_vectors([np.array(bad)], vocabulary_size=3, width=4)
    with pytest.raises(ValueError, match="width=0"):
        random_word_vectors(3, 0, seed=0)
