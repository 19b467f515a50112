"""`sicot events triplets`: what was clicked rather than what, from events; to learn from.

Parquet, a row a triplet, those of one click together and clicks in a random order:

    request_id         string   of the click's list; its photo, where the service kept it, is named
    so query_image_id     string   the photo that was asked with clicked            string   a SKU
    that was shown and clicked not_clicked        string   a SKU of the same list that was looked at
    and not clicked weight             float32  see below; those of a click's triplets sum to the
    click's weight clicked_place      int32    from 1 not_clicked_place  int32    from 1 bought
    bool     whether the clicked thing was bought too

Rules, in this order:

1. Bots: a visitor beyond a limit on any day is left out altogether (`Limits`). 2. Views: the first
impression of a request that has a query photo. Clicks: of something in that list, not before it; a
   visitor's clicks of one thing for one query photo are one; a purchase is a click too.
3. Weight of a click: min(1 / chance that its place is looked at, `largest_weight`), chances by
`position`; times
   `purchase_weight` where it was bought. So a thing's clicks weigh, on average, what its relevance
   says, wherever it stood.
4. Not clicked counts what stands above a click, at most `reach` places, and the next one below: it
was looked at.
   Not what the same query clicks in any other list, nor what is the same product as the clicked one
   (`products`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sicot_jax.common.files import check_not_there, scratch_directory
from sicot_jax.errors import InputError
from sicot_jax.events import propensity as position
from sicot_jax.events.duckdb_engine import as_parquet, connect, literal

if TYPE_CHECKING:
    import duckdb


@dataclasses.dataclass(frozen=True)
class Limits:
    """Beyond which a visitor is a bot. views, clicks: a day. click_share: clicks of all things
    shown on a day, from `least` clicks on. seconds: median time between what he does, from `least`
    events of a day on.
    """

    views: int = 200
    clicks: int = 100
    click_share: float = 0.5
    seconds: float = 1.0
    least: int = 20


@dataclasses.dataclass(frozen=True)
class TripletSettings:
    """eta: chances r^-eta in place of an estimate. products: CSV or Parquet with columns sku and
    product, which say what is the same.
    """

    limits: Limits = Limits()
    eta: float | None = None
    largest_weight: float = 10.0
    purchase_weight: float = 3.0
    reach: int = 10
    products: Path | None = None
    memory_mb: int = 1000
    threads: int = 0

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--largest-weight", self.largest_weight, 1),
            ("--purchase-weight", self.purchase_weight, 0),
            ("--reach", self.reach, 1),
            ("--eta", self.eta or 0, 0),
        ):
            if not value >= least:
                raise InputError(f"{flag} {value}, wanted at least {least}")


@dataclasses.dataclass(frozen=True)
class TripletReport:
    """bots: reason -> visitors (one may have several); bot_visitors and bot_views: of all. views,
    clicks: of the others.
    kept_out: reason -> things that were not clicked and are no negatives. looking, weights,
      views_at, clicks_at: [R], by place.
    """

    bots: dict[str, int]
    bot_visitors: int
    bot_views: int
    views: int
    clicks: int
    purchases: int
    triplets: int
    kept_out: dict[str, int]
    looking: position.Looking
    weights: np.ndarray
    views_at: np.ndarray
    clicks_at: np.ndarray

    def summary(self) -> str:
        """One line."""
        return (
            f"{self.triplets:,} triplets of {self.clicks:,} clicks ({self.purchases:,} bought) in {self.views:,} lists; "
            f"left out: {self.bot_visitors:,} bots with {self.bot_views:,} lists; "
            f"places: {self.looking.source}"
        )

    def markdown(self) -> str:
        lines = [
            "# Triplets",
            "",
            self.summary() + ".",
            "",
            "| bots, by | visitors |",
            "|---|---:|",
        ]
        lines += [f"| {reason} | {count:,} |" for reason, count in self.bots.items()]
        lines += ["", "| not counted as looked at and not clicked | things |", "|---|---:|"]
        lines += [f"| {reason} | {count:,} |" for reason, count in self.kept_out.items()]
        lines += [
            "",
            "| place | views | clicks, % | looked at, against the first | weight | weighted clicks, % |",
        ]
        lines += ["|---:|---:|---:|---:|---:|---:|"]
        for place, views in enumerate(self.views_at):
            chance, error = self.looking.chance[place], self.looking.error[place]
            spread = (
                ""
                if np.isnan(error)
                else f" [{chance * np.exp(-1.96 * error):.3f}, {chance * np.exp(1.96 * error):.3f}]"
            )
            rate = 100 * self.clicks_at[place] / max(views, 1)
            weight = self.weights[place]
            lines.append(
                f"| {place + 1} | {views:,} | {rate:.2f} | {chance:.3f}{spread} | {weight:.2f} | {rate * weight:.2f} |"
            )
        return "\n".join(lines) + "\n"


def make_triplets(
    events: Path, out: Path, settings: TripletSettings = TripletSettings()
) -> TripletReport:
    """Triplets of `events` (Parquet, a folder of sicot events import, a service's file) as the new
    Parquet file `out`, and what was counted as `out` with the suffix .md. Whatever stops it,
    neither is there.

    InputError: no events, no list with a click, settings out of range.
    """
    text = out.with_suffix(".md")
    for path in (out, text):
        check_not_there(path)
    with scratch_directory(out) as work:
        with connect(work, memory_mb=settings.memory_mb, threads=settings.threads) as database:
            report = _make(database, as_parquet(events, work), work / "triplets", settings)
        if not report.triplets:
            raise InputError(
                f"{events}: no triplet in {report.views:,} lists with {report.clicks:,} clicks; "
                "wanted clicks below or above things that are not clicked"
            )
        (work / "text").write_text(report.markdown())
        (work / "text").rename(text)
        (work / "triplets").rename(out)
    return report


def _make(
    database: duckdb.DuckDBPyConnection, events: Path, out: Path, settings: TripletSettings
) -> TripletReport:
    database.execute(
        "CREATE VIEW events AS SELECT *, file_row_number AS row "
        f"FROM read_parquet({literal(events)}, file_row_number=true)"
    )
    bots = _find_bots(database, settings.limits)
    _find_clicks(database)
    views_at, clicks_at = _places(database)
    places = len(views_at)
    looking = (
        position.assumed(places, settings.eta)
        if settings.eta is not None
        else _estimate(database, places)
    )
    weights = looking.weights(settings.largest_weight)
    kept_out = _find_not_clicked(database, settings)
    _write(database, out, weights, settings.purchase_weight)
    (bot_views,) = _one(
        database,
        "SELECT count(*) FROM events SEMI JOIN bots USING (visitor) WHERE kind = 'impression'",
    )
    (bot_visitors,) = _one(database, "SELECT count(*) FROM bots")
    (views,) = _one(database, "SELECT count(*) FROM views")
    clicks, purchases = _one(database, "SELECT count(*), count(*) FILTER (bought) FROM once")
    (triplets,) = _one(database, f"SELECT count(*) FROM read_parquet({literal(out)})")
    return TripletReport(
        bots,
        bot_visitors,
        bot_views,
        views,
        clicks,
        purchases,
        triplets,
        kept_out,
        looking,
        weights,
        views_at,
        clicks_at,
    )


def _one(database: duckdb.DuckDBPyConnection, statement: str) -> tuple:
    row = database.execute(statement).fetchone()
    assert row is not None
    return row


def _find_bots(database: duckdb.DuckDBPyConnection, limits: Limits) -> dict[str, int]:
    """Makes `bots` (visitor). Only days on which someone did at least `least` things are looked
    into.
    """
    database.execute(f"""
        CREATE TABLE days AS
        SELECT visitor, floor(time / 86400) AS day, count(*) FILTER (kind = 'impression') AS views,
          count(*) FILTER (kind = 'click') AS clicks, sum(len(shown)) AS things
        FROM events GROUP BY ALL HAVING count(*) >= {min(limits.least, limits.views, limits.clicks)}""")
    database.execute("""
        CREATE TABLE paces AS
        SELECT visitor, day, count(*) + 1 AS number, median(gap) AS pace FROM (
          SELECT visitor, floor(time / 86400) AS day, time - lag(time) OVER (PARTITION BY visitor, day ORDER BY time) AS gap
          FROM events SEMI JOIN days ON events.visitor = days.visitor AND floor(events.time / 86400) = days.day)
        WHERE gap IS NOT NULL GROUP BY ALL""")
    database.execute(f"""
        CREATE TABLE reasons AS
        SELECT visitor, 'more than {limits.views} lists a day' AS reason FROM days WHERE views > {limits.views}
        UNION SELECT visitor, 'more than {limits.clicks} clicks a day' FROM days WHERE clicks > {limits.clicks}
        UNION SELECT visitor, 'clicks on more than {limits.click_share:g} of what is shown' FROM days
          WHERE clicks >= {limits.least} AND clicks > {limits.click_share} * things
        UNION SELECT visitor, 'less than {limits.seconds:g} s from one event to the next' FROM paces
          WHERE number >= {limits.least} AND pace < {limits.seconds}""")
    database.execute("CREATE TABLE bots AS SELECT DISTINCT visitor FROM reasons")
    return dict(
        database.execute(
            "SELECT reason, count(*) FROM reasons GROUP BY reason ORDER BY reason"
        ).fetchall()
    )


def _find_clicks(database: duckdb.DuckDBPyConnection) -> None:
    """Makes `views` (the first impression of each request), `clicks` (each thing of a view once)
    and `once` (of a visitor too).

    `pair` is a hash of query and SKU: among a million pairs two are the same with a chance of 1 in
    37 million.
    """
    database.execute("""
        CREATE TABLE again AS
        WITH twice AS (
          SELECT hash(request_id) AS h FROM events WHERE kind = 'impression' GROUP BY h HAVING count(*) > 1)
        SELECT row FROM (
          SELECT row, row_number() OVER (PARTITION BY request_id ORDER BY time, row) AS n
          FROM events WHERE kind = 'impression' AND hash(request_id) IN (SELECT h FROM twice))
        WHERE n > 1""")
    database.execute("""
        CREATE VIEW views AS
        SELECT row, request_id, time, visitor, query_image_id AS query, shown FROM events
        ANTI JOIN bots USING (visitor) ANTI JOIN again USING (row)
        WHERE kind = 'impression' AND query_image_id <> ''""")
    database.execute("""
        CREATE TABLE clicks AS
        WITH done AS (
          SELECT request_id, sku, time, kind FROM events ANTI JOIN bots USING (visitor) WHERE kind <> 'impression')
        SELECT views.row AS row, any_value(visitor) AS visitor, any_value(query) AS query, sku,
          any_value(list_position(shown, sku)) AS place, bool_or(kind = 'purchase') AS bought,
          hash(any_value(query), sku) AS pair
        FROM done JOIN views USING (request_id)
        WHERE list_contains(shown, sku) AND done.time >= views.time
        GROUP BY views.row, sku""")
    database.execute("""
        CREATE TABLE once AS
        SELECT min(row) AS row, query, sku, arg_min(place, row) AS place, bool_or(bought) AS bought, any_value(pair) AS pair
        FROM clicks GROUP BY visitor, query, sku""")


def _places(database: duckdb.DuckDBPyConnection) -> tuple[np.ndarray, np.ndarray]:
    """Views and clicks by place, [R] each."""
    lengths = np.array(
        database.execute("SELECT len(shown), count(*) FROM views GROUP BY ALL").fetchall(), int
    )
    if not len(lengths):
        return np.zeros(0, int), np.zeros(0, int)
    views = np.bincount(lengths[:, 0], lengths[:, 1])[::-1].cumsum()[::-1][1:].astype(int)
    clicks = np.zeros(len(views), int)
    for place, count in database.execute(
        "SELECT place, count(*) FROM clicks GROUP BY place"
    ).fetchall():
        clicks[place - 1] = count
    return views, clicks


def _estimate(database: duckdb.DuckDBPyConnection, places: int) -> position.Looking:
    """From what was clicked at all, and was shown at several places for one query."""
    counts = database.execute("""
        WITH asked AS (SELECT query FROM views GROUP BY query HAVING count(*) > 1),
        things AS (
          SELECT hash(query, unnest(shown)) AS pair, generate_subscripts(shown, 1) AS place
          FROM views SEMI JOIN asked USING (query)),
        seen AS (
          SELECT pair, place, count(*) AS views FROM things SEMI JOIN clicks USING (pair) GROUP BY ALL),
        several AS (SELECT pair FROM seen GROUP BY pair HAVING count(*) > 1),
        done AS (SELECT pair, place, count(*) AS clicks FROM clicks GROUP BY ALL)
        SELECT pair, place - 1 AS place, views, coalesce(clicks, 0) AS clicks
        FROM seen SEMI JOIN several USING (pair) LEFT JOIN done USING (pair, place) ORDER BY pair, place""").fetchnumpy()
    return position.estimate(
        *(counts[key] for key in ("pair", "place", "views", "clicks")), places=places
    )


def _find_not_clicked(
    database: duckdb.DuckDBPyConnection, settings: TripletSettings
) -> dict[str, int]:
    """Makes `pairs` (row and place of a click, what was not clicked); what was left out of it by
    reason.
    """
    same = "false"
    if settings.products is not None:
        database.execute(
            f"CREATE TABLE products AS SELECT sku, product FROM {literal(settings.products)}"
        )
        same = (
            "coalesce((SELECT any_value(product) FROM products WHERE products.sku = near.sku) = "
            "(SELECT any_value(product) FROM products WHERE products.sku = near.other), false)"
        )
    database.execute(f"""
        CREATE TABLE near AS
        SELECT row, request_id, place, sku, other, other_place,
          hash(query, other) IN (SELECT pair FROM clicks) AS elsewhere
        FROM (
          SELECT once.row AS row, request_id, once.query AS query, sku, place, greatest(place - {settings.reach}, 1) AS first,
            unnest(shown[greatest(place - {settings.reach}, 1) : place + 1]) AS other,
            first - 1 + generate_subscripts(shown[greatest(place - {settings.reach}, 1) : place + 1], 1) AS other_place
          FROM once JOIN views USING (row))
        WHERE other <> sku""")
    database.execute(f"CREATE TABLE pairs AS SELECT *, {same} AS same FROM near")
    elsewhere, twins = _one(
        database,
        "SELECT count(*) FILTER (elsewhere), count(*) FILTER (same AND NOT elsewhere) FROM pairs",
    )
    return {"clicked with the same query": elsewhere, "the same product as the clicked one": twins}


def _write(
    database: duckdb.DuckDBPyConnection, out: Path, weights: np.ndarray, purchase_weight: float
) -> None:
    database.execute("CREATE TABLE weights (place BIGINT, weight DOUBLE)")
    if len(weights):
        database.executemany(
            "INSERT INTO weights VALUES (?, ?)", [[i + 1, float(w)] for i, w in enumerate(weights)]
        )
    database.execute(f"""
        COPY (
          WITH kept AS (SELECT * FROM pairs WHERE NOT elsewhere AND NOT same),
          counted AS (SELECT row, place, count(*) AS number FROM kept GROUP BY ALL)
          SELECT request_id, query AS query_image_id, once.sku AS clicked, other AS not_clicked,
            CAST(weight * if(bought, {purchase_weight}, 1) / number AS FLOAT) AS weight,
            CAST(place AS INTEGER) AS clicked_place, CAST(other_place AS INTEGER) AS not_clicked_place, bought
          FROM kept JOIN counted USING (row, place) JOIN once USING (row, place) JOIN weights USING (place)
          ORDER BY hash(row, place), other_place)
        TO {literal(out)} (FORMAT parquet, ROW_GROUP_SIZE 65536)""")
