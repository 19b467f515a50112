"""Measures `sicot serve` at several times the rate that it carries.

Command:  python -m benchmarks.service_overload --index INDEX [INDEX ...]
          (docs/results/service.md: one index of a small and one of a large network)
Needs:    the extra service.

What `--max-wait-ms` promises is measured where a visitor feels it: from the connection of a request
to the last byte of its answer. For each index, size of the photos and number of workers: the
service's own work is the time of a request when there is no other; the rate it carries is that of
twice as many clients as cores, plus eight, that wait for their answers, with no photo refused. Then
requests start at two, five and ten times that rate, each on a connection of its own, whether
earlier ones are answered or not, but for at most `CLIENTS` at once. The 99th percentile of the
answered ones is to be at most the limit plus the 99th percentile of the own work. Clients are one
process, with an event loop, on the same cores: the rate column says which rate they reached.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import io
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import timing
from benchmarks.service_process import ServiceProcess

CLIENTS = 256
FACTORS = (2, 5, 10)
SIDES = {"small": (384, 384), "12 megapixels": (4000, 3000)}
_PATH = "/v1/recognize?k=5&similar=20"


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What is overloaded.

    Attributes:
      index: index folder.
      photos: key of SIDES.
      workers: of the service.
      max_wait_ms: of the service.
    """

    index: Path
    photos: str
    workers: int
    max_wait_ms: float


@dataclasses.dataclass(frozen=True)
class Overload:
    """Result of one rate.

    Attributes:
      rate: requests a second that were sent.
      answered: milliseconds of the answered photos.
      refused: milliseconds of those that got 503.
      failed: number of others.
    """

    rate: float
    answered: list[float]
    refused: list[float]
    failed: int


def request_bytes(width: int, height: int) -> bytes:
    """Returns an HTTP request with a JPEG of smooth noise.

    Args:
      width: of the photo, pixels.
      height: of the photo, pixels.

    Returns:
      The bytes to send.
    """
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    out = io.BytesIO()
    resized = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    resized.save(out, "JPEG", quality=90)
    body = out.getvalue()
    head = (
        f"POST {_PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _Exchange(asyncio.Protocol):
    """Sends a request once it is connected; `done` is the status, 0 without an answer."""

    def __init__(self, request: bytes, done: asyncio.Future[int]):
        self.request, self.done, self.received = request, done, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, error: Exception | None) -> None:
        answered = error is None and self.received.startswith(b"HTTP/1.1 ")
        self.done.set_result(int(self.received[9:12]) if answered else 0)


async def send(port: int, request: bytes) -> tuple[int, float]:
    """Sends a request on a connection of its own.

    Args:
      port: of the service.
      request: the bytes to send.

    Returns:
      Status, 0 without an answer, and milliseconds.
    """
    loop, start = asyncio.get_running_loop(), time.perf_counter()
    done = loop.create_future()
    try:
        await loop.create_connection(lambda: _Exchange(request, done), "127.0.0.1", port)
        status = await done
    except OSError:
        status = 0
    return status, (time.perf_counter() - start) * 1e3


async def closed_loop(
    port: int, request: bytes, clients: int, seconds: float
) -> tuple[list[float], float]:
    """Runs clients that send their next photo when the last one is answered.

    Args:
      port: of the service.
      request: the bytes to send.
      clients: number of clients.
      seconds: duration.

    Returns:
      Milliseconds of each request, and requests a second.
    """
    start, times = time.perf_counter(), list[float]()

    async def run() -> None:
        while time.perf_counter() < start + seconds:
            status, milliseconds = await send(port, request)
            if status != 200:
                raise RuntimeError(f"status {status} without an overload")
            times.append(milliseconds)

    await asyncio.gather(*(run() for _ in range(clients)))
    return times, len(times) / (time.perf_counter() - start)


