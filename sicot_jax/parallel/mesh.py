"""The device mesh and every PartitionSpec; the only file that names mesh axes.

The backbone's batch is divided over both axes, and so are the classifier's rows: every device owns
`num_classes_padded / number of devices` rows, so that no gradient of the kernel ever crosses
devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sicot_jax.errors import InputError

AXES = ("data", "model")
CLASS_ROWS = P(AXES, None)  # classifier kernel [C, D]
CLASS = P(AXES)  # classifier bias, log prior [C]
BATCH = P(AXES)  # any array whose leading axis is the batch, or has one entry a device


def make_mesh(*, data: int = 0, model: int = 1, devices=None) -> Mesh:
    """Mesh of `data` x `model` devices with explicit axes; `data=0` takes all devices that are left
    over.

    Devices of one process are neighbours, so that its batch rows are.

    Raises InputError when there are not enough devices.
    """
    devices = sorted(
        jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id)
    )
    if data == 0:
        if len(devices) % model:
            raise InputError(
                f"mesh.model={model} does not divide {len(devices)} devices; set mesh.data and mesh.model"
            )
        data = len(devices) // model
    if data * model > len(devices):
        raise InputError(
            f"mesh {data}x{model} wants {data * model} devices, found {len(devices)}; lower mesh.data or mesh.model"
        )
    if data * model < len(devices) and len({d.process_index for d in devices}) > 1:
        raise InputError(
            f"mesh {data}x{model} takes {data * model} of {len(devices)} devices of several processes, wanted all; set "
            "mesh.data=0"
        )
    grid = np.asarray(devices[: data * model]).reshape(data, model)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * 2)


def pad_classes(num_classes: int, mesh: Mesh) -> int:
    """The smallest multiple of the number of devices that holds all classes."""
    return -(-num_classes // mesh.size) * mesh.size


def batch_spec(ndim: int) -> P:
    """The leading axis of an array of `ndim` axes divided over all devices."""
    return P(AXES, *(None,) * (ndim - 1))


def is_per_class(x, num_rows: int) -> bool:
    """Whether an array of the classifier's state has one entry a class, like its kernel, and not
    e.g. a step count.
    """
    return x.ndim > 0 and x.shape[0] == num_rows


def class_spec(x, num_rows: int) -> P:
    """Of an array of the classifier's state."""
    return batch_spec(x.ndim) if is_per_class(x, num_rows) else P()


def split_per_class(tree, num_rows: int):
    """A tree of the classifier's state -> (its arrays with one entry a class, the others), each
    with None for the rest.
    """
    own = jax.tree.map(lambda x: x if is_per_class(x, num_rows) else None, tree)
    return own, jax.tree.map(lambda x: None if is_per_class(x, num_rows) else x, tree)


def join_per_class(per_class, shared):
    """The inverse of `split_per_class`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, per_class, shared, is_leaf=lambda x: x is None
    )


def on_devices(shapes, mesh: Mesh):
    """Tree of ShapeDtypeStructs as `eval_shape` gives it (PartitionSpecs at most) -> with shardings
    on real devices.
    """

    def place(x):
        spec = x.sharding.spec if x.sharding is not None else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, shapes)


def divided(x: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The shape with its leading axis divided over all devices."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, batch_spec(x.ndim)))


def class_sharding(mesh: Mesh) -> NamedSharding:
    """Of a vector with one entry a class."""
    return NamedSharding(mesh, CLASS)


def class_vector(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """A vector with one entry a class, which every process has whole, divided over all devices."""
    return jax.make_array_from_callback(x.shape, class_sharding(mesh), lambda index: x[index])


def padded_rows(shape: tuple[int, ...], rows: Any, mesh: Mesh) -> jax.Array:
    """Float32 rows of that shape, an array or what can be cut like one, divided over all devices;
    zeros after them.
    """
    count = shape[0]

    def rows_of(index):
        start, stop, _ = index[0].indices(pad_classes(count, mesh))
        part = np.zeros((stop - start, *shape[1:]), np.float32)
        if start < count:
            part[: count - start] = rows[start : min(stop, count)]
        return part

    padded = (pad_classes(count, mesh), *shape[1:])
    return jax.make_array_from_callback(
        padded, NamedSharding(mesh, batch_spec(len(shape))), rows_of
    )


def rows_by_device(x: jax.Array, count: int) -> Iterator[np.ndarray]:
    """The first `count` rows of an array divided by its leading axis, one device's after the
    other's, on the host.
    """
    seen = 0
    for shard in sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0):
        start = shard.index[0].start or 0
        if start == seen < count:  # of copies the first
            rows = np.asarray(shard.data)[: count - start]
            seen += len(rows)
            yield rows


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a host batch -> global arrays divided over all devices."""
    return {
        name: jax.make_array_from_process_local_data(
            NamedSharding(mesh, batch_spec(array.ndim)), array
        )
        for name, array in batch.items()
    }


def copy_to_all(tree, mesh: Mesh):
    """Every array of a tree whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def mean_over_devices(x):
    """Inside shard_map the mean of what each device has; elsewhere x is of all devices already."""
    axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return jax.lax.pmean(x, axes) if axes else x


def gather_devices(x):
    """Inside shard_map: what the devices have, one after the other, on all of them: [n, ...] ->
    [devices * n, ...].
    """
    return jax.lax.all_gather(x, AXES, tiled=True, to="invarying")


def divide(x: jax.Array) -> jax.Array:
    """Its leading axis divided over all devices; of an array that all have, every device takes its
    part.
    """
    return jax.reshard(x, batch_spec(x.ndim))


def replicate(x: jax.Array) -> jax.Array:
    """Gather to every device, inside or outside jit."""
    return jax.reshard(x, P(*(None,) * x.ndim))
