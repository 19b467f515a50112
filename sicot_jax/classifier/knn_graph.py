"""The graph behind KNN softmax: each class's nearest other classes by the cosine of their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sicot_jax.classifier.streaming import (
    first_class_id,
    pass_to_previous_device,
    slice_rows,
    to_varying,
    update_rows,
)
from sicot_jax.parallel import mesh
from sicot_jax.parallel.array_types import Array, Float, Int

# Rows that are compared at a time, with how many others: queries x chunk cosines are held. Few
# against many, since choosing the k largest costs less of long rows.
GRAPH_QUERIES, GRAPH_CHUNK = 256, 32768
TOP_K_GROUP = 16  # entries of a group in `grouped_top_k`


def knn_graph(
    kernel: Float[Array, "C D"],
    *,
    num_classes: int,
    k: int,
    queries: int = GRAPH_QUERIES,
    chunk: int = GRAPH_CHUNK,
    dtype: DTypeLike = jnp.float32,
) -> Int[Array, "C {k}"]:
    """Returns each class's k nearest other classes by the cosine of their rows, exactly.

    Every device keeps the running top-k of its rows while the blocks of rows are passed round the
    devices, so that no device ever holds more than two blocks besides its rows: the one compared
    with and the next one. A single device holds none. Song et al. 2020, section on the graph.

    Args:
      kernel: float32 [C padded, D], divided over devices by class.
      num_classes: C; rows beyond it are padding, and neighbours of none.
      k: number of neighbours, less than the number of classes.
      queries: rows compared at a time.
      chunk: rows they are compared with at a time.
      dtype: dtype of the inputs of the products; sums are float32.

    Returns:
      Class ids, nearest first, int32 [C padded, k], divided by class; ties in any order.
    """

    def on_shard(kernel: Array) -> Array:
        shard_rows = kernel.shape[0]
        start = first_class_id(shard_rows)
        devices = lax.axis_size(mesh.AXES)

        def unit_rows_of(first: Any, size: int) -> Array:
            # Normalised when needed, so that no copy of the rows is held.
            return _unit(slice_rows(kernel, first, size), dtype)

        def compare(
            block: Callable[[Any, int], Array], block_start: Any, best: tuple[Array, ...]
        ) -> tuple[Array, ...]:
            def with_others(best: Any, first: Any, size: int, seen: Array) -> Any:
                others, other_ids = block(first, size), block_start + first + jnp.arange(size)
                excluded = seen | (other_ids >= num_classes)

                def merge(best: Any, first: Any, size: int, seen: Array) -> Any:
                    rows, ids = unit_rows_of(first, size), start + first + jnp.arange(size)
                    cosine = jnp.einsum(
                        "qd,nd->qn", rows, others, preferred_element_type=jnp.float32
                    )
                    wrong = (other_ids == ids[:, None]) | excluded | seen[:, None]
                    values, position = grouped_top_k(
                        jnp.where(wrong, -jnp.inf, cosine), min(k, other_ids.size)
                    )
                    return _merge_top_k(best, (values, other_ids[position]), first, size)

                return loop_over_equal_chunks(merge, best, shard_rows, queries)

            return loop_over_equal_chunks(with_others, best, shard_rows, chunk)

        def next_block(i: Any, carry: Any) -> Any:
            block, best = carry
            block = pass_to_previous_device(block)
            owner = (lax.axis_index(mesh.AXES) + i) % devices
            rows_of_block = lambda first, size: slice_rows(block, first, size)  # noqa: E731
            return block, compare(rows_of_block, owner * shard_rows, best)

        best: tuple[Array, ...] = (
            to_varying(jnp.full((shard_rows, k), -jnp.inf)),
            to_varying(jnp.zeros((shard_rows, k), jnp.int32)),
        )
        best = compare(unit_rows_of, start, best)
        if devices > 1:
            _, best = lax.fori_loop(1, devices, next_block, (_unit(kernel, dtype), best))
        return best[1]

    return jax.shard_map(on_shard, in_specs=(mesh.CLASS_ROWS,), out_specs=mesh.CLASS_ROWS)(kernel)


def _unit(x: Array, dtype: DTypeLike) -> Array:
    length = lax.rsqrt(jnp.maximum(jnp.sum(x**2, -1, keepdims=True), 1e-30))
    return (x * length).astype(dtype)


def _merge_top_k(
    best: tuple[Array, Array], new: tuple[Array, Array], first: Any, size: int
) -> tuple[Array, ...]:
    """`best` (values, ids [rows, k]) with new candidates for the rows of a chunk merged in."""
    values, ids = (slice_rows(x, first, size) for x in best)
    k = values.shape[1]
    values, position = lax.top_k(jnp.concatenate([values, new[0]], -1), k)
    ids = jnp.take_along_axis(jnp.concatenate([ids, new[1]], -1), position, -1)
    return tuple(update_rows(x, part, first) for x, part in zip(best, (values, ids), strict=True))


def grouped_top_k(
    x: Float[Array, "R N"], k: int
) -> tuple[Float[Array, "R {k}"], Int[Array, "R {k}"]]:
    """Returns `lax.top_k` of long rows in less time.

    The k largest are in the k groups of TOP_K_GROUP entries with the largest maxima, since a group
    left out has k maxima no smaller than its maximum; so only their entries are sorted. Groups are
    strided: their maxima are those of complete vectors.

    Args:
      x: float [R, N].
      k: number of entries.

    Returns:
      Values and their columns, [R, k] each, largest first; ties in any order.
    """
    rows, width = x.shape
    groups, rest = divmod(width, TOP_K_GROUP)
    if rest or groups <= k:
        values, columns = lax.top_k(x, k)
        return values, columns
    _, best = lax.top_k(jnp.max(x.reshape(rows, TOP_K_GROUP, groups), 1), k)
    columns = (best[:, None, :] + groups * jnp.arange(TOP_K_GROUP)[:, None]).reshape(
        rows, k * TOP_K_GROUP
    )
    values, position = lax.top_k(jnp.take_along_axis(x, columns, -1), k)
    return values, jnp.take_along_axis(columns, position, -1)


def equal_chunk_size(num_rows: int, chunk: int) -> int:
    """Returns the size of the chunks of `loop_over_equal_chunks`.

    There are two or more chunks, though one could do: one that is no multiple of the groups of
    `grouped_top_k` could not use them, and memory would depend on that.

    Args:
      num_rows: rows to divide.
      chunk: wanted size.

    Returns:
      Up to `chunk` and a few; a multiple of TOP_K_GROUP where there are that many rows.
    """
    number = max(2, -(-num_rows // chunk))
    return min(num_rows, -(-num_rows // (number * TOP_K_GROUP)) * TOP_K_GROUP)


def loop_over_equal_chunks(
    function: Callable[[Any, Any, int, Array], Any], carry: Any, num_rows: int, chunk: int
) -> Any:
    """Runs `carry = function(carry, first, size, seen)` over all rows, in chunks of one size.

    The last chunk ends with the rows and overlaps the one before it. One body, and so one set of
    buffers, unlike a loop followed by a remainder.

    Args:
      function: takes the carry, the index of the chunk's first row, its (static) size, and bool
        [size] for the rows that an earlier chunk had.
      carry: start value, a tree of arrays.
      num_rows: number of rows.
      chunk: wanted size of a chunk, see `equal_chunk_size`.

    Returns:
      The last carry.
    """
    size = equal_chunk_size(num_rows, chunk)

    def run_chunk(i: Any, carry: Any) -> Any:
        first = jnp.minimum(i * size, num_rows - size)
        return function(carry, first, size, first + jnp.arange(size) < i * size)

    return lax.fori_loop(0, -(-num_rows // size), run_chunk, carry)
