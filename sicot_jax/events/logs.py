"""`sicot events import`: page-view logs of other systems as events of the service's schema.

A row of a log is an event. Its columns are found by name, or by the names given. A row that is no
event (`store.parse_event` says what one is), or contradicts another, is left out, counted by reason
and listed; beyond a share of such rows nothing is written at all.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sicot_jax.common.files import atomic_directory
from sicot_jax.common.text import markdown_table
from sicot_jax.errors import InputError
from sicot_jax.events.duckdb_engine import open_duckdb, sql_files, sql_literal
from sicot_jax.events.log_readers import REQUIRED_FIELDS, LogSettings, open_log
from sicot_jax.events.store import EVENT_FIELDS, EVENT_KINDS, EVENTS_FILE

if TYPE_CHECKING:
    import duckdb
import time
from typing import TYPE_CHECKING

from sicot_jax.events.bots import SECONDS_PER_DAY

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
    bad_skus = "list_filter(shown, lambda s: s IS NULL OR s = '' OR length(s) > 256)"
    latest = time.time() + SECONDS_PER_DAY
    cases = {
        "NOT is_row": "no row of the table",
        **{
            f"{field} = ''": f"without {field}"
            for field in ("event_id", "request_id", "visitor", "variant", "kind")
        },
        f"{longest} > 256": "with a text of more than 256 characters",
        f"regexp_matches({joined}, '[\\x00-\\x1f\\x7f]')": "with a control character",
        f"kind NOT IN ({', '.join(map(sql_literal, EVENT_KINDS))})": "of an unknown kind",
        "isnan(time)": "without a time that can be read",
        f"time < {_EARLIEST!r} OR time > {latest!r}": "at an impossible time",
        "kind = 'impression' AND len(shown) = 0": "impressions with nothing shown",
        "kind = 'impression' AND sku <> ''": "impressions with a sku",
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
    """Adds to `rejected` every event whose id appeared in an earlier row.

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


_DEFAULTS = LogSettings()
_MAX_EXAMPLES = 5  # rows of each reason
_ROWS_PER_LOG = 1 << 40  # row numbers of successive logs are so far apart
_EMPTY = {"time": "CAST('nan' AS DOUBLE)", "shown": "CAST([] AS VARCHAR[])"}


@dataclasses.dataclass(frozen=True)
class LogReport:
    """What an import kept and left out.

    Attributes:
      logs: names of the files.
      rows: rows read in all.
      kinds: kind of event -> events kept.
      bad: reason -> rows left out as bad.
      left_out: reason -> rows left out that are no error, such as repeated ones.
      examples: reason -> some of its rows, as `log: row 5`.
    """

    logs: list[str]
    rows: int
    kinds: dict[str, int]
    bad: dict[str, int]
    left_out: dict[str, int]
    examples: dict[str, list[str]]

    @property
    def kept(self) -> int:
        """Events kept."""
        return sum(self.kinds.values())

    @property
    def bad_share(self) -> float:
        """Bad rows as a share of all."""
        return sum(self.bad.values()) / max(self.rows, 1)

    def summary(self) -> str:
        """Returns the counts in one line.

        Returns:
          Rows, events by kind, and rows left out by reason.
        """
        kinds = ", ".join(f"{self.kinds.get(kind, 0):,} {kind}s" for kind in EVENT_KINDS)
        reasons = "; ".join(
            f"{count:,} {reason}" for reason, count in {**self.bad, **self.left_out}.items()
        )
        return (
            f"{self.rows:,} rows, {self.kept:,} events kept ({kinds}); "
            f"left out: {reasons or 'none'}"
        )

    def markdown(self) -> str:
        """Returns the report as a Markdown page.

        Returns:
          The summary and a table of what was left out.
        """
        rows = [
            [
                reason,
                f"{count:,}",
                f"{100 * count / max(self.rows, 1):.2f}",
                "yes" if reason in self.bad else "no",
                "; ".join(self.examples.get(reason, ())),
            ]
            for reason, count in {**self.bad, **self.left_out}.items()
        ]
        header = ["left out", "rows", "share, %", "counts as bad", "for example"]
        logs = "\n".join(f"- {log}" for log in self.logs)
        table = markdown_table(header, rows)
        return f"# Import of events\n\n{logs}\n\n{self.summary()}.\n\n{table}\n"


