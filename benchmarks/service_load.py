"""Measures the service under load, against plain FastAPI services of the same network.

Command:  python -m benchmarks.service_load --index INDEX
          (docs/results/service.md: ResNet-50 at 224 pixels)
Needs:    the extras service, torch and onnx; an index with an ONNX graph.

Contenders, each a process on a free port of this machine: `sicot serve`; "plain ONNX Runtime" and
"plain PyTorch", a route that decodes the photo, calls the network and returns the five best
classes, as one writes it in twenty lines: no limits, no batches, no search. Clients are threads of
one more process, each with a connection that it keeps, one request after the other; they take a
share of the same cores. Photos are JPEGs of four sizes. All contenders run in every round. Cold
start: from the command to the first answer. Beyond the rate that it carries: service_overload.py.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import http.client
import io
import statistics
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks import timing
from benchmarks.baseline_services import ONNX, TORCH
from benchmarks.service_process import ServiceProcess

CONTENDERS = ("sicot serve", ONNX, TORCH)
_PATH = "/v1/recognize?k=5&similar=20"


def example_jpegs() -> list[bytes]:
    """Returns JPEGs of smooth noise, 256 to 1,024 pixels a side."""
    from PIL import Image

    rng, jpegs = np.random.default_rng(0), []
    for side in (256, 384, 640, 1024):
        noise = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        out = io.BytesIO()
        noise.resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        jpegs.append(out.getvalue())
    return jpegs


def start_contender(name: str, index: Path, data: bytes, *flags: str) -> ServiceProcess:
    """Starts a contender and returns it once it has answered a photo."""
    if name == CONTENDERS[0]:
        service = ServiceProcess.start_sicot(index, *flags)
    else:
        service = ServiceProcess("benchmarks.baseline_services", name, "--index", str(index))
    try:
        service.wait(_PATH, data)
    except RuntimeError:
        service.stop()
        raise
    return service


def send(
    service: ServiceProcess, data: bytes, connection: http.client.HTTPConnection | None = None
) -> tuple[int, float]:
    """Sends a photo; returns status and milliseconds."""
    start = time.perf_counter()
    status = service.request(_PATH, data, connection)
    return status, (time.perf_counter() - start) * 1e3


def closed_loop(
    service: ServiceProcess, images: list[bytes], clients: int, seconds: float
) -> dict[str, float]:
    """Runs clients that send their next photo when the last one is answered."""
    times: list[float] = []
    refused: list[int] = []
    errors: list[Exception] = []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        try:
            send_photos(number)
        except Exception as error:
            errors.append(error)

    def send_photos(number: int) -> None:
        connection = service.connect()
        turn = number
        while time.perf_counter() < end:
            status, milliseconds = send(service, images[turn % len(images)], connection)
            (times if status == 200 else refused).append(milliseconds if status == 200 else status)
            turn += 1
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - start
    if errors or refused:
        raise RuntimeError(
            f"{len(refused)} requests refused, clients ended by {errors}: not the same work for "
            "every service"
        )
    percentiles = statistics.quantiles(times, n=100)
    return {
        "p50": percentiles[49],
        "p95": percentiles[94],
        "p99": percentiles[98],
        "rate": len(times) / elapsed,
    }


def in_process_latency(index: Path, images: list[bytes], rounds: int = 60) -> tuple[float, float]:
    """Measures one photo at a time in this process.

    Returns:
      Median milliseconds of the graph alone, and from photo to logits.
    """
    from sicot_jax.index.storage import layout
    from sicot_jax.recognizer import onnx_engine
    from sicot_jax.weights.bundle import read_bundle

    version = layout.current_version(index)
    engine = onnx_engine(version / layout.ONNX_MODEL)
    preprocessing = read_bundle(version / layout.MODEL).preprocessing
    graph_times, total_times = [], []
    for number in range(rounds):
        start = time.perf_counter()
        batch = preprocessing.batch([images[number % len(images)]])
        decoded = time.perf_counter()
        engine(batch)
        end = time.perf_counter()
        graph_times.append((end - decoded) * 1e3)
        total_times.append((end - start) * 1e3)
    return statistics.median(graph_times), statistics.median(total_times)


@dataclasses.dataclass
class Measurements:
    """What all rounds measured.

    Attributes:
      load: (contender, clients) -> percentiles and rate of each round.
      startup: contender -> seconds of each round.
      in_process: milliseconds of the graph alone, and from photo to logits, of each round.
    """

    load: dict[tuple[str, int], list[dict[str, float]]]
    startup: dict[str, list[float]]
    in_process: list[tuple[float, float]]


def measure(options: argparse.Namespace) -> Measurements:
    """Runs all contenders in every round."""
    images = example_jpegs()
    measured = Measurements(collections.defaultdict(list), collections.defaultdict(list), [])
    for _ in range(options.rounds):
        measured.in_process.append(in_process_latency(options.index, images))
        for name in CONTENDERS:
            # No request is refused: all contenders answer the same requests.
            service = start_contender(name, options.index, images[0], "--max-wait-ms=60000")
            try:
                measured.startup[name].append(service.startup_seconds)
                for clients in options.clients:
                    measured.load[name, clients].append(
                        closed_loop(service, images, clients, options.seconds)
                    )
            finally:
                service.stop()
    return measured


def print_load(measured: Measurements) -> None:
    """Prints percentiles and rates of all contenders."""
    rows = []
    for (name, clients), runs in sorted(
        measured.load.items(), key=lambda item: (item[0][1], CONTENDERS.index(item[0][0]))
    ):
        baseline = [run["rate"] for run in measured.load[CONTENDERS[1], clients]]
        rows.append(
            [
                name,
                str(clients),
                *(
                    timing.median_text([run[key] for run in runs], 1)
                    for key in ("p50", "p95", "p99", "rate")
                ),
                timing.ratio_text([run["rate"] for run in runs], baseline),
            ]
        )
    header = ["service", "clients", "p50, ms", "p95, ms", "p99, ms", "photos/s"]
    timing.print_table("Under load", [*header, "x plain ONNX Runtime"], rows)


def print_in_process(measured: Measurements, clients: int) -> None:
    """Prints the latency in one process, and that of `sicot serve` as a multiple."""
    graph_alone, total = zip(*measured.in_process, strict=True)
    ours = [run["p50"] for run in measured.load[CONTENDERS[0], clients]]
    rows = [
        [name, timing.median_text(times, 1), timing.ratio_text(ours, times)]
        for name, times in (("the graph alone", graph_alone), ("from photo to logits", total))
    ]
    header = ["in process, one photo at a time", "p50, ms"]
    timing.print_table(
        "In one process, without a service",
        [*header, f"sicot serve, {clients} client: x that"],
        rows,
    )


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
    measured = measure(options)
    print_load(measured)
    print_in_process(measured, min(options.clients))
    rows = [
        [name, timing.median_text(seconds, 1), timing.range_text(seconds, 1)]
        for name, seconds in measured.startup.items()
    ]
    timing.print_table("Cold start, s", ["service", "median", "least to greatest"], rows)


if __name__ == "__main__":
    main()
