"""Runs the service under Ray Serve.

`serve run sicot_jax.serve.ray:app index=/srv/index replicas=2`, see docs/how-to/scale.md.
"""

# No `from __future__ import annotations` here: Ray reads the type of the builder's argument.

import math
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sicot_jax.serve.photo import PhotoLimits
from sicot_jax.serve.server import MAX_CONCURRENT_REQUESTS, check_settings, create_logging_app
from sicot_jax.serve.settings import ServiceSettings


class RayArguments(BaseModel, extra="forbid", hide_input_in_errors=True):
    """Arguments of `serve run` or of a Serve config file: flags of `sicot serve`, and resources.

    A file or folder has the same path on every machine that a replica may run on.
    """

    index: Path
    database: str = Field("", repr=False, description="a URL; never part of an error")
    replicas: int = Field(1, ge=1)
    cpus: int = Field(1, ge=1, description="of a replica, and threads of its engine")
    gpus: float = Field(0, ge=0, description="of a replica")
    engine: str = "auto"
    require_gpu: bool = False
    max_batch: int = 32
    timeout: float = Field(10.0, description="seconds")
    max_wait_ms: float = 500.0
    max_photo_bytes: int = 10_000_000
    max_photo_pixels: int = 30_000_000
    keys: Path | None = None
    events: Path | None = None
    keep_queries: Path | None = None
    keep_days: int = 30
    root_path: str = ""


def app(arguments: RayArguments) -> Application:
    """Builds the Ray Serve application of an index.

    A replica makes a FastAPI app, and gets requests once its model and index are loaded.

    Args:
      arguments: settings of the service and of its replicas.

    Returns:
      The application.

    Raises:
      InputError: settings that no replica could serve.
    """
    settings = _service_settings(arguments)
    check_settings(settings)

    def make() -> FastAPI:
        made = create_logging_app(settings)
        made.add_middleware(_SingleRequestId)
        return made

    deployment = serve.deployment(
        name="sicot",
        num_replicas=arguments.replicas,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        # As many as `sicot serve` takes: the service itself refuses at once what it cannot serve in
        # time; no request waits in Ray's queue.
        max_ongoing_requests=MAX_CONCURRENT_REQUESTS,
        max_queued_requests=MAX_CONCURRENT_REQUESTS,
        graceful_shutdown_timeout_s=math.ceil(settings.timeout_seconds) + 1,
        logging_config={"enable_access_log": False},  # the service writes a log without SKUs
    )
    return deployment(serve.ingress(make)()).bind()


def _service_settings(arguments: RayArguments) -> ServiceSettings:
    def absolute(path: Path | None) -> str:
        return str(path.absolute()) if path else ""  # a replica has another working folder

    return ServiceSettings(
        index=absolute(arguments.index),
        database=arguments.database,
        engine=arguments.engine,
        require_gpu=arguments.require_gpu,
        max_batch=arguments.max_batch,
        threads=arguments.cpus,
        timeout_seconds=arguments.timeout,
        max_wait_seconds=arguments.max_wait_ms / 1e3,
        limits=PhotoLimits(bytes=arguments.max_photo_bytes, pixels=arguments.max_photo_pixels),
        keys=absolute(arguments.keys),
        events=absolute(arguments.events),
        keep_queries=absolute(arguments.keep_queries),
        keep_days=arguments.keep_days,
        root_path=arguments.root_path.rstrip("/"),
    )


class _SingleRequestId:
    """ASGI middleware that drops the service's request id where Ray's proxy adds the same one."""

    def __init__(self, inner: ASGIApp):
        self.inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_ids = {
            (name, value) for name, value in scope.get("headers", ()) if name == b"x-request-id"
        }

        async def send_once(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept: list[Any] = [
                    header for header in message["headers"] if tuple(header) not in request_ids
                ]
                message = {**message, "headers": kept}
            await send(message)

        await self.inner(scope, receive, send_once)
