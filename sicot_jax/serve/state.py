"""State of a running service, shared by its request handlers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from fastapi import Request
from starlette.exceptions import HTTPException

from sicot_jax.events.store import EventStore
from sicot_jax.index.backends.base import ProductIndex
from sicot_jax.serve import metrics
from sicot_jax.serve.model_manager import ModelManager
from sicot_jax.serve.photo import PixelBudget
from sicot_jax.serve.query_store import QueryStore
from sicot_jax.serve.settings import ServiceSettings

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
      pending_photos: photos that are being processed.
    """

    settings: ServiceSettings
    models: ModelManager
    threads: concurrent.futures.ThreadPoolExecutor
    events: EventStore | None
    queries: QueryStore | None
    budget: PixelBudget
    pending_photos: int = 0

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
            concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1, "decode"),
            EventStore(Path(settings.events)) if settings.events else None,
            QueryStore(Path(settings.keep_queries), settings.keep_days)
            if settings.keep_queries
            else None,
            PixelBudget(settings.limits.pixels),
        )

    def close(self) -> None:
        """Ends the threads and closes the store of events."""
        self.threads.shutdown()
        if self.events is not None:
            self.events.close()

    @contextlib.contextmanager
    def count_photo(self) -> Iterator[None]:
        """Counts a photo as pending while the context lasts.

        Yields:
          None.
        """
        self.pending_photos += 1
        try:
            with metrics.IN_FLIGHT.track_inprogress():
                yield
        finally:
            self.pending_photos -= 1


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
