"""Codes and the files of vectors."""

import numpy as np
import pytest

from sicot_jax.errors import InputError
from sicot_jax.index import layout
from sicot_jax.index.vectors import Codebook, Vectors, fit_codebook, unit, widened


def test_a_code_by_hand():
    """Signs of x - mean along three directions and their opposites, lowest bit first."""
    rotation = np.concatenate([np.eye(3), -np.eye(3), np.eye(3)[:, :2]], 1).astype(np.float32)
    codebook = Codebook(np.array([1, 1, 1], np.float32), rotation)
    np.testing.assert_array_equal(codebook.encode(np.array([[2, 0, 3]])), [[0b01010101]])


@pytest.mark.parametrize("bits", [8, 16, 64, 256])
def test_near_vectors_have_near_codes(bits):
    """Fewer bits than numbers, as many and more: noise of a twentieth flips a few bits, another vector about half."""
    rng = np.random.default_rng(0)
    rows = unit(rng.standard_normal((500, 32)))
    codebook = fit_codebook(rows, bits)
    assert codebook.bits == bits
    codes = codebook.encode(rows)
    near = codebook.encode(unit(rows + 0.05 * unit(rng.standard_normal(rows.shape))))
    flipped = np.unpackbits(codes ^ near, axis=1).mean()
    others = np.unpackbits(codes ^ np.roll(codes, 1, 0), axis=1).mean()
    assert flipped < 0.05 and 0.4 < others < 0.6


def test_a_codebook_of_vectors_without_variance():
    """One photo, or all the same: codes are made all the same."""
    for rows in (np.ones((1, 4)), np.ones((5, 4))):
        assert fit_codebook(rows.astype(np.float32), 16).encode(rows).shape == (len(rows), 2)


def test_bits_that_are_no_bytes():
    with pytest.raises(InputError, match="bits=12, wanted a multiple of 8"):
        fit_codebook(np.ones((3, 4)), 12)


def test_lines_after_those_that_count_are_overwritten(tmp_path):
    """What a change left behind that did not come to its end."""
    vectors = Vectors(tmp_path, 3, 8)
    vectors.write(layout.OWNERS, 0, np.arange(5, dtype=np.int32))
    vectors.write(layout.OWNERS, 2, np.array([7], np.int32))
    np.testing.assert_array_equal(vectors.mapped(layout.OWNERS, 3), [0, 1, 7])
    with pytest.raises(InputError, match="3 lines, wanted 4; the index is damaged"):
        vectors.mapped(layout.OWNERS, 4)


def test_a_map_made_before_keeps_its_lines(tmp_path):
    """A reader's view, while a writer appends."""
    vectors = Vectors(tmp_path, 2, 8)
    first = np.array([[1, 2], [3, 4]], np.float16)
    vectors.write(layout.FEATURES, 0, first)
    before = vectors.mapped(layout.FEATURES, 2)
    vectors.write(layout.FEATURES, 2, first + 4)
    np.testing.assert_array_equal(before, first)
    np.testing.assert_array_equal(vectors.mapped(layout.FEATURES, 4)[2:], first + 4)
    assert vectors.mapped(layout.CODES, 0).shape == (0, 1)


def test_halves_are_widened_exactly():
    """Every finite one, negative zero and the subnormal ones too; also of lines that do not follow each other."""
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    np.testing.assert_array_equal(widened(finite).view(np.int32), finite.astype(np.float32).view(np.int32))
    table = finite[:60000].reshape(-1, 100)
    np.testing.assert_array_equal(widened(table[::7]), table[::7].astype(np.float32))
    assert widened(np.zeros((0, 8), np.float16)).shape == (0, 8)
