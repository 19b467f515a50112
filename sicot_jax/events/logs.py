"""`sicot events import`: page-view logs of other systems as events of the service's schema, and a
report of what was wrong.

A row of a log is an event. Its columns are found by name, or by the names given. What cannot be an
event (`store.parse` says what one is), or contradicts another, is left out, counted by reason and
named; beyond a share of such rows nothing is written at all.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sicot_jax.common.files import atomic_directory
from sicot_jax.errors import InputError
from sicot_jax.events.duckdb_engine import as_parquet, connect, literal, name
from sicot_jax.events.store import EVENTS_FILE, FIELDS, KINDS, is_parquet

if TYPE_CHECKING:
    import duckdb

REQUIRED = ("request_id", "time", "visitor", "kind", "query_image_id", "sku", "shown")
TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_EARLIEST, _A_DAY = 788_918_400.0, 86_400.0  # 1995
_NAMED = 5  # rows of each reason
_FILE = 1 << 40  # row numbers of the files lie this far apart
# lines of a JSONL file, for the names in it; of the others those with a name that is still missing
_LOOKED_AT = 1000


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """columns: field of an event -> column of the log. kinds: word of the log -> kind of an event.
    time_unit: of times that are numbers. split: between the SKUs of a list that is a text.
    max_bad_share: of all rows. variant: of logs without one.
    """

    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    time_unit: str = "s"
    split: str = "|"
    variant: str = "imported"
    max_bad_share: float = 0.05
    memory_mb: int = 1000
    threads: int = 0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.columns) - set(FIELDS)):
            raise InputError(
                f"--column {unknown[0]}: no field of an event, wanted one of {', '.join(FIELDS)}"
            )
        if unknown := sorted(set(self.kinds.values()) - set(KINDS)):
            raise InputError(
                f"--kind-word {unknown[0]}: no kind of event, wanted one of {', '.join(KINDS)}"
            )
        if self.time_unit not in TIME_UNITS:
            raise InputError(f"--time-unit {self.time_unit}, wanted one of {', '.join(TIME_UNITS)}")
        if not 0 <= self.max_bad_share <= 1:
            raise InputError(
                f"--max-bad-share {self.max_bad_share}, wanted a share from 0 to 1; the default is 0.05"
            )
        if not self.split:
            raise InputError(
                "--split is empty, wanted what stands between two SKUs; the default is |"
            )


@dataclasses.dataclass(frozen=True)
class LogReport:
    """rows: read in all. kinds: events kept. bad, left_out: reason -> rows; named: reason -> some
    of them, as `log: row`.
    """

    logs: list[str]
    rows: int
    kinds: dict[str, int]
    bad: dict[str, int]
    left_out: dict[str, int]
    named: dict[str, list[str]]

    @property
    def kept(self) -> int:
        return sum(self.kinds.values())

    @property
    def bad_share(self) -> float:
        return sum(self.bad.values()) / max(self.rows, 1)

    def summary(self) -> str:
        """One line."""
        kinds = ", ".join(f"{self.kinds.get(kind, 0):,} {kind}s" for kind in KINDS)
        wrong = "; ".join(
            f"{count:,} {reason}" for reason, count in {**self.bad, **self.left_out}.items()
        )
        return (
            f"{self.rows:,} rows, {self.kept:,} events kept ({kinds}); left out: {wrong or 'none'}"
        )

    def markdown(self) -> str:
        lines = [
            "# Import of events",
            "",
            *(f"- {log}" for log in self.logs),
            "",
            self.summary() + ".",
            "",
        ]
        lines += [
            "| left out | rows | share, % | counts as bad | for example |",
            "|---|---:|---:|---|---|",
        ]
        for reason, count in {**self.bad, **self.left_out}.items():
            bad = "yes" if reason in self.bad else "no"
            share = f"{100 * count / max(self.rows, 1):.2f}"
            lines.append(
                f"| {reason} | {count:,} | {share} | {bad} | {'; '.join(self.named.get(reason, ()))} |"
            )
        return "\n".join(lines) + "\n"


def import_logs(
    logs: Sequence[Path], out: Path, settings: LogSettings = LogSettings()
) -> LogReport:
    """The events of all `logs` (CSV, JSONL, Parquet, or a service's SQLite file) in the new folder
    `out`: events.parquet, a row an event in the order of the logs, and report.md. Whatever stops
    it, there is no `out` then.

    InputError: a log that is missing or of another format, a column missing, more bad rows than
      settings.max_bad_share.
    """
    for log in logs:
        if not log.is_file():
            raise InputError(
                f"{log}: no such file, wanted a log: CSV, JSONL, Parquet or a service's events"
            )
    with atomic_directory(out) as folder:
        work = folder / "work"
        work.mkdir()
        with connect(work, memory_mb=settings.memory_mb, threads=settings.threads) as database:
            report = _import(database, logs, folder, work, settings)
        if not report.rows:
            raise InputError(f"{logs[0]}: no rows in it, wanted events")
        if report.bad_share > settings.max_bad_share:
            worst = max(report.bad, key=lambda reason: report.bad[reason])
            raise InputError(
                f"{100 * report.bad_share:.1f} % of {report.rows:,} rows are bad, "
                f"at most {100 * settings.max_bad_share:g} % may be; "
                f"most: {report.bad[worst]:,} {worst} ({'; '.join(report.named[worst][:3])}); "
                "mend the log, name its columns, or give --max-bad-share"
            )
        (folder / "report.md").write_text(report.markdown())
        shutil.rmtree(work)
    return report


def _import(
    database: duckdb.DuckDBPyConnection,
    logs: Sequence[Path],
    folder: Path,
    work: Path,
    settings: LogSettings,
) -> LogReport:
    database.execute("CREATE TABLE wrong (row BIGINT, reason VARCHAR, bad BOOLEAN)")
    for number, log in enumerate(logs):
        _stage(database, log, number, work, settings)
    database.execute(f"CREATE VIEW staged AS FROM read_parquet({literal(work / '*.staged')})")
    database.execute(
        "INSERT INTO wrong SELECT row, reason, true FROM staged WHERE reason IS NOT NULL"
    )
    _find_repeated(database)
    _find_unshown(database)
    database.execute(
        f"COPY (SELECT {', '.join(FIELDS)} FROM staged ANTI JOIN wrong USING (row)) "
        f"TO {literal(folder / EVENTS_FILE)} (FORMAT parquet, ROW_GROUP_SIZE 65536)"
    )
    kinds = database.execute(
        f"SELECT kind, count(*) FROM {literal(folder / EVENTS_FILE)} GROUP BY kind"
    ).fetchall()
    counted = database.execute(
        f"SELECT reason, bad, count(*) AS n, min(row, {_NAMED}) FROM wrong GROUP BY ALL ORDER BY n DESC, reason"
    ).fetchall()
    kept = sum(count for _, count in kinds)
    return LogReport(
        logs=[log.name for log in logs],
        rows=kept + sum(count for _, _, count, _ in counted),
        kinds=dict(kinds),
        bad={reason: count for reason, bad, count, _ in counted if bad},
        left_out={reason: count for reason, bad, count, _ in counted if not bad},
        named={reason: [_where(logs, row) for row in rows] for reason, _, _, rows in counted},
    )


def _where(logs: Sequence[Path], row: int) -> str:
    log = logs[abs(row) // _FILE]
    return f"{log.name}: {'line' if row < 0 else 'row'} {abs(row) % _FILE}"


def _stage(
    database: duckdb.DuckDBPyConnection, log: Path, number: int, work: Path, settings: LogSettings
) -> None:
    """Rows of one log as events, each with what is wrong with it."""
    first, rejected = number * _FILE + 1, f"rejected_{number}"
    source, read = _reader(log, work, settings, rejected)
    words = " ".join(
        f"WHEN {literal(word)} THEN {literal(kind)}" for word, kind in settings.kinds.items()
    )
    if words:
        read["kind"] = f"CASE {read['kind']} {words} ELSE {read['kind']} END"
    if "event_id" not in read:  # what has the same values is the same event
        parts = ", ".join(f"coalesce(CAST({read[field]} AS VARCHAR), '')" for field in REQUIRED)
        read["event_id"] = f"md5(concat_ws(chr(0), {parts}))"
    read.setdefault("variant", literal(settings.variant))
    empty = {"time": "CAST('nan' AS DOUBLE)", "shown": "CAST([] AS VARCHAR[])"}
    fields = ", ".join(
        f"coalesce({read[field]}, {empty.get(field, literal(''))}) AS {field}" for field in FIELDS
    )
    database.execute(
        f"COPY (SELECT *, {_reason()} AS reason FROM "
        f"(SELECT {first} + row_number() OVER () - 1 AS row, {read['whole']} AS whole, {fields} FROM {source})) "
        f"TO {literal(work / f'{number}.staged')} (FORMAT parquet, ROW_GROUP_SIZE 65536)"
    )
    if rejected in {
        row[0] for row in database.execute("SELECT table_name FROM duckdb_tables()").fetchall()
    }:
        database.execute(
            f"INSERT INTO wrong SELECT DISTINCT -({first} - 1 + line), 'no row of the table', true FROM {rejected}"
        )


def _reader(
    log: Path, work: Path, settings: LogSettings, rejected: str
) -> tuple[str, dict[str, str]]:
    """What to select from, and how: field -> expression of its type; `whole`: whether the row could
    be read at all.
    """
    wanted = {field: settings.columns.get(field, field) for field in FIELDS}
    with log.open("rb") as file:
        begin = file.read(16)
    if begin.startswith(b"SQLite format 3"):
        log = as_parquet(log, work)
    if is_parquet(log):
        return _parquet_reader(log, wanted, settings)
    if log.suffix.lower() == ".csv":
        return _csv_reader(log, wanted, settings, rejected)
    if log.suffix.lower() in (".jsonl", ".ndjson"):
        return _jsonl_reader(log, wanted, settings)
    raise InputError(
        f"{log}: ends in {log.suffix!r}, wanted .csv, .jsonl, .ndjson, a Parquet file or a service's events"
    )


def _found(log: Path, wanted: Mapping[str, str], columns: Sequence[str]) -> dict[str, str]:
    """Those of `wanted` that the log has. InputError: without a required one, or one that was
    named.
    """
    missing = [
        column
        for field, column in wanted.items()
        if column not in columns and (field in REQUIRED or column != field)
    ]
    if missing:
        raise InputError(
            f"{log}: no column {', '.join(missing)}; found {', '.join(columns)[:200]}; name it with --column FIELD=COLUMN"
        )
    return {field: column for field, column in wanted.items() if column in columns}


def _from_texts(texts: Mapping[str, str], settings: LogSettings) -> dict[str, str]:
    read = dict(texts)
    read["time"] = _seconds(texts["time"], settings)
    as_json = f"CAST(try_cast({texts['shown']} AS JSON) AS VARCHAR[])"
    read["shown"] = (
        f"CASE WHEN coalesce({texts['shown']}, '') = '' THEN NULL WHEN {texts['shown']} LIKE '[%' THEN {as_json} "
        f"ELSE string_split({texts['shown']}, {literal(settings.split)}) END"
    )
    return {"whole": "true", **read}


def _seconds(text: str, settings: LogSettings) -> str:
    number = f"try_cast({text} AS DOUBLE) * {TIME_UNITS[settings.time_unit]!r}"
    return f"coalesce({number}, epoch(try_cast({text} AS TIMESTAMPTZ)))"


def _csv_reader(
    log: Path, wanted: Mapping[str, str], settings: LogSettings, rejected: str
) -> tuple[str, dict[str, str]]:
    with log.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        header = next(csv.reader(file), [])
    if repeated := sorted({column for column in header if header.count(column) > 1}):
        raise InputError(f"{log}: column {repeated[0]!r} more than once, wanted once; remove one")
    found = _found(log, wanted, header)
    columns = ", ".join(f"{literal(column)}: 'VARCHAR'" for column in header)
    source = (
        f"read_csv({literal(log)}, auto_detect=false, header=true, delim=',', quote='\"', escape='\"', columns={{{columns}}}, "
        f"store_rejects=true, rejects_table='{rejected}', rejects_scan='{rejected}_scan')"
    )
    return source, _from_texts({field: name(column) for field, column in found.items()}, settings)


def _jsonl_reader(
    log: Path, wanted: Mapping[str, str], settings: LogSettings
) -> tuple[str, dict[str, str]]:
    columns, lacking = dict[str, None](), {column.encode() for column in wanted.values()}
    with log.open("rb") as file:  # to its end: a log may begin with impressions, which need no SKU
        for number, line in enumerate(file):
            if number < _LOOKED_AT or any(column in line for column in lacking):
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    columns.update(dict.fromkeys(row if isinstance(row, dict) else ()))
                    lacking -= {column.encode() for column in columns}
            elif not lacking:
                break
    found = _found(log, wanted, list(columns))
    texts = {
        field: f"json_extract_string(json, {literal('$.' + name(column))})"
        for field, column in found.items()
    }
    source = f"read_ndjson_objects({literal(log)}, ignore_errors=true)"
    return source, {
        **_from_texts(texts, settings),
        "whole": "coalesce(json_type(json) = 'OBJECT', false)",
    }


def _parquet_reader(
    log: Path, wanted: Mapping[str, str], settings: LogSettings
) -> tuple[str, dict[str, str]]:
    import pyarrow as pa
    from pyarrow import parquet

    schema = parquet.read_schema(log)
    found = _found(log, wanted, schema.names)
    texts = {field: f"CAST({name(column)} AS VARCHAR)" for field, column in found.items()}
    read = _from_texts(texts, settings)
    if pa.types.is_floating(kind := schema.field(found["time"]).type) or pa.types.is_integer(kind):
        read["time"] = f"CAST({name(found['time'])} AS DOUBLE) * {TIME_UNITS[settings.time_unit]!r}"
    elif pa.types.is_timestamp(kind):
        read["time"] = f"epoch({name(found['time'])})"
    if pa.types.is_list(kind := schema.field(found["shown"]).type) or pa.types.is_large_list(kind):
        read["shown"] = f"CAST({name(found['shown'])} AS VARCHAR[])"
    return f"read_parquet({literal(log)})", read


def _reason() -> str:
    """What is wrong with a staged row by itself, NULL where nothing is: the rules of `store.parse`,
    and times that can be.
    """
    texts = [field for field in FIELDS if field not in ("time", "shown")]
    control = "'[\\x00-\\x1f\\x7f]'"
    joined = f"concat({', '.join(texts)}, array_to_string(shown, ''))"
    cases = [("NOT whole", "no row of the table")]
    cases += [
        (f"{field} = ''", f"without {field}")
        for field in ("event_id", "request_id", "visitor", "variant", "kind")
    ]
    cases += [
        (
            f"greatest({', '.join(f'length({field})' for field in texts)}) > 200",
            "with a text of more than 200 characters",
        ),
        (f"regexp_matches({joined}, {control})", "with a control character"),
        (f"kind NOT IN ({', '.join(map(literal, KINDS))})", "of an unknown kind"),
        ("isnan(time)", "without a time that can be read"),
        (f"time < {_EARLIEST!r} OR time > {time.time() + _A_DAY!r}", "at an impossible time"),
        ("kind = 'impression' AND len(shown) = 0", "impressions with nothing shown"),
        ("kind = 'impression' AND sku <> ''", "impressions with a sku of their own"),
        ("kind <> 'impression' AND sku = ''", "clicks or purchases without sku"),
        ("kind <> 'impression' AND len(shown) > 0", "clicks or purchases with a list"),
        ("len(shown) > 1000", "with more than 1000 SKUs in a list"),
        (
            "len(list_filter(shown, lambda s: s IS NULL OR s = '' OR length(s) > 200)) > 0",
            "with a bad SKU in the list",
        ),
    ]
    return (
        "CASE "
        + " ".join(f"WHEN {condition} THEN {literal(reason)}" for condition, reason in cases)
        + " END"
    )


def _find_repeated(database: duckdb.DuckDBPyConnection) -> None:
    """The first event of an event_id counts. By hashes first: few texts are compared then."""
    content = ", ".join(field for field in FIELDS if field != "event_id")
    database.execute(f"""
        INSERT INTO wrong
        WITH twice AS (SELECT hash(event_id) AS h FROM staged WHERE reason IS NULL GROUP BY h HAVING count(*) > 1),
        these AS (
          SELECT row, event_id, hash({content}) AS content FROM staged
          WHERE reason IS NULL AND hash(event_id) IN (SELECT h FROM twice)),
        ordered AS (
          SELECT row, row_number() OVER w AS n, content = first_value(content) OVER w AS same FROM these
          WINDOW w AS (PARTITION BY event_id ORDER BY row))
        SELECT row, if(same, 'repeated', 'with the event_id of another event'), NOT same FROM ordered WHERE n > 1""")


def _find_unshown(database: duckdb.DuckDBPyConnection) -> None:
    """Clicks and purchases need an impression of their request that showed the thing, not later
    than they are.
    """
    database.execute("""
        INSERT INTO wrong
        WITH done AS (
          SELECT row, request_id, time, sku FROM (FROM staged ANTI JOIN wrong USING (row)) WHERE kind <> 'impression'),
        seen AS (SELECT request_id, time, shown FROM staged WHERE kind = 'impression' AND reason IS NULL),
        found AS (
          SELECT row, any_value(done.time) AS time, min(seen.time) FILTER (list_contains(shown, sku)) AS since
          FROM done LEFT JOIN seen USING (request_id) GROUP BY row)
        SELECT row, if(since IS NULL, 'of a thing never shown', 'before their impression'), true
        FROM found WHERE since IS NULL OR time < since""")
