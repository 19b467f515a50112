"""Reads CSV, JSONL, Parquet and SQLite logs as SQL over columns of any name and type."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, cast

from sicot_jax.errors import InputError
from sicot_jax.events.duckdb_engine import (
    events_as_parquet,
    sku_key_sql,
    sql_files,
    sql_literal,
    sql_name,
)
from sicot_jax.events.store import EVENT_FIELDS, EVENT_KINDS, is_parquet

REQUIRED_FIELDS = ("request_id", "time", "visitor", "kind", "query_image_id", "sku", "shown")
TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}  # in seconds


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """How a log is read.

    Attributes:
      columns: field of an event -> column of the log, where their names differ.
      kinds: word of the log -> kind of an event.
      time_unit: unit of times that are numbers, one of `TIME_UNITS`.
      split: text between the SKUs of a list that is one text.
      variant: variant of events in logs without that column.
      max_bad_share: share of bad rows beyond which the import is refused.
      memory_mb: working memory, MB; more goes to disk.
      threads: threads to use; 0 for as many as there are cores.
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
        if unknown := sorted(set(self.columns) - set(EVENT_FIELDS)):
            raise InputError(
                f"--column {unknown[0]}: no field of an event, wanted one of "
                f"{', '.join(EVENT_FIELDS)}"
            )
        if unknown := sorted(set(self.kinds.values()) - set(EVENT_KINDS)):
            raise InputError(
                f"--kind-name {unknown[0]}: no kind of event, wanted one of "
                f"{', '.join(EVENT_KINDS)}"
            )
        if self.time_unit not in TIME_UNITS:
            raise InputError(f"--time-unit {self.time_unit}, wanted one of {', '.join(TIME_UNITS)}")
        if not 0 <= self.max_bad_share <= 1:
            raise InputError(
                f"--max-bad-share {self.max_bad_share}, wanted a share from 0 to 1; the default is "
                "0.05"
            )
        if not self.split:
            raise InputError("--split is empty, wanted the text between two SKUs; the default is |")


# Lines of a JSONL file that are parsed for its columns; later ones only where a column that is
# still missing occurs in them.
_SCANNED_LINES = 1000


@dataclasses.dataclass(frozen=True)
class LogSource:
    """A log as parts of a SELECT statement.

    Attributes:
      relation: what to select from.
      expressions: field of an event -> SQL expression of its type, NULL where it is empty.
      is_row: SQL condition that is true where the row could be read at all.
    """

    relation: str
    expressions: dict[str, str]
    is_row: str = "true"


def open_log(log: Path, folder: Path, settings: LogSettings, rejects_table: str) -> LogSource:
    """Finds the format and the columns of a log.

    Args:
      log: CSV, JSONL or Parquet file, or the SQLite file of a service.
      folder: folder for a copy of a SQLite file.
      settings: names of columns and units.
      rejects_table: table for the rows of a CSV file that cannot be read.

    Returns:
      The log as SQL.

    Raises:
      InputError: another format, a missing column, or a column given twice.
    """
    columns = {field: settings.columns.get(field, field) for field in EVENT_FIELDS}
    with log.open("rb") as file:
        begin = file.read(16)
    if begin.startswith(b"SQLite format 3"):
        log = events_as_parquet(log, folder)
    if is_parquet(log):
        return _open_parquet(log, columns, settings)
    suffix = Path(log.name.lower().removesuffix(".gz")).suffix
    if suffix == ".csv":
        return _open_csv(log, columns, settings, rejects_table)
    if suffix in (".jsonl", ".ndjson"):
        return _open_jsonl(log, columns, settings)
    raise InputError(
        f"{log}: ends in {log.suffix!r}, wanted .csv, .jsonl, .ndjson (also with .gz), a "
        "Parquet file or a service's events"
    )


def _existing_columns(
    log: Path, columns: Mapping[str, str], existing: Sequence[str]
) -> dict[str, str]:
    """Columns that the log has; InputError without a required one, or one that was named."""
    missing = [
        column
        for field, column in columns.items()
        if column not in existing and (field in REQUIRED_FIELDS or column != field)
    ]
    if missing:
        raise InputError(
            f"{log}: no column {', '.join(missing)}; found {', '.join(existing)[:200]}; name it "
            "with --column FIELD=COLUMN"
        )
    return {field: column for field, column in columns.items() if column in existing}


def _expressions(texts: Mapping[str, str], settings: LogSettings) -> dict[str, str]:
    """Expressions of the fields' types from expressions of their texts."""
    number = f"try_cast({texts['time']} AS DOUBLE) * {TIME_UNITS[settings.time_unit]!r}"
    timestamp = f"epoch(try_cast({texts['time']} AS TIMESTAMPTZ))"
    shown = texts["shown"]
    # A list of numbers, without quotes, may have gone through floats.
    numbers = f"regexp_replace({shown}, '\\.0([,\\] ])', '\\1', 'g')"
    unquoted = f"CASE WHEN contains({shown}, '\"') THEN {shown} ELSE {numbers} END"
    as_json = f"CAST(try_cast({unquoted} AS JSON) AS VARCHAR[])"
    as_list = f"string_split({shown}, {sql_literal(settings.split)})"
    shown_list = (
        f"CASE WHEN coalesce({shown}, '') = '' THEN NULL "
        f"WHEN {shown} LIKE '[%' THEN {as_json} ELSE {as_list} END"
    )
    return {
        **texts,
        **({"sku": sku_key_sql(texts["sku"])} if "sku" in texts else {}),
        "time": f"coalesce({number}, {timestamp})",
        "shown": _sku_keys_sql(shown_list),
    }


