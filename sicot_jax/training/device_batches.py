"""Host batches as global arrays, divided over all devices."""

from __future__ import annotations

import jax
import numpy as np

from sicot_jax.catalog.batches import HostBatch, ProcessShard
from sicot_jax.catalog.catalog import Catalog
from sicot_jax.parallel import mesh as mesh_lib


def process_shard() -> ProcessShard:
    """Returns the part of every global batch that this process makes."""
    return ProcessShard(jax.process_index(), jax.process_count())


def to_device(batch: HostBatch, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """The arrays of a batch, divided over all devices; strings stay on the host."""
    return mesh_lib.to_global(
        {name: array for name, array in batch.items() if array.dtype != object}, mesh
    )


class DevicePhotos:
    """All training photos on every device; batches of "index" get their photos there."""

    def __init__(self, catalog: Catalog, mesh: jax.sharding.Mesh):
        images = catalog.splits["train"].images  # type: ignore[attr-defined]  # an array file's
        self.mesh = mesh
        self.images = jax.make_array_from_callback(
            images.shape,
            jax.sharding.NamedSharding(mesh, jax.P()),
            lambda index: np.asarray(images[index]),
        )
        self._gather = jax.jit(
            lambda images, index: images.at[index].get(out_sharding=mesh_lib.batch_spec(4))
        )

    def __call__(self, batch: HostBatch) -> dict[str, jax.Array]:
        """As `to_device` of a batch with its photos."""
        placed = to_device(batch, self.mesh)
        return placed | {"image": self._gather(self.images, placed.pop("index"))}
