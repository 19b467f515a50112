"""Checks of rows during the import of logs: each by itself, then rows against each other."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sicot_jax.events.bots import SECONDS_PER_DAY
from sicot_jax.events.duckdb_engine import sql_literal
from sicot_jax.events.store import EVENT_FIELDS, EVENT_KINDS

if TYPE_CHECKING:
    import duckdb

_EARLIEST = 788_918_400.0  # 1995


def row_reason() -> str:
    """Returns an SQL expression that says what is wrong with a staged row by itself.

    The rules are those of `store.parse_event`, and that times are plausible.

    Returns:
      Expression of the columns of an event and `is_row`: a reason, or NULL for a good row.
    """
    texts = [field for field in EVENT_FIELDS if field not in ("time", "shown")]
    joined = f"concat({', '.join(texts)}, array_to_string(shown, ''))"
    longest = f"greatest({', '.join(f'length({field})' for field in texts)})"
    bad_skus = "list_filter(shown, lambda s: s IS NULL OR s = '' OR length(s) > 200)"
    latest = time.time() + SECONDS_PER_DAY
    cases = {
        "NOT is_row": "no row of the table",
        **{
            f"{field} = ''": f"without {field}"
            for field in ("event_id", "request_id", "visitor", "variant", "kind")
        },
        f"{longest} > 200": "with a text of more than 200 characters",
        f"regexp_matches({joined}, '[\\x00-\\x1f\\x7f]')": "with a control character",
        f"kind NOT IN ({', '.join(map(sql_literal, EVENT_KINDS))})": "of an unknown kind",
        "isnan(time)": "without a time that can be read",
        f"time < {_EARLIEST!r} OR time > {latest!r}": "at an impossible time",
        "kind = 'impression' AND len(shown) = 0": "impressions with nothing shown",
        "kind = 'impression' AND sku <> ''": "impressions with a sku of their own",
        "kind <> 'impression' AND sku = ''": "clicks or purchases without sku",
        "kind <> 'impression' AND len(shown) > 0": "clicks or purchases with a list",
        "len(shown) > 1000": "with more than 1000 SKUs in a list",
        f"len({bad_skus}) > 0": "with a bad SKU in the list",
    }
    branches = (
        f"WHEN {condition} THEN {sql_literal(reason)}" for condition, reason in cases.items()
    )
    return f"CASE {' '.join(branches)} END"


def reject_repeated_events(database: duckdb.DuckDBPyConnection) -> None:
    """Adds rows to `rejected` whose event_id came before; the first event of an id counts.

    Args:
      database: database with the tables `staged` (events with row and reason) and `rejected`.
    """
    content = ", ".join(field for field in EVENT_FIELDS if field != "event_id")
    # Compares hashes first, so that few texts are compared.
    database.execute(f"""
        INSERT INTO rejected
        WITH repeated AS (
          SELECT hash(event_id) AS h FROM staged WHERE reason IS NULL
          GROUP BY h HAVING count(*) > 1),
        candidates AS (
          SELECT row, event_id, hash({content}) AS content FROM staged
          WHERE reason IS NULL AND hash(event_id) IN (SELECT h FROM repeated)),
        ordered AS (
          SELECT row, row_number() OVER w AS n, content = first_value(content) OVER w AS same
          FROM candidates WINDOW w AS (PARTITION BY event_id ORDER BY row))
        SELECT row, if(same, 'repeated', 'with the event_id of another event'), NOT same
        FROM ordered WHERE n > 1""")


def reject_unshown_items(database: duckdb.DuckDBPyConnection) -> None:
    """Adds clicks and purchases to `rejected` that no earlier impression of their request showed.

    Args:
      database: database with the tables `staged` (events with row and reason) and `rejected`.
    """
    database.execute("""
        INSERT INTO rejected
        WITH actions AS (
          SELECT row, request_id, time, sku FROM (FROM staged ANTI JOIN rejected USING (row))
          WHERE kind <> 'impression'),
        impressions AS (
          SELECT request_id, time, shown FROM staged
          WHERE kind = 'impression' AND reason IS NULL),
        joined AS (
          SELECT row, any_value(actions.time) AS time,
            min(impressions.time) FILTER (list_contains(shown, sku)) AS shown_at
          FROM actions LEFT JOIN impressions USING (request_id) GROUP BY row)
        SELECT row, if(shown_at IS NULL, 'of an item never shown', 'before their impression'), true
        FROM joined WHERE shown_at IS NULL OR time < shown_at""")
