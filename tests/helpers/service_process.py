"""`sicot serve` as a process over loopback, and requests to it."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from helpers.made_photos import jpeg, photo

PHOTO = jpeg(photo(1, 99))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """The process, and requests to it."""

    # A busy machine may keep a photo waiting; tests of the limit give their own.
    FLAGS = ("--max-batch", "2", "--max-wait-ms", "30000")

    def __init__(self, index, *flags):
        self.port = free_port()
        command = [
            sys.executable,
            "-m",
            "sicot_jax.cli",
            "serve",
            "--index",
            str(index),
            "--engine",
            "jax",
        ]
        self.process = subprocess.Popen(
            [*command, *self.FLAGS, "--port", str(self.port), *flags],
            stderr=subprocess.PIPE, text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.lines: list[str] = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self.reader.start()

    def wait(self):
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert self.process.poll() is None, self.lines
            with contextlib.suppress(OSError):
                if self.get("/readyz")[0] == 200:
                    return self
            time.sleep(0.05)
        raise TimeoutError(self.lines)

    def request(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def get(self, path):
        return self.request("GET", path)

    def recognize(self, data=PHOTO):
        return self.request("POST", "/v1/recognize", data, {"Content-Type": "image/jpeg"})

    def raw(self, data, then="wait"):
        """The status line of what comes back, or "" where the server hangs up. `then`: wait for it,
        after saying that nothing more will come ("end"), or "leave".
        """
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
                if then == "end":
                    connection.shutdown(socket.SHUT_WR)
                if then != "leave":
                    return connection.recv(4096).split(b"\r\n")[0].decode("latin-1")
            return ""

    def memory(self):
        """Resident bytes of this process."""
        with open(f"/proc/{self.process.pid}/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS:"))

    def stop(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(30)
        self.reader.join(10)
        self.process.stderr.close()
        return code


@contextlib.contextmanager
def serving(index, *flags):
    server = Server(index, *flags)
    try:
        yield server.wait()
    finally:
        server.stop()


def post_photo(client, product, path="/v1/recognize", **params):
    """Posts a photo of a product.

    Args:
        client: TestClient of the app.
        product: product number.
        path: route.
        **params: query parameters.

    Returns:
        The response.
    """
    return client.post(path, files={"photo": jpeg(photo(product, 99))}, params=params)


def status_and_code(response):
    """Checks the format of an error response.

    Args:
        response: an error response.

    Returns:
        Its HTTP status and error code.
    """
    content = response.json()["error"]
    assert set(content) == {"code", "message", "request_id"}
    assert "\n" not in content["message"]
    assert content["request_id"] == response.headers["x-request-id"]
    return response.status_code, content["code"]


def wait_until(check, timeout_seconds=10.0):
    """Waits until a condition holds.

    Args:
        check: the condition, a function without arguments.
        timeout_seconds: fails after this time.
    """
    end = time.monotonic() + timeout_seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.02)
