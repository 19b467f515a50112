"""Photo files of a version."""

import numpy as np
import pytest

from sicot_jax.common.linalg import l2_normalize
from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout
from sicot_jax.index.storage import vectors as vectors
from sicot_jax.index.storage.vectors import VectorFiles, cosine_similarities, unit_features


def test_write_overwrites_rows_of_a_stopped_change(tmp_path):
    vectors = VectorFiles(tmp_path, 3, 8)
    vectors.write_rows(layout.ROW_PRODUCTS, 0, np.arange(5, dtype=np.int32))
    vectors.write_rows(layout.ROW_PRODUCTS, 2, np.array([7], np.int32))
    np.testing.assert_array_equal(vectors.memmap(layout.ROW_PRODUCTS, 3), [0, 1, 7])
    with pytest.raises(InputError, match="3 rows, wanted 4; the index is damaged"):
        vectors.memmap(layout.ROW_PRODUCTS, 4)


def test_memmap_keeps_its_rows_while_others_are_added(tmp_path):
    vectors = VectorFiles(tmp_path, 2, 8)
    first = np.array([[1, 2], [3, 4]], np.float16)
    vectors.write_rows(layout.FEATURES, 0, first)
    before = vectors.memmap(layout.FEATURES, 2)
    vectors.write_rows(layout.FEATURES, 2, first + 4)
    np.testing.assert_array_equal(before, first)
    np.testing.assert_array_equal(vectors.memmap(layout.FEATURES, 4)[2:], first + 4)
    assert vectors.memmap(layout.CODES, 0).shape == (0, 1)


def test_cosine_similarities_of_float16(monkeypatch):
    """Also of subnormal numbers; equal rows have equal results in every chunk; NaN gives -inf."""
    monkeypatch.setattr(vectors, "_CHUNK_BYTES", 64 * 200)  # 64 rows
    rng = np.random.default_rng(0)
    features = l2_normalize(
        rng.normal(size=(300, 100)) * 10.0 ** rng.uniform(-9, 0, (300, 100))
    ).astype(np.float16)
    features[200] = features[7]
    assert 0 < np.mean((features != 0) & (np.abs(features) < 2.0**-14)) < 1
    query, rows = l2_normalize(rng.normal(size=100)), rng.permutation(300)[:259]
    rows[:2] = 200, 7
    similarity = cosine_similarities(features, rows, query)
    np.testing.assert_allclose(
        similarity, features[rows].astype(np.float64) @ query, rtol=0, atol=1e-6
    )
    assert similarity.dtype == np.float32
    assert similarity[0] == similarity[1]
    assert cosine_similarities(features, rows[:0], query).shape == (0,)
    damaged = features.copy()
    damaged[rows[3], 5] = np.nan  # the others stay as they are
    np.testing.assert_array_equal(
        cosine_similarities(damaged, rows, query),
        np.where(np.arange(259) == 3, -np.inf, similarity),
    )
    assert np.all(cosine_similarities(features, rows, query * np.nan) == -np.inf)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_photo_without_a_finite_embedding_is_named(number):
    embeddings = np.array([[3, 4], [1, number], [0, 0]], np.float32)
    with pytest.raises(
        InputError, match=r"photo b: its embedding has numbers that are NaN .* 1 of 3"
    ):
        unit_features(embeddings, ["a", "b", "c"])
    np.testing.assert_array_equal(
        unit_features(embeddings[::2], ["a", "c"]), np.array([[0.6, 0.8], [0, 0]], np.float16)
    )
