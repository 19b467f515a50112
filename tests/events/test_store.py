"""The schema of events, their SQLite file and its export."""

import contextlib
import sqlite3
import subprocess
import sys

import pytest

from sicot_jax.cli import main as cli
from sicot_jax.errors import InputError
from sicot_jax.events import store as events
from sicot_jax.events.store import Event, EventStore, query_photos
from sicot_jax.serve.state import QueryStore


def impression(**changes):
    fields = {
        "event_id": "e1", "request_id": "r1", "time": 1e9, "visitor": "v1", "variant": "a",
        "kind": "impression", "query_image_id": "00ff", "shown": ["x", "y"],
    }  # fmt: skip
    return {name: value for name, value in {**fields, **changes}.items() if value is not None}


def click(**changes):
    return impression(**{"kind": "click", "event_id": "e2", "sku": "y", "shown": None, **changes})


def test_events_come_back_as_they_were(tmp_path):
    """In the order of time, whatever order they came in; again is not twice, and does not change
    the first.
    """
    store = EventStore(tmp_path / "events.sqlite")
    first, second = events.parse_event(impression()), events.parse_event(click(time=1e9 + 5))
    assert store.add([second, first]) == 2
    assert store.add([first, events.parse_event(click(sku="other"))]) == 0
    assert list(store) == [first, second]
    assert first.shown == ("x", "y")
    store.close()
    again = EventStore(tmp_path / "events.sqlite")
    assert list(again) == [first, second]
    again.close()


def test_events_as_parquet(tmp_path, capsys):
    """Every field in the order of time; nothing is overwritten, and no file of events is created
    where none is.
    """
    from pyarrow import parquet

    path, out = tmp_path / "events.sqlite", tmp_path / "events.parquet"
    store = EventStore(path)
    store.add(
        [events.parse_event(click(time=1e9 + 5)), events.parse_event(impression())]
    )  # and the service goes on
    assert cli.main(["events", "export", "--events", str(path), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == f"wrote {out}: 2 events"
    assert [
        Event(**row | {"shown": tuple(row["shown"])}) for row in parquet.read_table(out).to_pylist()
    ] == list(store)
    store.close()
    other = tmp_path / "other.sqlite"
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE products (sku TEXT)")
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(path.read_bytes()[:4096] + bytes(4096))

    def files():  # but for SQLite's -shm and -wal files of a database that it cannot read
        return sorted(
            path for path in tmp_path.iterdir() if not path.name.endswith(("-shm", "-wal"))
        )

    new = tmp_path / "new"
    for wrong, said in (
        ((path, out), "exists"),
        ((other, new), "no such table: events"),
        ((damaged, new), "damaged"),
        ((tmp_path / "none", new), "no such file"),
        ((path, tmp_path / "no" / "new"), "wanted a place"),
    ):
        before = files()
        assert (
            cli.main(["events", "export", "--events", str(wrong[0]), "--out", str(wrong[1])])
            == cli.INPUT_ERROR
        )
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1
        assert files() == before


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (impression(event_id=None), "event_id=None: wanted a text"),
        (impression(visitor=""), "visitor='': wanted a text"),
        (impression(visitor="x" * 257), "wanted a text of 1 to 256"),
        (impression(visitor="a\nb"), "wanted a text"),
        (impression(visitor="\ud800"), "wanted a text"),
        (impression(kind="look"), "kind='look', wanted one of impression, click, purchase"),
        (impression(time="now"), "time='now', wanted seconds"),
        (impression(time=float("nan")), "wanted seconds"),
        (impression(time=-1), "wanted seconds"),
        (impression(shown=[]), "an impression has the SKUs"),
        (impression(sku="x"), "an impression has the SKUs"),
        (impression(shown="xy"), "shown: wanted a list"),
        (impression(shown=[1]), "shown: wanted SKUs"),
        (impression(shown=["x"] * 1001), "at most 1000"),
        (click(sku=None), "a click has the sku"),
        (click(shown=["x"]), "a click has the sku"),
        (impression(price=1), "price: no field of an event"),
    ],
)
def test_an_event_that_is_none_is_refused(values, said):
    with pytest.raises(InputError, match=said):
        events.parse_event(values)


def test_events_have_defaults():
    assert events.parse_event(click(query_image_id=None)) == Event(
        "e2", "r1", 1e9, "v1", "a", "click", "", "y", ()
    )


def test_events_need_neither_jax_nor_the_service():
    program = """
import importlib, pkgutil, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("jax", "flax", "fastapi", "faiss", "torch"):
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
import sicot_jax.events
for module in pkgutil.iter_modules(sicot_jax.events.__path__):
    importlib.import_module("sicot_jax.events." + module.name)
from sicot_jax.events import simulator
results = simulator.random_results(num_queries=2, num_products=9, num_positions=3)
assert list(simulator.simulate_events(results, num_requests=3))
above = ("sicot_jax.serve", "sicot_jax.index", "sicot_jax.search")
assert not any(name.startswith(above) for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_events_are_read_from_parquet_as_from_the_service(tmp_path):
    """A file of `sicot events export`, or the folder of an import."""
    store = EventStore(tmp_path / "events.sqlite")
    written = [
        Event("1", "r", 5.0, "v", "a", "impression", "q", shown=("x", "y")),
        Event("2", "r", 6.0, "v", "a", "click", "q", sku="y"),
    ]
    store.add(written)
    store.close()
    (tmp_path / "folder").mkdir()
    events.export_events(tmp_path / "events.sqlite", tmp_path / "folder" / events.EVENTS_FILE)
    for path in (
        tmp_path / "events.sqlite",
        tmp_path / "folder",
        tmp_path / "folder" / events.EVENTS_FILE,
    ):
        assert list(events.open_events(path)) == written
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match="wanted events of `sicot events import`"):
        list(events.open_events(tmp_path / "bad.parquet"))
    with pytest.raises(InputError, match="no such file, wanted events of"):
        events.open_events(tmp_path)


def test_the_request_goes_before_the_name_and_two_are_none(tmp_path):
    folder = tmp_path / "kept"
    queries = QueryStore(folder, days=1)
    for request in ("r-1", "r2", "r2"):
        queries.save(request, b"")
    for name in ("q1.jpg", "q2.jpg", "q2.png"):
        (folder / name).touch()
    find = query_photos(folder)
    assert find("r-1", "q1").name.startswith("r-1-")
    assert find("r2", "q1") is None  # two photos under one id: which one is not known
    assert find("r3", "q1").name == "q1.jpg"
    assert find("r3", "q2") is find("r3", "q3") is find("", "") is None
    with pytest.raises(InputError, match="no folder, wanted that of `sicot serve --keep-queries`"):
        query_photos(folder / "q1.jpg")
