"""The weights of the output layer: names, initialisation, rows, the part shared through words.

Training divides the rows over all devices and pads them to a multiple of their number; exported
models, converted weights and the index hold the same two arrays unpadded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from sicot_jax.catalog.catalog import Catalog
from sicot_jax.catalog.title_variants import TitleVariantReader
from sicot_jax.classifier.streaming import (
    first_class_id,
    loop_over_chunks,
    pass_to_previous_device,
    to_varying,
    update_rows,
)
from sicot_jax.config import Config
from sicot_jax.parallel import mesh
from sicot_jax.parallel.array_types import Array, Float, Int, Key, Shaped

KERNEL_NAME, BIAS_NAME = "fc.weight", "fc.bias"  # torchvision's names of the two arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassWeights:
    """Weights of the output layer: logits of an embedding x are kernel @ x + bias.

    Attributes:
      kernel: float32 [C, D], row c is the weight vector of class c.
      bias: float32 [C].
    """

    # Arrays of jax or numpy, or what JAX puts in their place: specs, shapes, tracers.
    kernel: Any
    bias: Any

    @property
    def width(self) -> int:
        """D, the length of a row."""
        return self.kernel.shape[1]

    def as_params(self) -> dict[str, dict[str, Any]]:
        """Returns the tree that optimizers know: {"classifier": {"kernel", "bias"}}."""
        return {"classifier": {"kernel": self.kernel, "bias": self.bias}}

    @classmethod
    def from_params(cls, params: Mapping[str, Mapping[str, Any]]) -> ClassWeights:
        """Returns class weights from the tree that optimizers know.

        Args:
          params: {"classifier": {"kernel", "bias"}}.

        Returns:
          The weights.
        """
        return cls(**params["classifier"])

    def named_arrays(self) -> dict[str, Any]:
        """Returns torchvision's names -> arrays."""
        return {KERNEL_NAME: self.kernel, BIAS_NAME: self.bias}

    @classmethod
    def from_named_arrays(cls, arrays: Mapping[str, Any]) -> ClassWeights:
        """Returns the class weights among arrays with torchvision's names.

        Args:
          arrays: name -> array, "fc.weight" [C, D] and "fc.bias" [C] among them.

        Returns:
          The weights.
        """
        return cls(arrays[KERNEL_NAME], arrays[BIAS_NAME])

    def row_pieces(
        self, num_classes: int
    ) -> dict[str, tuple[tuple[int, ...], Callable[[], Iterator[np.ndarray]]]]:
        """Returns the arrays for a writer that holds one device's rows at a time.

        Args:
          num_classes: C, rows to write; those beyond are padding.

        Returns:
          torchvision's name -> (shape, function that yields the rows of one device after another).
        """
        shapes = {BIAS_NAME: (num_classes,), KERNEL_NAME: (num_classes, self.width)}
        arrays = self.named_arrays()
        return {
            name: (shape, functools.partial(mesh.rows_by_device, arrays[name], num_classes))
            for name, shape in shapes.items()
        }


def init_kernel(
    key: Key[Array, ""],
    num_rows: int,
    *,
    num_classes: int,
    width: int,
    scale: float,
    chunk: int = 4096,
) -> Float[Array, "C D"]:
    """Returns normally distributed rows, divided over devices by class.

    Row c is drawn from fold_in(key, c), so that it depends neither on the mesh nor on the number of
    classes. A chunk at a time: the random bits of all rows at once would need twice their memory.

    Args:
      key: random key.
      num_rows: rows of the kernel, padding included.
      num_classes: rows from here on are padding, and zero.
      width: D, length of a row.
      scale: standard deviation.
      chunk: rows that are drawn at a time on a device.

    Returns:
      float32 [num_rows, D].
    """

    def shard(key: Array, per_class: Array) -> Array:
        shard_rows = per_class.shape[0]
        start = first_class_id(shard_rows)

        def draw(kernel: Array, first: Array, size: int) -> Array:
            classes = start + first + jnp.arange(size)
            rows = jax.vmap(lambda c: jax.random.normal(jax.random.fold_in(key, c), (width,)))(
                classes
            )
            rows = jnp.where(classes[:, None] < num_classes, scale * rows, 0.0)
            return update_rows(kernel, rows, first)

        return loop_over_chunks(draw, to_varying(jnp.zeros((shard_rows, width))), shard_rows, chunk)

    per_class = jnp.zeros(num_rows, out_sharding=mesh.CLASS_VECTOR)
    return jax.shard_map(shard, in_specs=(P(), mesh.CLASS_VECTOR), out_specs=mesh.CLASS_ROWS)(
        key, per_class
    )


