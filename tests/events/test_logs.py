"""Page-view logs of other systems as events: what is read, what is left out and why, and that half
a result never stays.
"""

import gzip
import json
import signal
import subprocess
import sys
import time

import duckdb
import pyarrow as pa
import pytest
from pyarrow import parquet

from sicot_jax.cli import main as cli
from sicot_jax.errors import InputError
from sicot_jax.events import duckdb_engine, simulator, store
from sicot_jax.events.log_readers import LogSettings
from sicot_jax.events.logs import import_logs
from sicot_jax.events.simulator import LogNoise
from sicot_jax.events.store import Event, EventStore

HEADER = "event_id,request_id,time,visitor,variant,kind,query_image_id,sku,shown"
T = 1_700_000_000
SOME = LogSettings(max_bad_share=1, threads=1)


def rows_of(folder):
    return [
        Event(**{**row, "shown": tuple(row["shown"])})
        for row in parquet.read_table(folder / "events.parquet", partitioning=None).to_pylist()
    ]


def table_rows(folder):
    """Returns the rows of the report's table: first cell -> the others."""
    lines = (folder / "report.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return {row[0]: row[1:] for row in rows}


def csv_of(tmp_path, *rows, header=HEADER):
    path = tmp_path / "log.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


GOOD = (
    f"e1,r1,{T},v1,a,impression,q1,,x|y",
    f"e2,r1,{T + 5},v1,a,click,q1,y,",
    'e3,r2,2023-11-14T22:13:20Z,v2,a,impression,q2,,"[""x"",""z""]"',
)


def test_a_log_that_is_right(tmp_path, capsys):
    """A list split at bars or written as JSON, a time in seconds or by its name (1.7e9 is
    2023-11-14 22:13:20).
    """
    log, out = csv_of(tmp_path, *GOOD), tmp_path / "out"
    assert cli.main(["events", "import", str(log), "--out", str(out), "--threads", "1"]) == 0
    line = capsys.readouterr().out.strip()
    assert line == (
        f"wrote {out / 'events.parquet'}: 3 rows, 3 events kept (2 impressions, 1 clicks, "
        "0 purchases); left out: none"
    )
    assert rows_of(out) == [
        Event("e1", "r1", T, "v1", "a", "impression", "q1", "", ("x", "y")),
        Event("e2", "r1", T + 5, "v1", "a", "click", "q1", "y", ()),
        Event("e3", "r2", T, "v2", "a", "impression", "q2", "", ("x", "z")),
    ]
    assert sorted(path.name for path in out.iterdir()) == ["events.parquet", "report.md"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["logs [2024]", "*", "sku=1", "kind=b's"])
def test_the_path_of_a_log_is_no_pattern_and_no_column(tmp_path, name):
    """DuckDB would read the log of the folder beside it too, or every SKU as 1."""
    folders = tmp_path / name, tmp_path / "logs2"
    for folder in folders:
        folder.mkdir()
        import_logs([csv_of(folder, *GOOD)], folder / "from_csv", SOME)
        import_logs([folder / "from_csv" / "events.parquet"], folder / "again", SOME)
        lines = [
            json.dumps({**vars(event), "time": event.time}) for event in rows_of(folder / "again")
        ]
        (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
        import_logs([folder / "log.jsonl"], folder / "from_jsonl", SOME)
    for step in ("from_csv", "again", "from_jsonl"):
        events = rows_of(folders[0] / step)
        assert [event.event_id for event in events] == ["e1", "e2", "e3"], step
        assert (events[1].kind, events[1].sku) == ("click", "y"), step


def test_a_question_mark_in_the_path_of_the_result_is_refused(tmp_path):
    """DuckDB 2.0.1 puts the end of the name of its log of changes before it."""
    (tmp_path / "logs?").mkdir()
    with pytest.raises(InputError, match=r"takes what follows a \? .*; give an --out without one"):
        import_logs([csv_of(tmp_path, *GOOD)], tmp_path / "logs?" / "out", SOME)
    import_logs([csv_of(tmp_path / "logs?", *GOOD)], tmp_path / "out", SOME)
    assert len(rows_of(tmp_path / "out")) == 3


def test_a_compressed_log_and_blanks_in_its_header(tmp_path):
    header = HEADER.replace(",", " , ")
    plain = csv_of(tmp_path, *GOOD, header=header)
    packed = tmp_path / "log.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    import_logs([plain], tmp_path / "plain", SOME)
    import_logs([packed], tmp_path / "packed", SOME)
    assert rows_of(tmp_path / "packed") == rows_of(tmp_path / "plain")
    lines = [json.dumps({**vars(event), "time": T}) for event in rows_of(tmp_path / "plain")]
    (tmp_path / "log.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    import_logs([tmp_path / "log.jsonl.gz"], tmp_path / "lines", SOME)
    assert len(rows_of(tmp_path / "lines")) == 3
    packed.write_bytes(packed.read_bytes()[:40])
    with pytest.raises(InputError, match=r"log\.csv\.gz cannot be unpacked .*; copy it again"):
        import_logs([packed], tmp_path / "cut", SOME)


def test_skus_are_spelled_as_in_the_catalogue(tmp_path):
    """Unicode forms and kinds of blanks; numbers that went through floats."""
    rows = (
        f"e1,r1,{T},v1,a,impression,q1,,Stu\u0308hle\u00a01| y ",
        f"e2,r1,{T},v1,a,click,q1,\u00a0St\u00fchle 1,",
    )
    import_logs([csv_of(tmp_path, *rows)], tmp_path / "csv", SOME)
    first, second = rows_of(tmp_path / "csv")
    assert (first.shown, second.sku) == (("St\u00fchle 1", "y"), "St\u00fchle 1")
    common = {"request_id": "r", "time": T, "visitor": "v", "query_image_id": "q"}
    impression = {**common, "kind": "impression", "sku": None, "shown": [4006381333931.0, 1.5]}
    click = {**common, "kind": "click", "sku": 4006381333931.0, "shown": None}
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, (impression, click))))
    columns = {name: [impression[name], click[name]] for name in impression}
    columns["sku"] = pa.array([float("nan"), 4006381333931.0], from_pandas=False)
    parquet.write_table(pa.table(columns), tmp_path / "l.parquet")
    for name in ("l.jsonl", "l.parquet"):
        import_logs([tmp_path / name], tmp_path / f"of {name}", SOME)
        shown, clicked = rows_of(tmp_path / f"of {name}")
        assert (shown.shown, shown.sku) == (("4006381333931", "1.5"), "")
        assert clicked.sku == "4006381333931"


