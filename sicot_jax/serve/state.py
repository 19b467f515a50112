"""State of a running service, shared by its request handlers, and the query photos it keeps."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fastapi import Request
from starlette.exceptions import HTTPException

from sicot_jax.events.store import EventStore
from sicot_jax.index.backends.base import ProductIndex
from sicot_jax.serve.admission import Admission
from sicot_jax.serve.model_manager import ModelManager
from sicot_jax.serve.photo import PixelBudget
from sicot_jax.serve.settings import ServiceSettings

_MIN_THREADS = 2  # one decodes while the other waits for the index
_CLEAN_SECONDS = 3600.0
_log = logging.getLogger("sicot")


class QueryStore:
    """A folder of `REQUEST_ID-RANDOM.photo`; expired photos are removed at the start and hourly.

    Args:
      folder: made if missing, readable by its owner alone.
      days: days for which a photo is kept.
    """

    def __init__(self, folder: Path, days: int):
        self.folder, self.seconds, self._cleaned = folder, days * 86_400.0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.remove_expired()

    def save(self, request_id: str, data: bytes) -> None:
        """Saves a photo; a failure is logged and does not fail the request.

        Args:
          request_id: id of the request.
          data: the photo's bytes.
        """
        try:
            # Clients may choose the id: the rest of the name keeps their photos apart.
            (self.folder / f"{request_id}-{secrets.token_hex(4)}.photo").write_bytes(data)
        except OSError as error:
            _log.error("%s not kept: %s", request_id, error)

    def remove_expired(self) -> None:
        """Removes expired photos, at most once an hour."""
        now = time.time()
        if now - self._cleaned < _CLEAN_SECONDS:
            return
        self._cleaned = now
        for path in self.folder.glob("*.photo"):
            with contextlib.suppress(OSError):  # another worker was first
                if now - path.stat().st_mtime > self.seconds:
                    path.unlink()


_Result = TypeVar("_Result")


@dataclasses.dataclass
class ServiceState:
    """State of a service that is ready.

    Attributes:
      settings: settings of the service.
      models: the model and index in use.
      threads: decode photos and read the index.
      events: store of events; None where none are kept.
      queries: store of query photos; None where none are kept.
      budget: limits the pixels that are decoded at the same time.
      admission: admits photos, or refuses them.
    """

    settings: ServiceSettings
    models: ModelManager
    threads: concurrent.futures.ThreadPoolExecutor
    events: EventStore | None
    queries: QueryStore | None
    budget: PixelBudget
    admission: Admission

    @classmethod
    def create(cls, settings: ServiceSettings, models: ModelManager) -> ServiceState:
        """Opens what a service needs besides its model.

        Args:
          settings: settings of the service.
          models: the model and index in use.

        Returns:
          The state; close it at the end.
        """
        return cls(
            settings,
            models,
            concurrent.futures.ThreadPoolExecutor(
                max(settings.threads or os.cpu_count() or 1, _MIN_THREADS), "decode"
            ),
            EventStore(Path(settings.events)) if settings.events else None,
            QueryStore(Path(settings.keep_queries), settings.keep_days)
            if settings.keep_queries
            else None,
            PixelBudget(settings.limits.pixels),
            Admission(settings.max_wait_seconds),
        )

    @property
    def photo_seconds(self) -> float:
        """Time of the engine in use for a photo, in full batches, in seconds."""
        return self.models.current.engine.photo_ms / 1e3

    @property
    def is_busy(self) -> bool:
        """Whether a photo that comes now would wait too long."""
        return self.admission.is_busy(self.photo_seconds)

    def close(self) -> None:
        """Ends the threads and closes the store of events."""
        self.threads.shutdown()
        if self.events is not None:
            self.events.close()


def service_state(request: Request) -> ServiceState:
    """Returns the state of the service.

    Args:
      request: a request to the service.

    Returns:
      The state.

    Raises:
      HTTPException: 503 until model and index are loaded.
    """
    state = request.app.state.service
    if state is None:
        raise HTTPException(503, "not ready yet")
    return state


async def read_index(request: Request, read: Callable[[ProductIndex], _Result]) -> _Result:
    """Reads the index in a thread.

    Args:
      request: a request to the service.
      read: what is done with the index.

    Returns:
      The result of `read`.
    """
    state = service_state(request)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(state.threads, read, state.models.current.index)
