"""Admission by the wait that is measured, on a clock of the test."""

import asyncio
import contextlib
import http.client
import io
import json
import threading
import time

import numpy as np
import pytest
from helpers.made_photos import jpeg, photo
from helpers.service_process import free_port, wait_until
from PIL import Image

from sicot_jax.serve import admission
from sicot_jax.serve.admission import Admission, BusyError, PhotoClock
from sicot_jax.serve.settings import ServiceSettings

testclient = pytest.importorskip("fastapi.testclient", reason="the service needs its extra")

from sicot_jax.serve.app import create_app  # noqa: E402
from sicot_jax.serve.shedding import SheddingProtocol  # noqa: E402


class Clock:
    """A clock that the test sets."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(admission, "time", made)
    return made


def test_work_is_no_wait(clock):
    waiting = PhotoClock(0.5)
    clock.now += 0.2
    with waiting.work():
        clock.now += 3.0
    assert waiting.waited == pytest.approx(0.2)
    clock.now += 2.3
    waiting.add_work(2.0)
    assert waiting.waited == pytest.approx(0.5)
    clock.now += 0.01
    assert waiting.expired
    with pytest.raises(BusyError), waiting.work():
        raise AssertionError("the work began")


def simulate(clock, *, service, rate, seconds, engine=0.0005, lag=0.0):
    """One server that works on one photo after the other, `service` seconds each, and photos that
    come at a rate.

    Returns:
      Waits of the answered photos, and how many were refused when they came, and later.
    """
    gate, answered, refused, late = Admission(0.5), [], 0, 0
    gate.lag = lag
    queue, free = [], clock.now
    start = clock.now
    for number in range(int(rate * seconds)):
        arrival = start + number / rate
        while queue and max(free, queue[0][0]) <= arrival:
            came, context, waiting = queue.pop(0)
            clock.now = max(free, came)
            try:
                with waiting.work():
                    clock.now += service
                answered.append(waiting.waited)
            except BusyError:
                late += 1
            free = clock.now
            context.__exit__(None, None, None)
        clock.now = arrival
        try:
            context = gate.photo(engine)
            queue.append((arrival, context, context.__enter__()))
        except BusyError:
            refused += 1
    return answered, refused, late


@pytest.mark.parametrize("factor", [2, 5, 10])
@pytest.mark.parametrize("service", [0.006, 0.025, 0.1], ids=["small", "large", "12 megapixels"])
def test_photos_are_refused_at_once_whatever_limits_the_service(clock, service, factor):
    """The engine takes 0.5 ms a photo: what it costs otherwise is found out by waiting."""
    answered, refused, late = simulate(clock, service=service, rate=factor / service, seconds=30)
    assert max(answered) <= 0.5
    assert len(answered) * service > 0.9 * 30  # it is never idle
    assert late < 0.1 * (len(answered) + 0.5 / service * factor)
    assert refused > 0.8 * (1 - 1 / factor) * (refused + late + len(answered))


def test_a_service_that_keeps_up_refuses_nothing(clock):
    answered, refused, late = simulate(clock, service=0.1, rate=8, seconds=60)
    assert (refused, late) == (0, 0)
    assert len(answered) > 470


def test_a_burst_after_photos_that_cost_more_is_admitted_again(clock):
    """What was learned of large photos does not refuse small ones for long."""
    gate = Admission(0.5)

    def burst(count, service):
        contexts = [gate.photo(0.0005) for _ in range(count)]
        admitted = []
        for context in contexts:
            with contextlib.suppress(BusyError):
                admitted.append((context, context.__enter__()))
        for context, waiting in admitted:
            with waiting.work():
                clock.now += service
            context.__exit__(None, None, None)
        return len(admitted)

    for _ in range(20):
        assert burst(5, 0.09) >= 4
    assert burst(50, 0.001) < 50
    for _ in range(10):
        admitted = burst(50, 0.001)
    assert admitted == 50


def test_time_before_the_service_sees_a_request_counts(clock):
    """Where the event loop is what is late."""
    gate = Admission(0.5)
    gate.pending = 10
    assert not gate.is_busy(0.001)
    gate.lag = 0.45
    assert gate.is_busy(0.001)
    gate.pending = 0
    with gate.photo(0.001) as waiting:
        assert waiting.waited == pytest.approx(0.45)


def test_the_lag_of_the_loop_is_measured():
    """Three turns of the loop; one stall counts for little."""

    async def scenario(stalls):
        gate, highest = Admission(0.5), 0.0
        task = asyncio.create_task(gate.watch_lag())
        for _ in range(stalls):
            await asyncio.sleep(0.001)
            time.sleep(0.15)
            await asyncio.sleep(0.001)
            highest = max(highest, gate.lag)
        task.cancel()
        return highest

    assert 0.02 < asyncio.run(scenario(1)) < 0.2
    assert asyncio.run(scenario(10)) > 0.25


def large_photo():
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((4000, 3000)).save(out, "JPEG")
    return out.getvalue()


@pytest.mark.parametrize("stage", ["decode", "engine", "search"])
def test_a_photo_that_waits_too_long_for_any_stage_gets_503(index, monkeypatch, stage):
    """Before that stage begins, with the service's threads busy elsewhere."""
    settings = ServiceSettings(index=str(index), engine="jax", max_batch=2, max_wait_seconds=0.2)
    with testclient.TestClient(create_app(settings)) as client:
        state, release = client.app.state.service, threading.Event()
        batcher = state.models.current.batcher
        blocked = {"decode": state.threads, "engine": batcher._threads, "search": state.threads}
        threads = blocked[stage]

        def block():
            waiting = [threads.submit(release.wait, 10) for _ in range(threads._max_workers)]
            timer = threading.Timer(0.5, release.set)
            timer.start()
            return waiting

        if stage == "search":
            call = batcher._call
            monkeypatch.setattr(batcher, "_call", lambda photos: (block(), call(photos))[1])
        elif stage == "engine":
            # Two calls that take long; the photo waits in the queue behind them.
            engine = batcher.engine
            monkeypatch.setattr(batcher, "engine", lambda photos: time.sleep(0.5) or engine(photos))
            others = [threading.Thread(target=post, args=(client,)) for _ in range(4)]
            for other in others:
                other.start()
            time.sleep(0.1)
        else:
            block()
        response = post(client)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["message"] == "busy; try again"
        release.set()
        if stage == "engine":
            for other in others:
                other.join()


