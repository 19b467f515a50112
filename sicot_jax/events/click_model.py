"""What a click simulation is made of: result lists with their relevance, visitors, log errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sicot_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class SimulatedResults:
    """Result lists of Q queries over N products at R positions, with their true relevance.

    Attributes:
      query_image_ids: str [Q].
      skus: str [N].
      shown: int [Q, R], products by position, each once in its row.
      click_probability: float [Q, R], that a visitor who examines the product clicks it.
      purchase_probability: float [Q, R], that a visitor who clicked the product buys it.
    """

    query_image_ids: Sequence[str]
    skus: Sequence[str]
    shown: np.ndarray
    click_probability: np.ndarray
    purchase_probability: np.ndarray

    def __post_init__(self) -> None:
        shape = (len(self.query_image_ids), self.shown.shape[1])
        arrays = (self.shown, self.click_probability, self.purchase_probability)
        if any(array.shape != shape for array in arrays):
            raise InputError(
                f"results of shapes {', '.join(str(array.shape) for array in arrays)}, "
                f"wanted {shape}"
            )
        if self.shown.min() < 0 or self.shown.max() >= len(self.skus):
            raise InputError(
                f"shown: product {self.shown.max()}, wanted numbers from 0 to below "
                f"{len(self.skus)}"
            )

    @property
    def num_positions(self) -> int:
        """Positions of a list, R."""
        return self.shown.shape[1]


@dataclasses.dataclass(frozen=True)
class ClickModel:
    """Behaviour of visitors.

    Attributes:
      eta: exponent of the examination propensity r^-eta.
      shuffled_share: share of requests whose list is in random order.
      stop_after_purchase: whether a visitor examines nothing below a purchase; lower positions are
        then examined less often than r^-eta.
      requests_per_visitor: requests of a visitor, on average.
      days: days over which the requests are spread.
      start: Unix time of the first request, seconds.
    """

    eta: float = 1.0
    shuffled_share: float = 0.1
    stop_after_purchase: bool = False
    requests_per_visitor: float = 5.0
    days: float = 10.0
    start: float = 1_700_000_000.0

    def propensity(self, num_positions: int) -> np.ndarray:
        """Returns the examination propensity of each position.

        Args:
          num_positions: positions of a list, R.

        Returns:
          float64 [R], 1 at the first position.
        """
        return np.arange(1, num_positions + 1, dtype=np.float64) ** -self.eta


@dataclasses.dataclass(frozen=True)
class LogNoise:
    """Bots and errors in a log, as shares.

    Attributes:
      bots: share of requests made by bots.
      requests_per_bot: requests of a bot, one after the other; every second bot clicks all that it
        is shown, ten times a second, the others click nothing.
      duplicates: share of events that are logged twice.
      missing_fields: share of events in which a field is empty.
      double_clicks: share of visitors' clicks that are followed by a second one at once.
      unshown_clicks: share of visitors' clicks followed by one on an item not in the list.
      clock_errors: share of visitors' clicks that are dated before their impression.
    """

    bots: float = 0.0
    requests_per_bot: int = 400
    duplicates: float = 0.0
    missing_fields: float = 0.0
    double_clicks: float = 0.0
    unshown_clicks: float = 0.0
    clock_errors: float = 0.0


NO_NOISE = LogNoise()
TYPICAL_NOISE = LogNoise(
    bots=0.05,
    duplicates=0.01,
    missing_fields=0.005,
    double_clicks=0.02,
    unshown_clicks=0.01,
    clock_errors=0.01,
)
