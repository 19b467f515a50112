"""The service under Ray Serve: a separate Ray on this machine, started as a user does."""

import concurrent.futures
import contextlib
import importlib.util
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from helpers.made_photos import jpeg, photo, sku
from helpers.service_process import free_port
from helpers.small_index import PRODUCTS, publish_copy

from sicot_jax.serve.api_keys import add_api_key
from sicot_jax.serve.settings import ServiceSettings

if importlib.util.find_spec("ray") is None:  # an import would cost every test process two seconds
    pytest.skip("needs the extra ray", allow_module_level=True)
testclient = pytest.importorskip("fastapi.testclient", reason="the service needs its extra")

from sicot_jax.serve.app import create_app  # noqa: E402

ROOT = Path(__file__).parents[2]
APP = "sicot_jax.serve.ray:app"
# `serve run` in a Ray as small as it gets. A test run in the background may have SIGINT ignored,
# which its children inherit.
DRIVER = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import ray
from ray import serve
from ray.serve.scripts import cli
ray.init(
    num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20,
    _temp_dir=sys.argv[1], namespace="serve",
)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
cli(["run", *sys.argv[3:]])
"""


class Cluster:
    """Ray with the service, all its processes in one session."""

    def __init__(self, folder, *arguments):
        self.port = free_port()
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1",
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on the loopback address alone
            # else it writes one into the home folder
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, folder, str(self.port), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout))
        self.reader.start()

    def said(self, pattern):
        """The processes of the replicas that logged it."""
        lines = [
            re.search(rf"\(ServeReplica:\S+ pid=(\d+)\).*{pattern}", line)
            for line in list(self.lines)
        ]
        return {int(match[1]) for match in lines if match}

    def eventually(self, check, seconds=60.0):
        end = time.monotonic() + seconds
        while not (result := check()):
            last_lines = "".join(self.lines[-40:])
            assert self.process.poll() is None, last_lines
            assert time.monotonic() < end, last_lines
            time.sleep(0.05)
        return result

    def post(self, path="/v1/recognize", key="", **more):
        headers = {**more.pop("headers", {}), **({"Authorization": f"Bearer {key}"} if key else {})}
        return httpx.post(
            f"http://127.0.0.1:{self.port}{path}", headers=headers, timeout=30, **more
        )

    def ready(self):
        with contextlib.suppress(httpx.TransportError):
            response = httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=30)
            return response.status_code == 200 and response.json()

    def processes(self):
        return [pid for pid in psutil.pids() if _session(pid) == self.process.pid]

    def stop(self):
        """As Ctrl-C does. Its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def kill(self):
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)
        self.reader.join(30)
        self.process.stdout.close()


def _session(pid):
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


@contextlib.contextmanager
def running(*arguments):
    # Sockets lie in the folder, and their paths are limited to 107 bytes.
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        cluster = Cluster(folder, *arguments)
        try:
            cluster.eventually(cluster.ready, 120)
            yield cluster
        finally:
            cluster.kill()


@pytest.mark.cluster
@pytest.mark.slow
def test_two_replicas_answer_as_the_plain_app(index, small_version, tmp_path):
    key = add_api_key(tmp_path / "keys", "shop")
    given = [f"index={index}", f"keys={tmp_path / 'keys'}", f"events={tmp_path / 'events'}"]
    given += ["max_batch=2", "max_wait_ms=300"]
    plain = ServiceSettings(
        index=str(index), engine="jax", max_batch=2, keys=str(tmp_path / "keys")
    )
    with (
        running(
            APP, "replicas=2", "engine=jax", "max_batch=2", "max_wait_ms=300", *given
        ) as cluster,
        testclient.TestClient(
            create_app(plain), headers={"Authorization": f"Bearer {key}"}
        ) as client,
    ):
        _same_answers(cluster, client, key)
        _same_errors(cluster, client, key)
        _one_store_of_events(cluster, key)
        _busy_is_said(cluster, key)
        first = cluster.eventually(
            lambda: len(replicas := cluster.said("ready: index")) == 2 and replicas
        )
        publish_copy(index, small_version)
        cluster.eventually(lambda: cluster.said("index v000002 in use") == first)
        assert (
            cluster.post(key=key, files={"photo": jpeg(photo(1, 99))}).json()["index"] == "v000002"
        )
        _one_is_killed(cluster, first, key)
        assert cluster.stop() == 0
        _ended(cluster)
        assert not [
            line for line in cluster.lines if "ServeReplica" in line and "Traceback" in line
        ]


def _same_answers(cluster, client, key):
    """Of every product, and until both replicas gave some."""
    rounds = 0
    while rounds < 1 or len(cluster.said("POST /v1/recognize 200")) < 2:
        for product in range(PRODUCTS):
            files = {"photo": jpeg(photo(product, 99))}
            response = cluster.post("/v1/recognize?k=3&similar=4", key, files=files)
            answer, wanted = (
                response.json(),
                client.post("/v1/recognize?k=3&similar=4", files=files).json(),
            )
            assert response.headers.get_list("x-request-id") == [answer["request_id"]]
            assert answer["products"][0]["sku"] == sku(product)
            assert answer["known"] == wanted["known"] is True
            for kind, number in (("products", "probability"), ("similar", "similarity")):
                assert [match["sku"] for match in answer[kind]] == [
                    match["sku"] for match in wanted[kind]
                ]
                numbers = [[match[number] for match in side[kind]] for side in (answer, wanted)]
                np.testing.assert_allclose(*numbers, atol=1e-4)
        rounds += 1
        assert rounds < 100


