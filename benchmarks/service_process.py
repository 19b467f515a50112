"""Starts services as processes and sends them photos."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from pathlib import Path


class ServiceProcess:
    """A service, started by `python -m COMMAND --port PORT` on a free port of this machine.

    Attributes:
      port: of the service.
      startup_seconds: from its start to its first answer.
      process: of the service.
    """

    def __init__(self, *command: str):
        with socket.socket() as free_socket:
            free_socket.bind(("127.0.0.1", 0))
            self.port = free_socket.getsockname()[1]
        self._start, self.startup_seconds = time.perf_counter(), float("nan")
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", str(self.port)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @classmethod
    def start_sicot(cls, index: Path, *flags: str) -> ServiceProcess:
        """Starts `sicot serve` on an index."""
        return cls("sicot_jax.cli", "serve", "--index", str(index), *flags)

    def wait(self, path: str = "/readyz", data: bytes | None = None) -> None:
        """Waits until it answers `path` with 200; with `data`, a photo that is sent there.

        Raises:
          RuntimeError: the service ended, or answered with an error.
        """
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the service ended with {self.process.returncode}")
            try:
                status = self.request(path, data)
            except OSError:  # it does not listen yet
                status = 503
            if status == 200:
                break
            if status != 503:
                raise RuntimeError(f"the service answered with {status}")
            time.sleep(0.02)
        self.startup_seconds = time.perf_counter() - self._start

    def connect(self) -> http.client.HTTPConnection:
        """Opens a connection."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def request(
        self, path: str, data: bytes | None, connection: http.client.HTTPConnection | None = None
    ) -> int:
        """Sends a request, reads the answer and returns its status."""
        open_connection = connection or self.connect()
        try:
            open_connection.request(
                "POST" if data else "GET",
                path,
                data,
                {"Content-Type": "image/jpeg"} if data else {},
            )
            response = open_connection.getresponse()
            response.read()
            return response.status
        finally:
            if connection is None:
                open_connection.close()

    def stop(self) -> None:
        """Ends the service."""
        self.process.terminate()
        self.process.wait()