def fold_shared_word_weights(
    weights: ClassWeights, tag_kernel: Float[Array, "D V"] | None
) -> ClassWeights:
    """Returns plain class weights that have the same logits as factorised ones.

    With shared word weights a row is [w_c, t_c], t_c the shares of words in the titles of class c,
    and is multiplied with [v, A v]. w_c . v + t_c . A v = (w_c + A^T t_c) . v, so the plain row is
    w_c + A^T t_c.

    Args:
      weights: class weights, kernel float32 [C, D + V], or [C, D] without shared word weights.
      tag_kernel: kernel A^T of the tag head; None for a model without one.

    Returns:
      Weights with a kernel float32 [C, D]; `weights` itself where nothing is shared.
    """
    if tag_kernel is None or weights.width == len(tag_kernel):
        return weights
    width = len(tag_kernel)

    @jax.jit
    def fold(kernel: Array, tag_kernel: Array) -> Array:
        return kernel[:, :width] + jnp.matmul(kernel[:, width:], tag_kernel.T, precision="highest")

    return dataclasses.replace(weights, kernel=fold(weights.kernel, tag_kernel))


def gather_rows(rows: Shaped[Array, "C D"], indices: Int[Array, " N"]) -> Shaped[Array, "N D"]:
    """Returns rows[indices], rows and result both divided over all devices by their leading axis.

    The rows are passed round the devices, each of which keeps those it is asked for, so that a
    device holds the rows of two devices at a time.

    Args:
      rows: [C, D], divided over devices.
      indices: int32 [N], divided over devices; -1 gives a row of zeros.

    Returns:
      [N, D], divided over devices.
    """

    def shard(rows: Array, indices: Array) -> Array:
        devices = lax.axis_size(mesh.AXES)
        device = lax.axis_index(mesh.AXES)

        def turn(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            gathered, rows = carry
            local = indices - (device + i) % devices * len(rows)
            is_here = (local >= 0) & (local < len(rows)) & (indices >= 0)
            gathered = jnp.where(
                is_here[:, None], rows[jnp.clip(local, 0, len(rows) - 1)], gathered
            )
            return gathered, pass_to_previous_device(rows)

        gathered = to_varying(jnp.zeros((len(indices), rows.shape[1]), rows.dtype))
        return lax.fori_loop(0, devices, turn, (gathered, rows))[0]

    return jax.shard_map(
        shard, in_specs=(mesh.CLASS_ROWS, mesh.CLASS_VECTOR), out_specs=mesh.CLASS_ROWS
    )(rows, indices)


def class_word_shares(
    catalog: Catalog, config: Config, num_tags: int
) -> Float[np.ndarray, "C {num_tags}"]:
    """Returns the share of each word in the training titles of each class.

    t_cw is the mean over the class's training titles of the share of word w + 1 among the title's
    words. Words beyond the tag vocabulary count in a title's length alone. Titles are read in the
    variant that the config trains with (masked, shuffled).

    Args:
      catalog: an opened catalogue.
      config: the run's config.
      num_tags: V, size of the tag vocabulary.

    Returns:
      float32 [C, V]; zeros for a class without a known word.
    """
    read_title, split = TitleVariantReader(catalog, config), catalog.splits["train"]
    total = np.zeros((len(catalog.classes), num_tags + 1), np.float32)
    num_titles = np.zeros(len(total), np.int64)
    for i in range(len(split)):
        ids = read_title(split[i], i)
        known = ids[ids > 0]
        if len(known):
            tags = np.where(known <= num_tags, known, 0)
            np.add.at(total[split.labels[i]], tags, 1 / len(known))
            num_titles[split.labels[i]] += 1
    total /= np.maximum(num_titles, 1)[:, None]
    return total[:, 1:]


def set_word_columns(weights: ClassWeights, word_shares: Float[np.ndarray, "C V"]) -> ClassWeights:
    """Returns class weights whose last columns are the word shares of their classes.

    Args:
      weights: kernel float32 [C padded, D + V], divided over devices by class.
      word_shares: float32 [C, V].

    Returns:
      The weights with the last V columns replaced; zeros in rows of padding.
    """
    kernel = weights.kernel
    num_rows, width = kernel.shape
    padded = np.zeros((num_rows, word_shares.shape[1]), np.float32)
    padded[: len(word_shares)] = word_shares
    sharded = jax.make_array_from_callback(
        padded.shape, kernel.sharding, lambda index: padded[index]
    )
    num_visual_columns = width - word_shares.shape[1]

    @jax.jit
    def concatenate(kernel: Array, columns: Array) -> Array:
        return jnp.concatenate([kernel[:, :num_visual_columns], columns], 1)

    return dataclasses.replace(weights, kernel=concatenate(kernel, sharded))
