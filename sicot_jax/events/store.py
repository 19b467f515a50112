"""Events of visitors and their query photos: schema, SQLite store, Parquet files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sicot_jax.common.files import atomic_file, check_not_there
from sicot_jax.common.sku import normalize_sku
from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


from collections.abc import Callable

EVENTS_FILE = "events.parquet"  # in the folder of `sicot events import`
EVENT_KINDS = ("impression", "click", "purchase")
PURCHASE_WEIGHT = 5.0
"""Clicks that a purchase is worth, in triplets and in the ranker's gains.

As in the evaluation of Expedia's hotel rankings (ICDM 2013 challenge, arXiv:1311.7679, section 1):
5 for a booking, 1 for a click. A purchase is rarer than a click and costs the visitor more, so it
says more of relevance.
"""
_ROW_GROUP = 65_536  # rows of a Parquet row group
# Texts without control characters and lone surrogates.
_TEXT = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,256}")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
  event_id TEXT PRIMARY KEY, request_id TEXT NOT NULL, time REAL NOT NULL, visitor TEXT NOT NULL,
  variant TEXT NOT NULL, kind TEXT NOT NULL, query_image_id TEXT NOT NULL, sku TEXT NOT NULL,
  shown TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that a visitor saw or did.

    Attributes:
      event_id: unique id; an event that arrives again has the same.
      request_id: request whose result list it belongs to.
      time: Unix time in seconds.
      visitor: who saw or did it.
      variant: variant of the service that made the list, of an A/B test.
      kind: one of `EVENT_KINDS`.
      query_image_id: id of the query photo, "" where it is not known.
      sku: the product of a click or purchase; "" of an impression.
      shown: the SKUs of an impression by position; empty otherwise.
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


EVENT_FIELDS = tuple(field.name for field in dataclasses.fields(Event))


def parse_event(values: Mapping[str, Any]) -> Event:
    """Parses an event from JSON values.

    Args:
      values: field -> value.

    Returns:
      The event; its SKUs as `normalize_sku` spells them.

    Raises:
      InputError: a field is missing, unknown, of another type, too long, or one that its kind does
        not have.
    """
    if unknown := sorted(values.keys() - set(EVENT_FIELDS)):
        raise InputError(
            f"{unknown[0]}: no field of an event; wanted {', '.join(sorted(EVENT_FIELDS))}"
        )
    for name in ("event_id", "request_id", "visitor", "variant", "kind"):
        if not isinstance(values.get(name), str) or not _TEXT.fullmatch(values[name]):
            raise InputError(
                f"{name}={values.get(name)!r:.60}: wanted a text of 1 to 256 characters"
            )
    for name in ("query_image_id", "sku"):
        value = values.get(name, "")
        if not isinstance(value, str) or (value and not _TEXT.fullmatch(value)):
            raise InputError(f"{name}={value!r:.60}: wanted a text of at most 256 characters")
    _check_time(values.get("time"))
    _check_shown(values.get("shown", ()))
    _check_kind(values)
    read = {
        "time": float(values["time"]),
        "sku": normalize_sku(values.get("sku", "")),
        "shown": tuple(map(normalize_sku, values.get("shown", ()))),
    }
    return Event(**{**values, **read})


def _check_time(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e11:
        raise InputError(f"time={value!r:.40}, wanted seconds since 1970")


def _check_shown(value: object) -> None:
    if not isinstance(value, list | tuple) or len(value) > 1000:
        raise InputError(
            "shown: wanted a list of at most 1000 SKUs in the order of their positions"
        )
    if not all(isinstance(sku, str) and _TEXT.fullmatch(sku) for sku in value):
        raise InputError("shown: wanted SKUs, texts of 1 to 256 characters")


def _check_kind(values: Mapping[str, Any]) -> None:
    kind, shown, sku = values["kind"], values.get("shown", ()), values.get("sku")
    if kind not in EVENT_KINDS:
        raise InputError(f"kind={kind!r}, wanted one of {', '.join(EVENT_KINDS)}")
    if kind == "impression" and (not shown or sku):
        raise InputError("an impression has the SKUs that were shown, and no sku")
    if kind != "impression" and (not sku or shown):
        raise InputError(f"a {kind} has the sku it is of, and nothing shown")


class EventStore:
    """A SQLite file of events that several threads may use; the first version of an event stays."""

    def __init__(self, path: Path, *, read_only: bool = False):
        """Opens a file of events.

        Args:
          path: SQLite file; it is made where there is none, unless `read_only`.
          read_only: whether nothing may be made or written.

        Raises:
          InputError: the file holds something else, or cannot be made.
        """
        self.path, self._lock = path, threading.Lock()
        address = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        try:
            self._connection = sqlite3.connect(
                address, uri=True, check_same_thread=False, timeout=30
            )
            if not read_only:
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.executescript(_SCHEMA)
            self._connection.execute(f"SELECT {', '.join(EVENT_FIELDS)} FROM events LIMIT 0")
        except sqlite3.Error as error:
            raise InputError(
                f"{path}: {error}; wanted a file of events, or a place where one can be made"
            ) from error

    def add(self, events: Iterable[Event]) -> int:
        """Stores events, in one transaction.

        Args:
          events: events; those whose id is stored already are ignored.

        Returns:
          How many were new.
        """
        rows = [
            (*(getattr(event, name) for name in EVENT_FIELDS[:-1]), json.dumps(event.shown))
            for event in events
        ]
        with self._lock, self._connection:
            before = self._connection.total_changes
            self._connection.executemany(
                "INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows
            )
            return self._connection.total_changes - before

    def __iter__(self) -> Iterator[Event]:
        """Yields the events in the order of time; InputError where the file is damaged."""
        try:
            for row in self._connection.execute(
                f"SELECT {', '.join(EVENT_FIELDS)} FROM events ORDER BY time, event_id"
            ):
                fields = dict(zip(EVENT_FIELDS, row, strict=True))
                yield Event(**{**fields, "shown": tuple(json.loads(row[-1]))})
        except (sqlite3.Error, ValueError) as error:
            raise InputError(
                f"{self.path}: {error}; the file is damaged, take it from a copy"
            ) from error

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()


class ParquetEvents:
    """Events of a Parquet file, read in pieces."""

    def __init__(self, path: Path):
        self.path = path

    def __iter__(self) -> Iterator[Event]:
        """Yields the events in the order of the file; InputError where it is damaged."""
        from pyarrow import ArrowException, parquet

        try:
            with parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(_ROW_GROUP, columns=list(EVENT_FIELDS)):
                    for row in batch.to_pylist():
                        yield Event(**{**row, "shown": tuple(row["shown"] or ())})
        except (ArrowException, OSError, TypeError) as error:
            raise InputError(
                f"{self.path}: {one_line_error(error)}; wanted events of `sicot events import` or "
                "`export`"
            ) from error

    def close(self) -> None:
        """Does nothing: the file is closed after each iteration."""


def open_events(path: Path) -> EventStore | ParquetEvents:
    """Opens events for reading.

    Args:
      path: SQLite file of a service, Parquet file of events, or folder of `sicot events import`.

    Returns:
      An iterable of events that is to be closed.

    Raises:
      InputError: no such file, or one of another kind.
    """
    if path.is_dir():
        path /= EVENTS_FILE
    if not path.is_file():
        raise InputError(
            f"{path}: no such file, wanted events of `sicot serve --events FILE`, `sicot events "
            "import` or `export`"
        )
    return ParquetEvents(path) if is_parquet(path) else EventStore(path, read_only=True)


def is_parquet(path: Path) -> bool:
    """Returns whether a file begins as Parquet does.

    Args:
      path: file to look into.

    Returns:
      True for a Parquet file, whatever its name.
    """
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def event_schema() -> pa.Schema:
    """Returns the Arrow schema of events.

    Returns:
      A column per field: strings, but for `time` (float64) and `shown` (list of strings).
    """
    import pyarrow as pa

    types = {"time": pa.float64(), "shown": pa.list_(pa.string())}
    return pa.schema([(name, types.get(name, pa.string())) for name in EVENT_FIELDS])


def export_events(path: Path, out: Path) -> int:
    """Writes all events to Parquet, ordered by time; safe while the service is recording.

    Args:
      path: SQLite file of a service, Parquet file of events, or folder of an import.
      out: Parquet file to make; must not exist.

    Returns:
      How many events were written.

    Raises:
      InputError: `path` holds no events, or `out` exists or cannot be made.
    """
    import pyarrow as pa
    from pyarrow import parquet

    check_not_there(out)
    store, schema, count = open_events(path), event_schema(), 0
    try:
        with atomic_file(out) as partial, parquet.ParquetWriter(partial, schema) as writer:
            events = iter(store)
            while rows := [
                dataclasses.asdict(event) for event in itertools.islice(events, _ROW_GROUP)
            ]:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                count += len(rows)
    except OSError as error:
        raise InputError(f"{out}: {error}; wanted a place for a new file") from error
    finally:
        store.close()
    return count


def query_photos(folder: Path) -> Callable[[str, str], Path | None]:
    """Returns a function that finds query photos in a folder.

    Args:
      folder: photos that `sicot serve --keep-queries` keeps (REQUEST_ID-RANDOM.photo), or photos
        named by their query_image_id (ID.jpg, any suffix).

    Returns:
      (request_id, query_image_id) -> path of the photo; None where there is not exactly one. A
      photo named by the request goes before one named by the image.

    Raises:
      InputError: `folder` is no folder.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no folder, wanted that of `sicot serve --keep-queries`, or of photos named "
            "by query_image_id"
        )
    paths_of: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        name = path.stem.rpartition("-")[0] if path.suffix == ".photo" else path.stem
        paths_of.setdefault(name, []).append(path)

    def find_photo(request_id: str, query_image_id: str) -> Path | None:
        paths = paths_of.get(request_id) or paths_of.get(query_image_id) or []
        return paths[0] if len(paths) == 1 else None

    return find_photo
