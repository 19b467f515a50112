"""Measures the stages of a request to the service, against the network alone.

Command:  taskset -c 0,1 python -m benchmarks.request_stages --index INDEX
          (ResNet-50 at 224 pixels: two or three minutes)
Smaller:  python -m benchmarks.request_stages --index INDEX --vectors 2000 --requests 20
Needs:    the extra service; an index with an ONNX graph. One of a ResNet-50 with initial weights (a
          few minutes):

  sicot train --config=tiny --workdir=RUN --config.model.depth=50 --config.model.width=64 \
    --config.model.stem=imagenet --config.model.embedding_width=0 \
    --config.preprocessing.height=224 --config.preprocessing.width=224 \
    --config.preprocessing.resize_height=256 --config.preprocessing.resize_width=256 \
    --config.mesh.data=1 --config.data.generated.validation_per_class=10 \
    --config.train.steps=1 --config.train.batch_size=8
  sicot index build --workdir RUN --out INDEX

The index is grown to `--vectors` in a temporary folder: near each photo's features new ones,
moved by the noise that features have within a product (benchmarks/vector_search), each a product
with the record of the one that it is near. Its model and its category fusion are used as they are;
what it lacks is named below the table. Its ranker too, or else that of the simulated shop of
benchmarks/reranking, which has as many features and trees.

A service runs in this process, so that parts of it can be timed, and one client sends it photos
over HTTP, one after the other, for five products and 20 similar ones; before each request the
network alone runs on the same photo. "products" is the SKUs and their confidence, "HTTP" all that
the service does not time: server, client, JSON. With `--backbone` the network alone is another
index's: of the same run without a localization branch, so that the branch and the second pass over
the masked photo have a row.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import http.client
import json
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import uvicorn

from benchmarks import reranking, timing
from benchmarks.service_load import example_jpegs
from benchmarks.vector_search import MeasuredVectors
from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout
from sicot_jax.index.storage import products as store_module
from sicot_jax.index.storage.binary_codes import BinaryEncoder
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.search import answer
from sicot_jax.search.ranker import Ranker, read_ranker, write_ranker
from sicot_jax.search.ranking_features import CatalogStatistics
from sicot_jax.serve import engines
from sicot_jax.serve.app import create_app
from sicot_jax.serve.model_manager import ServingModel
from sicot_jax.serve.settings import ServiceSettings

STAGES = (
    "read",
    "decode",
    "engine",
    "search",
    "category",
    "products",
    "re-rank",
    "records",
    "HTTP",
)
_PATH = "/v1/recognize?k=5&similar=20"
_WARM_UP_REQUESTS = 10
_BLOCK_ROWS = 1 << 15


def grow_index(index: Path, out: Path, size: int) -> None:
    """Writes the current version with about `size` photos, as the index `out`."""
    version, folder = layout.current_version(index), out / "v000001"
    folder.mkdir(parents=True)
    for name in (layout.MODEL, layout.ONNX_MODEL, *layout.FITTED):
        if (version / name).exists():
            (folder / name).symlink_to((version / name).absolute())
    manifest = layout.read_index_manifest(version)
    rng = np.random.default_rng(0)
    source_rows, ranges = _draw_source_rows(manifest, size, rng)
    is_new = np.ones(len(source_rows), bool)
    is_new[np.unique(source_rows, return_index=True)[1]] = False
    _write_vectors(index, folder, source_rows, is_new, rng)
    num_products = _write_products(version, folder, source_rows, is_new)
    if _ranker(version, manifest.model_sha256) is None:
        _write_simulated_ranker(folder, manifest.model_sha256)
    layout.write_index_manifest(
        folder,
        dataclasses.replace(
            manifest,
            num_photos=len(source_rows),
            num_products=num_products,
            category_ranges=ranges,
        ),
    )
    (out / layout.CURRENT).write_text(folder.name + "\n")


def _draw_source_rows(
    manifest: layout.IndexManifest, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, list[int]]]:
    """Returns a row of the index for each new row, category by category, and their ranges.

    The first occurrence of a row is that photo itself.
    """
    source_rows, ranges = np.zeros(0, np.int64), dict[str, list[int]]()
    for name, (first, last) in sorted(manifest.category_ranges.items(), key=lambda item: item[1]):
        extra = rng.integers(
            first, last, max(round((last - first) * (size / manifest.num_photos - 1)), 0)
        )
        ranges[name] = [len(source_rows), len(source_rows) + last - first + len(extra)]
        source_rows = np.concatenate([source_rows, np.arange(first, last), extra])
    return source_rows, ranges


def _write_vectors(
    index: Path,
    folder: Path,
    source_rows: np.ndarray,
    is_new: np.ndarray,
    rng: np.random.Generator,
) -> None:
    version = layout.current_version(index)
    manifest, measured = layout.read_index_manifest(version), MeasuredVectors(index)
    vectors = VectorFiles(folder, manifest.width, manifest.bits)
    encoder = BinaryEncoder.load(version / layout.BINARY_ENCODER)
    for first in range(0, len(source_rows), _BLOCK_ROWS):
        block = slice(first, first + _BLOCK_ROWS)
        features = np.where(
            is_new[block, None],
            measured.near_rows(source_rows[block], rng),
            measured.features[source_rows[block]],
        ).astype(np.float16)
        vectors.write_rows(layout.FEATURES, first, features)
        vectors.write_rows(layout.CODES, first, encoder.encode(features))


def _write_products(
    version: Path, folder: Path, source_rows: np.ndarray, is_new: np.ndarray
) -> int:
    """Writes the products of the rows; returns their number."""
    manifest, store = layout.read_index_manifest(version), ProductStore(version / layout.PRODUCTS)
    known = {record.product_id: record for record in store.all_products()}
    next_product = store.next_product_id()
    store.close()
    old_products = VectorFiles(version, manifest.width, manifest.bits).memmap(
        layout.ROW_PRODUCTS, manifest.num_photos
    )
    row_products = old_products[source_rows].copy()
    row_products[is_new] = next_product + np.arange(is_new.sum())
    VectorFiles(folder, manifest.width, manifest.bits).write_rows(
        layout.ROW_PRODUCTS, 0, row_products
    )
    products = [
        (p.product_id, p.sku, p.title, p.tags, p.category, p.quality) for p in known.values()
    ]
    for product, source_row in zip(
        row_products[is_new].tolist(), source_rows[is_new].tolist(), strict=True
    ):
        p = known[int(old_products[source_row])]
        products.append((product, f"copy {product}", p.title, p.tags, p.category, p.quality))
    photos = (
        (row, product, f"{row:032x}", b"") for row, product in enumerate(row_products.tolist())
    )
    written = ProductStore.create(folder / layout.PRODUCTS)
    with written.transaction() as connection:
        store_module.upsert_products(connection, products)
        store_module.insert_photos(connection, photos)
        store_module.set_num_rows(connection, len(source_rows))
    written.close()
    return len(products)


def _write_simulated_ranker(folder: Path, model_sha256: str) -> None:
    (folder / layout.RANKER).unlink(missing_ok=True)
    print("the index has no ranker: that of the simulated shop is used")
    store = ProductStore(folder / layout.PRODUCTS)
    statistics_of_products = CatalogStatistics.from_products(store.all_products())
    store.close()
    model = reranking.fit_shop_ranker(reranking.SimulatedShop(0, steps=True))
    write_ranker(folder / layout.RANKER, Ranker(model_sha256, statistics_of_products, model, {}))


def _ranker(version: Path, model: str) -> Ranker | None:
    """Returns the version's ranker, None where the service would not use it."""
    try:
        ranker = read_ranker(version / layout.RANKER)
    except InputError:
        return None
    return ranker if ranker and ranker.recognizer == model else None


