"""The run log: each step stands once after a resume; rate and time to go on a clock set by hand."""

import json

import pytest

from sicot_jax.training import logging as run_logging
from sicot_jax.training.logging import RunLog


class Clock:
    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(run_logging, "time", clock)
    return clock


def opened(workdir, *, start_step=0, total_steps=1000, batch_size=32, tensorboard=False):
    return RunLog(
        workdir,
        start_step=start_step,
        total_steps=total_steps,
        photos_before=lambda step: step * batch_size,
        tensorboard=tensorboard,
    )


def records(workdir):
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


def test_scalars_are_lines_of_json(tmp_path):
    log = opened(tmp_path)
    log.write_scalars(3, "validation", {"overall_top1": 12.5})
    assert records(tmp_path) == [
        {"step": 3, "kind": "validation", "overall_top1": 12.5}
    ]  # before it is closed: a kill loses nothing
    log.write_scalars(4, "train", {"total": float("nan")})
    log.close()
    assert len(records(tmp_path)) == 2


def test_resumed_log_drops_later_records_and_half_lines(tmp_path):
    log = opened(tmp_path)
    for step in (10, 20, 30):
        log.write_scalars(step, "train", {"total": float(step)})
    log.write_scalars(20, "validation", {"overall_top1": 1.0})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 15, "kind": "tra')  # cut off by a kill
    log = opened(tmp_path, start_step=20)
    log.write_scalars(30, "train", {"total": -1.0})
    log.close()
    assert [(r["step"], r["kind"], r.get("total")) for r in records(tmp_path)] == [
        (10, "train", 10.0),
        (20, "train", 20.0),
        (20, "validation", None),
        (30, "train", -1.0),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl"]


def test_a_run_from_the_start_drops_everything(tmp_path):
    log = opened(tmp_path)
    log.write_scalars(1, "train", {"total": 1.0})
    log.close()
    opened(tmp_path).close()
    assert records(tmp_path) == []


def test_rate_and_time_to_go(tmp_path, clock, capsys):
    """10 steps with compilation in 100 s, 10 in 5 s, 10 in 10 s: 10, 0.5, then 0.7 * 0.5 + 0.3 * 1
    = 0.65 s a step.
    """
    log = opened(tmp_path, start_step=100, total_steps=1000)
    for step, seconds in [(110, 100), (120, 5), (130, 10)]:
        clock.now += seconds
        log.progress(step, {"total": 2.0, "visual": 1.5})
    log.close()
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[0] == "step 110/1000  total 2.000  visual 1.500  3 images/s  148:20 to go"
    )  # 890 * 10 s
    assert (
        lines[1] == "step 120/1000  total 2.000  visual 1.500  64 images/s  7:20 to go"
    )  # 880 * 0.5 s
    assert (
        lines[2] == "step 130/1000  total 2.000  visual 1.500  49 images/s  9:25 to go"
    )  # 870 * 0.65 s
    assert [r["images_per_second"] for r in records(tmp_path)] == [3.2, 64.0, 49.2]


def test_pauses_do_not_count(tmp_path, clock, capsys):
    log = opened(tmp_path, total_steps=40)
    clock.now += 10
    log.pause_clock()
    clock.now += 500
    log.resume_clock()
    clock.now += 10
    log.progress(20, {"total": 1.0})
    log.progress(20, {"total": 1.0})  # the same step again divides by nothing
    log.close()
    assert (
        capsys.readouterr().err.splitlines()
        == ["step 20/40  total 1.000  32 images/s  0:20 to go"] * 2
    )


def test_last_step_has_nothing_to_go(tmp_path, clock, capsys):
    log = opened(tmp_path, total_steps=4)
    clock.now += 2
    log.progress(4, {"total": 0.25})
    log.message("done")
    log.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 4/4  total 0.250  64 images/s  0:00 to go",
        "done",
    ]


def test_tensorboard_events_are_written(tmp_path):
    pytest.importorskip("tensorboardX")
    log = opened(tmp_path, tensorboard=True)
    log.write_scalars(1, "train", {"total": 1.0})
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/total" in events.read_bytes()
