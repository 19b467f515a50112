"""Vectors of length 1."""

import numpy as np
import pytest

from sicot_jax.common.linalg import l2_normalize


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vectors_get_length_1_and_zeros_stay(dtype):
    rows = np.array([[3, 4], [0, 0], [-2, 0]], dtype)
    normalized = l2_normalize(rows)
    assert normalized.dtype == dtype
    np.testing.assert_allclose(normalized, [[0.6, 0.8], [0, 0], [-1, 0]], rtol=1e-6)
    np.testing.assert_array_equal(l2_normalize(rows[0]), normalized[0])
