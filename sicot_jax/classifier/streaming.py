"""Chunked passes over one device's rows of the classifier; functions for inside `shard_map`.

A pass never holds logits of more than a chunk of classes. `ActiveRows` hides whether all rows take
part or only some of them; the log-sum-exp accumulates over chunks and then over devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sicot_jax.parallel import mesh
from sicot_jax.parallel.array_types import Array, Float, Int, Shaped

# The logit of padding: finite, so that a shard that is all padding makes no inf - inf.
MASKED_LOGIT = -1e30

LogSumExp = tuple[Array, Array]  # maximum [R], sum of exp(logit - maximum) [R]


def first_class_id(shard_rows: int) -> Int[Array, ""]:
    """Returns the class id of this device's first row.

    Args:
      shard_rows: rows of a device.

    Returns:
      int32 scalar.
    """
    return lax.axis_index(mesh.AXES) * shard_rows


def to_varying(x: Shaped[Array, "*_"]) -> Shaped[Array, "*_"]:
    """Marks a value that is equal on all devices as one that may differ between them.

    Args:
      x: any array.

    Returns:
      The same values, as a start of a loop whose result differs between devices.
    """
    return lax.pcast(x, mesh.AXES, to="varying")


def pass_to_previous_device(x: Shaped[Array, "*_"]) -> Shaped[Array, "*_"]:
    """Sends an array once round the ring of devices, to the device before.

    Args:
      x: any array.

    Returns:
      The array of the next device.
    """
    devices = lax.axis_size(mesh.AXES)
    return lax.ppermute(x, mesh.AXES, [(d, (d - 1) % devices) for d in range(devices)])


def slice_rows(x: Shaped[Array, "N ..."], first: Any, size: int) -> Shaped[Array, "{size} ..."]:
    """Returns `size` rows from `first` on.

    Args:
      x: [N, ...].
      first: index of the first row, an integer or int32 scalar.
      size: number of rows.

    Returns:
      [size, ...].
    """
    return lax.dynamic_slice_in_dim(x, first, size)


def update_rows(
    x: Shaped[Array, "N ..."], rows: Shaped[Array, "n ..."], first: Any
) -> Shaped[Array, "N ..."]:
    """Returns an array with the rows from `first` on replaced.

    Args:
      x: [N, ...].
      rows: the new rows, [n, ...].
      first: index of the first row, an integer or int32 scalar.

    Returns:
      [N, ...].
    """
    return lax.dynamic_update_slice_in_dim(x, rows, first, 0)


def loop_over_chunks(
    function: Callable[[Any, Any, int], Any], carry: Any, num_rows: int, chunk: int
) -> Any:
    """Runs `carry = function(carry, first, size)` over all rows, a chunk at a time.

    Args:
      function: takes the carry, the index of the chunk's first row and its (static) size.
      carry: start value, a tree of arrays.
      num_rows: number of rows.
      chunk: largest size of a chunk.

    Returns:
      The last carry: of a loop over full chunks, then of the remaining rows.
    """
    size = min(chunk, num_rows)
    full_chunks, rest = divmod(num_rows, size)
    carry = lax.fori_loop(0, full_chunks, lambda i, carry: function(carry, i * size, size), carry)
    return function(carry, full_chunks * size, rest) if rest else carry


def matmul_transposed(
    kernel: Float[Array, "n D"], rows: Float[Array, "R D"], dtype: DTypeLike
) -> Float[Array, "n R"]:
    """Returns kernel @ rows^T with inputs in `dtype` and sums in float32.

    Args:
      kernel: rows of the classifier, float [n, D].
      rows: embeddings, float [R, D].
      dtype: dtype of the inputs of the product.

    Returns:
      float32 [n, R].
    """
    return jnp.einsum(
        "nd,rd->nr", kernel.astype(dtype), rows.astype(dtype), preferred_element_type=jnp.float32
    )


def logit_offset(
    bias: Float[Array, " n"],
    log_prior: Float[Array, " n"] | None,
    classes: Int[Array, " n"],
    tau: float,
) -> Float[Array, " n"]:
    """Returns bias + tau * log prior of a chunk, and MASKED_LOGIT for padding.

    Args:
      bias: float32 [n].
      log_prior: log share of each class in the training photos, float32 [n]; not read at tau 0.
      classes: class ids, int32 [n], -1 for padding.
      tau: strength of the logit adjustment, see `losses.logit_offsets`.

    Returns:
      float32 [n].
    """
    if tau:
        assert log_prior is not None
        bias = bias + tau * log_prior
    return jnp.where(classes >= 0, bias, MASKED_LOGIT)


def start_log_sum_exp(num_rows: int) -> LogSumExp:
    """Returns the running log-sum-exp of no logits.

    Args:
      num_rows: R, number of embeddings.

    Returns:
      Maximum and sum, float32 [R] each.
    """
    return to_varying(jnp.full(num_rows, MASKED_LOGIT)), to_varying(jnp.zeros(num_rows))


def add_to_log_sum_exp(running: LogSumExp, logits: Float[Array, "n R"]) -> LogSumExp:
    """Adds the logits of a chunk of classes to a running log-sum-exp.

    Args:
      running: maximum and sum of exp(logit - maximum) so far, float32 [R] each.
      logits: float32 [n, R].

    Returns:
      Maximum and sum, float32 [R] each.
    """
    highest, total = running
    new = jnp.maximum(highest, jnp.max(logits, 0))
    return new, total * jnp.exp(highest - new) + jnp.sum(jnp.exp(logits - new), 0)


def log_sum_exp_over_devices(running: LogSumExp) -> Float[Array, " R"]:
    """Returns the log-sum-exp over the classes of all devices.

    Args:
      running: each device's maximum and sum, float32 [R] each.

    Returns:
      float32 [R], equal on all devices.
    """
    highest, total = running
    top = lax.pmax(highest, mesh.AXES)
    return jnp.log(lax.psum(total * jnp.exp(highest - top), mesh.AXES)) + top


@dataclasses.dataclass(frozen=True)
class ActiveRows:
    """The rows of a device that take part in a step, read and written a chunk at a time.

    Attributes:
      shard_rows: rows of the device.
      num_classes: C; rows of class ids from here on are padding.
      indices: int32 [A], rows that take part, -1 for an empty slot; None for all rows in order.
    """

    shard_rows: int
    num_classes: int
    indices: Array | None = None

    @property
    def count(self) -> int:
        """Number of slots."""
        return self.shard_rows if self.indices is None else len(self.indices)

    def classes(self, first: Any, size: int) -> Int[Array, " {size}"]:
        """Returns the class ids of a chunk.

        Args:
          first: first slot of the chunk.
          size: slots of the chunk.

        Returns:
          int32 [size]; -1 for an empty slot and for padding.
        """
        rows = self._rows(first, size)
        ids = first_class_id(self.shard_rows) + rows
        return jnp.where((rows >= 0) & (ids < self.num_classes), ids, -1)

    def read(self, tree: Any, first: Any, size: int) -> Any:
        """Returns a chunk of arrays with one entry per class.

        Args:
          tree: arrays [shard_rows, ...].
          first: first slot of the chunk.
          size: slots of the chunk.

        Returns:
          Arrays [size, ...]; the values of empty slots have no meaning.
        """
        if self.indices is None:
            return jax.tree.map(lambda x: slice_rows(x, first, size), tree)
        rows = jnp.maximum(self._rows(first, size), 0)
        return jax.tree.map(lambda x: x.at[rows].get(mode="promise_in_bounds"), tree)

    def write(self, tree: Any, chunk: Any, first: Any, size: int) -> Any:
        """Returns the arrays with a chunk replaced; values of empty slots are dropped.

        Args:
          tree: arrays [shard_rows, ...].
          chunk: their new values, arrays [size, ...].
          first: first slot of the chunk.
          size: slots of the chunk.

        Returns:
          Arrays [shard_rows, ...].
        """
        if self.indices is None:
            return jax.tree.map(lambda x, new: update_rows(x, new, first), tree, chunk)
        rows = self._rows(first, size)
        # Empty slots write out of bounds, each to a different row, as unique_indices promises.
        rows = jnp.where(rows < 0, self.shard_rows + jnp.arange(size), rows)
        return jax.tree.map(
            lambda x, new: x.at[rows].set(new, mode="drop", unique_indices=True), tree, chunk
        )

    def _rows(self, first: Any, size: int) -> Array:
        if self.indices is None:
            return first + jnp.arange(size)
        return slice_rows(self.indices, first, size)
