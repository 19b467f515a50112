"""What visitors saw and did: one schema for the service, ranking and learning. SQLite, or Parquet
to read elsewhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sicot_jax.common.files import check_not_there
from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

EVENTS_FILE = "events.parquet"  # in the folder of sicot events import
_ROWS = 65_536  # of a row group
KINDS = ("impression", "click", "purchase")
_TEXT = re.compile(
    r"[^\x00-\x1f\x7f\ud800-\udfff]{1,200}"
)  # no control character, no half of a pair
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
  event_id TEXT PRIMARY KEY, request_id TEXT NOT NULL, time REAL NOT NULL, visitor TEXT NOT NULL, variant TEXT NOT NULL,
  kind TEXT NOT NULL, query_image_id TEXT NOT NULL, sku TEXT NOT NULL, shown TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclasses.dataclass(frozen=True)
class Event:
    """time: seconds since 1970. shown: an impression's SKUs by position; sku: that of a click or
    purchase.
    """

    event_id: str
    request_id: str
    time: float
    visitor: str
    variant: str
    kind: str
    query_image_id: str = ""
    sku: str = ""
    shown: tuple[str, ...] = ()


FIELDS = [field.name for field in dataclasses.fields(Event)]


def parse(values: Mapping[str, Any]) -> Event:
    """InputError: a field missing, of another type, too long, or that its kind has not."""
    if unknown := sorted(values.keys() - set(FIELDS)):
        raise InputError(f"{unknown[0]}: no field of an event; wanted {', '.join(sorted(FIELDS))}")
    for name in ("event_id", "request_id", "visitor", "variant", "kind"):
        if not isinstance(values.get(name), str) or not _TEXT.fullmatch(values[name]):
            raise InputError(
                f"{name}={values.get(name)!r:.60}: wanted a text of 1 to 200 characters"
            )
    for name in ("query_image_id", "sku"):
        value = values.get(name, "")
        if not isinstance(value, str) or (value and not _TEXT.fullmatch(value)):
            raise InputError(f"{name}={value!r:.60}: wanted a text of at most 200 characters")
    kind, moment, shown = values["kind"], values.get("time"), values.get("shown", ())
    if kind not in KINDS:
        raise InputError(f"kind={kind!r}, wanted one of {', '.join(KINDS)}")
    if isinstance(moment, bool) or not isinstance(moment, (int, float)) or not 0 < moment < 1e11:
        raise InputError(f"time={moment!r:.40}, wanted seconds since 1970")
    if not isinstance(shown, (list, tuple)) or len(shown) > 1000:
        raise InputError(
            "shown: wanted a list of at most 1000 SKUs in the order of their positions"
        )
    if not all(isinstance(sku, str) and _TEXT.fullmatch(sku) for sku in shown):
        raise InputError("shown: wanted SKUs, texts of 1 to 200 characters")
    if kind == "impression" and (not shown or values.get("sku")):
        raise InputError("an impression has the SKUs that were shown, and no sku of its own")
    if kind != "impression" and (not values.get("sku") or shown):
        raise InputError(f"a {kind} has the sku it is of, and nothing shown")
    return Event(**{**values, "time": float(moment), "shown": tuple(shown)})


class Events:
    """A SQLite file of events, made where there is none. An event that is there already stays as it
    was.

    `reading`: nothing is made or written, and a file of something else is an InputError.
    """

    def __init__(self, path: Path, *, reading: bool = False):
        self.path, self._lock = path, threading.Lock()
        address = f"{path.absolute().as_uri()}?mode={'ro' if reading else 'rwc'}"
        try:
            self._connection = sqlite3.connect(
                address, uri=True, check_same_thread=False, timeout=30
            )
            if not reading:
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.executescript(_SCHEMA)
            self._connection.execute(f"SELECT {', '.join(FIELDS)} FROM events LIMIT 0")
        except sqlite3.Error as error:
            raise InputError(
                f"{path}: {error}; wanted a file of events, or a place where one can be made"
            ) from error

    def add(self, events: Iterable[Event]) -> int:
        """How many were new."""
        rows = [(*(getattr(e, name) for name in FIELDS[:-1]), json.dumps(e.shown)) for e in events]
        with self._lock, self._connection:
            before = self._connection.total_changes
            self._connection.executemany(
                "INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows
            )
            return self._connection.total_changes - before

    def __iter__(self) -> Iterator[Event]:
        """In the order of time. InputError where the file is damaged."""
        try:
            for row in self._connection.execute(
                f"SELECT {', '.join(FIELDS)} FROM events ORDER BY time, event_id"
            ):
                yield Event(
                    **{**dict(zip(FIELDS, row, strict=True)), "shown": tuple(json.loads(row[-1]))}
                )
        except (sqlite3.Error, ValueError) as error:
            raise InputError(
                f"{self.path}: {error}; the file is damaged, take it from a copy"
            ) from error

    def close(self) -> None:
        self._connection.close()


class Imported:
    """Events in Parquet, in the order of the file. InputError where it is none, or is damaged."""

    def __init__(self, path: Path):
        self.path = path

    def __iter__(self) -> Iterator[Event]:
        from pyarrow import ArrowException, parquet

        try:
            with parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(_ROWS, columns=list(FIELDS)):
                    for row in batch.to_pylist():
                        yield Event(**{**row, "shown": tuple(row["shown"] or ())})
        except (ArrowException, OSError, TypeError) as error:
            raise InputError(
                f"{self.path}: {one_line_error(error)}; wanted events of `sicot events import` or `export`"
            ) from error

    def close(self) -> None: ...


def opened(path: Path) -> Events | Imported:
    """Those that a service keeps, or events in Parquet: a file, or the folder of `sicot events
    import`. InputError where there
    is no such file: none is made.
    """
    if path.is_dir():
        path /= EVENTS_FILE
    if not path.is_file():
        raise InputError(
            f"{path}: no such file, wanted events of `sicot serve --events FILE`, `sicot events import` or `export`"
        )
    return Imported(path) if is_parquet(path) else Events(path, reading=True)


def is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def arrow_schema() -> pa.Schema:
    """Of events in Parquet: a column each field, texts but for time (float64) and shown (a list of
    texts).
    """
    import pyarrow as pa

    kinds = {"time": pa.float64(), "shown": pa.list_(pa.string())}
    return pa.schema([(name, kinds.get(name, pa.string())) for name in FIELDS])


def export_events(path: Path, out: Path) -> int:
    """All events in the order of time as the new Parquet file `out`, a column each field; how many.
    The service may go on.

    InputError where `path` is no file of events, or `out` is there.
    """
    import pyarrow as pa
    from pyarrow import parquet

    check_not_there(out)
    store, partial, count = opened(path), out.with_name(f".{out.name}.{os.getpid()}.partial"), 0
    schema = arrow_schema()
    try:
        with parquet.ParquetWriter(partial, schema) as writer:
            every = iter(store)
            while piece := [dataclasses.asdict(event) for event in itertools.islice(every, _ROWS)]:
                writer.write_table(pa.Table.from_pylist(piece, schema))
                count += len(piece)
        partial.rename(out)
    except OSError as error:
        raise InputError(f"{out}: {error}; wanted a place for a new file") from error
    finally:
        store.close()
        partial.unlink(missing_ok=True)
    return count
