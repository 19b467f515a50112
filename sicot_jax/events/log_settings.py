"""Settings of the import of foreign logs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sicot_jax.errors import InputError
from sicot_jax.events.store import EVENT_FIELDS, EVENT_KINDS

REQUIRED_FIELDS = ("request_id", "time", "visitor", "kind", "query_image_id", "sku", "shown")
TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}  # in seconds


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """How a log is read.

    Attributes:
      columns: field of an event -> column of the log, where their names differ.
      kinds: word of the log -> kind of an event.
      time_unit: unit of times that are numbers, one of `TIME_UNITS`.
      split: text between the SKUs of a list that is one text.
      variant: variant of events in logs without that column.
      max_bad_share: share of bad rows beyond which the import is refused.
      memory_mb: working memory, MB; more goes to disk.
      threads: threads to use; 0 for as many as there are cores.
    """

    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    time_unit: str = "s"
    split: str = "|"
    variant: str = "imported"
    max_bad_share: float = 0.05
    memory_mb: int = 1000
    threads: int = 0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.columns) - set(EVENT_FIELDS)):
            raise InputError(
                f"--column {unknown[0]}: no field of an event, wanted one of "
                f"{', '.join(EVENT_FIELDS)}"
            )
        if unknown := sorted(set(self.kinds.values()) - set(EVENT_KINDS)):
            raise InputError(
                f"--kind-name {unknown[0]}: no kind of event, wanted one of "
                f"{', '.join(EVENT_KINDS)}"
            )
        if self.time_unit not in TIME_UNITS:
            raise InputError(f"--time-unit {self.time_unit}, wanted one of {', '.join(TIME_UNITS)}")
        if not 0 <= self.max_bad_share <= 1:
            raise InputError(
                f"--max-bad-share {self.max_bad_share}, wanted a share from 0 to 1; the default is "
                "0.05"
            )
        if not self.split:
            raise InputError("--split is empty, wanted the text between two SKUs; the default is |")
