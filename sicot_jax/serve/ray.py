"""The service under Ray Serve: `serve run sicot_jax.serve.ray:app index=/srv/index replicas=2`
(docs/scaling.md).
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

from sicot_jax.serve import server as run
from sicot_jax.serve.photo import Limits
from sicot_jax.serve.settings import Settings


class Arguments(BaseModel, extra="forbid", hide_input_in_errors=True):
    """What `serve run` and a Serve config file may give: the flags of `sicot serve`, and what a
    replica takes.

    A file or folder has the same path on every machine that a replica may run on.
    """

    index: Path
    database: str = Field("", repr=False, description="a URL; errors do not tell it")
    replicas: int = Field(1, ge=1)
    cpus: int = Field(1, ge=1, description="of a replica, and threads of its engine")
    gpus: float = Field(0, ge=0, description="of a replica")
    engine: str = "auto"
    largest_batch: int = 32
    seconds: float = 10.0
    wait_ms: float = 500.0
    photo_bytes: int = 10_000_000
    photo_pixels: int = 30_000_000
    keys: Path | None = None
    events: Path | None = None
    keep_queries: Path | None = None
    keep_days: int = 30


def app(arguments: Arguments) -> Application:
    """The service of an index, for Ray Serve. InputError for what no replica could serve.

    A replica makes its own app, and gets requests once its model and index are loaded.
    """
    settings = _settings(arguments)
    run.check(settings)

    def make() -> FastAPI:
        made = run.make_app(settings)
        made.add_middleware(_OneRequestId)
        return made

    deployment = serve.deployment(
        name="sicot",
        num_replicas=arguments.replicas,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        # As many as `sicot serve` takes: the service itself says at once who is too many; nobody
        # waits unseen in Ray's queue.
        max_ongoing_requests=run.CONCURRENT,
        max_queued_requests=run.CONCURRENT,
        graceful_shutdown_timeout_s=math.ceil(settings.seconds) + 1,
        logging_config={"enable_access_log": False},  # the service writes its own, without SKUs
    )
    return deployment(serve.ingress(make)()).bind()


def _settings(arguments: Arguments) -> Settings:
    def absolute(path: Path | None) -> str:
        return str(path.absolute()) if path else ""  # a replica has another working folder

    return Settings(
        index=absolute(arguments.index),
        database=arguments.database,
        engine=arguments.engine,
        largest_batch=arguments.largest_batch,
        threads=arguments.cpus,
        seconds=arguments.seconds,
        wait_seconds=arguments.wait_ms / 1e3,
        limits=Limits(bytes=arguments.photo_bytes, pixels=arguments.photo_pixels),
        keys=absolute(arguments.keys),
        events=absolute(arguments.events),
        keep_queries=absolute(arguments.keep_queries),
        keep_days=arguments.keep_days,
    )


class _OneRequestId:
    """ASGI middleware. Ray's proxy gives every request an id and repeats it in the answer; the
    service's header would be a second.
    """

    def __init__(self, inner: ASGIApp):
        self.inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        theirs = {
            (name, value) for name, value in scope.get("headers", ()) if name == b"x-request-id"
        }

        async def once(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept: list[Any] = [
                    header for header in message["headers"] if tuple(header) not in theirs
                ]
                message = {**message, "headers": kept}
            await send(message)

        await self.inner(scope, receive, once)