def test_threads_have_room_in_memory(tmp_path, monkeypatch):
    """As many threads as cores, but no more than the memory has room for."""
    monkeypatch.setattr(duckdb_engine, "_num_cores", lambda: 64)
    for threads, wanted in ((0, 12), (3, 3)):
        with duckdb_engine.open_duckdb(tmp_path, memory_mb=1000, threads=threads) as database:
            (found,) = database.execute("SELECT current_setting('threads')").fetchone()
        assert found == wanted


def test_too_little_memory_is_said_with_the_threads(tmp_path):
    with (
        pytest.raises(InputError, match="with 2 threads; give more, or fewer --threads"),
        duckdb_engine.open_duckdb(tmp_path, memory_mb=200, threads=2),
    ):
        raise duckdb.OutOfMemoryException("no memory")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("e9,r1,1,2", "no row of the table"),
        (f"e9,,{T},v1,a,click,q1,y,", "without request_id"),
        (f",r1,{T},v1,a,click,q1,y,", "without event_id"),
        (f"e9,r1,{T},,a,click,q1,y,", "without visitor"),
        (f"e9,r1,{T},v1,a,,q1,y,", "without kind"),
        (f"e9,r1,{T},v1,a,look,q1,y,", "of an unknown kind"),
        (f"e9,r1,{T},{'v' * 257},a,click,q1,y,", "with a text of more than 256 characters"),
        (f"e9,r1,{T},v\x071,a,click,q1,y,", "with a control character"),
        ("e9,r1,soon,v1,a,click,q1,y,", "without a time that can be read"),
        ("e9,r1,,v1,a,click,q1,y,", "without a time that can be read"),
        ("e9,r1,12,v1,a,click,q1,y,", "at an impossible time"),
        (f"e9,r1,{T}000,v1,a,click,q1,y,", "at an impossible time"),
        (f"e9,r1,{T},v1,a,impression,q1,,", "impressions with nothing shown"),
        (f"e9,r1,{T},v1,a,impression,q1,x,x|y", "impressions with a sku"),
        (f"e9,r1,{T},v1,a,click,q1,,", "clicks or purchases without sku"),
        (f"e9,r1,{T},v1,a,click,q1,x,x|y", "clicks or purchases with a list"),
        (f"e9,r1,{T},v1,a,impression,q1,,x||y", "with a bad SKU in the list"),
        (
            f"e9,r1,{T},v1,a,impression,q1,,{'|'.join(map(str, range(1001)))}",
            "with more than 1000 SKUs in a list",
        ),
        (f"e9,r1,{T},v1,a,click,q1,z,", "of an item never shown"),
        (f"e9,r9,{T},v1,a,click,q1,x,", "of an item never shown"),
        (f"e9,r1,{T - 1},v1,a,click,q1,x,", "before their impression"),
        (f"e9,r1,{T - 1},v1,a,purchase,q1,x,", "before their impression"),
        (f"e2,r1,{T + 9},v1,a,click,q1,y,", "with the event_id of another event"),
    ],
)
def test_a_row_that_is_wrong(tmp_path, row, reason):
    """Left out, counted, and named in the report; the others stay."""
    report = import_logs([csv_of(tmp_path, *GOOD, row)], tmp_path / "out", SOME)
    assert report.bad == {reason: 1}
    assert report.rows == 4
    assert not report.left_out
    assert report.examples[reason] == [
        "log.csv: line 5" if reason == "no row of the table" else "log.csv: row 4"
    ]
    assert len(rows_of(tmp_path / "out")) == 3
    assert table_rows(tmp_path / "out")[reason][:3] == ["1", "25.00", "yes"]
    assert table_rows(tmp_path / "out")[reason][3].startswith("log.csv: ")


