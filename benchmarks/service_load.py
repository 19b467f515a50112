"""The service under load, beside plain FastAPI services of the same network.

Command:  python -m benchmarks.service_load --index INDEX          (docs/service.md: ResNet-50 at 224
  pixels)
Needs:    the extras service, torch and onnx; an index with an ONNX graph.

Contenders, each a process of its own on a free port of this machine: `sicot serve`; "plain ONNX
  Runtime" and "plain PyTorch", a
route that decodes the photo, calls the network and returns the five best classes, as one writes it
  in twenty lines: no limits, no batches, no search. Clients are threads of one more process, each
  with a connection that it keeps, one request after the other; they take a share of the same cores.
  Photos are JPEGs of four sizes. Contenders come in turn in every round. Cold start: from the
  command to the first answer.
Overload: requests start at twice the rate that the service carried, whether earlier ones are
  answered or not; a photo may wait for half a second, as by default.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import http.client
import io
import statistics
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks import timing
from benchmarks.baseline_services import ONNX, TORCH
from benchmarks.service_process import Service

CONTENDERS = ("sicot serve", ONNX, TORCH)
_PATH = "/v1/recognize?k=5&similar=20"


def photos() -> list[bytes]:
    """JPEGs of smooth noise, 256 to 1,024 pixels a side."""
    from PIL import Image

    rng, found = np.random.default_rng(0), []
    for side in (256, 384, 640, 1024):
        small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        out = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        found.append(out.getvalue())
    return found


def start(name: str, index: Path, data: bytes, *flags: str) -> Service:
    """A contender that has answered a photo."""
    if name == CONTENDERS[0]:
        service = Service.ours(index, *flags)
    else:
        service = Service("benchmarks.baseline_services", name, "--index", str(index))
    try:
        service.wait(_PATH, data)
    except RuntimeError:
        service.stop()
        raise
    return service


def send(
    service: Service, data: bytes, connection: http.client.HTTPConnection | None = None
) -> tuple[int, float]:
    """Status and milliseconds."""
    start = time.perf_counter()
    status = service.ask(_PATH, data, connection)
    return status, (time.perf_counter() - start) * 1e3


def closed_loop(
    service: Service, shown: list[bytes], clients: int, seconds: float
) -> dict[str, float]:
    """Each client sends its next photo when the last one is answered."""
    times: list[float] = []
    bad: list[int] = []
    broken: list[Exception] = []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        try:
            ask(number)
        except Exception as error:
            broken.append(error)

    def ask(number: int) -> None:
        connection = service.connect()
        turn = number
        while time.perf_counter() < end:
            status, milliseconds = send(service, shown[turn % len(shown)], connection)
            (times if status == 200 else bad).append(milliseconds if status == 200 else status)
            turn += 1
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start
    if broken or bad:
        raise RuntimeError(
            f"{len(bad)} requests refused, clients ended by {broken}: not the same work for every service"
        )
    cut = statistics.quantiles(times, n=100)
    return {"p50": cut[49], "p95": cut[94], "p99": cut[98], "rate": len(times) / took}


def overload(service: Service, shown: list[bytes], rate: float, seconds: float) -> dict[str, float]:
    """Requests at a fixed rate, whatever comes back."""
    found: collections.Counter[int] = collections.Counter()
    times: list[float] = []

    def one(number: int) -> None:
        try:
            status, milliseconds = send(service, shown[number % len(shown)])
        except OSError:
            found[0] += 1
            return
        found[status] += 1
        if status == 200:
            times.append(milliseconds)

    with concurrent.futures.ThreadPoolExecutor(256) as pool:
        start = time.perf_counter()
        for number in range(int(rate * seconds)):
            time.sleep(max(start + number / rate - time.perf_counter(), 0))
            pool.submit(one, number)
    cut = statistics.quantiles(times, n=100)
    total = sum(found.values())
    return {
        "p50": cut[49],
        "p99": cut[98],
        "accepted": found[200] / total,
        "shed": found[503] / total,
    }


def bare(index: Path, shown: list[bytes], rounds: int = 60) -> tuple[float, float]:
    """Milliseconds of the graph alone, and from photo to logits, one photo at a time in this
    process.
    """
    from sicot_jax.index.storage import layout
    from sicot_jax.recognizer import onnx_engine
    from sicot_jax.weights import bundle as folders

    version = layout.current_version(index)
    engine = onnx_engine(version / layout.ONNX_MODEL)
    preprocessing = folders.read_converted(version / layout.MODEL).preprocessing
    alone, whole = [], []
    for number in range(rounds):
        start = time.perf_counter()
        batch = preprocessing.batch([shown[number % len(shown)]])
        decoded = time.perf_counter()
        engine(batch)
        end = time.perf_counter()
        alone.append((end - decoded) * 1e3)
        whole.append((end - start) * 1e3)
    return statistics.median(alone), statistics.median(whole)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    timing.print_machine(options.rounds)
    shown = photos()
    results: dict[tuple[str, int], list[dict[str, float]]] = collections.defaultdict(list)
    starts: dict[str, list[float]] = collections.defaultdict(list)
    pressed: list[dict[str, float]] = []
    by_hand: list[tuple[float, float]] = []
    for _ in range(options.rounds):
        by_hand.append(bare(options.index, shown))
        for name in CONTENDERS:
            # Nobody is turned away but in the overload: all contenders answer the same requests.
            service = start(name, options.index, shown[0], "--wait-ms=60000")
            try:
                starts[name].append(service.seconds)
                for clients in options.clients:
                    results[name, clients].append(
                        closed_loop(service, shown, clients, options.seconds)
                    )
            finally:
                service.stop()
        carried = max(results[CONTENDERS[0], clients][-1]["rate"] for clients in options.clients)
        service = start(CONTENDERS[0], options.index, shown[0])
        try:
            pressed.append(overload(service, shown, 2 * carried, options.seconds))
        finally:
            service.stop()
    rows = [
        [name, str(clients)]
        + [
            timing.middle([found[key] for found in runs], 1)
            for key in ("p50", "p95", "p99", "rate")
        ]
        + [
            timing.ratio(
                [r["rate"] for r in runs], [r["rate"] for r in results[CONTENDERS[1], clients]]
            )
        ]
        for (name, clients), runs in sorted(
            results.items(), key=lambda item: (item[0][1], CONTENDERS.index(item[0][0]))
        )
    ]
    header = [
        "service",
        "clients",
        "p50, ms",
        "p95, ms",
        "p99, ms",
        "photos/s",
        "x plain ONNX Runtime",
    ]
    timing.print_table("Under load", header, rows)
    alone, whole = zip(*by_hand, strict=True)
    ours = [found["p50"] for found in results[CONTENDERS[0], min(options.clients)]]
    rows = [
        ["the graph alone", timing.middle(alone, 1), timing.ratio(ours, alone)],
        ["from photo to logits", timing.middle(whole, 1), timing.ratio(ours, whole)],
    ]
    header = [
        "by hand, one photo at a time",
        "p50, ms",
        f"sicot serve, {min(options.clients)} client: x that",
    ]
    timing.print_table("In one process, without a service", header, rows)
    rows = [
        [name, timing.middle(found, 1), timing.spread(found, 1)] for name, found in starts.items()
    ]
    timing.print_table("Cold start, s", ["service", "median", "least to greatest"], rows)
    cells = {
        key: timing.middle(
            [found[key] for found in pressed], 3 if key in ("accepted", "shed") else 1
        )
        for key in pressed[0]
    }
    timing.print_table(
        "sicot serve at twice the rate it carried", list(cells), [list(cells.values())]
    )


if __name__ == "__main__":
    main()
