"""Estimates the bytes that a training step sends between devices, by item."""

from __future__ import annotations

import dataclasses

from sicot_jax.training.memory.plan import MemoryPlan
from sicot_jax.training.model import compute_dtype


@dataclasses.dataclass(frozen=True)
class Collective:
    """An array that crosses devices in a step.

    Attributes:
      kind: the collective, as XLA calls it.
      size: bytes that are gathered, scattered, summed or passed on.
      times: how often in a step.
    """

    kind: str
    size: int
    times: float = 1

    def bytes_sent(self, devices: int) -> float:
        """Returns the bytes that one device sends in a step, where all devices form a ring.

        Args:
          devices: number of devices.

        Returns:
          Bytes.
        """
        if devices == 1:
            return 0.0
        if self.kind == "collective-permute":
            return self.size * self.times
        passes = 2 if self.kind == "all-reduce" else 1
        return self.size * self.times * (devices - 1) / devices * passes


def step_collectives(plan: MemoryPlan) -> dict[str, Collective]:
    """Lists what crosses devices in a training step.

    Args:
      plan: the memory plan.

    Returns:
      Item -> collective.
    """
    head = _dense_head(plan) if plan.config.head.kind == "dense" else _sharded_head(plan)
    return _streams(plan) | _comparisons(plan) | head


def _streams(plan: MemoryPlan) -> dict[str, Collective]:
    # Mean and variance, forward once or twice, and their gradients.
    passes = 4 if plan.micro_batches == 1 else 6
    items = {
        "streams: gradient": Collective("all-reduce", plan.gradient - plan.residual),
        "streams: batch-norm statistics": Collective(
            "all-reduce", 4 * plan.num_moments // 2, plan.micro_batches * passes
        ),
    }
    if plan.residual:
        items["streams: largest entries of the gradient"] = Collective(
            "all-gather", 8 * plan.entries_sent * plan.devices
        )
    return items


def _comparisons(plan: MemoryPlan) -> dict[str, Collective]:
    """What losses that compare photos of different devices exchange."""
    items, photos = {}, plan.batch_size
    if plan.code_width:
        bits = 4 * photos * plan.config.model.code_bits
        items["codes: bits and embeddings"] = Collective("all-gather", 4 * photos * plan.code_width)
        items["codes: cotangents"] = Collective("all-reduce", bits)
    if plan.compared_width:
        compared = 4 * photos * plan.compared_width
        items["boxes and triplets: embeddings"] = Collective("all-gather", compared)
        if plan.config.loss.triplet:  # background embeddings are compared with constants
            items["triplets: cotangents"] = Collective("all-reduce", compared)
    return items


def _dense_head(plan: MemoryPlan) -> dict[str, Collective]:
    kernel = 4 * (plan.width + 1) * plan.shard_classes * plan.devices
    items = {"classifier: kernel and bias": Collective("all-gather", kernel)}
    if plan.kernel_trains:
        items["classifier: gradient of each stream"] = Collective(
            "all-reduce", kernel, plan.num_streams
        )
    return items


def _sharded_head(plan: MemoryPlan) -> dict[str, Collective]:
    parts, photos, rows = plan.micro_batches, plan.batch_size, plan.num_embeddings
    embeddings = 4 * rows * plan.width
    items = {
        "classifier: embeddings": Collective(
            "all-gather", embeddings, 1 if parts == 1 else (parts + 1) / parts
        ),
        "classifier: labels": Collective("all-gather", 4 * photos),
        "classifier: cotangents": Collective("reduce-scatter", embeddings),
        "classifier: maxima, sums, label logits": Collective("all-reduce", 4 * rows, 3),
    }
    head = plan.config.head
    if head.kind == "knn":
        block = compute_dtype(plan.config).itemsize * plan.width * plan.shard_classes
        items["classifier: neighbours of labels"] = Collective(
            "all-reduce", 4 * photos * head.neighbours
        )
        items["classifier: rows, for the graph"] = Collective(
            "collective-permute", block, (plan.devices - 1) / head.rebuild_steps
        )
    return items
