"""Events, keys and kept queries: what the service writes down."""

import contextlib
import os
import sqlite3
import time

import pytest

from sicot_jax import cli
from sicot_jax.errors import InputError
from sicot_jax.serve import events, keys
from sicot_jax.serve.events import Event, Events
from sicot_jax.serve.queries import Queries


def impression(**changes):
    fields = {
        "event_id": "e1", "request_id": "r1", "time": 1e9, "visitor": "v1", "variant": "a", "kind": "impression",
        "query_image_id": "00ff", "shown": ["x", "y"],
    }  # fmt: skip
    return {name: value for name, value in {**fields, **changes}.items() if value is not None}


def click(**changes):
    return impression(**{"kind": "click", "event_id": "e2", "sku": "y", "shown": None, **changes})


def test_events_come_back_as_they_were(tmp_path):
    """In the order of time, whatever order they came in; again is not twice, and does not change the first."""
    store = Events(tmp_path / "events.sqlite")
    first, second = events.parse(impression()), events.parse(click(time=1e9 + 5))
    assert store.add([second, first]) == 2
    assert store.add([first, events.parse(click(sku="other"))]) == 0
    assert list(store) == [first, second] and first.shown == ("x", "y")
    store.close()
    again = Events(tmp_path / "events.sqlite")
    assert list(again) == [first, second]
    again.close()


def test_events_as_parquet(tmp_path, capsys):
    """Every field in the order of time; nothing is overwritten, and no file of events is made where none is."""
    from pyarrow import parquet

    path, out = tmp_path / "events.sqlite", tmp_path / "events.parquet"
    store = Events(path)
    store.add([events.parse(click(time=1e9 + 5)), events.parse(impression())])  # and the service goes on
    assert cli.main(["events", "export", "--events", str(path), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == f"wrote {out}: 2 events"
    assert [Event(**row | {"shown": tuple(row["shown"])}) for row in parquet.read_table(out).to_pylist()] == list(store)
    store.close()
    other = tmp_path / "cards.sqlite"
    with contextlib.closing(sqlite3.connect(other)) as made:
        made.execute("CREATE TABLE cards (sku TEXT)")
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(path.read_bytes()[:4096] + bytes(4096))

    def files():  # but for what SQLite leaves beside a file that it cannot read
        return sorted(path for path in tmp_path.iterdir() if not path.name.endswith(("-shm", "-wal")))

    for wrong, said in (((path, out), "exists"), ((other, tmp_path / "new"), "no such table: events"),
                        ((damaged, tmp_path / "new"), "damaged"), ((tmp_path / "none", tmp_path / "new"), "no such file"),
                        ((path, tmp_path / "no" / "new"), "wanted a place")):  # fmt: skip
        before = files()
        assert cli.main(["events", "export", "--events", str(wrong[0]), "--out", str(wrong[1])]) == cli.INPUT_ERROR
        err = capsys.readouterr().err
        assert said in err and len(err.splitlines()) == 1 and files() == before


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (impression(event_id=None), "event_id=None: wanted a text"),
        (impression(visitor=""), "visitor='': wanted a text"),
        (impression(visitor="x" * 201), "wanted a text of 1 to 200"),
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
        events.parse(values)


def test_events_have_defaults():
    assert events.parse(click(query_image_id=None)) == Event("e2", "r1", 1e9, "v1", "a", "click", "", "y", ())


def test_keys(tmp_path, capsys):
    """Made by the command, kept as a hash that others cannot read, found by name."""
    path = tmp_path / "keys"
    made = []
    for name in ("shop", "app"):
        assert cli.main(["serve-key", name, "--file", str(path)]) == 0
        made.append(capsys.readouterr().out.split("\n")[0])
    stored = keys.read_keys(path)
    assert [stored.name_of(key) for key in made] == ["shop", "app"]
    assert stored.name_of("") is stored.name_of(made[0] + "x") is None
    assert not any(key in path.read_text() for key in made) and path.stat().st_mode & 0o077 == 0
    assert cli.main(["serve-key", "shop", "--file", str(path)]) == cli.INPUT_ERROR
    assert "shop has a key" in capsys.readouterr().err
    assert cli.main(["serve-key", "a b", "--file", str(path)]) == cli.INPUT_ERROR


def test_a_photo_that_cannot_be_kept_is_logged(tmp_path, caplog):
    kept = Queries(tmp_path / "kept", days=2)
    (tmp_path / "kept").rmdir()
    kept.keep("id", b"1")
    assert "id not kept" in caplog.text


def test_keys_are_added_to_a_file_that_was_edited(tmp_path):
    """Without an end of its last line; with comments alone."""
    path = tmp_path / "keys"
    path.write_text("# ours")
    made = [keys.add_key(path, "a")]
    path.write_text(path.read_text().rstrip("\n"))
    made.append(keys.add_key(path, "b"))
    assert [keys.read_keys(path).name_of(key) for key in made] == ["a", "b"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "shop 1234\n", f"a {'0' * 64}\na {'1' * 64}\n", "\x00\xff"])
def test_a_file_that_holds_no_keys(tmp_path, text):
    (tmp_path / "keys").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="wanted 'NAME SHA256'|no key in it|make keys"):
        keys.read_keys(tmp_path / "keys")
    with pytest.raises(InputError, match="make keys with"):
        keys.read_keys(tmp_path / "other")


def test_kept_photos_are_removed_after_their_days(tmp_path):
    kept = Queries(tmp_path / "kept", days=2)
    kept.keep("old", b"1")
    (old,) = (tmp_path / "kept").iterdir()
    long_ago = time.time() - 3 * 86_400
    os.utime(old, (long_ago, long_ago))
    for content in (b"2", b"3"):
        kept.keep("new", content)  # the same id twice: a client's choice
    kept.clean()  # within the hour: not yet
    assert old.exists()
    Queries(tmp_path / "kept", days=2)  # at the start
    assert sorted(path.read_bytes() for path in (tmp_path / "kept").iterdir()) == [b"2", b"3"]
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0
