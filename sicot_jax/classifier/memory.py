"""Estimates the temporary memory of a head."""

from __future__ import annotations

import dataclasses

from sicot_jax.classifier.sampling import num_sampled_slots
from sicot_jax.config import HeadConfig


@dataclasses.dataclass(frozen=True)
class HeadSizes:
    """Sizes that a head's temporary memory depends on.

    Attributes:
      num_streams: streams with a cross-entropy.
      batch: photos of a step; every stream has an embedding of each.
      width: D, length of a row.
      shard_classes: classes of one device.
      devices: number of devices.
      itemsize: bytes of a number in the products.
      is_trained: whether the kernel trains.
      moments: arrays of the kernel's shape in its optimizer.
    """

    num_streams: int
    batch: int
    width: int
    shard_classes: int
    devices: int = 1
    itemsize: int = 4
    is_trained: bool = True
    moments: int = 1

    @property
    def rows(self) -> int:
        """Embeddings of a step."""
        return self.num_streams * self.batch

    @property
    def is_narrow(self) -> bool:
        """Whether the inputs of products have 16 bits."""
        return self.itemsize < 4

    @property
    def kernel_bytes(self) -> int:
        """Bytes of one device's rows."""
        return 4 * self.shard_classes * self.width


def head_temporary_bytes(config: HeadConfig, sizes: HeadSizes) -> int:
    """Estimates what a head holds on one device while it runs, besides kernel and optimizer.

    Fitted to what XLA compiles on CPU, within 10 %. There 16-bit inputs of products are widened
    first, of a frozen kernel all rows at once; a device that multiplies 16-bit numbers needs less.
    An upper bound, up to 30 % above, for a frozen kernel with "sampled", "knn" or 16 bits, and for
    "dense" on one device. The graph of "knn" is not included.

    Args:
      config: the head.
      sizes: sizes of the step.

    Returns:
      Bytes.
    """
    if config.kind == "dense":
        return _dense_bytes(sizes)
    is_exact = config.kind == "class_sharded"
    active = sizes.shard_classes
    if not is_exact:
        active = sizes.batch + num_sampled_slots(config.sample_rate, sizes.shard_classes)
    chunk = min(config.chunk, active)
    kept = active * sizes.rows * {"no": 0, "bfloat16": 2, "float32": 4}[config.keep_logits]
    if is_exact:
        return round(_exact_bytes(sizes, chunk, keeps_logits=bool(kept)) + kept)
    return round(_sampled_bytes(sizes, chunk, rest=active % chunk) + kept)


def _dense_bytes(sizes: HeadSizes) -> int:
    # Logits, their exponentials and their gradient.
    logits = 3 * 4 * sizes.shard_classes * sizes.rows
    kernel = sizes.kernel_bytes
    if sizes.devices == 1:
        return logits + (kernel if sizes.is_trained or sizes.is_narrow else 0)
    # The complete kernel, and by stream its gradient and that summed over devices.
    kernel *= sizes.devices
    return max(
        2 * sizes.num_streams * kernel if sizes.is_trained else 0,
        kernel + max(logits, kernel // 2 if sizes.is_narrow else 0),
    )


def _exact_bytes(sizes: HeadSizes, chunk: int, *, keeps_logits: bool) -> float:
    part, logits = 4 * chunk * sizes.width, 4 * chunk * sizes.rows
    embeddings = 4 * sizes.rows * sizes.width
    if not sizes.is_trained:
        if sizes.is_narrow:
            return sizes.kernel_bytes + 1.5 * (part + logits)
        return part + logits + 3 * embeddings
    if sizes.is_narrow:
        logit_bytes = sizes.kernel_bytes + logits if keeps_logits else 1.5 * logits + 2 * embeddings
        return (3 + sizes.moments) * part + logit_bytes
    # Kernel, its gradient, moments, and one of them updated where the logits were.
    return (2 + sizes.moments) * part + max(part, logits) + 4 * embeddings


def _sampled_bytes(sizes: HeadSizes, chunk: int, *, rest: int) -> float:
    part, logits = 4 * chunk * sizes.width, 4 * chunk * sizes.rows
    # Rows are gathered and brought up to date; the last, shorter chunk has separate logits.
    size = 4 * rest * sizes.rows + (1.25 * part if sizes.is_narrow else 0)
    if not sizes.is_trained:
        return size + part + 2 * logits
    embeddings = 4 * sizes.rows * sizes.width
    return size + 4.25 * part + 1.25 * logits + 0.75 * max(part, logits) + embeddings
