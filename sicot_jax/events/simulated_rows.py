"""Draws the events of a simulated log, a chunk of requests at a time."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from sicot_jax.events.bots import SECONDS_PER_DAY
from sicot_jax.events.click_model import ClickModel, LogNoise, SimulatedResults
from sicot_jax.events.store import EVENT_KINDS, event_schema

if TYPE_CHECKING:
    import pyarrow as pa

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
