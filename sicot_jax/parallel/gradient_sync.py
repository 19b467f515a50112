"""Sums gradients over devices once per step: all entries, or the top-k with error feedback.

Until then a gradient is stacked, [devices, ...], one part on every device: no gradient crosses
devices while micro-batches add up.
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
from sicot_jax.parallel.array_types import Array, Float, PyTree

# Path name of an array of two axes or more -> float32 [devices, *its shape], sharded by device: the
# gradient entries that a device has not sent yet.
Residual = dict[str, jax.Array]


def stack_per_device(params: PyTree) -> PyTree:
    """Stacks a copy of the parameters for every device, so that their gradients stay unsummed.

    Args:
      params: tree of arrays that all devices hold.

    Returns:
      The tree with a leading axis [devices, ...], sharded by device. Derivatives by it are stacked
      likewise.
    """
    return jax.shard_map(
        lambda tree: jax.tree.map(lambda x: x[None], tree), in_specs=P(), out_specs=mesh.BATCH
    )(params)


def local_part(stacked: PyTree) -> PyTree:
    """Returns this device's part of a stacked tree; inside `shard_map`.

    Args:
      stacked: tree of arrays [1, ...], as `shard_map` hands them out.

    Returns:
      The tree without the leading axis.
    """
    return jax.tree.map(lambda x: x[0], stacked)


def init_residual(shapes: Mapping[str, tuple[int, ...]], devices: int) -> Residual:
    """Returns the residual of the first step: zeros.

    Args:
      shapes: path name -> shape, of the arrays to compress.
      devices: number of devices.

    Returns:
      float32 [devices, *shape] for each.
    """
    return {
        name: jnp.zeros((devices, *shape), out_sharding=mesh.batch_spec(1 + len(shape)))
        for name, shape in shapes.items()
    }


def num_entries_sent(size: int, ratio: float) -> int:
    """Returns how many gradient entries of an array each device sends per step.

    Args:
      size: entries of the array.
      ratio: share that is sent, above 0 up to 1.

    Returns:
      K, at least one.
    """
    return max(1, math.ceil(ratio * size))


def allreduce(gradient: PyTree) -> PyTree:
    """Sums stacked gradients over devices.

    Args:
      gradient: tree of arrays [devices, ...], sharded by device.

    Returns:
      The tree without the leading axis, the same on all devices.
    """
    return jax.shard_map(
        lambda stacked: jax.tree.map(lambda x: lax.psum(x, mesh.AXES), local_part(stacked)),
        in_specs=mesh.BATCH,
        out_specs=P(),
    )(gradient)


def topk_allreduce(
    gradient: PyTree, residual: Residual, *, ratio: float
) -> tuple[PyTree, Residual]:
    """Sums the largest gradient entries of every device and keeps the others for later steps.

    For device d: a_d = g_d + e_d; s_d = a_d at its ceil(ratio * size) entries of largest magnitude,
    else 0; the gradient is sum_d s_d, and e_d' = a_d - s_d is the next step's residual (error
    feedback: Stich et al. 2018; layer by layer after Song et al. 2020). Arrays that are not in
    `residual` (of one axis, or not trained) are summed completely. ratio = 1 equals `allreduce`.

    Devices exchange values and indices by an all-gather, 8 bytes an entry: less than an all-reduce
    of all entries while ratio * devices < 1.

    Args:
      gradient: tree of arrays [devices, ...], sharded by device.
      residual: e of the step before, `init_residual` at the start.
      ratio: share of the entries that each device sends.

    Returns:
      (the summed gradient, the same on all devices; the new residual).
    """

    def sync_shard(stacked: PyTree, residual: Residual) -> tuple[PyTree, Residual]:
        kept: Residual = {}

        def sync_array(path: tuple[Any, ...], local: Float[Array, "*_"]) -> Float[Array, "*_"]:
            name = path_name(path)
            if name not in residual:
                return lax.psum(local, mesh.AXES)
            corrected = (local + residual[name][0]).ravel()
            _, top = lax.top_k(jnp.abs(corrected), num_entries_sent(corrected.size, ratio))
            values = mesh.all_gather_devices(corrected[top][None])  # [devices, K]
            indices = mesh.all_gather_devices(top[None])
            kept[name] = corrected.at[top].set(0, unique_indices=True).reshape(1, *local.shape)
            # Device by device, so that all add in one order (no index comes twice) and their
            # parameters stay the same.
            zeros = jnp.zeros_like(values, shape=corrected.shape)
            add = lambda d, total: total.at[indices[d]].add(values[d], unique_indices=True)  # noqa: E731
            return lax.fori_loop(0, len(values), add, zeros).reshape(local.shape)

        total = jax.tree_util.tree_map_with_path(sync_array, local_part(stacked))
        return total, kept

    return jax.shard_map(sync_shard, in_specs=mesh.BATCH, out_specs=(P(), mesh.BATCH))(
        gradient, residual
    )
