"""Prometheus metrics of the service, summed over all worker processes."""

from __future__ import annotations

import os

import prometheus_client as prometheus
from prometheus_client import multiprocess

_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # set by `sicot serve` before its workers start
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

REQUESTS = prometheus.Counter("sicot_requests", "Requests by route and status", ["route", "status"])
REQUEST_SECONDS = prometheus.Histogram(
    "sicot_request_seconds", "Duration of a request", ["route"], buckets=_BUCKETS
)
STAGE_SECONDS = prometheus.Histogram(
    "sicot_stage_seconds", "Duration of a stage of a request", ["stage"], buckets=_BUCKETS
)
BATCH_PHOTOS = prometheus.Histogram(
    "sicot_batch_photos", "Photos in a call of the engine", buckets=(1, 2, 4, 8, 16, 32)
)
IN_FLIGHT = prometheus.Gauge(
    "sicot_in_flight", "Photos that are being processed", multiprocess_mode="livesum"
)
REJECTED = prometheus.Counter(
    "sicot_rejected", "Photos rejected as showing no product of the catalogue"
)


def render_metrics() -> tuple[bytes, str]:
    """Returns all metrics in Prometheus's text format, and its content type."""
    if os.environ.get(_DIRECTORY):
        registry = prometheus.CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return prometheus.generate_latest(registry), prometheus.CONTENT_TYPE_LATEST
    return prometheus.generate_latest(), prometheus.CONTENT_TYPE_LATEST
