"""Chooses which classes take part in a step of a sampled head, each device among its rows.

Sizes are fixed, so that a step compiles once: a device takes the classes of the labels and a fixed
number of others; slots without a class, or with one that is there already, are -1. All streams
share one set.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from sicot_jax.classifier.streaming import first_class_id, to_varying
from sicot_jax.parallel import mesh
from sicot_jax.parallel.array_types import Array, Int, Key


def random_rows(key: Key[Array, ""], num_rows: int, count: int) -> Int[Array, " {count}"]:
    """Returns distinct random rows, -1 in about count / sqrt(num_rows) of the slots.

    The first `count` positions of a keyed permutation of a grid a x b just above `num_rows`: four
    Feistel rounds on (row, column), so that the cost does not depend on `num_rows`, unlike a draw
    of scores for all of them.

    Args:
      key: random key.
      num_rows: rows to choose from.
      count: number of slots, at most `grid_size(num_rows)`.

    Returns:
      int32 [count], each from 0 to num_rows - 1 or -1.
    """
    a = math.isqrt(num_rows - 1) + 1
    b = -(-num_rows // a)
    position = jnp.arange(count, dtype=jnp.uint32)
    left, right = position // b, position % b
    for i, round_key in enumerate(jax.random.bits(key, (4,))):
        if i % 2:
            right = (right + _mix(left ^ round_key) % b) % b
        else:
            left = (left + _mix(right ^ round_key) % a) % a
    row = (left * b + right).astype(jnp.int32)
    return jnp.where(row < num_rows, row, -1)


def _mix(x: Array) -> Array:
    # The finaliser of MurmurHash3 (Appleby 2011) on uint32.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def grid_size(num_rows: int) -> int:
    """Returns the positions of the permutation behind `random_rows`.

    Args:
      num_rows: rows to choose from.

    Returns:
      Number of slots that hold every row once.
    """
    a = math.isqrt(num_rows - 1) + 1
    return a * -(-num_rows // a)


def num_sampled_slots(rate: float, num_rows: int) -> int:
    """Returns the slots of a device besides those of the labels.

    Args:
      rate: chance of each row to be taken.
      num_rows: rows of the device.

    Returns:
      Number of slots.
    """
    return round(rate * grid_size(num_rows))


def uniform_classes(
    key: Key[Array, ""], label: Int[Array, " B"], *, num_rows: int, rate: float
) -> Int[Array, " A"]:
    """Chooses the classes of the labels, and every other class with the same chance.

    After Partial FC (An et al. 2021, arXiv:2010.05222).

    Args:
      key: random key of this step, equal on all devices.
      label: class ids, int32 [B].
      num_rows: rows of the classifier, padding included.
      rate: chance of each other class.

    Returns:
      Row indices, -1 for an empty slot, int32 [devices * A], divided over devices, for
      `sharded.loss_and_update`.
    """

    def on_shard(key: Array, label: Array, per_class: Array) -> Array:
        shard_rows = per_class.shape[0]
        key = jax.random.fold_in(key, lax.axis_index(mesh.AXES))
        label_rows = _rows_of_labels(label, shard_rows)
        sampled = random_rows(key, shard_rows, num_sampled_slots(rate, shard_rows))
        return _concatenate(label_rows, _exclude(sampled, label_rows), shard_rows)

    per_class = jnp.zeros(num_rows, out_sharding=mesh.CLASS_VECTOR)
    return jax.shard_map(
        on_shard, in_specs=(P(), P(None), mesh.CLASS_VECTOR), out_specs=mesh.CLASS_VECTOR
    )(key, mesh.replicate(label), per_class)


def neighbour_classes(
    key: Key[Array, ""],
    label: Int[Array, " B"],
    neighbours: Int[Array, "C K"],
    *,
    rate: float,
) -> Int[Array, " A"]:
    """Chooses the classes of the labels and their nearest ones, a fixed number per device.

    KNN softmax (Song et al. 2020). Nearest first: a device takes all of its classes that are first
    neighbours of any label, then all second ones, until `rate` of its rows are taken; remaining
    slots hold random classes.

    Args:
      key: random key of this step, equal on all devices.
      label: class ids, int32 [B].
      neighbours: class ids, nearest first, int32 [C padded, K], divided by class
        (`knn_graph.knn_graph`).
      rate: share of a device's rows to take.

    Returns:
      Row indices, -1 for an empty slot, int32 [devices * A], divided over devices.
    """

    def on_shard(key: Array, label: Array, neighbours: Array) -> Array:
        shard_rows, width = neighbours.shape
        key = jax.random.fold_in(key, lax.axis_index(mesh.AXES))
        label_rows = _rows_of_labels(label, shard_rows)
        rank = _neighbour_ranks(label, neighbours)
        rank = rank.at[label_rows].set(width, mode="drop")  # these have their slots already
        slots = num_sampled_slots(rate, shard_rows)
        # Rows of rank <= k, and the ranks that fit completely.
        count = jnp.cumsum(jnp.zeros(width + 1, jnp.int32).at[rank].add(1))
        last = jnp.sum(count[:width] <= slots)
        nearest = jnp.nonzero(rank < last, size=slots, fill_value=-1)[0].astype(jnp.int32)
        others = _exclude(random_rows(key, shard_rows, slots), label_rows)
        is_new = (others >= 0) & (rank[others] >= last)
        # After the nearest; those that are not new go out of bounds.
        slot = jnp.where(is_new, jnp.sum(nearest >= 0) + jnp.cumsum(is_new) - 1, slots)
        nearest = nearest.at[slot].set(others, mode="drop")
        return _concatenate(label_rows, nearest, shard_rows)

    return jax.shard_map(
        on_shard, in_specs=(P(), P(None), mesh.CLASS_ROWS), out_specs=mesh.CLASS_VECTOR
    )(key, mesh.replicate(label), neighbours)


def _neighbour_ranks(label: Array, neighbours: Array) -> Array:
    """Best rank of each row as a neighbour of any label, int32 [rows]; K for none."""
    shard_rows, width = neighbours.shape
    start = first_class_id(shard_rows)
    # The labels' neighbours, from whichever device has them: [B, K].
    local = label - start
    is_here = (local >= 0) & (local < shard_rows)
    classes = lax.psum(
        jnp.where(is_here[:, None], neighbours[jnp.where(is_here, local, 0)], 0), mesh.AXES
    )
    rows = classes - start
    rows = jnp.where((rows >= 0) & (rows < shard_rows), rows, shard_rows)  # out of bounds: dropped
    rank = to_varying(jnp.full(shard_rows, width))
    return rank.at[rows].min(jnp.broadcast_to(jnp.arange(width), rows.shape), mode="drop")


def _rows_of_labels(label: Array, shard_rows: int) -> Array:
    """This device's rows of the labels, ascending, each once, then shard_rows, int32 [B]."""
    local = label - first_class_id(shard_rows)
    ordered = jnp.sort(jnp.where((local >= 0) & (local < shard_rows), local, shard_rows))
    is_first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    return jnp.sort(jnp.where(is_first, ordered, shard_rows))


def _exclude(rows: Array, ordered: Array) -> Array:
    """`rows` with -1 where `ordered` (ascending) has the same one."""
    match = ordered[jnp.minimum(jnp.searchsorted(ordered, rows), len(ordered) - 1)]
    return jnp.where(match == rows, -1, rows)


def _concatenate(label_rows: Array, other_rows: Array, shard_rows: int) -> Array:
    return jnp.concatenate([jnp.where(label_rows < shard_rows, label_rows, -1), other_rows])
