"""`sicot serve` as a process, over loopback."""

import base64
import concurrent.futures
import contextlib
import http.client
import json
import random
import signal
import socket
import threading
import time

import numpy as np
import pytest
from helpers.made_photos import jpeg, photo, sku
from helpers.service_process import PHOTO, Server, serving
from helpers.small_index import PRODUCTS, build_small_index, publish_copy

from sicot_jax.index.storage import layout

pytest.importorskip("uvicorn", reason="the service needs its extra")


@pytest.mark.slow
def test_a_request_that_runs_is_answered_before_the_end(index):
    """SIGTERM while photos are on their way: each is answered, nothing new is taken, the process
    ends by itself.
    """
    with serving(index) as server, concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(server.recognize) for _ in range(8)]
        concurrent.futures.wait(answers, return_when="FIRST_COMPLETED")
        assert server.stop() in (0, -signal.SIGTERM)
        statuses = []
        for answer in answers:
            with contextlib.suppress(OSError, http.client.HTTPException):  # not connected yet
                statuses.append(answer.result()[0])
        assert statuses
        assert set(statuses) == {200}
        assert not [line for line in server.lines if "Traceback" in line]


@pytest.mark.slow
def test_several_workers_count_together(index):
    with serving(index, "--workers", "2") as server:
        for _ in range(20):
            assert server.recognize()[0] == 200
        text = server.get("/metrics")[1].decode()
        assert 'sicot_requests_total{route="/v1/recognize",status="200"} 20.0' in text


