"""Lists of similar products that visitors were shown, with their clicks and purchases."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from sicot_jax.events.bots import BotLimits, find_bots, visitor_days
from sicot_jax.events.store import PURCHASE_WEIGHT, Event


@dataclasses.dataclass
class ShownList:
    """A list that a visitor was shown.

    Attributes:
      time: Unix time, seconds.
      request_id: request that it answered.
      query_image_id: id of the query photo.
      visitor: who saw it.
      shown: SKUs in order, each once.
      gain: SKU -> gain, of those that were clicked or bought.
    """

    time: float
    request_id: str
    query_image_id: str
    visitor: str
    shown: tuple[str, ...]
    gain: dict[str, float]


def shown_lists(events: Iterable[Event], limits: BotLimits | None = None) -> list[ShownList]:
    """Joins impressions with the clicks and purchases of their products.

    A click on a product that was not shown counts for nothing. Lists of bots are left out.

    Args:
      events: of any number of machines, in any order.
      limits: of the bot filter; None for the standard ones.

    Returns:
      Lists by time.
    """
    limits = limits or BotLimits()
    lists, gains = dict[str, ShownList](), dict[tuple[str, str], float]()

    def collect() -> Iterator[Event]:
        for event in events:
            if event.kind == "impression":
                shown = tuple(dict.fromkeys(event.shown))
                entry = ShownList(
                    event.time, event.request_id, event.query_image_id, event.visitor, shown, {}
                )
                lists.setdefault(event.request_id, entry)
            else:  # another machine may have shown it
                key = event.request_id, event.sku
                gain = PURCHASE_WEIGHT if event.kind == "purchase" else 1.0
                gains[key] = max(gains.get(key, 0.0), gain)
            yield event

    days = visitor_days(collect(), min_events=limits.min_suspicious_events)
    for (request_id, sku), gain in gains.items():
        if request_id in lists and sku in lists[request_id].shown:
            lists[request_id].gain[sku] = gain
    bots = set[str]().union(*find_bots(days, limits).values())
    return sorted(
        (entry for entry in lists.values() if entry.visitor not in bots),
        key=lambda entry: entry.time,
    )
