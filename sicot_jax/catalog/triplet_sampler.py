"""Samples training batches that mix triplets from clicks with ordinary records."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from sicot_jax.catalog.sampling import TRIPLET_STREAM, RecordSampler, random_stream
from sicot_jax.catalog.triplets import TripletTable
from sicot_jax.config.batch_plan import BatchPlan, num_triplets


@dataclasses.dataclass(frozen=True)
class TripletSampler:
    """Chooses the records of a batch, a pure function of (seed, step) as `RecordSampler` is.

    Each micro-batch holds `num_triplets(micro_batch, share)` triplets (query, clicked, not clicked;
    one after the other), drawn with probability proportional to weight, then ordinary records.
    Micro-batch p of P has the rows p, p + P, ... of the batch: a triplet is never cut.

    Attributes:
      table: the triplets.
      records: draws the ordinary records.
      plan: records of each step, triplets included.
      micro_batch: records of a micro-batch.
      share: share of a micro-batch's records that come in triplets, in [0, 1].
    """

    table: TripletTable
    records: RecordSampler
    plan: BatchPlan
    micro_batch: int
    share: float

    @classmethod
    def with_record_sampler(
        cls, table: TripletTable, records: RecordSampler, *, micro_batch: int, share: float
    ) -> TripletSampler:
        """Builds a sampler that replaces a share of another sampler's records by triplets.

        Args:
          table: the triplets.
          records: would draw the entire batch from the same split.
          micro_batch: records of a micro-batch.
          share: share of a micro-batch's records that come in triplets, in [0, 1].

        Returns:
          The sampler, for batches of the same sizes.
        """
        remaining = micro_batch - 3 * num_triplets(micro_batch, share)
        ordinary = dataclasses.replace(
            records, batch_size=records.batch_size // micro_batch * remaining
        )
        return cls(table, ordinary, records.plan, micro_batch, share)

    def __call__(self, step: int) -> np.ndarray:
        """Returns the record indices of the global batch of that step, int64 [plan.size(step)]."""
        parts = self.plan.size(step) // self.micro_batch
        triplets = self._draw_triplets(step, parts * num_triplets(self.micro_batch, self.share))
        both = [triplets.reshape(parts, -1), self.records(step).reshape(parts, -1)]
        return np.concatenate(both, 1).T.ravel()

    def _draw_triplets(self, step: int, count: int) -> np.ndarray:
        """Returns record indices (query, clicked, not clicked), int64 [count, 3]."""
        table, cumulative = self.table, self._cumulative_weights
        draws = random_stream(TRIPLET_STREAM, self.records.seed, step).random((3, count))
        row = np.searchsorted(cumulative, draws[0] * cumulative[-1], side="right")
        row = np.minimum(row, len(cumulative) - 1)
        query = table.query[row]
        clicked = self._draw_photo(table.clicked[row], draws[1], query)
        not_clicked = self._draw_photo(table.not_clicked[row], draws[2], query)
        return np.stack([query, clicked, not_clicked], 1)

    def _draw_photo(self, label: np.ndarray, draws: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Returns a training photo of each class, uniform over its photos without the query."""
        order, rank, starts, counts = self._by_class
        start, count = starts[label], counts[label]
        query_rank = rank[np.minimum(query, len(rank) - 1)] - start
        in_class = (query < len(rank)) & (query_rank >= 0) & (query_rank < count)
        chosen = (draws * (count - in_class)).astype(np.int64)
        return order[start + chosen + (in_class & (chosen >= query_rank))]

    @functools.cached_property
    def _cumulative_weights(self) -> np.ndarray:
        return np.cumsum(self.table.weight)

    @functools.cached_property
    def _by_class(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns records sorted by class, each record's rank there, class starts and counts."""
        labels = self.records.labels
        order = np.argsort(labels, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        counts = np.bincount(labels)
        return order, rank, np.cumsum(counts) - counts, counts
