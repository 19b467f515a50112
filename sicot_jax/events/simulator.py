"""Click simulator: logs of visitors whose true behaviour is known, for tests and benchmarks.

Position-based model (Richardson et al. 2007): a visitor examines position r (from 1) of a result
list with probability r^-eta, whatever item is there; clicks an examined item with its click
probability, and buys a clicked item with its purchase probability. So P(click at r) = r^-eta *
click probability. Some lists are shown in random order, which position bias can be estimated from.
Bots and errors of logging are added on request.

    results = simulator.results_from_scores(query_image_ids, skus, shown, similarity, quality)
    for table in simulator.simulate_tables(results, num_requests=100_000, seed=0): ...  # pyarrow
    simulator.write_simulated_log(results, path, num_requests=6_000_000)  # Parquet
    for event in simulator.simulate_events(results, num_requests=1_000): ...  # store.Event
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit

from sicot_jax.events.simulated_rows import (
    NO_NOISE,
    REQUESTS_PER_CHUNK,
    ClickModel,
    LogNoise,
    SimulatedResults,
    draw_chunk,
)
from sicot_jax.events.store import Event, event_schema

if TYPE_CHECKING:
    import pyarrow as pa

_DEFAULT_MODEL = ClickModel()


def results_from_scores(
    query_image_ids: Sequence[str],
    skus: Sequence[str],
    shown: np.ndarray,
    similarity: np.ndarray,
    quality: np.ndarray,
    *,
    click_weights: tuple[float, float, float] = (-3.0, 1.5, 1.0),
    purchase_weights: tuple[float, float, float] = (-2.5, 0.5, 1.5),
) -> SimulatedResults:
    """Builds result lists whose probabilities are sigmoid(a + b * similarity + c * quality).

    Args:
      query_image_ids: str [Q].
      skus: str [N].
      shown: int [Q, R], products by position.
      similarity: float [Q, R], of the product at that position to the query, about standard normal.
      quality: float [N], of the product, about standard normal.
      click_weights: (a, b, c) of clicks.
      purchase_weights: (a, b, c) of purchases.

    Returns:
      Result lists with their click and purchase probabilities.
    """

    def probability(weights: tuple[float, float, float]) -> np.ndarray:
        a, b, c = weights
        return expit(a + b * similarity + c * quality[shown])

    return SimulatedResults(
        query_image_ids, skus, shown, probability(click_weights), probability(purchase_weights)
    )


def random_results(
    *, num_queries: int, num_products: int, num_positions: int, seed: int = 0
) -> SimulatedResults:
    """Builds result lists of random products in the order of similarity.

    Args:
      num_queries: queries, Q.
      num_products: products, N.
      num_positions: positions of a list, R.
      seed: seed of the random numbers.

    Returns:
      Result lists by `results_from_scores`.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 1 << 40]))
    first = rng.integers(num_products, size=(num_queries, 1))
    max_step = max(num_products // num_positions, 1)
    steps = rng.integers(1, max_step + 1, size=(num_queries, num_positions))
    # Less than one round, so that no product comes twice.
    shown = rng.permuted((first + np.cumsum(steps, 1)) % num_products, axis=1)
    similarity = -np.sort(-rng.standard_normal((num_queries, num_positions)), 1)
    queries, skus = [f"q{i}" for i in range(num_queries)], [f"p{i}" for i in range(num_products)]
    return results_from_scores(queries, skus, shown, similarity, rng.standard_normal(num_products))


def simulate_tables(
    results: SimulatedResults,
    model: ClickModel = _DEFAULT_MODEL,
    noise: LogNoise = NO_NOISE,
    *,
    num_requests: int,
    seed: int = 0,
) -> Iterator[pa.Table]:
    """Simulates a log, some thousand requests at a time.

    Args:
      results: what can be asked, and what is shown then; each request draws a query at random.
      model: behaviour of visitors.
      noise: bots and errors.
      num_requests: requests in all, with ids r0, r1, ...
      seed: seed of the random numbers; the same arguments give the same events.

    Yields:
      Tables in `store.event_schema`, each in the order of time.
    """
    for chunk in range(-(-num_requests // REQUESTS_PER_CHUNK)):
        rng = np.random.Generator(np.random.Philox(key=[seed, chunk]))
        yield draw_chunk(results, model, noise, rng, chunk=chunk, num_requests=num_requests)


def simulate_events(
    results: SimulatedResults,
    model: ClickModel = _DEFAULT_MODEL,
    noise: LogNoise = NO_NOISE,
    *,
    num_requests: int,
    seed: int = 0,
) -> Iterator[Event]:
    """Simulates a log event by event, see `simulate_tables`.

    Args:
      results: what can be asked, and what is shown then.
      model: behaviour of visitors.
      noise: bots and errors; missing fields are empty, which `store.parse_event` would refuse.
      num_requests: requests in all.
      seed: seed of the random numbers.

    Yields:
      Events.
    """
    for table in simulate_tables(results, model, noise, num_requests=num_requests, seed=seed):
        for row in table.to_pylist():
            yield Event(**{**row, "shown": tuple(row["shown"])})


def write_simulated_log(
    results: SimulatedResults,
    path: Path,
    model: ClickModel = _DEFAULT_MODEL,
    noise: LogNoise = NO_NOISE,
    *,
    num_requests: int,
    seed: int = 0,
) -> int:
    """Writes a simulated log as a Parquet file, see `simulate_tables`.

    Args:
      results: what can be asked, and what is shown then.
      path: file to write.
      model: behaviour of visitors.
      noise: bots and errors.
      num_requests: requests in all.
      seed: seed of the random numbers.

    Returns:
      How many events were written.
    """
    from pyarrow import parquet

    count = 0
    with parquet.ParquetWriter(path, event_schema()) as writer:
        for table in simulate_tables(results, model, noise, num_requests=num_requests, seed=seed):
            writer.write_table(table)
            count += table.num_rows
    return count
