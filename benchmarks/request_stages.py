"""The way of a photo through the service, by stage, against the network alone.

Command:  taskset -c 0,1 python -m benchmarks.request_stages --index INDEX         (ResNet-50 at 224 pixels:
  two or three minutes)
Smaller:  python -m benchmarks.request_stages --index INDEX --vectors 2000 --requests 20
Needs:    the extra service; an index with an ONNX graph. One of a ResNet-50 with starting values (a
  few minutes):
  sicot train --config=tiny --workdir=RUN --config.model.depth=50 --config.model.width=64
  --config.model.stem=imagenet \\
    --config.model.embedding_width=0 --config.preprocessing.height=224
      --config.preprocessing.width=224 \\
    --config.preprocessing.resize_height=256 --config.preprocessing.resize_width=256
      --config.mesh.data=1 \\
    --config.data.generated.validation_per_class=10 --config.train.steps=1
      --config.train.batch_size=8
  sicot index build --workdir RUN --out INDEX

The index is grown to `--vectors` in a temporary folder: beside each photo's features new ones,
moved by the noise that features have within a product (benchmarks/search), each a product with the
card of the one that it lies beside. Its model and its fit of categories are taken as they are; what
it has none of is named below the table. Its ranker too, else that of the made shop of
benchmarks/reranking: its features and trees are as many, whatever it learned.

A service runs in this process, so that parts of it can be timed, and one client asks it over HTTP
for five products and 20 similar ones, a photo after the other; before each request the network
alone sees the same photo. "products" is the SKU and how sure it is, "HTTP" all that the service
does not time: server, client, JSON. With `--backbone` the network alone is another index's: of the
same run without a box branch, so that the branch and the second look at the masked photo stand in a
row of their own.
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
from benchmarks.vector_search import Measured
from benchmarks.service_load import photos
from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout
from sicot_jax.index.storage import products as cards_of
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

STAGES = ("read", "decode", "engine", "search", "category", "products", "re-rank", "cards", "HTTP")
_PATH = "/v1/recognize?k=5&similar=20"
_WARM = 10  # requests
_LINES = 1 << 15


def grow(index: Path, out: Path, size: int) -> None:
    """The version in use with about `size` photos, as the index `out`."""
    version, folder = layout.current_version(index), out / "v000001"
    folder.mkdir(parents=True)
    for name in (layout.MODEL, layout.ONNX_MODEL, *layout.FITTED):
        if (version / name).exists():
            (folder / name).symlink_to((version / name).absolute())
    manifest, cards = layout.read_index_manifest(version), ProductStore(version / layout.PRODUCTS)
    owned = VectorFiles(version, manifest.width, manifest.bits).memmap(
        layout.ROW_PRODUCTS, manifest.num_photos
    )
    known, new = {product.product: product for product in cards.all_products()}, cards.ends()[1]
    cards.close()
    # A line of the index for each of ours, category by category; the first time it comes it is that
    # photo itself.
    rng, lines, ranges = np.random.default_rng(0), np.zeros(0, np.int64), dict[str, list[int]]()
    for name, (first, last) in sorted(manifest.categories.items(), key=lambda item: item[1]):
        more = rng.integers(
            first, last, max(round((last - first) * (size / manifest.num_photos - 1)), 0)
        )
        ranges[name] = [len(lines), len(lines) + last - first + len(more)]
        lines = np.concatenate([lines, np.arange(first, last), more])
    made = np.ones(len(lines), bool)
    made[np.unique(lines, return_index=True)[1]] = False
    owners = owned[lines].copy()
    owners[made] = new + np.arange(made.sum())
    vectors, codebook, measured = (
        VectorFiles(folder, manifest.width, manifest.bits),
        BinaryEncoder.load(version / layout.BINARY_ENCODER),
        Measured(index),
    )
    for at in range(0, len(lines), _LINES):
        some = lines[at : at + _LINES]
        rows = np.where(
            made[at : at + _LINES, None], measured.beside(some, rng), measured.features[some]
        )
        vectors.write(layout.FEATURES, at, rows.astype(np.float16))
        vectors.write(layout.CODES, at, codebook.encode(rows.astype(np.float16)))
    vectors.write(layout.ROW_PRODUCTS, 0, owners)
    written = ProductStore.create(folder / layout.PRODUCTS)
    with written.change() as connection:
        products = [
            (p.product, p.sku, p.title, p.tags, p.category, p.quality) for p in known.values()
        ]
        for number, line in zip(owners[made].tolist(), lines[made].tolist(), strict=True):
            products.append(
                (number, f"made {number}", *dataclasses.astuple(known[int(owned[line])])[2:6])
            )
        cards_of.upsert_products(connection, products)
        cards_of.insert_photos(
            connection,
            ((place, owner, f"{place:032x}", b"") for place, owner in enumerate(owners.tolist())),
        )
        cards_of.set_num_rows(connection, len(lines))
    if _ranker(version, manifest.model_sha256) is None:
        (folder / layout.RANKER).unlink(missing_ok=True)
        print("no ranker of its own: that of the made shop")
        model = reranking.model_of(reranking.Shop(0, steps=True))
        write_ranker(
            folder / layout.RANKER,
            Ranker(
                manifest.model_sha256,
                CatalogStatistics.from_products(written.all_products()),
                model,
                {},
            ),
        )
    written.close()
    layout.write_index_manifest(
        folder,
        dataclasses.replace(manifest, photos=len(lines), products=len(products), categories=ranges),
    )
    (out / layout.CURRENT).write_text(folder.name + "\n")


def _ranker(version: Path, model: str) -> Ranker | None:
    """The version's, None where the service would not use it."""
    try:
        ranker = read_ranker(version / layout.RANKER)
    except InputError:
        return None
    return ranker if ranker and ranker.recognizer == model else None


