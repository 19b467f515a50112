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

from sicot_jax.events.store import Event, event_schema

if TYPE_CHECKING:
    import pyarrow as pa


import dataclasses
from typing import TYPE_CHECKING

from sicot_jax.events.bots import SECONDS_PER_DAY
from sicot_jax.events.store import EVENT_KINDS

if TYPE_CHECKING:
    import pyarrow as pa

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


BOT_PREFIX = "bot-"  # begins the name of every bot, and of no visitor
REQUESTS_PER_CHUNK = 8192
_IMPRESSION, _CLICK, _PURCHASE = range(3)  # indices of EVENT_KINDS


def draw_chunk(
    results: SimulatedResults,
    model: ClickModel,
    noise: LogNoise,
    rng: np.random.Generator,
    *,
    chunk: int,
    num_requests: int,
) -> pa.Table:
    """Draws the events of a chunk of requests.

    Args:
      results: what can be asked, and what is shown then.
      model: behaviour of visitors.
      noise: bots and errors.
      rng: random numbers of the chunk.
      chunk: number of the chunk; its requests begin at `chunk * REQUESTS_PER_CHUNK`.
      num_requests: requests of all chunks.

    Returns:
      Events in `store.event_schema`, in the order of time.
    """
    requests = _draw_requests(results, model, noise, rng, chunk=chunk, num_requests=num_requests)
    return _event_table(results, requests, _draw_events(requests, results, noise, rng))


@dataclasses.dataclass(frozen=True)
class _Requests:
    """Requests of a chunk: n requests of R positions."""

    chunk: int
    first: int  # number of the first request
    query: np.ndarray  # int [n]
    shown: np.ndarray  # int [n, R], products
    clicked: np.ndarray  # bool [n, R]
    bought: np.ndarray  # bool [n, R]
    visitor: np.ndarray  # int [n]
    is_bot: np.ndarray  # bool [n]
    time: np.ndarray  # float [n], seconds


@dataclasses.dataclass(frozen=True)
class _Events:
    """Events of a chunk in the order in which they are logged."""

    number: np.ndarray  # int [E], in the chunk; a duplicate has the number of its first
    request: np.ndarray  # int [E], in the chunk
    kind: np.ndarray  # int [E], index of EVENT_KINDS
    time: np.ndarray  # float [E], seconds
    product: np.ndarray  # int [E], -1 for an impression
    missing: np.ndarray  # int [E], 1 without request, 2 without visitor, else 0


def _draw_rows(rng: np.random.Generator, share: float, count: int) -> np.ndarray:
    """Rows of `count`, each with the probability `share`."""
    return np.flatnonzero(rng.random(count) < share)


