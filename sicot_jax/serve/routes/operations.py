"""Routes for operation: liveness, readiness, metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from sicot_jax.serve.metrics import render_metrics
from sicot_jax.serve.state import service_state

router = APIRouter(tags=["operation"])


@router.get("/healthz", description="Reports that the process is alive.")
async def healthz() -> dict[str, str]:
    """Reports that the process is alive.

    Returns:
      JSON with the status "alive".
    """
    return {"status": "alive"}


@router.get(
    "/readyz",
    description="Reports that model and index are loaded and that every batch size is compiled. "
    "`milliseconds` is the time of an engine call by batch size, where two calls share the "
    "machine, divided by two: the cost of a batch under load, not the latency of a request.",
)
async def readyz(request: Request) -> dict[str, Any]:
    """Reports that model and index are loaded and that every batch size is compiled.

    Args:
      request: the request.

    Returns:
      JSON of the index version, the engine and the number of products and photos.

    Raises:
      HTTPException: 503 until the service is ready.
    """
    model = service_state(request).models.current
    engine = model.engine
    return {
        "status": "ready",
        "index": model.version,
        "model": model.model_id,
        "engine": engine.kind,
        "provider": engine.provider,
        "max_batch": engine.batch_size,
        "milliseconds": engine.batch_ms,
        **model.index.counts(),
    }


@router.get("/metrics")
async def metrics_text() -> Response:
    """Returns metrics in Prometheus's text format."""
    text, content_type = render_metrics()
    return Response(text, headers={"Content-Type": content_type})


_PAGE = Path(__file__).parents[1] / "page"
_CONTENT_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


def create_page_router() -> APIRouter:
    """Returns a router of the page's files, read once."""
    router = APIRouter()
    for path in sorted(_PAGE.iterdir()):
        address = "/" if path.name == "index.html" else f"/{path.name}"
        router.add_api_route(address, _file_handler(path), include_in_schema=False)
    return router


def _file_handler(path: Path) -> Callable[[], Awaitable[Response]]:
    content, content_type = path.read_bytes(), _CONTENT_TYPES[path.suffix]

    async def send_file() -> Response:
        return Response(content, media_type=content_type, headers={"Cache-Control": "no-cache"})

    return send_file
