"""Runs the service in uvicorn, with one worker process or several."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from sicot_jax.errors import InputError
from sicot_jax.events.store import EventStore
from sicot_jax.index.backends.open import open_index
from sicot_jax.index.storage import layout
from sicot_jax.serve.api_keys import read_api_keys
from sicot_jax.serve.engines import available_engines, claim_gpu, create_gpu_pool
from sicot_jax.serve.settings import (
    ServiceSettings,
    read_from_environment,
    write_to_environment,
)
from sicot_jax.serve.shedding import SheddingProtocol
from sicot_jax.serve.state import QueryStore

MAX_CONCURRENT_REQUESTS = 1000  # of a worker
# The event loop gives up the GIL at every read and write. Until it has it back, from a thread that
# searches or decodes, by default 5 ms pass: requests wait for that several times each.
_SWITCH_SECONDS = 0.001
_LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def serve(settings: ServiceSettings, *, host: str, port: int, workers: int) -> None:
    """Serves until SIGINT or SIGTERM; running requests are answered first.

    Args:
      settings: settings of the service.
      host: address to listen on.
      port: port to listen on.
      workers: number of worker processes.

    Raises:
      InputError: settings that cannot be served.
    """
    if workers < 1 or not 0 < port < 65536:
        raise InputError(f"--workers {workers} --port {port}, wanted 1 or more and 1 to 65535")
    check_settings(settings)
    write_to_environment(settings)
    if gpu_pool := create_gpu_pool(workers):
        atexit.register(shutil.rmtree, gpu_pool, ignore_errors=True)
    if workers > 1:
        metrics_folder = tempfile.mkdtemp(prefix="sicot-metrics-")
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics_folder
        atexit.register(shutil.rmtree, metrics_folder, ignore_errors=True)
    uvicorn.run(
        "sicot_jax.serve.server:create_worker_app",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(settings.timeout_seconds) + 1,
        timeout_keep_alive=30,
        limit_concurrency=MAX_CONCURRENT_REQUESTS,
        server_header=False,
        # Also where httptools is installed: with it hostile requests leak half a kB each.
        http=SheddingProtocol,
        # uvloop (0.23.0) accepts one connection a turn of its loop: under load they wait in the
        # kernel, where neither --max-wait-ms nor /metrics see it (findings/).
        loop="asyncio",
    )


def check_settings(settings: ServiceSettings) -> None:
    """Raises an error for settings that a worker would fail at, and makes shared files.

    Args:
      settings: settings of the service.

    Raises:
      InputError: no index, engine or keys, or a file that cannot be written.
    """
    folder = layout.current_version(Path(settings.index))
    open_index(folder, settings.database).close()
    available_engines(folder, settings.engine)
    if settings.keys:
        read_api_keys(Path(settings.keys))
    if settings.events:
        EventStore(Path(settings.events)).close()
    if settings.keep_queries:
        QueryStore(Path(settings.keep_queries), settings.keep_days)


def create_worker_app() -> FastAPI:
    """Returns the app of a worker process, with a GPU to itself."""
    claim_gpu()
    sys.setswitchinterval(_SWITCH_SECONDS)
    settings = read_from_environment()
    app = create_logging_app(settings)
    SheddingProtocol.is_busy = staticmethod(app.state.is_busy)
    SheddingProtocol.prefix = settings.root_path
    return app


def create_logging_app(settings: ServiceSettings) -> FastAPI:
    """Returns the app, and sets up the log of a process that does nothing else.

    Args:
      settings: settings of the service.

    Returns:
      The app.
    """
    from sicot_jax.serve.app import create_app

    logging.basicConfig(level=logging.WARNING, format=_LOG_FORMAT)
    logging.getLogger("sicot").setLevel(logging.INFO)
    return create_app(settings)