@pytest.mark.slow
def test_a_port_that_is_taken_and_an_index_that_is_none(index, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = Server(index, "--port", str(taken.getsockname()[1]))
        assert server.process.wait(60) not in (0, None)
        server.stop()
        assert any("address already in use" in line for line in server.lines)
    server = Server(tmp_path)
    assert server.process.wait(60) == 2
    assert server.stop() == 2
    assert server.lines[-1].startswith(f"sicot serve: {tmp_path}: no product index there")


SIDES = ["0", "0.5", "1", "-1", "nan", "inf", "1e400", "0.01", "x", "%00", "%ed%a0%80", "9" * 5_000]
PNG = jpeg(np.zeros((8, 8, 3), np.uint8), "PNG")


def post(body, kind, path="/v1/recognize", length=None, more=""):
    """A POST request as bytes; `length` and `more` replace the true length and add headers."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: {kind}\r\n{more}"
    return (
        f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body
    )


def photo_requests(rng, noise, cut):
    """Constructors of photo uploads: valid, cut, damaged, in forms and with wrong lengths."""
    changed = bytearray(PHOTO)
    for _ in range(rng.randrange(1, 30)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    form = (
        b'--b\r\nContent-Disposition: form-data; name="photo"; filename="../../x\x00.jpg"\r\n\r\n'
        + cut
        + b"\r\n--b--\r\n"
    )
    sized = PNG[:16] + rng.randbytes(8) + PNG[24:]  # any width and height
    multipart = "multipart/form-data; boundary="
    return [
        lambda: (post(PHOTO, "image/jpeg"), "wait"),
        lambda: (post(cut, "image/jpeg"), "wait"),
        lambda: (post(bytes(changed), "image/jpeg"), "wait"),
        lambda: (post(noise, "image/png"), "wait"),
        lambda: (post(sized, "image/png"), "wait"),
        lambda: (post(form, f"{multipart}b"), "wait"),
        lambda: (post(form[: rng.randrange(len(form))], f"{multipart}b"), "wait"),
        lambda: (post(noise, f"{multipart}{'b' * rng.randrange(200)}"), "wait"),
    ]


def json_requests(rng, noise, cut):
    """Constructors of JSON bodies, valid and not, for photos and events."""
    encoded = base64.b64encode(cut).decode()
    lone_surrogate = b'[{"event_id": "\\ud800", "kind": 1}]'
    return [
        lambda: (post(b"[" * rng.randrange(50_000), "application/json"), "wait"),
        lambda: (post(json.dumps({"photo": encoded}).encode(), "application/json"), "wait"),
        lambda: (post(b'{"photo": ' + noise, "application/json"), "wait"),
        lambda: (post(noise, "application/json", "/v1/events"), "wait"),
        lambda: (post(b"[" * 100_000, "application/json", "/v1/events"), "wait"),
        lambda: (post(lone_surrogate, "application/json", "/v1/events"), "wait"),
    ]


def length_requests(cut):
    """Constructors of uploads whose length is not that of the body."""
    return [
        lambda: (post(cut, "image/jpeg", length=10**12), "wait"),
        lambda: (post(cut, "image/jpeg", length="-1"), "wait"),
        lambda: (post(cut, "image/jpeg", length=len(cut) + 1000), "leave"),
        lambda: (post(cut, "image/jpeg", more="Transfer-Encoding: chunked\r\n"), "wait"),
    ]


def parameter_requests(rng):
    """Constructors of requests with wrong parameters and paths."""

    def counts():
        return f"k={rng.randrange(-5, 300)}&similar={rng.choice('ax%9')}"

    def box():
        return f"box={','.join(rng.choices(SIDES, k=rng.choice([3, 4, 4, 5])))}"

    def category():
        return f"category={'%00' * rng.randrange(9)}..%2f"

    def image_number():
        return str(rng.randrange(-(10**30), 10**30)).encode()

    host = b" HTTP/1.1\r\nHost: x\r\n\r\n"
    return [
        lambda: (post(PHOTO, "image/jpeg", f"/v1/recognize?{counts()}"), True),
        lambda: (post(PHOTO, "image/jpeg", f"/v1/recognize?{box()}"), "wait"),
        lambda: (post(PHOTO, "image/jpeg", f"/v1/search?{category()}"), "wait"),
        lambda: (b"GET /v1/products/" + b"..%2f" * rng.randrange(60) + host, "wait"),
        lambda: (b"GET /v1/products/x/images/" + image_number() + b" HTTP/1.0\r\n\r\n", True),
    ]


def protocol_requests(rng, noise):
    """Constructors of what is not HTTP, or not as the service knows it."""
    long_header = b"GET / HTTP/1.1\r\nX: "
    return [
        lambda: (b"GET /" + noise.replace(b"\n", b"") + b" HTTP/1.1\r\nHost: x\r\n\r\n", "end"),
        lambda: (noise, "end"),
        lambda: (long_header + b"a" * rng.randrange(100_000) + b"\r\n\r\n", "wait"),
        lambda: (b"BREW /v1/recognize HTTP/1.1\r\nHost: x\r\n\r\n", "wait"),
    ]


def hostile(rng):
    """One request of a fixed mix, and what its sender does then, as `Server.raw` takes them."""
    noise = rng.randbytes(rng.randrange(2_000))
    cut = PHOTO[: rng.randrange(len(PHOTO))]
    constructors = [
        *photo_requests(rng, noise, cut),
        *json_requests(rng, noise, cut),
        *length_requests(cut),
        *parameter_requests(rng),
        *protocol_requests(rng, noise),
    ]
    return rng.choice(constructors)()


@pytest.mark.slow
def test_ten_thousand_hostile_requests(index, tmp_path):
    """No 5xx, no crash, and 2 % more memory at most from the first 1,000 to the last 5,000."""
    rng = random.Random(0)
    requests = [hostile(rng) for _ in range(10_000)]
    statuses: dict[str, int] = {}
    kept = ["--events", str(tmp_path / "e"), "--keep-queries", str(tmp_path / "k")]
    with (
        serving(index, "--max-photo-bytes", "100000", "--timeout", "1", *kept) as server,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        resident = []
        for first in range(0, len(requests), 500):
            for line in pool.map(
                lambda request: server.raw(*request), requests[first : first + 500]
            ):
                code = line.split(" ")[1] if line.startswith("HTTP/1.1 ") else "hung up"
                statuses[code] = statuses.get(code, 0) + 1
            resident.append(server.memory())
        assert server.process.poll() is None
        assert server.recognize()[0] == 200
        errors = [line for line in server.lines if "Traceback" in line or " failed" in line]
    assert not errors, errors[:3]
    assert not [code for code in statuses if code.startswith("5")], statuses
    assert {"200", "400", "404", "413", "415", "422"} <= set(statuses)
    assert max(resident[10:]) <= 1.02 * resident[1], [round(r / 1e6, 1) for r in resident]


@pytest.mark.slow
def test_the_index_is_switched_a_hundred_times_under_load(index, small_version):
    """No request fails, and every answer names a version that was in use and the right product."""
    seen, failed, done = set(), [], threading.Event()

    def asking(server):
        rng = random.Random(0)
        while not done.is_set():
            product = rng.randrange(PRODUCTS)
            try:
                status, body = server.recognize(jpeg(photo(product, 99)))
            except OSError as error:
                failed.append(repr(error))
                continue
            answer = json.loads(body)
            if status != 200 or answer["products"][0]["sku"] != sku(product):
                failed.append((status, body[:300]))
            else:
                seen.add(answer["index"])

    with serving(index) as server:
        threads = [threading.Thread(target=asking, args=(server,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(100):
                publish_copy(index, small_version)
                wanted = layout.current_version(index).name
                end = time.monotonic() + 30
                while json.loads(server.get("/readyz")[1])["index"] != wanted:
                    assert time.monotonic() < end, (wanted, server.lines[-5:])
                    time.sleep(0.02)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert not failed, failed[:3]
        assert server.process.poll() is None
    assert len(seen) > 50


@pytest.mark.slow
def test_requests_that_time_out_while_models_change(index, small_version, tmp_path):
    """Threads still work for requests that were given up, while index and model are replaced: the
    process lives, and no answer is another error than "try again".
    """
    other = build_small_index(tmp_path / "other", seed=1)
    statuses, done = [], threading.Event()

    def asking(server):
        while not done.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                statuses.append(server.recognize()[0])

    with serving(index, "--timeout", "0.03") as server:
        threads = [threading.Thread(target=asking, args=(server,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        try:
            for number in range(12):
                publish_copy(index, other if number % 3 else small_version)
                time.sleep(1.2)
                assert server.process.poll() is None, server.lines[-5:]
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert set(statuses) <= {200, 408, 503}
        assert statuses.count(200)
        assert not [line for line in server.lines if "Traceback" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--engine", "torch"], "engine 'torch', wanted auto, onnx or jax"),
        (["--engine", "onnx", "--workers", "2"], "holds no ONNX graph"),
        (["--events", "/nonexistent/x"], "unable to open database file"),
        (["--keys", "/nonexistent"], "make keys with"),
    ],
)
def test_unusable_settings_are_one_line(index, flags, said):
    server = Server(index, *flags)
    assert server.process.wait(60) == 2
    assert server.stop() == 2
    assert len(server.lines) == 1, server.lines
    assert said in server.lines[0]
