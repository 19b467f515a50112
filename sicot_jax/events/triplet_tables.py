"""SQL steps of triplets: bots, views, clicks, pairs and the file itself."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sicot_jax.common.sku import SkuError, SkuReader
from sicot_jax.common.table_files import DroppedRow, TableColumns, read_table
from sicot_jax.errors import InputError
from sicot_jax.events.bots import SECONDS_PER_DAY, BotLimits, VisitorDays, find_bots
from sicot_jax.events.duckdb_engine import sql_literal
from sicot_jax.events.propensity import PositionCounts

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa


def fetch_row(database: duckdb.DuckDBPyConnection, statement: str) -> tuple[Any, ...]:
    """Returns the one row of a statement.

    Args:
      database: database to ask.
      statement: SQL statement that gives a row.

    Returns:
      Values of the row.
    """
    row = database.execute(statement).fetchone()
    assert row is not None
    return row


def create_bots(database: duckdb.DuckDBPyConnection, limits: BotLimits) -> dict[str, int]:
    """Makes the table `bots` (visitor) of the visitors beyond a limit.

    Args:
      database: database with the view `events`.
      limits: limits of human activity.

    Returns:
      Reason -> number of visitors.
    """
    days = database.execute(f"""
        WITH days AS (
          SELECT visitor, floor(time / {SECONDS_PER_DAY}) AS day, count(*) AS events,
            count(*) FILTER (kind = 'impression') AS views,
            count(*) FILTER (kind = 'click') AS clicks, coalesce(sum(len(shown)), 0) AS items
          FROM events GROUP BY ALL HAVING events >= {limits.min_suspicious_events}),
        gaps AS (
          SELECT visitor, floor(time / {SECONDS_PER_DAY}) AS day,
            time - lag(time) OVER (PARTITION BY visitor, day ORDER BY time) AS gap
          FROM events SEMI JOIN days
            ON events.visitor = days.visitor
            AND floor(events.time / {SECONDS_PER_DAY}) = days.day),
        medians AS (SELECT visitor, day, median(gap) AS median_interval FROM gaps GROUP BY ALL)
        SELECT days.visitor, views, clicks, items, events,
          coalesce(median_interval, CAST('nan' AS DOUBLE)) AS median_interval
        FROM days JOIN medians USING (visitor, day)""").fetchnumpy()
    fields = [field.name for field in dataclasses.fields(VisitorDays)]
    visitors_by_reason = find_bots(VisitorDays(*(days[name] for name in fields)), limits)
    bots = sorted(set[str]().union(*visitors_by_reason.values()))
    database.execute("CREATE TABLE bots (visitor VARCHAR)")
    database.execute("INSERT INTO bots SELECT unnest(?)", [bots])
    return {reason: len(visitors) for reason, visitors in visitors_by_reason.items()}


def create_clicks(database: duckdb.DuckDBPyConnection) -> None:
    """Makes `views`, `clicks` (each item of a view once) and `unique_clicks` (of a visitor too).

    `pair` is a hash of query and SKU: among a million pairs two are the same with a chance of 1 in
    37 million.

    Args:
      database: database with `events` and `bots`.
    """
    database.execute("""
        CREATE TABLE repeated_views AS
        WITH repeated AS (
          SELECT hash(request_id) AS h FROM events WHERE kind = 'impression'
          GROUP BY h HAVING count(*) > 1)
        SELECT row FROM (
          SELECT row, row_number() OVER (PARTITION BY request_id ORDER BY time, row) AS n
          FROM events WHERE kind = 'impression' AND hash(request_id) IN (SELECT h FROM repeated))
        WHERE n > 1""")
    database.execute("""
        CREATE VIEW views AS
        SELECT row, request_id, time, visitor, query_image_id AS query, shown FROM events
        ANTI JOIN bots USING (visitor) ANTI JOIN repeated_views USING (row)
        WHERE kind = 'impression' AND query_image_id <> ''""")
    database.execute("""
        CREATE TABLE clicks AS
        WITH actions AS (
          SELECT request_id, sku, time, kind FROM events ANTI JOIN bots USING (visitor)
          WHERE kind <> 'impression')
        SELECT views.row AS row, any_value(visitor) AS visitor, any_value(query) AS query, sku,
          any_value(list_position(shown, sku)) AS position,
          bool_or(kind = 'purchase') AS bought, hash(any_value(query), sku) AS pair
        FROM actions JOIN views USING (request_id)
        WHERE list_contains(shown, sku) AND actions.time >= views.time
        GROUP BY views.row, sku""")
    database.execute("""
        CREATE TABLE unique_clicks AS
        SELECT min(row) AS row, query, sku, arg_min(position, row) AS position,
          bool_or(bought) AS bought, any_value(pair) AS pair
        FROM clicks GROUP BY visitor, query, sku""")


def count_by_position(database: duckdb.DuckDBPyConnection) -> tuple[np.ndarray, np.ndarray]:
    """Counts views and clicks by position.

    Args:
      database: database with `views` and `clicks`.

    Returns:
      (views, clicks), int [R] each, R the length of the longest list.
    """
    lengths = np.array(
        database.execute("SELECT len(shown), count(*) FROM views GROUP BY ALL").fetchall(), int
    )
    if not len(lengths):
        return np.zeros(0, int), np.zeros(0, int)
    views = np.bincount(lengths[:, 0], lengths[:, 1])[::-1].cumsum()[::-1][1:].astype(int)
    clicks = np.zeros(len(views), int)
    for position, count in database.execute(
        "SELECT position, count(*) FROM clicks GROUP BY position"
    ).fetchall():
        clicks[position - 1] = count
    return views, clicks


def count_by_pair_and_position(database: duckdb.DuckDBPyConnection) -> PositionCounts:
    """Counts views and clicks of pairs that were shown at several positions and clicked.

    A pair is a query photo and a product; it counts where it was shown at two or more positions and
    clicked at least once.

    Args:
      database: database with `views` and `clicks`.

    Returns:
      Counts by pair and position.
    """
    counts = database.execute("""
        WITH repeated_queries AS (SELECT query FROM views GROUP BY query HAVING count(*) > 1),
        items AS (
          SELECT hash(query, unnest(shown)) AS pair, generate_subscripts(shown, 1) AS position
          FROM views SEMI JOIN repeated_queries USING (query)),
        item_views AS (
          SELECT pair, position, count(*) AS views FROM items SEMI JOIN clicks USING (pair)
          GROUP BY ALL),
        moved AS (SELECT pair FROM item_views GROUP BY pair HAVING count(*) > 1),
        item_clicks AS (SELECT pair, position, count(*) AS clicks FROM clicks GROUP BY ALL)
        SELECT pair, position - 1 AS position, views, coalesce(clicks, 0) AS clicks
        FROM item_views SEMI JOIN moved USING (pair) LEFT JOIN item_clicks USING (pair, position)
        ORDER BY pair, position""").fetchnumpy()
    return PositionCounts(*(counts[key] for key in ("pair", "position", "views", "clicks")))


_PRODUCT_COLUMNS = TableColumns(("sku", "product"), ("sku", "product"))


def read_product_table(path: Path) -> pa.Table:
    """Reads which SKUs are one product; all values are text.

    Args:
      path: table that `common.table_files` reads, with the columns sku and product; rows without
        a product are left out.

    Returns:
      Columns "sku" and "product", text, one row per SKU.

    Raises:
      InputError: no such file, a row that cannot be used, or a SKU of two products.
    """
    import pyarrow as pa

    if not path.is_file():
        raise InputError(f"{path}: no such file, wanted a table with the columns sku and product")
    skus, products = SkuReader(), dict[str, str]()
    for location, values in read_table(path, _PRODUCT_COLUMNS, []):
        if isinstance(values, DroppedRow):
            raise InputError(f"{path}: {values}; correct this row")
        try:
            sku, product = skus.key(values.get("sku", "")), values.get("product", "").strip()
        except SkuError as error:
            raise InputError(f"{path}: {location}: {error}; correct this row") from None
        if product and products.setdefault(sku, product) != product:
            raise InputError(
                f"{path}: {location}: SKU {sku!r} is of product {product!r}, and of "
                f"{products[sku]!r} before, wanted one product; correct one of these rows"
            )
    for line in skus.warnings():
        print(f"WARNING: {path}: {line}", file=sys.stderr)
    columns = {"sku": list(products), "product": list(products.values())}
    return pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns]))


def create_pairs(
    database: duckdb.DuckDBPyConnection, *, max_skips: int, products: pa.Table | None
) -> dict[str, int]:
    """Makes `pairs` of a click and an examined item that was not clicked.

    Args:
      database: database with `views`, `clicks` and `unique_clicks`.
      max_skips: positions above a click that count as examined.
      products: columns "sku" and "product" of `read_product_table`, or None.

    Returns:
      Reason -> pairs that are marked as no negatives.
    """
    same_product = "false"
    if products is not None:
        database.register("product_table", products)
        database.execute("CREATE TABLE products AS SELECT sku, product FROM product_table")
        same_product = (
            "coalesce((SELECT any_value(product) FROM products WHERE products.sku = near.sku) = "
            "(SELECT any_value(product) FROM products WHERE products.sku = near.other), false)"
        )
    begin = f"greatest(position - {max_skips}, 1)"
    database.execute(f"""
        CREATE TABLE near AS
        SELECT row, request_id, position, sku, other, other_position,
          hash(query, other) IN (SELECT pair FROM clicks) AS clicked_elsewhere
        FROM (
          SELECT unique_clicks.row AS row, request_id, unique_clicks.query AS query, sku, position,
            unnest(shown[{begin} : position + 1]) AS other,
            {begin} - 1 + generate_subscripts(shown[{begin} : position + 1], 1) AS other_position
          FROM unique_clicks JOIN views USING (row))
        WHERE other <> sku""")
    database.execute(f"CREATE TABLE pairs AS SELECT *, {same_product} AS same_product FROM near")
    clicked_elsewhere, same = fetch_row(
        database,
        "SELECT count(*) FILTER (clicked_elsewhere), "
        "count(*) FILTER (same_product AND NOT clicked_elsewhere) FROM pairs",
    )
    return {
        "clicked with the same query": clicked_elsewhere,
        "the same product as the clicked one": same,
    }


def write_triplets(
    database: duckdb.DuckDBPyConnection, out: Path, weights: np.ndarray, purchase_weight: float
) -> None:
    """Writes the triplets as a Parquet file.

    Args:
      database: database with `pairs` and `unique_clicks`.
      out: file to write.
      weights: float64 [R], weight of a click by position.
      purchase_weight: factor of clicks on items that were bought.
    """
    database.execute("CREATE TABLE weights (position BIGINT, weight DOUBLE)")
    if len(weights):
        database.executemany(
            "INSERT INTO weights VALUES (?, ?)",
            [[i + 1, float(weight)] for i, weight in enumerate(weights)],
        )
    database.execute(f"""
        COPY (
          WITH negatives AS (SELECT * FROM pairs WHERE NOT clicked_elsewhere AND NOT same_product),
          counts AS (SELECT row, position, count(*) AS number FROM negatives GROUP BY ALL)
          SELECT request_id, query AS query_image_id, unique_clicks.sku AS clicked,
            other AS not_clicked,
            CAST(weight * if(bought, {purchase_weight}, 1) / number AS FLOAT) AS weight,
            CAST(position AS INTEGER) AS clicked_position,
            CAST(other_position AS INTEGER) AS not_clicked_position, bought
          FROM negatives JOIN counts USING (row, position)
            JOIN unique_clicks USING (row, position) JOIN weights USING (position)
          ORDER BY hash(row, position), other_position)
        TO {sql_literal(out)} (FORMAT parquet, ROW_GROUP_SIZE 65536)""")
