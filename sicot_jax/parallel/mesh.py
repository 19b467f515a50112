"""The device mesh and every PartitionSpec; the only module that names mesh axes.

The backbone's batch is sharded over both axes, and so are the classifier's rows: every device owns
`num_classes_padded / number of devices` rows, so that no gradient of the kernel ever crosses
devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sicot_jax.errors import InputError
from sicot_jax.parallel.array_types import Array, Float, PyTree, Shaped

AXES = ("data", "model")
CLASS_ROWS = P(AXES, None)  # classifier kernel [C, D]
CLASS_VECTOR = P(AXES)  # classifier bias, log prior [C]
BATCH = P(AXES)  # any array whose leading axis is the batch, or has one entry per device


def make_mesh(
    *, data: int = 0, model: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Builds a mesh of `data` x `model` devices with explicit axes.

    Devices of one process are neighbours, so that the rows of its batch are.

    Args:
      data: devices along the batch axis; 0 uses all that `model` leaves.
      model: devices along the class axis.
      devices: devices to choose from; all of the run by default.

    Returns:
      The mesh.

    Raises:
      InputError: there are too few devices, or some of several processes would be unused.
    """
    devices = sorted(
        jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id)
    )
    if data == 0:
        if len(devices) % model:
            raise InputError(
                f"mesh.model={model} does not divide {len(devices)} devices; set mesh.data and "
                "mesh.model"
            )
        data = len(devices) // model
    if data * model > len(devices):
        raise InputError(
            f"mesh {data}x{model} wants {data * model} devices, found {len(devices)}; lower "
            "mesh.data or mesh.model"
        )
    if data * model < len(devices) and len({d.process_index for d in devices}) > 1:
        raise InputError(
            f"mesh {data}x{model} takes {data * model} of {len(devices)} devices of several "
            "processes, wanted all; set mesh.data=0"
        )
    grid = np.asarray(devices[: data * model]).reshape(data, model)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * 2)


