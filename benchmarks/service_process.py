"""Services as processes of their own, for the benchmarks that ask them."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from pathlib import Path


class Service:
    """`python -m COMMAND --port PORT` on a free port of this machine. `seconds`: from its start to
    its first answer.
    """

    def __init__(self, *command: str):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self._start, self.seconds = time.perf_counter(), float("nan")
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", str(self.port)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @classmethod
    def ours(cls, index: Path, *flags: str) -> Service:
        return cls("sicot_jax.cli", "serve", "--index", str(index), *flags)

    def wait(self, path: str = "/readyz", data: bytes | None = None) -> None:
        """Until it answers `path` with 200; with `data`, a photo that is sent there. RuntimeError
        where it ends, or says no.
        """
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the service ended with {self.process.returncode}")
            try:
                status = self.ask(path, data)
            except OSError:  # it does not listen yet
                status = 503
            if status == 200:
                break
            if status != 503:
                raise RuntimeError(f"the service answered with {status}")
            time.sleep(0.02)
        self.seconds = time.perf_counter() - self._start

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(
        self, path: str, data: bytes | None, connection: http.client.HTTPConnection | None = None
    ) -> int:
        """The status of an answer that was read to its end."""
        used = connection or self.connect()
        try:
            used.request(
                "POST" if data else "GET",
                path,
                data,
                {"Content-Type": "image/jpeg"} if data else {},
            )
            response = used.getresponse()
            response.read()
            return response.status
        finally:
            if connection is None:
                used.close()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