def import_logs(logs: Sequence[Path], out: Path, settings: LogSettings = _DEFAULTS) -> LogReport:
    """Imports logs as a new folder with `events.parquet` and `report.md`.

    Args:
      logs: CSV, JSONL or Parquet files, or SQLite files of a service.
      out: folder to make; it is there in the end, or not at all.
      settings: how the logs are read.

    Returns:
      What was kept and left out; events are in the order of the logs.

    Raises:
      InputError: a log is missing, of another format or lacks a column, or too many rows are bad.
    """
    for log in logs:
        if not log.is_file():
            raise InputError(
                f"{log}: no such file, wanted a log: CSV, JSONL, Parquet or a service's events"
            )
    with atomic_directory(out) as folder:
        work = folder / "work"
        work.mkdir()
        with open_duckdb(work, memory_mb=settings.memory_mb, threads=settings.threads) as database:
            report = _import_logs(database, logs, folder, settings)
        if not report.rows:
            raise InputError(f"{logs[0]}: no rows in it, wanted events")
        if report.bad_share > settings.max_bad_share:
            worst = max(report.bad, key=lambda reason: report.bad[reason])
            raise InputError(
                f"{100 * report.bad_share:.1f} % of {report.rows:,} rows are bad, "
                f"at most {100 * settings.max_bad_share:g} % may be; "
                f"most: {report.bad[worst]:,} {worst} ({'; '.join(report.examples[worst][:3])}); "
                "mend the log, name its columns, or give --max-bad-share"
            )
        (folder / "report.md").write_text(report.markdown())
        shutil.rmtree(work)
    return report


def _import_logs(
    database: duckdb.DuckDBPyConnection, logs: Sequence[Path], folder: Path, settings: LogSettings
) -> LogReport:
    work = folder / "work"
    database.execute("CREATE TABLE rejected (row BIGINT, reason VARCHAR, bad BOOLEAN)")
    for number, log in enumerate(logs):
        _stage_log(database, log, number, work, settings)
    database.execute(f"CREATE VIEW staged AS FROM read_parquet({sql_files(work, '*.staged')})")
    database.execute(
        "INSERT INTO rejected SELECT row, reason, true FROM staged WHERE reason IS NOT NULL"
    )
    reject_repeated_events(database)
    reject_unshown_items(database)
    database.execute(
        f"COPY (SELECT {', '.join(EVENT_FIELDS)} FROM staged ANTI JOIN rejected USING (row)) "
        f"TO {sql_literal(folder / EVENTS_FILE)} (FORMAT parquet, ROW_GROUP_SIZE 65536)"
    )
    kinds = database.execute(
        f"SELECT kind, count(*) FROM read_parquet({sql_files(folder / EVENTS_FILE)}) GROUP BY kind"
    ).fetchall()
    reasons = database.execute(
        f"SELECT reason, bad, count(*) AS n, min(row, {_MAX_EXAMPLES}) FROM rejected "
        "GROUP BY ALL ORDER BY n DESC, reason"
    ).fetchall()
    return LogReport(
        logs=[log.name for log in logs],
        rows=sum(count for _, count in kinds) + sum(count for _, _, count, _ in reasons),
        kinds=dict(kinds),
        bad={reason: count for reason, bad, count, _ in reasons if bad},
        left_out={reason: count for reason, bad, count, _ in reasons if not bad},
        examples={
            reason: [_locate_row(logs, row) for row in rows] for reason, _, _, rows in reasons
        },
    )


def _locate_row(logs: Sequence[Path], row: int) -> str:
    """Log and number of a row; those that no reader understood are counted in lines."""
    log = logs[abs(row) // _ROWS_PER_LOG]
    return f"{log.name}: {'line' if row < 0 else 'row'} {abs(row) % _ROWS_PER_LOG}"


def _stage_log(
    database: duckdb.DuckDBPyConnection, log: Path, number: int, work: Path, settings: LogSettings
) -> None:
    """Writes the rows of one log as events, each with what is wrong with it."""
    first, rejects = number * _ROWS_PER_LOG + 1, f"rejects_{number}"
    source = open_log(log, work, settings, rejects)
    expressions = dict(source.expressions)
    words = " ".join(
        f"WHEN {sql_literal(word)} THEN {sql_literal(kind)}"
        for word, kind in settings.kinds.items()
    )
    if words:
        expressions["kind"] = f"CASE {expressions['kind']} {words} ELSE {expressions['kind']} END"
    if "event_id" not in expressions:  # rows of equal values are one event
        parts = ", ".join(
            f"coalesce(CAST({expressions[field]} AS VARCHAR), '')" for field in REQUIRED_FIELDS
        )
        expressions["event_id"] = f"md5(concat_ws(chr(0), {parts}))"
    expressions.setdefault("variant", sql_literal(settings.variant))
    fields = ", ".join(
        f"coalesce({expressions[field]}, {_EMPTY.get(field, sql_literal(''))}) AS {field}"
        for field in EVENT_FIELDS
    )
    database.execute(
        f"COPY (SELECT *, {row_reason()} AS reason FROM "
        f"(SELECT {first} + row_number() OVER () - 1 AS row, {source.is_row} AS is_row, {fields} "
        f"FROM {source.relation})) "
        f"TO {sql_literal(work / f'{number}.staged')} (FORMAT parquet, ROW_GROUP_SIZE 65536)"
    )
    tables = database.execute("SELECT table_name FROM duckdb_tables()").fetchall()
    if (rejects,) in tables:
        database.execute(
            f"INSERT INTO rejected SELECT DISTINCT -({first} - 1 + line), 'no row of the table', "
            f"true FROM {rejects}"
        )
