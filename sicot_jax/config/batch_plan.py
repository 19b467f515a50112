"""How many records each step takes, and which of them come in triplets."""

from __future__ import annotations

import dataclasses

SAMPLING_SCHEMES = ("uniform", "class_balanced", "square_root")


def num_triplets(photos: int, share: float) -> int:
    """How many triplets of photos a share of so many photos holds."""
    return int(photos * share + 1e-9) // 3


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How many records each step takes: `batch_size`, and twice as many from each step of
    `doubled_at` on (ascending).

    Time is counted in batches of the first size: a step on 4 * `batch_size` records is four of
      them. So epochs and schedules mean the same number of records whatever the batch has grown to
      (Smith et al. 2018, "Don't decay the learning rate, increase the batch size").
    """

    batch_size: int
    doubled_at: tuple[int, ...] = ()

    @classmethod
    def growing(cls, batch_size: int, *, doublings: int, every: float) -> BatchPlan:
        """Doubled `doublings` times: at the first steps with at least `every`, 2 * `every`, ...
        batches before them.
        """
        plan = cls(batch_size)
        for i in range(1, doublings + 1):
            plan = cls(batch_size, (*plan.doubled_at, plan.steps_for(round(i * every))))
        return plan

    def batches_before(self, step):
        """What the steps before this one take, in batches of the first size: step + sum_i 2^i
        max(0, step - doubled_at_i).

        `step` is an int or an integer array, also one that JAX traces.
        """
        return step + sum(2**i * (step - at) * (step > at) for i, at in enumerate(self.doubled_at))

    def steps_for(self, batches: int) -> int:
        """The first step with at least that many batches of the first size before it: the inverse
        of `batches_before`.
        """
        step, size = batches, 1
        for at in self.doubled_at:
            before = int(self.batches_before(at))
            if before >= batches:
                break
            size *= 2
            step = at + -(-(batches - before) // size)
        return step

    def passes(self, step: int, every: int) -> bool:
        """Whether the last of `step` steps makes the batches, counted in the first size, reach a
        multiple of `every`.
        """
        return self.batches_before(step) // every > self.batches_before(step - 1) // every

    def size(self, step: int) -> int:
        """Records of that step's batch."""
        return self.batch_size * 2 ** sum(step >= at for at in self.doubled_at)

    def sizes(self, start: int, stop: int) -> list[int]:
        """The sizes that the steps start .. stop - 1 have, each once, ascending."""
        return sorted(
            {self.size(step) for step in (start, *self.doubled_at) if start <= step < stop}
        )

    def first_position(self, step: int) -> int:
        """Records that all steps before this one take: its batch is positions first_position .. +
        size in the order.
        """
        return self.batches_before(step) * self.batch_size