def test_the_same_event_again_is_left_out_and_not_bad(tmp_path):
    first = csv_of(tmp_path, *GOOD, GOOD[1])
    second = tmp_path / "second.csv"
    second.write_text(f"{HEADER}\n{GOOD[0]}\n")
    report = import_logs([first, second], tmp_path / "out", LogSettings(max_bad_share=0, threads=1))
    assert report.left_out == {"repeated": 2}
    assert not report.bad
    assert report.examples["repeated"] == ["log.csv: row 4", "second.csv: row 1"]


def test_events_with_only_the_required_fields(tmp_path):
    """A thousand impressions without a SKU before the first click."""
    line = {
        "request_id": "r",
        "time": T,
        "visitor": "v",
        "kind": "impression",
        "query_image_id": "q",
    }
    page_views = [line | {"request_id": f"r{n}", "shown": ["a", "b"]} for n in range(1_100)]
    tap = line | {"request_id": "r5", "kind": "click", "sku": "b", "shown": None}
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, [*page_views, tap])))
    import_logs([log], tmp_path / "out", LogSettings(max_bad_share=1, threads=1))
    listed = rows_of(tmp_path / "out")
    assert len(listed) == 1_101
    assert [event.sku for event in listed if event.kind == "click"] == ["b"]


def test_columns_and_words_of_another_system(tmp_path):
    """No event_id and no variant, numbers as SKUs, times in milliseconds, other field names; lines
    that are no JSON are bad.
    """
    page_view = {
        "page": 7,
        "ts": T * 1000,
        "who": "v",
        "what": "view",
        "photo": "q",
        "item": None,
        "shown": [1, 2],
    }
    tap = page_view | {"what": "tap", "item": 2, "shown": None}
    log = tmp_path / "log.jsonl"
    log.write_text(
        "\n".join([json.dumps(page_view), json.dumps(tap), "{broken", "[1]", json.dumps(tap)])
        + "\n"
    )
    names = [
        "request_id=page",
        "time=ts",
        "visitor=who",
        "kind=what",
        "query_image_id=photo",
        "sku=item",
    ]
    flags = [flag for name in names for flag in ("--column", name)] + [
        "--time-unit",
        "ms",
        "--max-bad-share",
        "1",
    ]
    flags += [
        "--kind-name",
        "impression=view",
        "--kind-name",
        "click=tap",
        "--variant",
        "shop",
        "--threads",
        "1",
    ]
    assert cli.main(["events", "import", str(log), "--out", str(tmp_path / "out"), *flags]) == 0
    first, second = rows_of(tmp_path / "out")
    assert (first.request_id, first.time, first.kind, first.shown) == (
        "7",
        T,
        "impression",
        ("1", "2"),
    )
    assert (second.sku, second.variant, second.kind) == (
        "2",
        "shop",
        "click",
    )
    assert first.event_id != second.event_id
    table = table_rows(tmp_path / "out")
    assert table["no row of the table"][0] == "2"
    assert table["repeated"][0] == "1"


def test_parquet_and_the_file_of_the_service(tmp_path):
    """Both are read as they are; times of Parquet may be timestamps, lists may be texts."""
    import pyarrow as pa

    kept = EventStore(tmp_path / "events.sqlite")
    listed = [
        Event("e1", "r1", T, "v1", "a", "impression", "q1", "", ("x", "y")),
        Event("e2", "r1", T + 5.5, "v1", "a", "click", "q1", "y"),
    ]
    kept.add(listed)
    kept.close()
    import_logs([tmp_path / "events.sqlite"], tmp_path / "first", SOME)
    assert rows_of(tmp_path / "first") == listed
    import_logs([tmp_path / "first" / "events.parquet"], tmp_path / "second", SOME)
    assert rows_of(tmp_path / "second") == listed
    table = parquet.read_table(tmp_path / "first" / "events.parquet")
    times = pa.array([T * 1000, T * 1000 + 5500], pa.timestamp("ms"))
    table = table.set_column(2, "time", times).set_column(8, "shown", pa.array(["x|y", ""]))
    parquet.write_table(table, tmp_path / "other.parquet")
    import_logs([tmp_path / "other.parquet"], tmp_path / "third", SOME)
    assert rows_of(tmp_path / "third") == listed


