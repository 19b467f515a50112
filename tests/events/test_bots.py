"""The one bot filter: by hand, and the same from Python and from SQL."""

import numpy as np
import pytest

from sicot_jax.events import simulator
from sicot_jax.events.bots import BotLimits, VisitorDays, find_bots, visitor_days
from sicot_jax.events.duckdb_engine import open_duckdb, sql_literal
from sicot_jax.events.simulator import LogNoise
from sicot_jax.events.store import Event
from sicot_jax.events.triplet_tables import create_bots

LIMITS = BotLimits(10, 5, max_click_share=0.5, min_interval=1.0, min_events=4)


def days(**changes):
    """One day of a visitor just within all limits, but for what is changed."""
    usual = {"views": 10, "clicks": 5, "items": 10, "events": 15, "median_interval": 1.0}
    fields = {name: np.array([value]) for name, value in (usual | changes).items()}
    return VisitorDays(visitor=np.array(["v"], object), **fields)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"views": 11}, "more than 10 lists a day"),
        ({"clicks": 6, "items": 20}, "more than 5 clicks a day"),
        ({"items": 9}, "clicks on more than 0.5 of what is shown"),
        ({"items": 1, "clicks": 3}, None),  # too few clicks to judge
        ({"median_interval": 0.9}, "less than 1 s from one event to the next"),
        ({"median_interval": 0.9, "events": 3}, None),
        ({"median_interval": np.nan, "events": 20}, None),
    ],
)
def test_each_limit(changes, reason):
    assert find_bots(days(**changes), LIMITS) == ({} if reason is None else {reason: {"v"}})


def test_activity_is_counted_by_day():
    def event(time, kind, visitor="v"):
        shown, sku = (("x", "y"), "") if kind == "impression" else ((), "x")
        return Event(f"e{time}", "r", time, visitor, "a", kind, "q", sku, shown)

    listed = [event(86_399, "click"), event(86_390, "impression"), event(86_401, "impression")]
    days = visitor_days([*listed, event(86_396, "purchase"), event(1, "impression", "w")])
    rows = zip(
        *(getattr(days, name).tolist() for name in ("visitor", "views", "clicks")), strict=True
    )
    assert sorted(rows) == [("v", 1, 0), ("v", 1, 1), ("w", 1, 0)]
    first = days.events.argmax()
    assert (days.events[first], days.items[first], days.median_interval[first]) == (3, 2, 4.5)
    assert np.isnan(np.delete(days.median_interval, first)).all()
    assert len(visitor_days(listed, min_events=2).visitor) == 1
    assert find_bots(visitor_days([]), LIMITS) == {}


def test_sql_and_python_find_the_same_bots(tmp_path):
    pytest.importorskip("duckdb", reason="triplets need their extra")
    results = simulator.random_results(num_queries=50, num_products=500, num_positions=6)
    noise = LogNoise(bots=0.2, requests_per_bot=100, duplicates=0.02, double_clicks=0.05)
    log, limits = tmp_path / "log.parquet", BotLimits(20, 10, min_events=5)
    simulator.write_simulated_log(results, log, noise=noise, num_requests=3_000)
    events = list(simulator.simulate_events(results, noise=noise, num_requests=3_000))
    bots_by_reason = find_bots(
        visitor_days(events, min_events=limits.min_suspicious_events), limits
    )
    assert len(bots_by_reason) == 4
    with open_duckdb(tmp_path, memory_mb=1000, threads=1) as database:
        database.execute(f"CREATE VIEW events AS FROM read_parquet({sql_literal(log)})")
        counts = create_bots(database, limits)
        bots = {row[0] for row in database.execute("SELECT visitor FROM bots").fetchall()}
    assert counts == {reason: len(visitors) for reason, visitors in bots_by_reason.items()}
    assert bots == set().union(*bots_by_reason.values())
