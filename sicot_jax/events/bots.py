"""The bot filter of triplets and of the ranker: visitors whose activity of a day is not human."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

import numpy as np

from sicot_jax.events.store import Event

SECONDS_PER_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class BotLimits:
    """Limits beyond which, on any day, a visitor counts as a bot.

    Attributes:
      max_views_per_day: impressions of a day.
      max_clicks_per_day: clicks of a day.
      max_click_share: clicks of a day per item shown, judged from `min_events` clicks on.
      min_interval: seconds between successive events, median of a day, judged from `min_events`
        events on.
      min_events: fewest events that share and interval are judged by.
    """

    max_views_per_day: int = 200
    max_clicks_per_day: int = 100
    max_click_share: float = 0.5
    min_interval: float = 1.0
    min_events: int = 20

    @property
    def min_suspicious_events(self) -> int:
        """Fewest events of a day with which a visitor can be a bot."""
        return min(self.min_events, self.max_views_per_day, self.max_clicks_per_day)


@dataclasses.dataclass(frozen=True, eq=False)
class VisitorDays:
    """Activity of visitors by day; M pairs of a visitor and a day.

    Attributes:
      visitor: str [M].
      views: int [M], impressions.
      clicks: int [M].
      items: int [M], items in the lists shown.
      events: int [M], events of any kind.
      median_interval: float [M], median seconds between successive events, nan below two events.
    """

    visitor: np.ndarray
    views: np.ndarray
    clicks: np.ndarray
    items: np.ndarray
    events: np.ndarray
    median_interval: np.ndarray


def find_bots(days: VisitorDays, limits: BotLimits) -> dict[str, set[str]]:
    """Finds the visitors that exceed a limit on any day.

    Args:
      days: activity of visitors.
      limits: limits of human activity.

    Returns:
      Reason -> visitors, in the order of reasons, without reasons that no visitor gives; a visitor
      may have several.
    """
    enough_clicks = days.clicks >= limits.min_events
    enough_events = days.events >= limits.min_events
    exceeded = {
        f"clicks on more than {limits.max_click_share:g} of what is shown": enough_clicks
        & (days.clicks > limits.max_click_share * days.items),
        f"less than {limits.min_interval:g} s from one event to the next": enough_events
        & (days.median_interval < limits.min_interval),
        f"more than {limits.max_clicks_per_day} clicks a day": days.clicks
        > limits.max_clicks_per_day,
        f"more than {limits.max_views_per_day} lists a day": days.views > limits.max_views_per_day,
    }
    return {
        reason: set(days.visitor[rows].tolist())
        for reason, rows in sorted(exceeded.items())
        if rows.any()
    }


def visitor_days(events: Iterable[Event], *, min_events: int = 1) -> VisitorDays:
    """Collects the activity of visitors by day.

    Args:
      events: events in any order.
      min_events: leaves out days with fewer events.

    Returns:
      A row per visitor and day (UTC).
    """
    times = collections.defaultdict[tuple[str, int], list[float]](list)
    counts = collections.defaultdict[tuple[str, int], list[int]](lambda: [0, 0, 0])
    for event in events:
        day = event.visitor, int(event.time // SECONDS_PER_DAY)
        times[day].append(event.time)
        count = counts[day]
        count[0] += event.kind == "impression"
        count[1] += event.kind == "click"
        count[2] += len(event.shown)
    days = [day for day in times if len(times[day]) >= min_events]
    views, clicks, items = np.array([counts[day] for day in days], np.int64).reshape(-1, 3).T
    return VisitorDays(
        visitor=np.array([visitor for visitor, _ in days], object),
        views=views,
        clicks=clicks,
        items=items,
        events=np.array([len(times[day]) for day in days], np.int64),
        median_interval=np.array([_median_interval(times[day]) for day in days], np.float64),
    )


def _median_interval(times: list[float]) -> float:
    return float(np.median(np.diff(np.sort(times)))) if len(times) > 1 else float("nan")