async def overload(port: int, request: bytes, rate: float, seconds: float) -> Overload:
    """Starts requests at a fixed rate, whatever is answered.

    Args:
      port: of the service.
      request: the bytes to send.
      rate: requests a second.
      seconds: duration.

    Returns:
      The times.
    """
    results, running = list[tuple[int, float]](), set[asyncio.Task[None]]()

    async def run() -> None:
        results.append(await send(port, request))

    start, count = time.perf_counter(), 0
    while (now := time.perf_counter()) < start + seconds:
        while count < (now - start) * rate and len(running) < CLIENTS:
            task = asyncio.create_task(run())
            running.add(task)
            task.add_done_callback(running.discard)
            count += 1
        await asyncio.sleep(0.001)
    await asyncio.gather(*running)
    return Overload(
        count / seconds,
        [milliseconds for status, milliseconds in results if status == 200],
        [milliseconds for status, milliseconds in results if status == 503],
        sum(status not in (200, 503) for status, _ in results),
    )


def percentile(times: Sequence[float], share: float) -> float:
    """Returns a percentile; NaN of fewer than two times."""
    return (
        statistics.quantiles(times, n=1000)[round(share * 1000) - 1] if len(times) > 1 else np.nan
    )


def measure(scenario: Scenario, seconds: float) -> list[list[str]]:
    """Overloads a service.

    Args:
      scenario: what is overloaded.
      seconds: duration of each load.

    Returns:
      A table row for each of FACTORS.
    """
    request = request_bytes(*SIDES[scenario.photos])
    workers = f"--workers={scenario.workers}"
    clients = 2 * timing.available_cores() + 8

    def started(max_wait_ms: float) -> ServiceProcess:
        service = ServiceProcess.start_sicot(
            scenario.index, workers, f"--max-wait-ms={max_wait_ms:g}"
        )
        try:
            service.wait()
            asyncio.run(closed_loop(service.port, request, 2, 1.0))  # whatever is made once
        except RuntimeError:
            service.stop()
            raise
        return service

    service = started(60_000.0)
    try:
        alone, _ = asyncio.run(closed_loop(service.port, request, 1, seconds))
        _, carried = asyncio.run(closed_loop(service.port, request, clients, seconds))
    finally:
        service.stop()
    rows, own = [], percentile(alone, 0.99)
    service = started(scenario.max_wait_ms)
    try:
        for factor in FACTORS:
            load = overload(service.port, request, factor * carried, seconds)
            result = asyncio.run(load)
            total = len(result.answered) + len(result.refused) + result.failed
            p99 = percentile(result.answered, 0.99)
            rows.append(
                [
                    f"{scenario.index.name}, {scenario.photos}, {scenario.workers}, {factor}",
                    f"{percentile(alone, 0.5):.0f} / {own:.0f}",
                    f"{carried:.0f}",
                    f"{result.rate:.0f}",
                    f"{len(result.answered) / seconds:.0f}",
                    f"{percentile(result.answered, 0.5):.0f} / {p99:.0f}",
                    f"{scenario.max_wait_ms + own:.0f}",
                    "yes" if p99 <= scenario.max_wait_ms + own else "no",
                    f"{percentile(result.refused, 0.5):.0f} / "
                    f"{percentile(result.refused, 0.99):.0f}",
                    f"{result.failed / total:.3f}",
                ]
            )
    finally:
        service.stop()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", type=Path, nargs="+", required=True)
    parser.add_argument("--photos", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--max-wait-ms", type=float, default=500.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    timing.print_machine()
    rows = [
        row
        for index in options.index
        for photos in options.photos
        for workers in options.workers
        for row in measure(Scenario(index, photos, workers, options.max_wait_ms), options.seconds)
    ]
    header = [
        "index, photos, workers, times the rate",
        "own work, p50 / p99, ms",
        "carried, photos/s",
        "sent, photos/s",
        "answered, photos/s",
        "answered, p50 / p99, ms",
        "limit + own work, ms",
        "held",
        "503, p50 / p99, ms",
        "failed",
    ]
    timing.print_table("sicot serve beyond the rate it carries", header, rows)


if __name__ == "__main__":
    main()
