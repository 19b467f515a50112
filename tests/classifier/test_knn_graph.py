"""The graph of KNN softmax against a dense one, and its top-k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sicot_jax.classifier.knn_graph import (
    TOP_K_GROUP,
    grouped_top_k,
    knn_graph,
    loop_over_equal_chunks,
)
from sicot_jax.parallel import mesh


@pytest.mark.parametrize(("width", "k"), [(160, 3), (1600, 99), (160, 10), (161, 3), (5, 5)])
def test_grouped_top_k_equals_top_k(width, k):
    """Grouped with more groups than k, else that of XLA; nine in ten entries are equal."""
    x = np.random.default_rng(0).normal(size=(20, width)).astype(np.float32)
    x[:, ::10] += 3
    values, columns = jax.jit(lambda x: grouped_top_k(x, k))(np.maximum(x, 1))
    np.testing.assert_array_equal(values, np.sort(np.maximum(x, 1), 1)[:, ::-1][:, :k])
    np.testing.assert_array_equal(
        np.take_along_axis(np.maximum(x, 1), np.asarray(columns), 1), values
    )
    assert all(len(set(row)) == k for row in np.asarray(columns).tolist())


@pytest.mark.parametrize(
    ("rows", "chunk"), [(1, 4), (15, 100), (16, 16), (100, 100), (100, 40), (96, 32), (97, 32)]
)
def test_equal_chunks_see_each_row_once(rows, chunk):
    def add(seen_rows, first, size, seen):
        assert size <= chunk + TOP_K_GROUP
        assert size == rows or size % TOP_K_GROUP == 0
        return seen_rows.at[first + jnp.arange(size)].add(~seen)

    assert (
        loop_over_equal_chunks(add, jnp.zeros(rows, jnp.int32), rows, chunk).tolist() == [1] * rows
    )


@pytest.mark.parametrize(
    ("num_classes", "k", "chunk"), [(37, 5, 3), (40, 39, 100), (1000, 3, 100), (1001, 2, 1000)]
)
def test_knn_graph_equals_dense(device_mesh, num_classes, k, chunk):
    rng = np.random.default_rng(0)
    padded = mesh.pad_classes(num_classes, device_mesh)
    kernel = np.zeros((padded, 6), np.float32)
    kernel[:num_classes] = rng.normal(size=(num_classes, 6))
    sharded = mesh.to_global({"kernel": kernel}, device_mesh)["kernel"]
    graph = jax.jit(lambda w: knn_graph(w, num_classes=num_classes, k=k, queries=7, chunk=chunk))(
        sharded
    )
    unit = kernel[:num_classes] / np.linalg.norm(kernel[:num_classes], axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    np.testing.assert_array_equal(np.asarray(graph)[:num_classes], np.argsort(-cosine, 1)[:, :k])
