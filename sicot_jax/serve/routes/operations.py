"""Routes for operation: liveness, readiness, metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from sicot_jax.serve.metrics import render_metrics
from sicot_jax.serve.state import service_state

router = APIRouter(tags=["operation"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Reports that the process is alive."""
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
        "largest_batch": engine.batch_size,
        "milliseconds": engine.batch_ms,
        **model.index.counts(),
    }


@router.get("/metrics")
async def metrics_text() -> Response:
    """Returns metrics in Prometheus's text format."""
    text, content_type = render_metrics()
    return Response(text, headers={"Content-Type": content_type})