def _same_errors(cluster, client, key):
    requests = [
        {"files": {"photo": b"no photo"}},
        {"content": jpeg(photo(1))[:-100], "headers": {"Content-Type": "image/jpeg"}},
        {"content": b"x" * 14_000_000, "headers": {"Content-Type": "image/png"}},
        {"json": {}},
    ]
    statuses = []
    for request in requests:
        response, wanted = cluster.post(key=key, **request), client.post("/v1/recognize", **request)
        errors = [side.json()["error"] for side in (response, wanted)]
        assert response.status_code == wanted.status_code
        assert response.headers.get_list("x-request-id") == [errors[0].pop("request_id")]
        assert errors[1].pop("request_id")
        assert errors[0] == errors[1]
        statuses.append(response.status_code)
    assert statuses == [415, 400, 413, 400]
    refused = cluster.post(files={"photo": jpeg(photo(1))})
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    named = cluster.post(
        key=key, files={"photo": jpeg(photo(1))}, headers={"X-Request-Id": "abc-1"}
    )
    assert named.headers.get_list("x-request-id") == ["abc-1"]
    assert named.json()["request_id"] == "abc-1"


def _one_store_of_events(cluster, key):
    event = {
        "event_id": "e", "request_id": "r", "time": 1e9, "visitor": "v", "variant": "a",
        "kind": "impression", "shown": [sku(1)],
    }  # fmt: skip
    new = 0

    def both():
        nonlocal new
        new += cluster.post("/v1/events", key, json=[event]).json()["new"]
        return len(cluster.said("POST /v1/events 202")) == 2

    cluster.eventually(both)
    assert new == 1


def _busy_is_said(cluster, key):
    """Photos that take long to decode, many at once: the service turns some away, and Ray keeps
    none waiting.
    """
    large = jpeg(np.zeros((3000, 3000, 3), np.uint8))

    def burst():
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            answers = list(
                pool.map(lambda _: cluster.post(key=key, files={"photo": large}), range(24))
            )
        assert {answer.status_code for answer in answers} <= {200, 503}
        return [answer for answer in answers if answer.status_code == 503]

    for turned_away in cluster.eventually(burst):
        assert turned_away.headers["retry-after"] == "1"
        assert turned_away.json()["error"]["message"] == "busy; try again"


def _one_is_killed(cluster, first, key):
    """The other one goes on answering; a new one replaces it."""
    killed, other = sorted(first)
    data = jpeg(photo(1, 99))
    os.kill(killed, signal.SIGKILL)
    before = sum(f"pid={other}" in line for line in cluster.lines)

    def answered():
        # What was on its way to the killed one may be lost, until Ray has noticed.
        with contextlib.suppress(httpx.TransportError):
            return cluster.post(key=key, files={"photo": data}).status_code == 200

    for _ in range(5):
        cluster.eventually(answered)
    cluster.eventually(lambda: sum(f"pid={other}" in line for line in cluster.lines) > before)
    cluster.eventually(lambda: len(cluster.said("ready: index") - first) == 1)
    new = {other} | (cluster.said("ready: index") - first)
    cluster.eventually(lambda: answered() and cluster.said("POST /v1/recognize 200") >= new)
    assert {cluster.post(key=key, files={"photo": data}).status_code for _ in range(10)} == {200}


def _ended(cluster):
    end = time.monotonic() + 30
    while left := [pid for pid in cluster.processes() if psutil.pid_exists(pid)]:
        assert time.monotonic() < end, [psutil.Process(pid).cmdline() for pid in left]
        time.sleep(0.05)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_config_file_with_autoscaling(index, tmp_path):
    config = tmp_path / "service.yaml"
    config.write_text(
        f"applications:\n- import_path: {APP}\n"
        f"  args: {{index: {index}, engine: jax, max_batch: 2, gpus: 0}}\n"
        "  deployments:\n  - name: sicot\n    num_replicas: auto\n"
        "    autoscaling_config: {min_replicas: 2, max_replicas: 3, target_ongoing_requests: 8}\n"
    )
    with running(str(config)) as cluster:
        answer = cluster.post("/v1/search?similar=1", files={"photo": jpeg(photo(2, 99))}).json()
        assert answer["similar"][0]["sku"] == sku(2)
        cluster.eventually(lambda: len(cluster.said("ready: index")) == 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pydantic, in an import of Ray
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"engine": "torch"}, "engine 'torch', wanted"),
        ({"replica": 2}, "Extra inputs"),
        ({"cpus": 0}, "greater than"),
    ],
)
def test_unusable_arguments_are_refused_before_a_replica_starts(index, more, said):
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build

    from sicot_jax.serve.ray import app

    with pytest.raises(Exception, match=said):
        build(app, {"index": str(index), **more})
