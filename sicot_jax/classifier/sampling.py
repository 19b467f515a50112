"""Which classes take part in a step of a sampled head: places in each device's rows, chosen on that
device.

Fixed sizes, so that a step compiles once: a device takes its labels' classes and a fixed number of
  others; slots that hold no class, or one that is there already, are -1. Both streams share one
  set.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from sicot_jax.classifier.sharded import cut, put, shard_start, varying
from sicot_jax.parallel import mesh as mesh_lib

GRAPH_QUERIES, GRAPH_CHUNK = (
    256,
    32768,
)  # rows that `class_graph` compares at a time with how many others
TOP_K_GROUP = 16


def random_places(key, rows: int, count: int):
    """int32 [count]: distinct random places in 0 .. rows - 1, -1 in about count / sqrt(rows) of
    them.

    The first `count` positions of a keyed permutation of a grid a x b just above `rows`: four
    Feistel rounds on (row, column), so the cost does not depend on `rows`, unlike a draw of scores
    for all of them. count <= a * b.
    """
    a = math.isqrt(rows - 1) + 1
    b = -(-rows // a)
    position = jnp.arange(count, dtype=jnp.uint32)
    left, right = position // b, position % b
    for i, round_key in enumerate(jax.random.bits(key, (4,))):
        if i % 2:
            right = (right + _mix(left ^ round_key) % b) % b
        else:
            left = (left + _mix(right ^ round_key) % a) % a
    place = (left * b + right).astype(jnp.int32)
    return jnp.where(place < rows, place, -1)


def _mix(x):
    """The finaliser of MurmurHash3 (Appleby 2011) on uint32."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def grid_size(rows: int) -> int:
    """Positions of the permutation behind `random_places`: that many slots hold every row once."""
    a = math.isqrt(rows - 1) + 1
    return a * -(-rows // a)


def slots(rate: float, rows: int) -> int:
    """Slots of a device beside those of the labels: every one of its rows is taken with chance
    `rate`.
    """
    return round(rate * grid_size(rows))


def label_places(label, shard_rows: int):
    """int32 [B]: this device's places of the labels' classes, ascending, each once, then -1."""
    local = label - shard_start(shard_rows)
    ordered = jnp.sort(jnp.where((local >= 0) & (local < shard_rows), local, shard_rows))
    first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    return jnp.sort(jnp.where(first, ordered, shard_rows))


def without(places, ordered):
    """`places` with -1 where `ordered` (ascending) has the same one."""
    found = ordered[jnp.minimum(jnp.searchsorted(ordered, places), len(ordered) - 1)]
    return jnp.where(found == places, -1, places)


def uniform_classes(key, label, *, num_rows: int, rate: float):
    """The labels' classes, and every other class with the same chance `rate` (after Partial FC, An
    et al. 2021).

    Args:
      key: of this step, the same on all devices.
      label: int32 [B].
      num_rows: rows of the classifier, padding included.

    Returns: int32 [devices * A], divided, for `class_sharded.loss_and_update`.
    """

    def shard(key, label, like):
        rows = like.shape[0]
        key = jax.random.fold_in(key, lax.axis_index(mesh_lib.AXES))
        own = label_places(label, rows)
        others = without(random_places(key, rows, slots(rate, rows)), own)
        return jnp.concatenate([jnp.where(own < rows, own, -1), others])

    like = jnp.zeros(num_rows, out_sharding=mesh_lib.CLASS_VECTOR)
    return jax.shard_map(shard, in_specs=(P(), P(None), mesh_lib.CLASS_VECTOR), out_specs=mesh_lib.CLASS_VECTOR)(
        key, mesh_lib.replicate(label), like
    )


def neighbour_classes(key, label, neighbours, *, rate: float):
    """The labels' classes and their nearest ones, up to a fixed number a device (KNN softmax, Song
    et al. 2020).

    Nearest first: a device takes all classes of its own that are first neighbours of any label,
      then all second ones, until `rate` of its rows are taken; slots that are left hold random
      classes.

    Args:
      neighbours: int32 [C padded, K], divided by class: class ids, nearest first (`class_graph`).

    Returns: int32 [devices * A], divided.
    """

    def shard(key, label, neighbours):
        rows, width = neighbours.shape
        start = shard_start(rows)
        key = jax.random.fold_in(key, lax.axis_index(mesh_lib.AXES))
        own = label_places(label, rows)
        # The labels' neighbours, from whichever device has them: [B, K].
        local = label - start
        here = (local >= 0) & (local < rows)
        wanted = lax.psum(
            jnp.where(here[:, None], neighbours[jnp.where(here, local, 0)], 0), mesh_lib.AXES
        )
        wanted = wanted - start
        wanted = jnp.where((wanted >= 0) & (wanted < rows), wanted, rows)  # out of bounds: dropped
        rank = varying(jnp.full(rows, width))  # best rank of each row as a neighbour of any label
        rank = rank.at[wanted].min(jnp.broadcast_to(jnp.arange(width), wanted.shape), mode="drop")
        rank = rank.at[own].set(width, mode="drop")  # the labels' own classes have their slots
        free = slots(rate, rows)
        taken = jnp.cumsum(jnp.zeros(width + 1, jnp.int32).at[rank].add(1))  # rows of rank <= k
        last = jnp.sum(taken[:width] <= free)  # ranks below it fit whole
        nearest = jnp.nonzero(rank < last, size=free, fill_value=-1)[0].astype(jnp.int32)
        others = without(random_places(key, rows, free), own)
        new = (others >= 0) & (rank[others] >= last)
        slot = jnp.where(
            new, jnp.sum(nearest >= 0) + jnp.cumsum(new) - 1, free
        )  # after the nearest; -> nowhere
        return jnp.concatenate(
            [jnp.where(own < rows, own, -1), nearest.at[slot].set(others, mode="drop")]
        )

    return jax.shard_map(
        shard, in_specs=(P(), P(None), mesh_lib.CLASS_ROWS), out_specs=mesh_lib.CLASS_VECTOR
    )(key, mesh_lib.replicate(label), neighbours)


def top_k(x, k: int):
    """`lax.top_k` of long rows in less time: [R, N] -> values, places [R, k], largest first; ties
    in any order.

    The k largest lie in the k groups of TOP_K_GROUP with the largest maxima, since a group left out
    has k maxima no smaller than its own; so only their entries are sorted. Groups are strided:
    their maxima are those of whole vectors.
    """
    rows, width = x.shape
    groups, rest = divmod(width, TOP_K_GROUP)
    if rest or groups <= k:
        return lax.top_k(x, k)
    _, best = lax.top_k(jnp.max(x.reshape(rows, TOP_K_GROUP, groups), 1), k)
    places = (best[:, None, :] + groups * jnp.arange(TOP_K_GROUP)[:, None]).reshape(
        rows, k * TOP_K_GROUP
    )
    values, where = lax.top_k(jnp.take_along_axis(x, places, -1), k)
    return values, jnp.take_along_axis(places, where, -1)


def equal_chunks(rows: int, chunk: int) -> int:
    """Size of the chunks of `over_equal_chunks`: up to `chunk` and a few; whole groups of `top_k`,
    where there are any.

    Two or more, though one could do: one that is no whole number of groups could not, and memory
      would depend on that.
    """
    number = max(2, -(-rows // chunk))
    return min(rows, -(-rows // (number * TOP_K_GROUP)) * TOP_K_GROUP)


def over_equal_chunks(function, carry, rows: int, chunk: int):
    """`carry = function(carry, first, size, seen)` for all rows, in chunks of one size: the last
    one ends with the rows.

    seen: bool [size], those that an earlier chunk had. One body, so one set of buffers, unlike a
      loop and what is left.
    """
    size = equal_chunks(rows, chunk)

    def one(i, carry):
        first = jnp.minimum(i * size, rows - size)
        return function(carry, first, size, first + jnp.arange(size) < i * size)

    return lax.fori_loop(0, -(-rows // size), one, carry)


def class_graph(
    kernel,
    *,
    num_classes: int,
    k: int,
    queries: int = GRAPH_QUERIES,
    chunk: int = GRAPH_CHUNK,
    dtype=jnp.float32,
):
    """Each class's k nearest other classes by the cosine of their rows, exact (Song et al. 2020,
    section on the graph).

    Every device keeps the running top-k of its own rows while the blocks of rows are passed round
    the devices, so that
    no device ever holds more than two blocks beside its rows: the one compared with, the next one.
      One device holds none.

    Args:
      kernel: float32 [C padded, D], divided by class.
      k: less than the number of classes.
      queries, chunk: rows compared at a time, with how many others: queries x chunk cosines are
        held. Few against many:
        choosing the k largest costs less of long rows.

    Returns: int32 [C padded, k], divided by class, nearest first; ties in any order.
    """

    def shard(kernel):
        rows = kernel.shape[0]
        start = shard_start(rows)
        devices = lax.axis_size(mesh_lib.AXES)

        def unit(x):
            return (x * lax.rsqrt(jnp.maximum(jnp.sum(x**2, -1, keepdims=True), 1e-30))).astype(
                dtype
            )

        def own(first, size):  # normalised when it is needed, so that no copy of the rows is held
            return unit(cut(kernel, first, size))

        def compare(block, block_start, best):
            """`best` (values, ids [rows, k]) after the rows of a block, a function (first, size) ->
            unit rows.
            """

            def others(best, first, size, seen):
                other_rows, other_id = block(first, size), block_start + first + jnp.arange(size)
                no_other = seen | (other_id >= num_classes)

                def some(best, first, size, seen):
                    cosine = jnp.einsum(
                        "qd,nd->qn",
                        own(first, size),
                        other_rows,
                        preferred_element_type=jnp.float32,
                    )
                    wrong = (
                        (other_id == (start + first + jnp.arange(size))[:, None])
                        | no_other
                        | seen[:, None]
                    )
                    found, where = top_k(jnp.where(wrong, -jnp.inf, cosine), min(k, other_id.size))
                    values, ids = (cut(x, first, size) for x in best)
                    values, where_of_both = lax.top_k(jnp.concatenate([values, found], -1), k)
                    ids = jnp.take_along_axis(
                        jnp.concatenate([ids, other_id[where]], -1), where_of_both, -1
                    )
                    return tuple(
                        put(x, part, first) for x, part in zip(best, (values, ids), strict=True)
                    )

                return over_equal_chunks(some, best, rows, queries)

            return over_equal_chunks(others, best, rows, chunk)

        def next_block(i, carry):
            block, best = carry
            block = lax.ppermute(
                block, mesh_lib.AXES, [(d, (d - 1) % devices) for d in range(devices)]
            )
            owner = (lax.axis_index(mesh_lib.AXES) + i) % devices
            return block, compare(lambda first, size: cut(block, first, size), owner * rows, best)

        best = varying(jnp.full((rows, k), -jnp.inf)), varying(jnp.zeros((rows, k), jnp.int32))
        best = compare(own, start, best)
        if devices > 1:
            _, best = lax.fori_loop(1, devices, next_block, (unit(kernel), best))
        return best[1]

    return jax.shard_map(shard, in_specs=(mesh_lib.CLASS_ROWS,), out_specs=mesh_lib.CLASS_ROWS)(
        kernel
    )
