"""Samples the records of each step: a pure function (seed, step) -> record indices.

Resuming needs a step number and nothing else, and the number of workers does not matter.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from sicot_jax.config.batch_plan import SAMPLING_SCHEMES, BatchPlan
from sicot_jax.errors import InputError

_FEISTEL_ROUNDS = 6
# Purposes of random numbers: streams that never meet.
ORDER_STREAM, CLASS_STREAM, TRIPLET_STREAM = range(3)


def _random_bits(purpose: int, seed: int, number: int) -> np.random.Philox:
    # The purpose is the highest word of the counter: streams of one key never overlap.
    return np.random.Philox(key=[seed, number], counter=[0, 0, 0, purpose])


def random_stream(purpose: int, seed: int, number: int) -> np.random.RandomState:
    """Returns random numbers that depend on purpose, seed and number alone.

    Streams never overlap. They are the same with every version of NumPy, which those of
    `numpy.random.Generator` need not be (NEP 19): a run may be resumed under another version.

    Args:
      purpose: `ORDER_STREAM`, `CLASS_STREAM` or `TRIPLET_STREAM`.
      seed: seed of the run, in 0..2^63-1.
      number: epoch or step.

    Returns:
      A generator.
    """
    return np.random.RandomState(_random_bits(purpose, seed, number))


def permute(index: np.ndarray, *, size: int, seed: int, epoch: int) -> np.ndarray:
    """Evaluates a pseudo-random permutation of 0..size-1 at `index` without building it.

    A Feistel network over the next power of four, iterated until the result is below `size`
    ("cycle walking", Black & Rogaway 2002): constant memory, whatever the size.

    Args:
      index: int64 [n], in 0..size-1.
      size: number of elements.
      seed: seed of the run.
      epoch: one permutation per epoch.

    Returns:
      int64 [n], the permuted indices.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = _random_bits(ORDER_STREAM, seed, epoch).random_raw(_FEISTEL_ROUNDS) >> np.uint64(1)

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & mask
        for key in keys:
            left, right = right, left ^ (_splitmix64(right ^ key) & mask)
        return (left << np.uint64(half)) | right

    result = network(index.astype(np.uint64))
    too_large = result >= size
    while too_large.any():
        result[too_large] = network(result[too_large])
        too_large = result >= size
    return result.astype(np.int64)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Returns splitmix64's finalizer of x (Steele et al. 2014): all bits mixed."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class RecordSampler:
    """Chooses the records of a step's batch; `BatchPlan` says how many.

    Samplings: "uniform": every record once an epoch, in a new order each epoch. "class_balanced":
    a class uniformly among those with a record, then one of its records. "square_root": a class
    with probability proportional to n^0.5 (Mahajan et al. 2018), then one of its records.

    Attributes:
      labels: int32 [N], class of each record.
      batch_size: records of the first step.
      seed: seed of the run.
      sampling: one of the above.
      doubled_at: steps from which the batch has twice as many records, ascending.

    Raises:
      InputError: an unknown sampling, or no records.
    """

    labels: np.ndarray
    batch_size: int
    seed: int
    sampling: str = "uniform"
    doubled_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLING_SCHEMES:
            raise InputError(f"data.sampling={self.sampling!r}, wanted one of {SAMPLING_SCHEMES}")
        if not len(self.labels):
            raise InputError("no training records to sample from; check the catalogue's splits")

    @property
    def plan(self) -> BatchPlan:
        """Records of each step."""
        return BatchPlan(self.batch_size, self.doubled_at)

    def __call__(self, step: int) -> np.ndarray:
        """Returns the record indices of the global batch of that step, int64 [plan.size(step)]."""
        size = self.plan.size(step)
        if self.sampling == "uniform":
            return self._uniform(self.plan.first_position(step), size)
        order, starts, counts, cumulative = self._by_class
        rng = random_stream(CLASS_STREAM, self.seed, step)
        classes = np.searchsorted(cumulative, rng.random(size) * cumulative[-1], side="right")
        classes = np.minimum(classes, len(counts) - 1)
        within = (rng.random(size) * counts[classes]).astype(np.int64)
        return order[starts[classes] + within]

    def _uniform(self, first: int, size: int) -> np.ndarray:
        """Returns the records at positions first .. first + size - 1 of all epochs' orders."""
        epoch, index = np.divmod(np.arange(first, first + size, dtype=np.int64), len(self.labels))
        result = np.empty_like(index)
        for e in np.unique(epoch):
            rows = epoch == e
            result[rows] = permute(index[rows], size=len(self.labels), seed=self.seed, epoch=int(e))
        return result

    @functools.cached_property
    def _by_class(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns records sorted by class, class starts, class counts, cumulative class weights."""
        order = np.argsort(self.labels, kind="stable")
        _, starts, counts = np.unique(self.labels[order], return_index=True, return_counts=True)
        power = 0.0 if self.sampling == "class_balanced" else 0.5
        return order, starts, counts, np.cumsum(counts.astype(np.float64) ** power)