def _sku_keys_sql(skus: str) -> str:
    return f"list_transform({skus}, lambda s: {sku_key_sql('s')})"


def _number_text_sql(number: str) -> str:
    """SQL of a float as the text that it was: 4006381333931.0 as 4006381333931, NaN as none."""
    is_integer = f"{number} = trunc({number}) AND abs({number}) <= {2**53}"
    return (
        f"CASE WHEN isnan({number}) THEN NULL "
        f"WHEN {is_integer} THEN CAST(CAST({number} AS BIGINT) AS VARCHAR) "
        f"ELSE CAST({number} AS VARCHAR) END"
    )


@contextlib.contextmanager
def _open_plain(log: Path) -> Iterator[IO[bytes]]:
    packed = log.suffix.lower() == ".gz"
    with log.open("rb") as plain:
        try:
            yield cast(IO[bytes], gzip.GzipFile(fileobj=plain)) if packed else plain
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(
                f"{log} cannot be unpacked ({error}), wanted a whole gzip file; copy it again"
            ) from None


def _open_csv(
    log: Path, columns: Mapping[str, str], settings: LogSettings, rejects_table: str
) -> LogSource:
    with _open_plain(log) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="")
        header = [column.strip() for column in next(csv.reader(text), [])]
    if repeated := sorted({column for column in header if header.count(column) > 1}):
        raise InputError(f"{log}: column {repeated[0]!r} more than once, wanted once; remove one")
    existing = _existing_columns(log, columns, header)
    types = ", ".join(f"{sql_literal(column)}: 'VARCHAR'" for column in header)
    relation = (
        f"read_csv({sql_files(log)}, auto_detect=false, header=true, delim=',', quote='\"', "
        f"escape='\"', columns={{{types}}}, store_rejects=true, "
        f"rejects_table='{rejects_table}', rejects_scan='{rejects_table}_scan')"
    )
    texts = {field: sql_name(column) for field, column in existing.items()}
    return LogSource(relation, _expressions(texts, settings))


def _open_jsonl(log: Path, columns: Mapping[str, str], settings: LogSettings) -> LogSource:
    names, missing = dict[str, None](), {column.encode() for column in columns.values()}
    with _open_plain(log) as file:  # to its end: a log may begin with impressions, which lack a SKU
        for number, line in enumerate(file):
            if number < _SCANNED_LINES or any(column in line for column in missing):
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    names.update(dict.fromkeys(row if isinstance(row, dict) else ()))
                    missing -= {name.encode() for name in names}
            elif not missing:
                break
    existing = _existing_columns(log, columns, list(names))
    texts = {}
    for field, column in existing.items():
        path = sql_literal("$." + sql_name(column))
        texts[field] = f"json_extract_string(json, {path})"
        if field == "sku":  # a whole number that went through a float
            is_float = f"suffix({texts[field]}, '.0') AND json_type(json, {path}) = 'DOUBLE'"
            texts[field] = f"CASE WHEN {is_float} THEN {texts[field]}[:-3] ELSE {texts[field]} END"
    return LogSource(
        f"read_ndjson_objects({sql_files(log)}, ignore_errors=true)",
        _expressions(texts, settings),
        is_row="coalesce(json_type(json) = 'OBJECT', false)",
    )


def _open_parquet(log: Path, columns: Mapping[str, str], settings: LogSettings) -> LogSource:
    from pyarrow import parquet, types

    schema = parquet.read_schema(log)
    existing = _existing_columns(log, columns, schema.names)
    texts = {
        field: _number_text_sql(sql_name(column))
        if types.is_floating(schema.field(column).type)
        else f"CAST({sql_name(column)} AS VARCHAR)"
        for field, column in existing.items()
    }
    expressions = _expressions(texts, settings)
    time, shown = (sql_name(existing[field]) for field in ("time", "shown"))
    time_type, shown_type = (schema.field(existing[field]).type for field in ("time", "shown"))
    if types.is_floating(time_type) or types.is_integer(time_type):
        expressions["time"] = f"CAST({time} AS DOUBLE) * {TIME_UNITS[settings.time_unit]!r}"
    elif types.is_timestamp(time_type):
        expressions["time"] = f"epoch({time})"
    if types.is_list(shown_type) or types.is_large_list(shown_type):
        items = f"CAST({shown} AS VARCHAR[])"
        if types.is_floating(shown_type.value_type):
            items = f"list_transform({shown}, lambda x: {_number_text_sql('x')})"
        expressions["shown"] = _sku_keys_sql(items)
    return LogSource(f"read_parquet({sql_files(log)})", expressions)
