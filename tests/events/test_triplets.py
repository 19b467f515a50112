"""Triplets from events: each rule by hand, and all of it against visitors whose truth is known."""

import math
import re

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from sicot_jax.cli import main as cli
from sicot_jax.errors import InputError
from sicot_jax.events import simulator, triplets
from sicot_jax.events.bots import BotLimits
from sicot_jax.events.simulator import BOT_PREFIX, TYPICAL_NOISE, ClickModel
from sicot_jax.events.store import Event, EventStore
from sicot_jax.events.triplet_tables import read_product_table
from sicot_jax.events.triplets import TripletSettings, make_triplets

DAY = 86_400
T = 20_000 * DAY  # a midnight


class Log:
    """Events by hand: a request at a time."""

    def __init__(self):
        self.events: list[Event] = []

    def add(self, visitor, query, shown, *clicks, bought=(), at=100.0, after=10.0, request=""):
        request = request or f"r{len(self.events)}"

        def event(time, kind, sku="", shown=()):
            self.events.append(
                Event(
                    f"e{len(self.events)}",
                    request,
                    T + time,
                    visitor,
                    "a",
                    kind,
                    query,
                    sku,
                    tuple(shown),
                )
            )

        event(at, "impression", shown=shown)
        for number, sku in enumerate(clicks, 1):
            event(at + number * after, "click", sku)
        for sku in bought:
            event(at + 100, "purchase", sku)
        return self

    def write(self, folder):
        store = EventStore(folder / "events.sqlite")
        store.add(self.events)
        store.close()

    def triplets(self, folder, **settings):
        self.write(folder)
        report = make_triplets(
            folder / "events.sqlite", folder / "t.parquet", TripletSettings(threads=1, **settings)
        )
        table = parquet.read_table(folder / "t.parquet")
        assert str(table.schema.field("weight").type) == "float"
        assert str(table.schema.field("clicked").type) == "string"
        rows = {
            (r["query_image_id"], r["clicked"], r["not_clicked"]): round(r["weight"], 4)
            for r in table.to_pylist()
        }
        assert len(rows) == table.num_rows == report.triplets
        return rows, report


def test_what_stands_above_a_click_and_next_to_it(tmp_path):
    """Of c, a and b were passed over, d lies next to it, e may not have been examined. A
    third of a click each.
    """
    rows, report = Log().add("v", "q", "abcde", "c").triplets(tmp_path)
    assert rows == {("q", "c", "a"): 0.3333, ("q", "c", "b"): 0.3333, ("q", "c", "d"): 0.3333}
    assert report.propensity.source.startswith("none")
    assert report.views == report.clicks == 1
    (first, *_) = sorted(
        parquet.read_table(tmp_path / "t.parquet").to_pylist(), key=lambda row: row["not_clicked"]
    )
    assert (first["clicked_position"], first["not_clicked_position"], first["bought"]) == (
        3,
        1,
        False,
    )


def test_max_skips(tmp_path):
    rows, _ = Log().add("v", "q", "abcde", "c").triplets(tmp_path, max_skips=1)
    assert rows == {("q", "c", "b"): 0.5, ("q", "c", "d"): 0.5}


def test_a_low_position_and_a_purchase_weigh_more(tmp_path):
    """r^-1: a third examine the third position, so a click there is worth 3, a purchase 2 * 3; at
    the fourth 3.5, not 4.
    """
    log = (
        Log()
        .add("v", "q", "abcd", "c")
        .add("w", "r", "abcd", bought="c")
        .add("x", "s", "abcd", "d")
    )
    rows, report = log.triplets(tmp_path, eta=1.0, purchase_weight=2.0, max_weight=3.5)
    assert {key: rows[key] for key in rows if key[2] == "a"} == {
        ("q", "c", "a"): 1.0, ("r", "c", "a"): 2.0, ("s", "d", "a"): 1.1667}  # fmt: skip
    assert report.purchases == 1
    assert report.clicks == 3


def test_what_the_same_query_clicks_elsewhere_is_no_negative(tmp_path):
    """Here b, by another visitor in another list of the query; for other queries it stays one."""
    log = Log().add("v", "q", "abcd", "c").add("w", "q", "bxyz", "b").add("u", "other", "bc", "c")
    rows, report = log.triplets(tmp_path)
    assert rows == {
        ("q", "c", "a"): 0.5, ("q", "c", "d"): 0.5, ("q", "b", "x"): 1.0,
        ("other", "c", "b"): 1.0}  # fmt: skip
    assert report.excluded["clicked with the same query"] == 1


def test_the_same_product_is_no_negative(tmp_path):
    (tmp_path / "products.csv").write_text("sku,product\na,1\nc,1\nb,2\n")
    rows, report = (
        Log().add("v", "q", "abcd", "c").triplets(tmp_path, products=tmp_path / "products.csv")
    )
    assert set(rows) == {("q", "c", "b"), ("q", "c", "d")}
    assert report.excluded["the same product as the clicked one"] == 1