def _draw_requests(
    results: SimulatedResults,
    model: ClickModel,
    noise: LogNoise,
    rng: np.random.Generator,
    *,
    chunk: int,
    num_requests: int,
) -> _Requests:
    first, num_positions = chunk * REQUESTS_PER_CHUNK, results.num_positions
    count = min(REQUESTS_PER_CHUNK, num_requests - first)
    interval = model.days * SECONDS_PER_DAY / num_requests  # from one request to the next
    row = np.arange(count)
    query = rng.integers(len(results.query_image_ids), size=count)
    order = np.tile(np.arange(num_positions), (count, 1))
    shuffled = _draw_rows(rng, model.shuffled_share, count)
    order[shuffled] = rng.permuted(order[shuffled], axis=1)
    shown, click, purchase = (
        np.take_along_axis(array[query], order, 1)
        for array in (results.shown, results.click_probability, results.purchase_probability)
    )
    clicked = rng.random((count, num_positions)) < model.propensity(num_positions) * click
    bought = clicked & (rng.random((count, num_positions)) < purchase)
    if model.stop_after_purchase:
        below = np.cumsum(bought, 1) - bought > 0
        clicked, bought = clicked & ~below, bought & ~below

    # Bots have all their requests in one chunk, its first ones: `noise.bots` of all on average.
    num_bots = int(noise.bots * count / noise.requests_per_bot + rng.random())
    is_bot = row < num_bots * noise.requests_per_bot
    bot = (chunk * 1001 + row // noise.requests_per_bot)[is_bot]
    clicked[is_bot], bought[is_bot] = (bot % 2 == 0)[:, None], False
    num_visitors = max(int(num_requests / model.requests_per_visitor), 1)
    visitor = rng.integers(num_visitors, size=count)
    visitor[is_bot] = bot
    time = model.start + (first + row + rng.random(count)) * interval
    time[is_bot] = model.start + first * interval + row[is_bot] % noise.requests_per_bot
    return _Requests(chunk, first, query, shown, clicked, bought, visitor, is_bot, time)


def _draw_events(
    requests: _Requests, results: SimulatedResults, noise: LogNoise, rng: np.random.Generator
) -> _Events:
    request, position = np.nonzero(requests.clicked)
    is_bot = requests.is_bot[request]
    delay = np.where(
        is_bot, 0.1 * (position + 1), 2.0 * (position + 1) + rng.exponential(size=len(request))
    )
    product, time = requests.shown[request, position], requests.time[request] + delay
    human = np.flatnonzero(~is_bot)
    double = human[_draw_rows(rng, noise.double_clicks, len(human))]
    early = human[_draw_rows(rng, noise.clock_errors, len(human))]
    unshown = human[_draw_rows(rng, noise.unshown_clicks, len(human))]
    other = rng.integers(len(results.skus), size=len(unshown))
    is_unshown = (requests.shown[request[unshown]] != other[:, None]).all(1)
    unshown, other = unshown[is_unshown], other[is_unshown]
    bought = np.flatnonzero(requests.bought[request, position])
    count = len(requests.query)
    purchase_time = time[bought] + 30 + rng.exponential(300, len(bought))
    early_time = requests.time[request[early]] - rng.uniform(1, 600, len(early))
    parts = [  # request, kind, time, product
        (np.arange(count), _IMPRESSION, requests.time, np.full(count, -1)),
        (request, _CLICK, time.copy(), product),
        (request[double], _CLICK, time[double] + 0.3, product[double]),
        (request[unshown], _CLICK, time[unshown] + 1, other),
        (request[bought], _PURCHASE, purchase_time, product[bought]),
    ]
    parts[1][2][early] = early_time
    kind = np.concatenate([np.full(len(part[0]), part[1]) for part in parts])
    request, time, product = (np.concatenate([part[i] for part in parts]) for i in (0, 2, 3))
    duplicates = _draw_rows(rng, noise.duplicates, len(request))
    number = np.concatenate([np.arange(len(request)), duplicates])
    number = number[np.argsort(time[number], kind="stable")]
    missing = np.zeros(len(request), int)
    incomplete = _draw_rows(rng, noise.missing_fields, len(request))
    missing[incomplete] = rng.integers(1, 3, len(incomplete))
    return _Events(number, *(array[number] for array in (request, kind, time, product, missing)))


def _event_table(results: SimulatedResults, requests: _Requests, events: _Events) -> pa.Table:
    import pyarrow as pa
    from pyarrow import compute as pc

    def numbered(prefix: str | pa.Array, numbers: np.ndarray) -> pa.Array:
        return pc.binary_join_element_wise(prefix, pa.array(numbers).cast(pa.string()), "")

    def empty_where(condition: np.ndarray, texts: pa.Array) -> pa.Array:
        return pc.if_else(pa.array(condition), "", texts)

    queries = pa.array(results.query_image_ids, pa.string())
    skus = pa.array(results.skus, pa.string())
    request, is_impression = events.request, events.kind == _IMPRESSION
    lengths = is_impression * requests.shown.shape[1]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    shown = skus.take(pa.array(requests.shown[request[is_impression]].ravel()))
    prefix = pc.if_else(pa.array(requests.is_bot[request]), BOT_PREFIX, "v")
    columns = {
        "event_id": numbered(f"e{requests.chunk}-", events.number),
        "request_id": empty_where(events.missing == 1, numbered("r", requests.first + request)),
        "time": events.time,
        "visitor": empty_where(events.missing == 2, numbered(prefix, requests.visitor[request])),
        "variant": pa.repeat("generated", len(request)),
        "kind": pa.array(EVENT_KINDS, pa.string()).take(pa.array(events.kind)),
        "query_image_id": queries.take(pa.array(requests.query[request])),
        "sku": empty_where(is_impression, skus.take(pa.array(np.maximum(events.product, 0)))),
        "shown": pa.ListArray.from_arrays(offsets, shown),
    }
    return pa.table(columns, schema=event_schema())


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
