"""The files of vectors."""

import numpy as np
import pytest

from sicot_jax.errors import InputError
from sicot_jax.index import layout
from sicot_jax.index.vectors import Vectors, widened


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