@pytest.mark.parametrize(
    ("make", "flags", "said"),
    [
        (lambda p: csv_of(p, "a,b", header="request_id,time"), (),
         "no column visitor, kind, query_image_id, sku, shown;"),
        (lambda p: csv_of(p, *GOOD), ("--column", "sku=item"), "no column item; found"),
        (lambda p: csv_of(p, *GOOD), ("--column", "price=item"),
         "--column price: no field of an event"),
        (lambda p: csv_of(p, *GOOD), ("--kind-name", "look=view"), "--kind-name look: no kind"),
        (lambda p: csv_of(p, *GOOD), ("--time-unit", "h"), "--time-unit h, wanted"),
        (lambda p: csv_of(p, *GOOD), ("--memory-mb", "1"), "--memory-mb 1, wanted at least"),
        (lambda p: csv_of(p, *GOOD), ("--max-bad-share", "2"),
         "--max-bad-share 2.0, wanted a share"),
        (lambda p: csv_of(p, header=HEADER + ",sku"), (), "column 'sku' more than once"),
        (lambda p: csv_of(p), (), "no rows in it"),
        (lambda p: csv_of(p, *GOOD, f"e4,r1,{T},v1,a,click,q1,z,"), (),
         "25.0 % of 4 rows are bad, at most 5 %"),
        (lambda p: p / "none.csv", (), "no such file"),
        (lambda p: csv_of(p, *GOOD).rename(p / "log.txt"), (), "ends in '.txt', wanted"),
    ],
)  # fmt: skip
def test_logs_that_are_refused(tmp_path, capsys, make, flags, said):
    """One line, and nothing is left."""
    log = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert (
        cli.main(["events", "import", str(log), "--out", str(tmp_path / "out"), *flags])
        == cli.INPUT_ERROR
    )
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_noise_of_a_simulated_log_is_removed(tmp_path):
    """As many of each kind as counted by hand from the events themselves."""
    results = simulator.random_results(num_queries=20, num_products=400, num_positions=6)
    noise = LogNoise(duplicates=0.02, unshown_clicks=0.05, clock_errors=0.05, missing_fields=0.02)
    simulator.write_simulated_log(
        results, tmp_path / "log.parquet", noise=noise, num_requests=4_000
    )
    listed = list(simulator.simulate_events(results, noise=noise, num_requests=4_000))
    report = import_logs([tmp_path / "log.parquet"], tmp_path / "out", SOME)
    unique, seen = {}, {}
    for event in listed:
        if event.visitor and event.request_id:
            unique.setdefault(event.event_id, event)
    for event in unique.values():
        if event.kind == "impression":
            seen[event.request_id] = event
    done = [event for event in unique.values() if event.kind != "impression"]
    stray = [e for e in done if e.request_id not in seen or e.sku not in seen[e.request_id].shown]
    early = [e for e in done if e not in stray and e.time < seen[e.request_id].time]
    assert report.bad == {
        "of an item never shown": len(stray),
        "before their impression": len(early),
        "without visitor": sum(not e.visitor for e in listed),
        "without request_id": sum(not e.request_id for e in listed),
    }
    assert report.kept == len(unique) - len(stray) - len(early)
    assert all(
        store.parse_event({**vars(e), "shown": list(e.shown)}) == e
        for e in rows_of(tmp_path / "out")[:500]
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_a_stopped_import_leaves_nothing(tmp_path, number):
    results = simulator.random_results(num_queries=200, num_products=4000, num_positions=20)
    log, out = tmp_path / "log.parquet", tmp_path / "out"
    simulator.write_simulated_log(results, log, num_requests=60_000)
    # A test run in the background may have SIGINT ignored, which its children inherit.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from sicot_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "events", "import", str(log), "--out", str(out)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while (
        not list(tmp_path.glob(".out.*/work/*.staged"))
        and time.monotonic() < until
        and running.poll() is None
    ):
        time.sleep(0.01)
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert running.returncode in (cli.INTERRUPTED, 128 + number)
    assert err.strip() in (
        "interrupted",
        "",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]


def test_settings_are_checked():
    with pytest.raises(InputError, match="--split is empty"):
        LogSettings(split="")
