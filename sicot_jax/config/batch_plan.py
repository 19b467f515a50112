"""Number of records in every step's batch, and how many of them come in triplets."""

from __future__ import annotations

import dataclasses
from typing import Any

SAMPLING_SCHEMES = ("uniform", "class_balanced", "square_root")


def num_triplets(photos: int, share: float) -> int:
    """Returns the number of triplets in a batch of which a share of the photos comes in triplets.

    Args:
      photos: photos of the batch.
      share: 0 to 1.

    Returns:
      Triplets, rounded down.
    """
    return int(photos * share + 1e-9) // 3


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Batch size of every step: `batch_size`, doubled at each step of `doubled_at`.

    Time is counted in batches of the first size: a step on 4 * `batch_size` records is four of
    them. So epochs and schedules mean the same number of records however far the batch has grown
    (Smith et al. 2018, "Don't decay the learning rate, increase the batch size").

    Attributes:
      batch_size: records of the first batch.
      doubled_at: steps from which on batches are twice as large, ascending.
    """

    batch_size: int
    doubled_at: tuple[int, ...] = ()

    @classmethod
    def with_doublings(cls, batch_size: int, *, doublings: int, every: float) -> BatchPlan:
        """Builds a plan that doubles its batches at regular intervals.

        Args:
          batch_size: records of the first batch.
          doublings: how many times the batch doubles.
          every: batches of the first size between two doublings.

        Returns:
          The plan: doubled at the first steps with at least `every`, 2 * `every`, ... batches
          before them.
        """
        plan = cls(batch_size)
        for i in range(1, doublings + 1):
            plan = cls(batch_size, (*plan.doubled_at, plan.steps_for(round(i * every))))
        return plan

    def batches_before(self, step: Any) -> Any:
        """Counts the batches of the first size that earlier steps take.

        That is step + sum_i 2^i max(0, step - doubled_at_i).

        Args:
          step: int, or an integer array of numpy or JAX, traced ones included.

        Returns:
          Batches, of the type of `step`.
        """
        return step + sum(2**i * (step - at) * (step > at) for i, at in enumerate(self.doubled_at))

    def steps_for(self, batches: int) -> int:
        """Returns the first step with so many batches before it: the inverse of `batches_before`.

        Args:
          batches: counted in the first size.

        Returns:
          The step.
        """
        step, size = batches, 1
        for at in self.doubled_at:
            before = self.batches_before(at)
            if before >= batches:
                break
            size *= 2
            step = at + -(-(batches - before) // size)
        return step

    def crosses_multiple(self, step: int, every: int) -> bool:
        """Returns whether the batches taken reach a multiple of `every` with the last of the steps.

        Args:
          step: steps taken so far.
          every: batches of the first size.

        Returns:
          Whether the last of `step` steps passed the multiple.
        """
        return self.batches_before(step) // every > self.batches_before(step - 1) // every

    def size(self, step: int) -> int:
        """Returns the records of a step's batch.

        Args:
          step: 0 for the first.

        Returns:
          Records.
        """
        return self.batch_size * 2 ** sum(step >= at for at in self.doubled_at)

    def sizes(self, start: int, stop: int) -> list[int]:
        """Returns the distinct batch sizes of a range of steps.

        Args:
          start: first step.
          stop: one after the last step.

        Returns:
          Records, each size once, ascending.
        """
        return sorted(
            {self.size(step) for step in (start, *self.doubled_at) if start <= step < stop}
        )

    def first_position(self, step: int) -> int:
        """Returns the records that earlier steps take.

        Args:
          step: 0 for the first.

        Returns:
          Position, in the order of records, of the batch's first one.
        """
        return self.batches_before(step) * self.batch_size