class Spent:
    """Milliseconds of the stages of one request."""

    def __init__(self) -> None:
        self.stages = collections.Counter[str]()

    def timing(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*arguments: Any, **more: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **more)
            finally:
                self.stages[stage] += (time.perf_counter() - start) * 1e3

        return timed

    def watched(self, inner: Any, **stages: str) -> Any:
        """`inner`, some of its methods timed."""
        spent = self

        class Watched:
            def __getattr__(self, name: str) -> Any:
                found = getattr(inner, name)
                return spent.timing(stages[name], found) if name in stages else found

        return Watched()


def stages(told: dict[str, float], inside: dict[str, float], whole: float) -> dict[str, float]:
    """Milliseconds by stage. told: as the service answers; inside: of what it calls "search";
    whole: as the client waits.
    """
    found = {
        **told,
        **{name: inside.get(name, 0.0) for name in ("search", "category", "re-rank", "cards")},
    }
    found["products"] = told["search"] - sum(
        found[name] for name in ("search", "category", "re-rank", "cards")
    )
    found["HTTP"] = whole - sum(told.values())
    return {name: found[name] for name in STAGES}


def watch(model: ServingModel, spent: Spent) -> ServingModel:
    searcher = dataclasses.replace(
        model.searcher,
        index=spent.watched(model.index, nearest="search", products="cards"),
        ranker=spent.watched(model.searcher.ranker, scores="re-rank"),
    )
    return dataclasses.replace(model, searcher=searcher)


def ask(connection: http.client.HTTPConnection, data: bytes) -> tuple[dict[str, Any], float]:
    """The answer, and milliseconds until it was read."""
    start = time.perf_counter()
    connection.request("POST", _PATH, data, {"Content-Type": "image/jpeg"})
    response = connection.getresponse()
    body = response.read()
    milliseconds = (time.perf_counter() - start) * 1e3
    if response.status != 200:
        raise RuntimeError(f"the service answered {response.status}: {body[:200]!r}")
    return json.loads(body), milliseconds


def cells(times: list[float], base: float) -> list[str]:
    cut = statistics.quantiles(times, n=100)
    return [f"{cut[49]:.2f}", f"{cut[98]:.2f}", f"{100 * cut[49] / base:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument(
        "--backbone", type=Path, help="an index of the same network without a box branch"
    )
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=600)
    options = parser.parse_args()
    timing.print_machine()
    spent, shown = Spent(), photos()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as listening:
        grow(options.index, Path(folder, "index"), options.vectors)
        listening.bind(("127.0.0.1", 0))
        app = create_app(ServiceSettings(index=str(Path(folder, "index")), largest_batch=1))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", http="h11"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not (server.started and app.state.service):
                if not thread.is_alive():
                    raise RuntimeError("the service ended before it was ready")
                time.sleep(0.05)
            models = app.state.service.models
            models.current = watch(models.current, spent)
            engine = alone = models.current.engine
            if options.backbone:
                alone = engines.select_engine(
                    layout.current_version(options.backbone), engine.kind, largest=1
                )
            batches = [engine.preprocessing.batch([data]) for data in shown]
            connection = http.client.HTTPConnection(
                "127.0.0.1", listening.getsockname()[1], timeout=60
            )
            network, whole, parts = list[float](), list[float](), list[dict[str, float]]()
            with mock.patch.object(
                answer, "category_posterior", spent.timing("category", answer.category_posterior)
            ):
                for number in range(-_WARM, options.requests):
                    start = time.perf_counter()
                    alone.run(batches[number % len(shown)])
                    end = time.perf_counter()
                    spent.stages.clear()
                    answered, milliseconds = ask(connection, shown[number % len(shown)])
                    if number >= 0:
                        network.append((end - start) * 1e3)
                        whole.append(milliseconds)
                        parts.append(stages(answered["timings_ms"], spent.stages, milliseconds))
            connection.close()
            report(options, models.current, answered, network, whole, parts)
        finally:
            server.should_exit = True
            thread.join()


def report(
    options: argparse.Namespace,
    model: ServingModel,
    answer: dict[str, Any],
    network: list[float],
    whole: list[float],
    parts: list[dict[str, float]],
) -> None:
    base = statistics.median(network)
    around = [total - part["engine"] for total, part in zip(whole, parts, strict=True)]
    rows = [["the network alone", *cells(network, base)]]
    rows += [[name, *cells([part[name] for part in parts], base)] for name in STAGES]
    rows.append(["all but the engine", *cells(around, base)])
    if options.backbone:
        more = [part["engine"] - one for part, one in zip(parts, network, strict=True)]
        rows.append(["the engine, less the network alone", *cells(more, base)])
    rows.append(["from photo to answer", *cells(whole, base)])
    size = f"{model.engine.preprocessing.width} x {model.engine.preprocessing.height} pixels"
    header = [f"{size}, {model.engine.kind}", "p50, ms", "p99, ms", "p50, % of the network alone"]
    timing.print_table(
        f"{model.index.manifest.num_photos:,} photos in the index, {options.requests} requests",
        header,
        rows,
    )
    missing = {
        "no box: the model has no box branch": answer["box"] is None,
        "no fit of categories": model.searcher.category_fusion is None,
        "the network alone has the box branch too: give --backbone": answer["box"] is not None
        and not options.backbone,
    }
    for what in (what for what, is_so in missing.items() if is_so):
        print(f"- {what}")
    print(f"- similar products of {answer['searched'] or 'all categories'} in the last answer")


if __name__ == "__main__":
    main()
