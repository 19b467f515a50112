"""Sample order as a pure function (seed, step) -> record indices: resume is a step number, workers
do not matter.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from sicot_jax.config.batch_plan import SAMPLINGS, BatchPlan
from sicot_jax.errors import InputError

_ROUNDS = 6
ORDER, CLASSES, TRIPLETS = range(3)  # what random numbers are for


def generator(purpose: int, seed: int, number: int) -> np.random.Generator:
    """Random numbers of this purpose, seed and number (epoch, step, position) alone.

    The purpose is the highest word of Philox's counter: streams of the same key that can never
    meet.
    """
    return np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, purpose]))


def permute(index: np.ndarray, *, size: int, seed: int, epoch: int) -> np.ndarray:
    """A pseudo-random permutation of 0..size-1, evaluated at `index` without making it: int64 [n]
    -> int64 [n].

    A Feistel network over the next power of four, walked until it lands inside (Black & Rogaway
    2002): every index appears once, in constant memory, whatever the size.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = generator(ORDER, seed, epoch).integers(0, 2**63, _ROUNDS, dtype=np.uint64)

    def network(x):
        left, right = x >> np.uint64(half), x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << np.uint64(half)) | right

    result = network(index.astype(np.uint64))
    outside = result >= size
    while outside.any():
        result[outside] = network(result[outside])
        outside = result >= size
    return result.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al. 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Which records make the batch of a step; how many, `BatchPlan` says.

    "uniform":        every record once an epoch, in a new order each epoch. "class_balanced": class
    uniform among those with a record, then a record of it (probability ~ n^0). "square_root":
    class with probability ~ n^0.5 (Mahajan et al. 2018), then a record of it.
    """

    labels: np.ndarray  # int32 [N]
    batch_size: int
    seed: int
    sampling: str = "uniform"
    doubled_at: tuple[int, ...] = ()

    def __post_init__(self):
        if self.sampling not in SAMPLINGS:
            raise InputError(f"data.sampling={self.sampling!r}, wanted one of {SAMPLINGS}")
        if not len(self.labels):
            raise InputError("no training records to sample from; check the catalogue's splits")

    @property
    def plan(self) -> BatchPlan:
        return BatchPlan(self.batch_size, self.doubled_at)

    def __call__(self, step: int) -> np.ndarray:
        """Record indices of the global batch of that step, int64 [plan.size(step)]."""
        size = self.plan.size(step)
        if self.sampling == "uniform":
            first = self.plan.first_position(step)
            position = np.arange(first, first + size, dtype=np.int64)
            epoch, index = np.divmod(position, len(self.labels))
            result = np.empty_like(index)
            for e in np.unique(epoch):
                here = epoch == e
                result[here] = permute(
                    index[here], size=len(self.labels), seed=self.seed, epoch=int(e)
                )
            return result
        order, starts, counts, cumulative = self._by_class
        rng = generator(CLASSES, self.seed, step)
        classes = np.searchsorted(cumulative, rng.random(size) * cumulative[-1], side="right")
        classes = np.minimum(classes, len(counts) - 1)
        within = (rng.random(size) * counts[classes]).astype(np.int64)
        return order[starts[classes] + within]

    @functools.cached_property
    def _by_class(self):
        """Records sorted by class, where each class starts, how many it has, cumulative class
        weights.
        """
        order = np.argsort(self.labels, kind="stable")
        _, starts, counts = np.unique(self.labels[order], return_index=True, return_counts=True)
        power = 0.0 if self.sampling == "class_balanced" else 0.5
        return order, starts, counts, np.cumsum(counts.astype(np.float64) ** power)
