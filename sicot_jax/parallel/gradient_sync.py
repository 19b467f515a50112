"""From the gradients of each device's photos to that of the whole batch: their sum, or of each
kernel its largest entries.

Until then a gradient is stacked, [devices, ...], divided: every device holds its own. So no
gradient crosses devices while micro-batches add up, and once a step the sum does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from sicot_jax.common.trees import path_name
from sicot_jax.parallel import mesh

Unsent = dict[
    str, jax.Array
]  # path name of an array of two axes or more -> float32 [devices, *its shape], divided by device


def copies(params: Any):
    """A tree that all devices hold -> the same stacked [devices, ...]. Derivatives by it are
    stacked too: nothing is summed.
    """
    return jax.shard_map(
        lambda tree: jax.tree.map(lambda x: x[None], tree), in_specs=P(), out_specs=mesh.BATCH
    )(params)


def own(stacked: Any):
    """Inside shard_map: a device's part of a stacked tree."""
    return jax.tree.map(lambda x: x[0], stacked)


def nothing_unsent(shapes: Mapping[str, tuple[int, ...]], devices: int) -> Unsent:
    """The start, for kernels of those path names and shapes."""
    return {
        name: jnp.zeros((devices, *shape), out_sharding=mesh.batch_spec(1 + len(shape)))
        for name, shape in shapes.items()
    }


def entries_sent(size: int, ratio: float) -> int:
    """Of a kernel of that many entries, by each device."""
    return max(1, math.ceil(ratio * size))


def summed(gradient: Any):
    """Stacked gradients -> their sum, on all devices."""
    return jax.shard_map(
        lambda stacked: jax.tree.map(lambda x: lax.psum(x, mesh.AXES), own(stacked)),
        in_specs=mesh.BATCH,
        out_specs=P(),
    )(gradient)


def largest_summed(gradient: Any, unsent: Unsent, *, ratio: float):
    """Each device sends the largest entries of each of its kernels' gradients and keeps the others
    for later steps.

    For device d: a_d = g_d + e_d; s_d = a_d at its ceil(ratio * size) entries of largest magnitude,
      else 0; the gradient is sum_d s_d, and e_d' = a_d - s_d is left for the next step (error
      feedback: Stich et al. 2018; layer by layer after Song et al. 2020). What is not among
      `unsent` (arrays of one axis, what does not train) is summed whole. ratio = 1 gives `summed`.

    Across devices goes an all-gather of values and places, 8 bytes an entry: less than an
    all-reduce of all entries while ratio * devices < 1.

    Args:
      gradient: stacked tree.
      unsent: e of the step before, zeros at the start.

    Returns: the gradient on all devices, the new `unsent`.
    """

    def shard(stacked, unsent):
        kept: Unsent = {}

        def one(path, x):
            name = path_name(path)
            if name not in unsent:
                return lax.psum(x, mesh.AXES)
            waiting = (x + unsent[name][0]).ravel()
            _, places = lax.top_k(jnp.abs(waiting), entries_sent(waiting.size, ratio))
            values, where = (mesh.gather_devices(sent[None]) for sent in (waiting[places], places))
            kept[name] = waiting.at[places].set(0, unique_indices=True).reshape(1, *x.shape)
            # Device by device, so that all add in one order (no place comes twice) and their
            # parameters stay the same.
            total = jnp.zeros_like(values, shape=waiting.shape)
            add = lambda d, total: total.at[where[d]].add(values[d], unique_indices=True)  # noqa: E731
            return lax.fori_loop(0, len(values), add, total).reshape(x.shape)

        total = jax.tree_util.tree_map_with_path(one, own(stacked))
        return total, kept

    return jax.shard_map(shard, in_specs=mesh.BATCH, out_specs=(P(), mesh.BATCH))(gradient, unsent)
