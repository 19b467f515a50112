"""The service under load, beside plain FastAPI services of the same network.

Command:  python -m benchmarks.service --index INDEX          (docs/service.md: ResNet-50 at 224 pixels)
Needs:    the extras service, torch and onnx; an index with an ONNX graph.

Contenders, each a process of its own on a free port of this machine: `sicot serve`; "plain ONNX Runtime" and "plain PyTorch", a
route that decodes the photo, calls the network and returns the five best classes, as one writes it in twenty lines: no limits,
no batches, no search. Clients are threads of one more process, each with a connection that it keeps, one request after the
other; they take a share of the same cores. Photos are JPEGs of four sizes. Contenders come in turn in every round. Cold start:
from the command to the first answer.
Overload: requests start at twice the rate that the service carried, whether earlier ones are answered or not; a photo may wait
for half a second, as by default.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import http.client
import io
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks import timing

CONTENDERS = ("sicot serve", "plain ONNX Runtime", "plain PyTorch")
_HEADERS = {"Content-Type": "image/jpeg"}


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


def plain_app(kind: str, index: Path):
    """The plain service."""
    from fastapi import FastAPI, Request
    from starlette.concurrency import run_in_threadpool

    from sicot_jax.convert import folder as folders
    from sicot_jax.convert import network
    from sicot_jax.index import layout

    version = layout.current_version(index)
    converted = folders.read_converted(version / layout.MODEL)
    preprocessing = converted.preprocessing
    if kind == "plain ONNX Runtime":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(version / layout.GRAPH / folders.GRAPH))

        def logits(batch):
            return session.run(["logits"], {"photos": batch})[0]

    else:
        import dataclasses

        import safetensors.numpy
        import torch

        classes = [""] * converted.model.classes
        made = network.torch_module().SicotRecognizer(
            dataclasses.asdict(converted.model), dataclasses.asdict(preprocessing), classes
        )
        network.load_into(made, safetensors.numpy.load_file(version / layout.MODEL / folders.WEIGHTS))

        def logits(batch):
            image = torch.from_numpy(preprocessing.normalise(batch).transpose(0, 3, 1, 2))
            with torch.inference_mode():
                return made(image).numpy()

    app = FastAPI()

    def answer(data: bytes) -> dict:
        scores = logits(preprocessing.batch([data]))[0]
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        return {"products": [(int(c), float(shares[c])) for c in np.argsort(-scores)[:5]]}

    @app.post("/v1/recognize")
    async def recognize(request: Request):
        return await run_in_threadpool(answer, await request.body())

    @app.get("/readyz")
    async def ready():
        return {}

    return app


class Service:
    """A contender's process; `seconds` from its start to its first answer."""

    def __init__(self, name: str, index: Path, data: bytes, *flags: str):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        ours = ["-m", "sicot_jax.cli", "serve", "--index", str(index), "--port", str(self.port), *flags]
        plain = ["-m", "benchmarks.service", "--index", str(index), "--plain", name, "--port", str(self.port)]
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *(ours if name == CONTENDERS[0] else plain)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"{name} ended with {self.process.returncode}")
            try:
                if self.send(data)[0] == 200:
                    break
            except OSError:
                time.sleep(0.02)
        self.seconds = time.perf_counter() - start

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def send(self, data: bytes, connection: http.client.HTTPConnection | None = None) -> tuple[int, float]:
        """Status and milliseconds."""
        own = connection or self.connect()
        start = time.perf_counter()
        try:
            own.request("POST", "/v1/recognize?k=5&similar=20", data, _HEADERS)
            response = own.getresponse()
            response.read()
            return response.status, (time.perf_counter() - start) * 1e3
        finally:
            if connection is None:
                own.close()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def closed_loop(service: Service, shown: list[bytes], clients: int, seconds: float) -> dict[str, float]:
    """Each client sends its next photo when the last one is answered."""
    times: list[float] = []
    bad: list[int] = []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        connection = service.connect()
        turn = number
        while time.perf_counter() < end:
            status, milliseconds = service.send(shown[turn % len(shown)], connection)
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
    cut = statistics.quantiles(times, n=100)
    return {"p50": cut[49], "p95": cut[94], "p99": cut[98], "rate": len(times) / took, "refused": len(bad)}


def overload(service: Service, shown: list[bytes], rate: float, seconds: float) -> dict[str, float]:
    """Requests at a fixed rate, whatever comes back."""
    found: collections.Counter[int] = collections.Counter()
    times: list[float] = []

    def one(number: int) -> None:
        try:
            status, milliseconds = service.send(shown[number % len(shown)])
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
    return {"p50": cut[49], "p99": cut[98], "accepted": found[200] / total, "shed": found[503] / total}


def bare(index: Path, shown: list[bytes], rounds: int = 60) -> float:
    """Milliseconds of the graph alone, one photo, in this process."""
    from sicot_jax.convert import folder as folders
    from sicot_jax.index import layout
    from sicot_jax.recognizer import onnx_engine

    version = layout.current_version(index)
    engine = onnx_engine(version / layout.GRAPH)
    batch = folders.read_converted(version / layout.MODEL).preprocessing.batch(shown[:1])
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        engine(batch)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        import uvicorn

        uvicorn.run(plain_app(options.plain, options.index), port=options.port, log_level="error")
        return
    timing.print_machine(options.rounds)
    shown = photos()
    alone = bare(options.index, shown)
    results: dict[tuple[str, int], list[dict[str, float]]] = collections.defaultdict(list)
    starts: dict[str, list[float]] = collections.defaultdict(list)
    pressed: list[dict[str, float]] = []
    for _ in range(options.rounds):
        for name in CONTENDERS:
            # Nobody is turned away but in the overload: all contenders answer the same requests.
            service = Service(name, options.index, shown[0], "--wait-ms=60000")
            try:
                starts[name].append(service.seconds)
                for clients in options.clients:
                    results[name, clients].append(closed_loop(service, shown, clients, options.seconds))
            finally:
                service.stop()
        carried = max(results[CONTENDERS[0], clients][-1]["rate"] for clients in options.clients)
        service = Service(CONTENDERS[0], options.index, shown[0])
        try:
            pressed.append(overload(service, shown, 2 * carried, options.seconds))
        finally:
            service.stop()
    rows = [
        [name, str(clients)]
        + [timing.middle([found[key] for found in runs], 1) for key in ("p50", "p95", "p99", "rate")]
        + [timing.ratio([r["rate"] for r in runs], [r["rate"] for r in results[CONTENDERS[1], clients]])]
        for (name, clients), runs in sorted(
            results.items(), key=lambda item: (item[0][1], CONTENDERS.index(item[0][0]))
        )
    ]
    header = ["service", "clients", "p50, ms", "p95, ms", "p99, ms", "photos/s", "x plain ONNX Runtime"]
    timing.print_table("Under load", header, rows)
    print(f"\nThe graph alone, one photo: {alone:.1f} ms.")
    rows = [[name, timing.middle(found, 1), timing.spread(found, 1)] for name, found in starts.items()]
    timing.print_table("Cold start, s", ["service", "median", "least to greatest"], rows)
    cells = {
        key: timing.middle([found[key] for found in pressed], 3 if key in ("accepted", "shed") else 1)
        for key in pressed[0]
    }
    timing.print_table("sicot serve at twice the rate it carried", list(cells), [list(cells.values())])


if __name__ == "__main__":
    main()