class StageTimer:
    """Measures the milliseconds of the stages of one request."""

    def __init__(self) -> None:
        self.stages = collections.Counter[str]()

    def timing(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function, timed."""

        @functools.wraps(call)
        def timed(*arguments: Any, **more: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **more)
            finally:
                self.stages[stage] += (time.perf_counter() - start) * 1e3

        return timed

    def watched(self, inner: Any, **stage_times: str) -> Any:
        """Returns an object like `inner`, some of its methods timed."""
        timer = self

        class Watched:
            def __getattr__(self, name: str) -> Any:
                attribute = getattr(inner, name)
                return (
                    timer.timing(stage_times[name], attribute) if name in stage_times else attribute
                )

        return Watched()


def stage_times(
    reported: dict[str, float], inside: dict[str, float], total: float
) -> dict[str, float]:
    """Returns milliseconds by stage.

    Args:
      reported: as the service reports them.
      inside: of the parts of what it calls "search".
      total: as the client waits.
    """
    by_stage = {
        **reported,
        **{name: inside.get(name, 0.0) for name in ("search", "category", "re-rank", "records")},
    }
    by_stage["products"] = reported["search"] - sum(
        by_stage[name] for name in ("search", "category", "re-rank", "records")
    )
    by_stage["HTTP"] = total - sum(reported.values())
    return {name: by_stage[name] for name in STAGES}


def time_stages(model: ServingModel, timer: StageTimer) -> ServingModel:
    """Returns the model with its index and ranker timed."""
    searcher = dataclasses.replace(
        model.searcher,
        index=timer.watched(model.index, nearest="search", products="records"),
        ranker=timer.watched(model.searcher.ranker, scores="re-rank"),
    )
    return dataclasses.replace(model, searcher=searcher)


def send_photo(connection: http.client.HTTPConnection, data: bytes) -> tuple[dict[str, Any], float]:
    """Sends a photo; returns the answer, and milliseconds until it was read."""
    start = time.perf_counter()
    connection.request("POST", _PATH, data, {"Content-Type": "image/jpeg"})
    response = connection.getresponse()
    body = response.read()
    milliseconds = (time.perf_counter() - start) * 1e3
    if response.status != 200:
        raise RuntimeError(f"the service answered {response.status}: {body[:200]!r}")
    return json.loads(body), milliseconds


def time_cells(times: list[float], base: float) -> list[str]:
    """Returns median, 99th percentile and the share of the base, as text."""
    percentiles = statistics.quantiles(times, n=100)
    return [
        f"{percentiles[49]:.2f}",
        f"{percentiles[98]:.2f}",
        f"{100 * percentiles[49] / base:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument(
        "--backbone", type=Path, help="an index of the same network without a localization branch"
    )
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=600)
    options = parser.parse_args()
    timing.print_machine()
    timer, images = StageTimer(), example_jpegs()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as listening:
        grow_index(options.index, Path(folder, "index"), options.vectors)
        listening.bind(("127.0.0.1", 0))
        app = create_app(ServiceSettings(index=str(Path(folder, "index")), max_batch=1))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", http="h11"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not (server.started and app.state.service):
                if not thread.is_alive():
                    raise RuntimeError("the service ended before it was ready")
                time.sleep(0.05)
            models = app.state.service.models
            models.current = time_stages(models.current, timer)
            engine = network_engine = models.current.engine
            if options.backbone:
                network_engine = engines.select_engine(
                    layout.current_version(options.backbone), engine.kind, largest=1
                )
            batches = [engine.preprocessing.batch([data]) for data in images]
            connection = http.client.HTTPConnection(
                "127.0.0.1", listening.getsockname()[1], timeout=60
            )
            network, totals, parts = list[float](), list[float](), list[dict[str, float]]()
            with mock.patch.object(
                answer, "category_posterior", timer.timing("category", answer.category_posterior)
            ):
                for number in range(-_WARM_UP_REQUESTS, options.requests):
                    start = time.perf_counter()
                    network_engine.run(batches[number % len(images)])
                    end = time.perf_counter()
                    timer.stages.clear()
                    answered, milliseconds = send_photo(connection, images[number % len(images)])
                    if number >= 0:
                        network.append((end - start) * 1e3)
                        totals.append(milliseconds)
                        parts.append(
                            stage_times(answered["timings_ms"], timer.stages, milliseconds)
                        )
            connection.close()
            report(options, models.current, answered, network, totals, parts)
        finally:
            server.should_exit = True
            thread.join()


def report(
    options: argparse.Namespace,
    model: ServingModel,
    answer: dict[str, Any],
    network: list[float],
    totals: list[float],
    parts: list[dict[str, float]],
) -> None:
    base = statistics.median(network)
    without_engine = [total - part["engine"] for total, part in zip(totals, parts, strict=True)]
    rows = [["the network alone", *time_cells(network, base)]]
    rows += [[name, *time_cells([part[name] for part in parts], base)] for name in STAGES]
    rows.append(["all but the engine", *time_cells(without_engine, base)])
    if options.backbone:
        engine_excess = [part["engine"] - one for part, one in zip(parts, network, strict=True)]
        rows.append(["the engine less the network alone", *time_cells(engine_excess, base)])
    rows.append(["from photo to answer", *time_cells(totals, base)])
    size = f"{model.engine.preprocessing.width} x {model.engine.preprocessing.height} pixels"
    header = [f"{size}, {model.engine.kind}", "p50, ms", "p99, ms", "p50, % of the network alone"]
    timing.print_table(
        f"{model.index.manifest.num_photos:,} photos in the index, {options.requests} requests",
        header,
        rows,
    )
    missing = {
        "no box: the model has no localization branch": answer["box"] is None,
        "no category fusion": model.searcher.category_fusion is None,
        "the network alone has the localization branch too: give --backbone": answer["box"]
        is not None
        and not options.backbone,
    }
    for reason in (reason for reason, applies in missing.items() if applies):
        print(f"- {reason}")
    print(f"- similar products of {answer['searched'] or 'all categories'} in the last answer")


if __name__ == "__main__":
    main()