def pad_classes(num_classes: int, mesh: Mesh) -> int:
    """Returns the smallest multiple of the number of devices that holds all classes.

    Args:
      num_classes: C.
      mesh: the device mesh.

    Returns:
      C padded: rows of the classifier's arrays.
    """
    return -(-num_classes // mesh.size) * mesh.size


def batch_spec(ndim: int) -> P:
    """Returns the spec of an array whose leading axis is sharded over all devices.

    Args:
      ndim: axes of the array.

    Returns:
      The spec.
    """
    return P(AXES, *(None,) * (ndim - 1))


def is_per_class(x: Any, num_rows: int) -> bool:
    """Returns whether an array of the classifier's state has one entry per class.

    The kernel has, a step count has not.

    Args:
      x: array, or its shape and dtype.
      num_rows: rows of the classifier: C padded, or a device's part of it.

    Returns:
      Whether its leading axis is that of the classes.
    """
    return x.ndim > 0 and x.shape[0] == num_rows


def class_spec(x: Any, num_rows: int) -> P:
    """Returns the spec of an array of the classifier's state.

    Args:
      x: array, or its shape and dtype.
      num_rows: C padded.

    Returns:
      Sharded by class, or replicated.
    """
    return batch_spec(x.ndim) if is_per_class(x, num_rows) else P()


def split_per_class(tree: PyTree, num_rows: int) -> tuple[PyTree, PyTree]:
    """Splits a tree of the classifier's state into arrays per class and the others.

    Args:
      tree: the state.
      num_rows: rows of the classifier: C padded, or a device's part of it.

    Returns:
      (arrays with one entry per class, other arrays): two trees of the structure of `tree`, each
      with None in place of the arrays of the other.
    """
    per_class = jax.tree.map(lambda x: x if is_per_class(x, num_rows) else None, tree)
    return per_class, jax.tree.map(lambda x: None if is_per_class(x, num_rows) else x, tree)


def join_per_class(per_class: PyTree, shared: PyTree) -> PyTree:
    """Merges two trees of equal structure: takes the first tree's leaf unless it is None.

    Inverse of `split_per_class`.

    Args:
      per_class: tree of the arrays with one entry per class, None in place of the others.
      shared: tree of the other arrays.

    Returns:
      The merged tree, without None where either tree has an array.
    """
    return jax.tree.map(
        lambda a, b: b if a is None else a, per_class, shared, is_leaf=lambda x: x is None
    )


def with_shardings(shapes: PyTree, mesh: Mesh) -> PyTree:
    """Adds shardings on real devices to abstract arrays.

    Args:
      shapes: tree of ShapeDtypeStructs as `jax.eval_shape` gives them, with PartitionSpecs or none.
      mesh: the device mesh.

    Returns:
      Tree of ShapeDtypeStructs with NamedShardings.
    """

    def with_sharding(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding is not None else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(with_sharding, shapes)


def sharded_struct(x: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Returns an abstract array with its leading axis sharded over all devices.

    Args:
      x: shape and dtype.
      mesh: the device mesh.

    Returns:
      The same with a sharding.
    """
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, batch_spec(x.ndim)))


def class_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a vector with one entry per class.

    Args:
      mesh: the device mesh.

    Returns:
      The sharding.
    """
    return NamedSharding(mesh, CLASS_VECTOR)


def shard_class_vector(x: Shaped[np.ndarray, " C"], mesh: Mesh) -> Shaped[Array, " C"]:
    """Shards a vector with one entry per class, which every process holds completely.

    Args:
      x: [C padded], of any dtype.
      mesh: the device mesh.

    Returns:
      The vector, sharded by class.
    """
    return jax.make_array_from_callback(x.shape, class_sharding(mesh), lambda index: x[index])


def shard_rows(shape: tuple[int, ...], rows: Any, mesh: Mesh) -> Float[Array, "*_"]:
    """Shards the classifier's rows by class, padded with zeros.

    Args:
      shape: (C, ...).
      rows: float [C, ...], an array or a file that can be sliced like one.
      mesh: the device mesh.

    Returns:
      float32 [C padded, ...], sharded by class.
    """
    count = shape[0]

    def read_rows(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(pad_classes(count, mesh))
        part = np.zeros((stop - start, *shape[1:]), np.float32)
        if start < count:
            part[: count - start] = rows[start : min(stop, count)]
        return part

    padded = (pad_classes(count, mesh), *shape[1:])
    return jax.make_array_from_callback(
        padded, NamedSharding(mesh, batch_spec(len(shape))), read_rows
    )


def rows_by_device(x: Shaped[Array, "C ..."], count: int) -> Iterator[np.ndarray]:
    """Copies the leading rows of a sharded array to the host, one device's part at a time.

    Args:
      x: [C padded, ...], sharded by its leading axis.
      count: rows to copy: C.

    Yields:
      [rows of a device, ...], in order.
    """
    position = 0
    for shard in sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0):
        start = shard.index[0].start or 0
        if start == position < count:  # of copies the first
            rows = np.asarray(shard.data)[: count - start]
            position += len(rows)
            yield rows


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Builds global arrays from this process's part of a batch.

    Args:
      batch: name -> [B of this process, ...].
      mesh: the device mesh.

    Returns:
      name -> [B, ...], sharded by the leading axis.
    """
    return {
        name: jax.make_array_from_process_local_data(
            NamedSharding(mesh, batch_spec(array.ndim)), array
        )
        for name, array in batch.items()
    }


def replicate_tree(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies every array of a tree to every device.

    Args:
      tree: arrays of numpy or JAX.
      mesh: the device mesh.

    Returns:
      The tree of replicated arrays.
    """
    return jax.device_put(tree, NamedSharding(mesh, P()))


def mean_over_devices(x: Float[Array, "*_"]) -> Float[Array, "*_"]:
    """Averages over devices inside `shard_map`; outside, an array is of all devices already.

    Args:
      x: float [...], what this device has.

    Returns:
      The mean, of the same shape.
    """
    axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return jax.lax.pmean(x, axes) if axes else x


def all_gather_devices(x: Shaped[Array, "N ..."]) -> Shaped[Array, "M ..."]:
    """Concatenates what all devices have, on all of them; inside `shard_map`.

    Args:
      x: [N, ...], of this device.

    Returns:
      [devices * N, ...].
    """
    return jax.lax.all_gather(x, AXES, tiled=True, to="invarying")


def shard_leading_axis(x: Shaped[Array, "N ..."]) -> Shaped[Array, "N ..."]:
    """Shards the leading axis over all devices.

    Args:
      x: [N, ...], sharded otherwise or replicated.

    Returns:
      The array; each device holds its part.
    """
    return jax.reshard(x, batch_spec(x.ndim))


def replicate(x: Shaped[Array, "*_"]) -> Shaped[Array, "*_"]:
    """Gathers an array to every device, inside or outside `jit`.

    Args:
      x: [...], sharded.

    Returns:
      The array, replicated.
    """
    return jax.reshard(x, P(*(None,) * x.ndim))
