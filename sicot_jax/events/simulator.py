"""A known model of visitors: logs of events whose truth is known, for tests and measurements of
what learns from logs.

A request shows a list. A visitor looks at place r (from 1) with chance r^-eta, whatever lies there
(the position-based
model: Richardson et al. 2007); clicks a thing that he looks at with its `click` chance, and buys
  what he clicked with its `buy` chance. So P(click at place r) = r^-eta * click. Some lists are
  shown in a random order, which is what position bias can be estimated from. Beside visitors there
  are bots, and what goes wrong on the way.

    lists = visitors.from_scores(query_image_ids, skus, shown, likeness, quality) for table in
    visitors.tables(lists, requests=100_000, seed=0): ...  # pyarrow, about in the order of time
    visitors.write(lists, path, requests=6_000_000)  # Parquet for event in visitors.events(lists,
    requests=1_000): ...  # store.Event
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sicot_jax.errors import InputError
from sicot_jax.events.store import KINDS, Event, arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa

BOT = "bot-"  # what the name of every bot begins with, and of no visitor
_REQUESTS = 8192  # of a piece; numbers are drawn by (seed, piece)
_IMPRESSION, _CLICK, _PURCHASE = range(3)  # of store.KINDS


@dataclasses.dataclass(frozen=True)
class Lists:
    """What can be asked, and what is shown then. Q queries, N products, R places.

    query_image_ids: [Q]. skus: [N]. shown: [Q, R], product numbers by place, each once in its row.
      click: [Q, R], chance that who looks at the product clicks it (its relevance to the query).
      buy: [Q, R], chance that who clicked it buys it.
    """

    query_image_ids: Sequence[str]
    skus: Sequence[str]
    shown: np.ndarray
    click: np.ndarray
    buy: np.ndarray

    def __post_init__(self) -> None:
        shape = (len(self.query_image_ids), self.shown.shape[1])
        if any(array.shape != shape for array in (self.shown, self.click, self.buy)):
            raise InputError(
                f"lists of shapes {self.shown.shape}, {self.click.shape}, {self.buy.shape}, wanted {shape}"
            )
        if self.shown.min() < 0 or self.shown.max() >= len(self.skus):
            raise InputError(
                f"shown: product {self.shown.max()}, wanted numbers from 0 to below {len(self.skus)}"
            )


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """eta: how fast looking falls off. shuffled: share of requests whose list is in a random order,
    all of it.
    ends_with_purchase: who bought looks at nothing below (chances of looking at lower places are
      then less than r^-eta). visits: requests of a visitor, on average. days: that the requests are
      spread over.
    """

    eta: float = 1.0
    shuffled: float = 0.1
    ends_with_purchase: bool = False
    visits: float = 5.0
    days: float = 10.0
    start: float = 1_700_000_000.0


@dataclasses.dataclass(frozen=True)
class Dirt:
    """Shares: bots of requests; repeated and missing (a field is empty) of events; twice (a second
    click at once), unshown (clicks on things not in the list) and backwards (a clock: the click is
    before its impression) of visitors' clicks. bot_requests: of a bot, one after the other; every
    second bot clicks all it is shown, ten times a second, the others click nothing.
    """

    bots: float = 0.0
    bot_requests: int = 400
    repeated: float = 0.0
    twice: float = 0.0
    unshown: float = 0.0
    backwards: float = 0.0
    missing: float = 0.0


CLEAN = Dirt()
DIRTY = Dirt(bots=0.05, repeated=0.01, twice=0.02, unshown=0.01, backwards=0.01, missing=0.005)


def looking(behaviour: Behaviour, places: int) -> np.ndarray:
    """Chance to look at each place, [places], 1 at the first."""
    return np.arange(1, places + 1, dtype=np.float64) ** -behaviour.eta


def from_scores(
    query_image_ids: Sequence[str],
    skus: Sequence[str],
    shown: np.ndarray,
    likeness: np.ndarray,
    quality: np.ndarray,
    *,
    click: tuple[float, float, float] = (-3.0, 1.5, 1.0),
    buy: tuple[float, float, float] = (-2.5, 0.5, 1.5),
) -> Lists:
    """Lists whose chances are sigmoid(a + b * likeness + c * quality), (a, b, c) of clicks and of
    purchases.

    shown: [Q, R], product numbers by place. likeness: [Q, R], of the product at that place to the
      query, about standard normal. quality: [N], of the product, about standard normal.
    """

    def chance(weights: tuple[float, float, float]) -> np.ndarray:
        a, b, c = weights
        return 1 / (1 + np.exp(-(a + b * likeness + c * quality[shown])))

    return Lists(query_image_ids, skus, shown, chance(click), chance(buy))


def generated_lists(*, queries: int, products: int, places: int, seed: int = 0) -> Lists:
    """Lists of random products in the order of likeness, by `from_scores`."""
    random = np.random.Generator(np.random.Philox(key=[seed, 1 << 40]))
    first = random.integers(products, size=(queries, 1))
    steps = random.integers(1, max(products // places, 1) + 1, size=(queries, places))
    shown = (first + np.cumsum(steps, 1)) % products  # less than a round: no product twice
    shown = random.permuted(shown, axis=1)
    likeness = -np.sort(-random.standard_normal((queries, places)), 1)
    names = [f"q{i}" for i in range(queries)], [f"p{i}" for i in range(products)]
    return from_scores(*names, shown, likeness, random.standard_normal(products))


def tables(
    lists: Lists,
    behaviour: Behaviour = Behaviour(),
    dirt: Dirt = CLEAN,
    *,
    requests: int,
    seed: int = 0,
) -> Iterator[pa.Table]:
    """Events in `store.arrow_schema`, some thousand requests at a time, in the order of time within
    these. Requests are
    numbered: request_id is r0, r1, ...; a lists' query is drawn for each at random. The same
      arguments give the same events.
    """
    import pyarrow as pa

    names = pa.array(lists.query_image_ids, pa.string()), pa.array(lists.skus, pa.string())
    for piece in range(-(-requests // _REQUESTS)):
        random = np.random.Generator(np.random.Philox(key=[seed, piece]))
        yield _piece(lists, behaviour, dirt, random, piece, requests, names)


def events(
    lists: Lists,
    behaviour: Behaviour = Behaviour(),
    dirt: Dirt = CLEAN,
    *,
    requests: int,
    seed: int = 0,
) -> Iterator[Event]:
    """Those of `tables`, one by one. Where a field is missing it is empty, which `store.parse`
    would refuse.
    """
    for table in tables(lists, behaviour, dirt, requests=requests, seed=seed):
        for row in table.to_pylist():
            yield Event(**{**row, "shown": tuple(row["shown"])})


def write(
    lists: Lists,
    path: Path,
    behaviour: Behaviour = Behaviour(),
    dirt: Dirt = CLEAN,
    *,
    requests: int,
    seed: int = 0,
) -> int:
    """Those of `tables` as a Parquet file; how many events."""
    from pyarrow import parquet

    count = 0
    with parquet.ParquetWriter(path, arrow_schema()) as writer:
        for table in tables(lists, behaviour, dirt, requests=requests, seed=seed):
            writer.write_table(table)
            count += table.num_rows
    return count


def _piece(
    lists: Lists,
    behaviour: Behaviour,
    dirt: Dirt,
    random: np.random.Generator,
    piece: int,
    requests: int,
    names: tuple[pa.Array, pa.Array],
) -> pa.Table:
    begin, places = piece * _REQUESTS, lists.shown.shape[1]
    count = min(_REQUESTS, requests - begin)
    second = behaviour.days * 86_400 / requests  # from one request to the next
    every = np.arange(count)

    def chosen(share: float, number: int) -> np.ndarray:
        return np.flatnonzero(random.random(number) < share)

    query = random.integers(len(lists.query_image_ids), size=count)
    order = np.tile(np.arange(places), (count, 1))
    mixed = chosen(behaviour.shuffled, count)
    order[mixed] = random.permuted(order[mixed], axis=1)
    shown, click, buy = (
        np.take_along_axis(array[query], order, 1)
        for array in (lists.shown, lists.click, lists.buy)
    )
    clicked = random.random((count, places)) < looking(behaviour, places) * click
    bought = clicked & (random.random((count, places)) < buy)
    if behaviour.ends_with_purchase:
        after = np.cumsum(bought, 1) - bought > 0
        clicked, bought = clicked & ~after, bought & ~after

    # Bots are whole (on average of `dirt.bots` of all), the first requests of a piece.
    bots = int(dirt.bots * count / dirt.bot_requests + random.random())
    bot = every < bots * dirt.bot_requests
    number = (piece * 1001 + every // dirt.bot_requests)[bot]
    clicked[bot], bought[bot] = (number % 2 == 0)[:, None], False
    visitor = random.integers(max(int(requests / behaviour.visits), 1), size=count)
    visitor[bot] = number
    moment = behaviour.start + (begin + every + random.random(count)) * second
    moment[bot] = behaviour.start + begin * second + every[bot] % dirt.bot_requests

    of, place = np.nonzero(clicked)
    pause = np.where(
        bot[of], 0.1 * (place + 1), 2.0 * (place + 1) + random.exponential(size=len(of))
    )
    product, time, human = shown[of, place], moment[of] + pause, np.flatnonzero(~bot[of])
    twice = human[chosen(dirt.twice, len(human))]
    late = human[chosen(dirt.backwards, len(human))]
    stray = human[chosen(dirt.unshown, len(human))]
    other = random.integers(len(lists.skus), size=len(stray))
    absent = (shown[of[stray]] != other[:, None]).all(1)
    stray, other = stray[absent], other[absent]
    sold = np.flatnonzero(bought[of, place])
    rows = [  # request, kind, time, product
        (every, _IMPRESSION, moment, np.full(count, -1)),
        (of, _CLICK, time, product),
        (of[twice], _CLICK, time[twice] + 0.3, product[twice]),
        (of[stray], _CLICK, time[stray] + 1, other),
        (of[sold], _PURCHASE, time[sold] + 30 + random.exponential(300, len(sold)), product[sold]),
    ]
    rows[1][2][late] = moment[of[late]] - random.uniform(1, 600, len(late))
    kind = np.concatenate([np.full(len(row[0]), row[1]) for row in rows])
    of, time, product = (np.concatenate([row[i] for row in rows]) for i in (0, 2, 3))
    again = np.concatenate([np.arange(len(of)), chosen(dirt.repeated, len(of))])
    again = again[np.argsort(time[again], kind="stable")]
    missing = np.zeros(len(of), int)
    gone = chosen(dirt.missing, len(of))
    missing[gone] = random.integers(1, 3, len(gone))
    return _table(
        names, piece, begin, again, of, kind, time, product, query, shown, visitor, bot, missing
    )


def _table(
    names: tuple[pa.Array, pa.Array],
    piece: int,
    begin: int,
    row: np.ndarray,
    of: np.ndarray,
    kind: np.ndarray,
    time: np.ndarray,
    product: np.ndarray,
    query: np.ndarray,
    shown: np.ndarray,
    visitor: np.ndarray,
    bot: np.ndarray,
    missing: np.ndarray,
) -> pa.Table:
    import pyarrow as pa
    from pyarrow import compute as pc

    of, kind, time, product, missing = (array[row] for array in (of, kind, time, product, missing))

    def numbered(prefix: str | pa.Array, numbers: np.ndarray) -> pa.Array:
        return pc.binary_join_element_wise(prefix, pa.array(numbers).cast(pa.string()), "")

    def unless(empty: np.ndarray, texts: pa.Array) -> pa.Array:
        return pc.if_else(pa.array(empty), "", texts)

    listed = kind == _IMPRESSION
    offsets = np.concatenate([[0], np.cumsum(listed * shown.shape[1])]).astype(np.int32)
    sku = names[1].take(pa.array(np.maximum(product, 0)))
    columns = {
        "event_id": numbered(f"e{piece}-", row),
        "request_id": unless(missing == 1, numbered("r", begin + of)),
        "time": time,
        "visitor": unless(
            missing == 2, numbered(pc.if_else(pa.array(bot[of]), BOT, "v"), visitor[of])
        ),
        "variant": pa.repeat("generated", len(row)),
        "kind": pa.array(KINDS, pa.string()).take(pa.array(kind)),
        "query_image_id": names[0].take(pa.array(query[of])),
        "sku": unless(listed, sku),
        "shown": pa.ListArray.from_arrays(
            offsets, names[1].take(pa.array(shown[of[listed]].ravel()))
        ),
    }
    return pa.table(columns, schema=arrow_schema())
