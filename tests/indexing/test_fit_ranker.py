"""`sicot index rank`: from events and query photos to the order of similar products."""

import json
import logging
import time
import zlib

import pytest
from helpers.made_photos import jpeg, photo, sku
from helpers.small_index import GOOD, NUM_IMPRESSIONS, PRODUCTS, record_visits

from sicot_jax.cli import main as cli
from sicot_jax.events.bots import BotLimits
from sicot_jax.events.store import Event, EventStore
from sicot_jax.index.storage import layout
from sicot_jax.indexing import fit_ranker
from sicot_jax.indexing.fit_ranker import shown_lists
from sicot_jax.indexing.update import remove_products
from sicot_jax.indexing.verify import verify_version
from sicot_jax.search.ranker import read_ranker
from sicot_jax.serve.settings import ServiceSettings

testclient = pytest.importorskip("fastapi.testclient", reason="the service needs its extra")
pytest.importorskip("lightgbm", reason="the ranker needs the service's extra")

from sicot_jax.serve.app import create_app  # noqa: E402


@pytest.fixture
def rated(index, tmp_path, monkeypatch):
    """(index, events, photos): visitors examine all of a list and click on the good products."""
    monkeypatch.setattr(fit_ranker, "MIN_CLICKED_LISTS", 20)
    return index, *record_visits(index, tmp_path)


def run(rated, *more):
    index, events, photos = map(str, rated)
    return cli.main(
        ["index", "rank", "--index", index, "--events", events, "--queries", photos, *more]
    )


def settings(index):
    return ServiceSettings(index=str(index), engine="jax", max_batch=2, reload_seconds=0.05)


def recognize(client, product, **params):
    response = client.post(
        "/v1/search", files={"photo": jpeg(photo(product, 99))}, params={"similar": 6, **params}
    )
    return response.json()


def test_ranker_follows_clicks(rated, capsys, caplog):
    """The running service picks up the ranker; `rerank=false` gives the order by similarity."""
    index = rated[0]
    with testclient.TestClient(create_app(settings(index))) as client:
        before = recognize(client, 2, any_category=True)
        assert before["ranker"] is None
        assert run(rated) == 0
        said = capsys.readouterr().out
        assert said.index("rating") < said.index("similarity")  # what mattered most comes first
        for _ in range(100):
            after = recognize(client, 2, any_category=True)
            if after["ranker"]:
                break
            time.sleep(0.05)
        ranker = read_ranker(layout.current_version(index) / layout.RANKER)
        assert after["ranker"] == ranker.version[:12]
        assert ranker.version[:12] in said
        assert {match["sku"] for match in after["similar"][:2]} == set(map(sku, GOOD))
        likeness = recognize(client, 2, any_category=True, rerank=False)
        assert likeness["similar"] == before["similar"]
        assert likeness["ranker"] is None
        assert sorted(s["sku"] for s in after["similar"]) == sorted(
            s["sku"] for s in before["similar"]
        )
        # The good ones of twice as many as are shown.
        assert next(
            match["sku"] for match in recognize(client, 2, similar=2, category="kind 0")["similar"]
        ) == sku(4)
        remove_products(index, [sku(4)])
        time.sleep(0.3)
        assert recognize(client, 2, any_category=True)["similar"][0]["sku"] == sku(1)
    report = ranker.report
    assert report["lists"] == NUM_IMPRESSIONS
    assert report["ndcg_difference"][1] > 0
    assert report["ndcg"] == pytest.approx(
        report["ndcg_by_similarity"] + report["ndcg_difference"][0]
    )
    assert report["importance"]["rating"]["ndcg_loss"] == max(
        m["ndcg_loss"] for m in report["importance"].values()
    )
    assert report["importance"]["sales"]["known"] == 0
    assert report["importance"]["price"]["known"] == 1
    assert verify_version(layout.current_version(index), checksums=True) == []


def test_damaged_ranker_is_ignored_with_one_line(rated, caplog):
    index = rated[0]
    assert run(rated) == 0
    path = layout.current_version(index) / layout.RANKER
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recognizer": "another"}))
    with (
        caplog.at_level(logging.ERROR),
        testclient.TestClient(create_app(settings(index))) as client,
    ):
        answer = recognize(client, 2, any_category=True)
    assert answer["ranker"] is None
    assert answer["similar"][0]["sku"] == sku(2)
    said = [record.getMessage() for record in caplog.records if "ranked" in record.getMessage()]
    assert len(said) == 1
    assert "sha256" in said[0]
    assert "\n" not in said[0]
    assert "sha256" in verify_version(layout.current_version(index))[0]


def test_lists_without_a_query_photo_are_left_out(rated, capsys):
    for path in rated[2].glob("*.photo"):
        if zlib.crc32(path.stem.partition("-")[0].encode()) % 3 == 0:
            path.unlink()
    next(rated[2].glob("*.photo")).write_bytes(b"no photo")
    assert run(rated) == 0
    there = len(list(rated[2].glob("*.photo")))
    assert f"left out: {NUM_IMPRESSIONS - there}" in capsys.readouterr().out
    for path in rated[2].glob("*.photo"):
        path.unlink()
    assert run(rated) == 2
    said = capsys.readouterr().err
    assert "0 lists" in said
    assert f"0 of {NUM_IMPRESSIONS}" in said
    assert "--keep-queries" in said


def test_ranker_no_better_than_similarity_is_not_written(rated, tmp_path, capsys):
    """Visitors click on the most similar product alone."""
    store = EventStore(tmp_path / "other.sqlite")
    for n in range(NUM_IMPRESSIONS):
        who = {"request_id": f"r{n}", "visitor": f"v{n % 97}", "variant": "a", "time": 1e9 + n}
        shown = tuple(sku((n + p) % PRODUCTS) for p in range(PRODUCTS))
        store.add([Event(f"i{n}", kind="impression", shown=shown, **who)])
        store.add([Event(f"c{n}", kind="click", sku=sku(n % PRODUCTS), **who)])
    store.close()
    assert run((rated[0], tmp_path / "other.sqlite", rated[2])) == 2
    assert "not shown to be better" in capsys.readouterr().err
    assert not (layout.current_version(rated[0]) / layout.RANKER).exists()


def test_shown_lists_by_hand():
    """Clicks before the impression, repeated, on products not shown; a purchase; and a bot."""

    def event(number, kind, request="r", visitor="v", time=1e9, **more):
        return Event(f"{number}", request, time, visitor, "a", kind, **more)

    events = [
        event(0, "click", sku="b"),
        event(1, "impression", shown=("a", "b", "a", "c")),
        event(2, "click", sku="b"),
        event(3, "click", sku="z"),
        event(4, "purchase", sku="c"),
        event(5, "click", sku="c"),
        event(6, "click", "lost", sku="a"),
        event(7, "impression", "before", time=9e8, shown=("a",)),
    ]
    events += [
        event(f"bot{n}", "impression", f"bot{n}", "bot", shown=("a",))
        for n in range(BotLimits().max_views_per_day + 1)
    ]
    before, shown_list = shown_lists(events)
    assert (before.request_id, before.gain) == ("before", {})
    assert (shown_list.shown, shown_list.gain) == (("a", "b", "c"), {"b": 1.0, "c": 5.0})
    lenient = BotLimits(max_views_per_day=1000, min_interval=0)
    assert "bot0" in {entry.request_id for entry in shown_lists(events, lenient)}