def post(client, data=None):
    return client.post("/v1/recognize", files={"photo": data or jpeg(photo(1, 99))})


def test_the_own_work_of_a_large_photo_is_no_wait(index):
    """12 megapixels take longer to decode than a photo may wait."""
    settings = ServiceSettings(index=str(index), engine="jax", max_batch=2, max_wait_seconds=0.04)
    with testclient.TestClient(create_app(settings)) as client:
        data = large_photo()
        statuses = [post(client, data).status_code for _ in range(5)]
        assert 200 in statuses


def test_a_busy_service_refuses_before_it_reads_the_photo(index):
    settings = ServiceSettings(index=str(index), engine="jax", max_batch=2)
    with testclient.TestClient(create_app(settings)) as client:
        client.app.state.service.admission.pending = 10**6
        refused = client.post("/v1/search", content=b"", headers={"Content-Type": "image/png"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        assert 'route="/v1/search",status="503"' in client.get("/metrics").text
        client.app.state.service.admission.pending = 0


@contextlib.contextmanager
def served(app):
    """Yields the port of an app under the protocol of `sicot serve`."""
    import uvicorn

    port = free_port()
    config = uvicorn.Config(app, port=port, http=SheddingProtocol, loop="asyncio", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield port
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("prefix", ["", "/find"])
def test_a_busy_worker_refuses_by_the_first_bytes(index, monkeypatch, prefix):
    """A whole answer in the service's format, while megabytes are on their way; what monitors the
    service is answered, and photos again on the next connection.
    """
    settings = ServiceSettings(index=str(index), engine="jax", max_batch=2, root_path=prefix)
    app = create_app(settings)
    monkeypatch.setattr(SheddingProtocol, "is_busy", staticmethod(app.state.is_busy))
    monkeypatch.setattr(SheddingProtocol, "prefix", prefix)

    def answer(method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Content-Type": "image/jpeg"})
            response = connection.getresponse()
            return response.status, response.headers, json.loads(response.read())

    with served(app) as port:
        gate = app.state.service.admission
        gate.pending = 10**6
        status, headers, content = answer("POST", f"{prefix}/v1/recognize?k=1", b"\0" * 3_000_000)
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert headers["x-content-type-options"] == "nosniff"
        assert content["error"]["message"] == "busy; try again"
        assert content["error"]["request_id"] == headers["x-request-id"]
        assert answer("GET", f"{prefix}/healthz")[0] == answer("GET", f"{prefix}/readyz")[0] == 200
        gate.pending = 0
        assert answer("POST", f"{prefix}/v1/recognize?k=1", jpeg(photo(1, 99)))[0] == 200
