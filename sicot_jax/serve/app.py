"""Builds the FastAPI app of the service."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI

from sicot_jax._version import __version__
from sicot_jax.serve.api_keys import read_api_keys
from sicot_jax.serve.errors import add_error_handlers
from sicot_jax.serve.middleware import RequestMiddleware
from sicot_jax.serve.model_manager import ModelManager, ServingModel, load_serving_model
from sicot_jax.serve.routes import events, operations, products, recognize
from sicot_jax.serve.routes.operations import create_page_router
from sicot_jax.serve.settings import ServiceSettings
from sicot_jax.serve.state import QueryStore, ServiceState

_CLEAN_INTERVAL_SECONDS = 60
_log = logging.getLogger("sicot")


def create_app(settings: ServiceSettings) -> FastAPI:
    """Returns the service of an index.

    The model is loaded and compiled when the app starts; it is ready when `/readyz` says so.

    Args:
      settings: settings of the service.

    Returns:
      The app.

    Raises:
      InputError: the file of API keys cannot be read.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _running(settings) as state:
            app.state.service = state
            try:
                yield
            finally:
                app.state.service = None

    app = FastAPI(
        title="sicot_jax",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        description="Recognises the product in a photo and finds similar products.",
    )
    app.state.service = None

    def is_busy() -> bool:
        return app.state.service is not None and app.state.service.is_busy

    app.state.is_busy = is_busy
    app.add_middleware(
        RequestMiddleware,
        api_keys=read_api_keys(Path(settings.keys)) if settings.keys else None,
        # base64 with line breaks and escaped characters ("\r\n", "\u002B" for each plus sign of
        # .NET: 13 % more than base64), and what multipart adds around a photo
        max_body_bytes=settings.limits.bytes * 8 // 5 + 10_000,
        is_busy=is_busy,
        root_path=settings.root_path,
    )
    add_error_handlers(app)
    for group in (operations, recognize, products, events):
        app.include_router(group.router)
    app.include_router(create_page_router())
    return app


@contextlib.asynccontextmanager
async def _running(settings: ServiceSettings) -> AsyncIterator[ServiceState]:
    """Loads the model, and follows changes of the index while the context lasts."""
    loop = asyncio.get_running_loop()
    model = await loop.run_in_executor(None, load_serving_model, settings)
    _log_ready(model)
    state = ServiceState.create(settings, ModelManager(settings, model))
    background = asyncio.gather(
        state.models.watch(), state.admission.watch_lag(), _remove_expired(state.queries)
    )
    try:
        yield state
    finally:
        background.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await background
        state.close()


def _log_ready(model: ServingModel) -> None:
    engine = model.engine
    _log.info(
        "ready: index %s, engine %s on %s, batches up to %d (%s)",
        model.version,
        engine.kind,
        engine.provider,
        engine.batch_size,
        ", ".join(f"{size}: {ms:.1f} ms" for size, ms in engine.batch_ms.items()),
    )


async def _remove_expired(queries: QueryStore | None) -> None:
    """Removes expired photos until cancelled, also while there are no requests."""
    while queries is not None:
        await asyncio.sleep(_CLEAN_INTERVAL_SECONDS)
        await asyncio.get_running_loop().run_in_executor(None, queries.remove_expired)
