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
    """Places the arrays of a host batch on the devices.

    Args:
      batch: name -> this process's rows [B / processes, ...].
      mesh: the devices.

    Returns:
      Name -> global array [B, ...], divided over all devices by row; text stays on the host.
    """
    return mesh_lib.to_global(
        {name: array for name, array in batch.items() if array.dtype != object}, mesh
    )


class DevicePhotos:
    """All training photos on every device, from which batches of indices take theirs.

    Attributes:
      mesh: the devices.
      images: uint8 [N, H, W, 3], a copy on every device.
    """

    def __init__(self, catalog: Catalog, mesh: jax.sharding.Mesh):
        """Copies the photos to the devices.

        Args:
          catalog: catalogue of an array file.
          mesh: the devices.
        """
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
        """Places a batch on the devices and adds its photos.

        Args:
          batch: batch as in `to_device`, with "index" (int32, position in the training split) in
            place of "image".

        Returns:
          As `to_device`, with "image" uint8 [B, H, W, 3].
        """
        placed = to_device(batch, self.mesh)
        return placed | {"image": self._gather(self.images, placed.pop("index"))}
