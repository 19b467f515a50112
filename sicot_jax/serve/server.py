"""`sicot serve`: uvicorn with one worker process or several."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from sicot_jax.errors import InputError
from sicot_jax.events.store import Events
from sicot_jax.index.backends.open import open_index
from sicot_jax.index.storage import layout
from sicot_jax.serve import engines
from sicot_jax.serve import gpus as devices
from sicot_jax.serve import settings as settings_of
from sicot_jax.serve.api_keys import read_keys
from sicot_jax.serve.query_store import Queries
from sicot_jax.serve.settings import Settings

CONCURRENT = 1000  # requests at once of a worker
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def serve(settings: Settings, *, host: str, port: int, workers: int) -> None:
    """Until SIGINT or SIGTERM; requests that run are answered first. InputError for settings that
    cannot be served.
    """
    if workers < 1 or not 0 < port < 65536:
        raise InputError(f"--workers {workers} --port {port}, wanted 1 or more and 1 to 65535")
    check(settings)
    settings_of.to_environment(settings)
    if gpus := devices.share_out(workers):
        atexit.register(shutil.rmtree, gpus, ignore_errors=True)
    if workers > 1:
        counts = tempfile.mkdtemp(prefix="sicot-metrics-")
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = counts
        atexit.register(shutil.rmtree, counts, ignore_errors=True)
    uvicorn.run(
        "sicot_jax.serve.server:app", factory=True, host=host, port=port, workers=workers, log_config=None, access_log=False,
        timeout_graceful_shutdown=int(settings.seconds) + 1, timeout_keep_alive=30, limit_concurrency=CONCURRENT,
        server_header=False,
        # everywhere, also where httptools is: with it hostile requests cost half a kB each for good
        http="h11",
    )  # fmt: skip


def check(settings: Settings) -> None:
    """What a worker would fail at is one line here; and files that all of them open are made before
    the first.
    """
    folder = layout.current_version(Path(settings.index))
    open_index(folder, settings.database).close()
    engines.check(folder, settings.engine)
    if settings.keys:
        read_keys(Path(settings.keys))
    if settings.events:
        Events(Path(settings.events)).close()
    if settings.keep_queries:
        Queries(Path(settings.keep_queries), settings.keep_days)


def app() -> FastAPI:
    """In a worker process."""
    devices.take()
    return make_app(settings_of.from_environment())


def make_app(settings: Settings) -> FastAPI:
    """With the log of a process that does nothing else."""
    from sicot_jax.serve.app import create_app

    logging.basicConfig(level=logging.WARNING, format=_FORMAT)
    logging.getLogger("sicot").setLevel(logging.INFO)
    return create_app(settings)