def test_product_tables_are_text(tmp_path):
    """SKUs that are equal as numbers are different ones; one text among numbers is no error."""
    shown = ("100000", "1E5", "1e05", "0012", "12", "1.1", "1.10", "x\u00a0y")
    table = "sku,product\n" + "".join(f"{sku},{n}\n" for n, sku in enumerate(shown))
    path = tmp_path / "products.csv"
    path.write_text(table.replace("0012,3", "0012,007").replace("12,4", "12,7"))
    _, report = Log().add("v", "q", shown, "1.10").triplets(tmp_path, products=path)
    assert report.triplets == len(shown) - 1
    (tmp_path / "t.parquet").unlink()
    (tmp_path / "t.md").unlink()
    products = read_product_table(path).to_pylist()
    assert [row["sku"] for row in products] == [*shown[:-1], "x y"]
    pa_table = pa.table({"sku": [100000.0, float("nan")], "product": [1.0, 2.0]})
    parquet.write_table(pa_table.slice(0, 1), tmp_path / "p.parquet")
    assert read_product_table(tmp_path / "p.parquet").to_pylist() == [
        {"sku": "100000", "product": "1"}
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sku,product\na,1\na,2\n", "line 3: SKU 'a' is of product '2', and of '1' before"),
        ("sku,product\n4.00638E+12,1\n", "line 2: SKU in scientific notation"),
        ("sku,product\na\n", "line 2: wrong number of fields"),
        ("sku,code\na,1\n", "no column product"),
    ],
)
def test_product_tables_that_are_refused(tmp_path, text, said):
    (tmp_path / "products.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        read_product_table(tmp_path / "products.csv")


def test_what_happens_again_counts_once(tmp_path):
    """Two clicks at once, the list loaded again and clicked again, an impression of the request
    sent twice.
    """
    log = (
        Log()
        .add("v", "q", "abc", "b", "b")
        .add("v", "q", "abc", "b", at=500)
        .add("w", "q", "ab", request="r0", at=900)
    )
    rows, report = log.triplets(tmp_path)
    assert rows == {("q", "b", "a"): 0.5, ("q", "b", "c"): 0.5}
    assert report.views == 2
    assert report.clicks == 1


def test_clicks_that_cannot_be(tmp_path):
    """Of a thing that was not shown, or before it was."""
    log = Log().add("v", "q", "abc", "b", "x").add("w", "q", "abc", "c", after=-10)
    rows, report = log.triplets(tmp_path)
    assert rows == {("q", "b", "a"): 0.5, ("q", "b", "c"): 0.5}
    assert report.clicks == 1


def crawl(log, visitor, number, clicks="", *, apart=60.0):
    for i in range(number):
        log.add(visitor, f"q-{visitor}-{i}", "abcd", *clicks, at=100 + i * apart)
    return log


@pytest.mark.parametrize(
    ("visits", "clicks", "apart", "reason"),
    [
        (4, "", 60, "more than 3 lists a day"),
        (3, "ab", 60, "more than 5 clicks a day"),
        (1, "abc", 60, "clicks on more than 0.5 of what is shown"),
        (3, "", 0.5, "less than 1 s from one event to the next"),
    ],
)
def test_bots(tmp_path, visits, clicks, apart, reason):
    """One just beyond a limit, another just within all of them."""
    log = Log().add("v", "q", "abcd", "b").add("v", "q1", "abcd", "b", at=500)
    crawl(log, "bot", visits, clicks, apart=apart)
    _, report = log.triplets(
        tmp_path, bot_limits=BotLimits(3, 5, max_click_share=0.5, min_interval=1.0, min_events=3)
    )
    assert report.bots == {reason: 1}
    assert report.num_bots == 1
    assert report.bot_views == visits
    assert report.views == 2
    page = (tmp_path / "t.md").read_text()
    assert re.search(rf"\| {re.escape(reason)} +\| +1 \|", page)


def test_limits_are_of_a_day(tmp_path):
    log = Log()
    for day in range(3):
        log.add("v", f"q{day}", "abc", "b", at=day * DAY + 100)
    _, report = log.triplets(tmp_path, bot_limits=BotLimits(1, 1, min_events=2))
    assert report.bots == {}
    assert report.views == 3


def test_refused(tmp_path, capsys):
    """One line, and no file that was not there."""
    Log().add("v", "q", "abc", "b").triplets(tmp_path)
    (tmp_path / "none").mkdir()
    empty = EventStore(tmp_path / "empty.sqlite")
    empty.close()
    table = parquet.read_table(tmp_path / "t.parquet")
    parquet.write_table(table, tmp_path / "other.parquet")
    good, new = str(tmp_path / "events.sqlite"), str(tmp_path / "new.parquet")

    def files():  # but for the -shm and -wal files of SQLite
        return sorted(
            path for path in tmp_path.iterdir() if not path.name.endswith(("-shm", "-wal"))
        )

    for arguments, said in (
        ([good, "--out", str(tmp_path / "t.parquet")], "exists"),
        ([good, "--out", str(tmp_path / "t")], "t.md exists"),
        ([str(tmp_path / "nowhere"), "--out", new], "no such file"),
        ([str(tmp_path / "none"), "--out", new], "events.parquet: no such file"),
        ([str(tmp_path / "other.parquet"), "--out", new], "no column event_id"),
        ([str(tmp_path / "t.md"), "--out", new], "file is not a database"),
        ([str(tmp_path / "empty.sqlite"), "--out", new], "no triplet in 0 lists"),
        ([good, "--out", str(tmp_path / "no" / "new")], "wanted a place"),
        (
            [good, "--out", new, "--max-weight", "0.5"],
            "--max-weight 0.5, wanted at least 1",
        ),
        ([good, "--out", new, "--products", str(tmp_path / "no.csv")], "no.csv"),
        ([good, "--out", new, "--memory-mb", "5"], "--memory-mb 5"),
    ):
        before = files()
        assert cli.main(["events", "triplets", *arguments]) == cli.INPUT_ERROR, arguments
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1
        assert files() == before


def test_stopped_half_way(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(triplets, "estimate_propensity", stop)
    Log().add("v", "q", "abc", "b").add("w", "q", "bac", "b").write(tmp_path)
    before = sorted(tmp_path.iterdir())
    arguments = [
        "events",
        "triplets",
        str(tmp_path / "events.sqlite"),
        "--out",
        str(tmp_path / "t.parquet"),
    ]
    assert cli.main(arguments) == cli.INTERRUPTED
    assert [
        path
        for path in sorted(tmp_path.iterdir())
        if path.suffix not in (".sqlite-shm", ".sqlite-wal")
    ] == before


def test_against_the_simulator(tmp_path):
    """Bots found, propensities estimated, weights unbiased, nothing that the query clicked among
    the negatives.
    """
    results = simulator.random_results(num_queries=400, num_products=5_000, num_positions=8, seed=3)
    model, noise = ClickModel(eta=1.0, shuffled_share=0.3), TYPICAL_NOISE
    log = tmp_path / "log.parquet"
    simulator.write_simulated_log(results, log, model, noise, num_requests=40_000, seed=4)
    assert (
        cli.main(["events", "import", str(log), "--out", str(tmp_path / "in"), "--threads", "1"])
        == 0
    )
    settings = TripletSettings(max_weight=100, threads=1)
    report = make_triplets(tmp_path / "in", tmp_path / "t.parquet", settings)

    events = parquet.read_table(tmp_path / "in" / "events.parquet").to_pylist()
    bots = {event["visitor"] for event in events if event["visitor"].startswith(BOT_PREFIX)}
    assert report.num_bots == len(bots)
    assert len(bots) >= 4
    assert report.views == sum(
        e["kind"] == "impression" and e["visitor"] not in bots for e in events
    )

    truth = model.propensity(8)
    estimate = report.propensity
    error = np.log(estimate.propensity / truth)
    assert (np.abs(error) < 3.5 * estimate.log_error + 1e-9).all()
    assert np.abs(estimate.propensity / truth - 1).max() < 0.2

    click, shuffled = results.click_probability, model.shuffled_share
    relevance = click.mean(0) * (1 - shuffled) + click.mean() * shuffled
    rate = report.clicks_at / report.views_at
    # Clicks that the import leaves out.
    lost = (1 - noise.clock_errors) * (1 - noise.missing_fields) ** 1.5
    np.testing.assert_allclose(rate * report.weights / (relevance * lost), 1, atol=0.2)
    assert (
        rate[7] / relevance[7] < 0.2 < 0.8 < (rate * report.weights)[7] / relevance[7]
    )  # without weights far off

    rows = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    impression_of = {e["request_id"]: e for e in events if e["kind"] == "impression"}
    clicked = {
        (e["query_image_id"], e["sku"])
        for e in events
        if e["kind"] != "impression" and e["visitor"] not in bots
    }
    shown_for = {e["query_image_id"]: set() for e in impression_of.values()}
    for event in impression_of.values():
        shown_for[event["query_image_id"]].update(event["shown"])
    assert rows
    assert all((row["query_image_id"], row["clicked"]) in clicked for row in rows)
    assert not any((row["query_image_id"], row["not_clicked"]) in clicked for row in rows)
    assert all(row["not_clicked"] in shown_for[row["query_image_id"]] for row in rows)
    assert all(row["not_clicked_position"] <= row["clicked_position"] + 1 for row in rows)
    assert math.isfinite(sum(row["weight"] for row in rows))
    assert min(row["weight"] for row in rows) > 0


def test_the_same_events_give_the_same_triplets(tmp_path):
    results = simulator.random_results(num_queries=50, num_products=500, num_positions=6)
    simulator.write_simulated_log(results, tmp_path / "log.parquet", num_requests=500)
    for name, threads in (("a", 1), ("b", 2)):
        make_triplets(
            tmp_path / "log.parquet", tmp_path / f"{name}.parquet", TripletSettings(threads=threads)
        )
    assert parquet.read_table(tmp_path / "a.parquet").equals(
        parquet.read_table(tmp_path / "b.parquet")
    )
