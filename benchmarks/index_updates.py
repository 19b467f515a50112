"""Measures building a product index and changing it, in photos per second.

Command:  python -m benchmarks.index_updates --workdir RUN
Smaller:  python -m benchmarks.index_updates --workdir RUN --add 100 --rounds 1

"embedding alone": the run's training photos through the same network. "index": the same with all
that a build does for each photo (features and product records onto the disk, commits); what is done
once for a version is printed separately: recogniser, graph, codes, calibration, verification.
Additions: photos of the catalogue's validation split as new products, as `sicot index add` adds
them, from files; deletions: the same products. Rounds start from a new folder.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks import timing
from benchmarks.finished_runs import open_run_catalog
from sicot_jax.catalog.batches import HostBatch, PhotoBatchLoader, prefetch
from sicot_jax.catalog.catalog import Catalog
from sicot_jax.export.from_run import ExportedRun, export_run
from sicot_jax.indexing import build as building
from sicot_jax.indexing import embed as embedding
from sicot_jax.indexing import version_writer
from sicot_jax.indexing.add import add_products
from sicot_jax.indexing.embed import IndexSource
from sicot_jax.indexing.update import remove_products
from sicot_jax.training.run import fit_run_to_devices, mesh_of_config, read_run


def embedding_rate(workdir: Path, catalog: Catalog) -> float:
    """Returns photos per second of embedding alone."""
    run = read_run(workdir)
    run = fit_run_to_devices(run, mesh_of_config(run.config))
    split = catalog.splits["train"]
    with export_run(workdir) as exported, embedding.photo_embedder(exported) as embed:

        def all_of(order: np.ndarray) -> int:
            batches = PhotoBatchLoader(
                split, run.config.preprocessing, run.config.eval.batch_size, order
            )
            prefetched = prefetch(
                batches,
                0,
                len(batches),
                workers=run.config.data.workers,
                source=run.config.data.source,
            )
            return sum(1 for _ in embed(prefetched))

        all_of(np.arange(1))  # compiles
        start = time.perf_counter()
        count = all_of(np.arange(len(split)))
        return count / (time.perf_counter() - start)


def build_rate(workdir: Path, index: Path) -> tuple[float, float]:
    """Returns photos per second while photos are indexed, and the seconds of all else."""
    photo_seconds: list[tuple[int, float]] = []
    inner = version_writer.embed_photos

    def timed(recognizer, source, reading, known, vectors, store) -> None:
        with embedding.photo_embedder(recognizer) as embed:
            list(embed(iter([_first_batch(recognizer, source, reading)])))  # compiles
            compiled = mock.patch.object(
                embedding, "photo_embedder", return_value=contextlib.nullcontext(embed)
            )
            with compiled:
                start = time.perf_counter()
                inner(recognizer, source, reading, known, vectors, store)
                photo_seconds.append((len(source.photos), time.perf_counter() - start))

    start = time.perf_counter()
    with mock.patch.object(version_writer, "embed_photos", timed):
        building.build_index(workdir, index)
    (count, seconds), total = photo_seconds[0], time.perf_counter() - start
    return count / seconds, total - seconds


def _first_batch(
    recognizer: ExportedRun, source: IndexSource, reading: embedding.PhotoReading
) -> HostBatch:
    split, photos = source.catalog.splits["train"], source.photos[:1]
    batches = PhotoBatchLoader(split, recognizer.preprocessing, reading.batch_size, photos)
    return next(iter(prefetch(batches, 0, 1, workers=0, source=reading.source)))


def change_seconds(index: Path, manifest: Path, skus: Sequence[str]) -> dict[str, float]:
    """Returns the seconds of each change."""

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    one = manifest.with_name("one.csv")
    one.write_text("\n".join(manifest.read_text().splitlines()[:2]) + "\n")
    return {
        "add one": seconds(lambda: add_products(index, one)),
        "add": seconds(lambda: add_products(index, manifest)),
        "remove one": seconds(lambda: remove_products(index, skus[:1])),
        "remove": seconds(lambda: remove_products(index, skus)),
    }


def write_manifest(catalog: Catalog, count: int, folder: Path) -> tuple[Path, list[str]]:
    """Writes a manifest of `count` products with a photo each; returns their SKUs."""
    split = catalog.splits["validation"]
    rows = []
    for number in range(min(count, len(split))):
        image = split[number]["image"]
        assert isinstance(image, bytes), "photos as an import stores them"
        (folder / f"{number}.jpg").write_bytes(image)
        rows.append((f"{number}.jpg", f"added-{number}", "red shirt"))
    with (folder / "added.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("image", "sku", "title"), *rows])
    return folder / "added.csv", [row[1] for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workdir", type=Path, required=True, help="a finished run on an imported catalogue"
    )
    parser.add_argument("--add", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    timing.print_machine(options.rounds)
    catalog = open_run_catalog(read_run(options.workdir))
    rates: list[float] = []
    build_seconds: list[tuple[float, float]] = []
    changes: list[dict[str, float]] = []
    for _ in range(options.rounds):
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            rates.append(embedding_rate(options.workdir, catalog))
            build_seconds.append(build_rate(options.workdir, folder / "index"))
            (folder / "photos").mkdir()
            manifest, skus = write_manifest(catalog, options.add, folder / "photos")
            changes.append(change_seconds(folder / "index", manifest, skus))
    indexed, other_seconds = zip(*build_seconds, strict=True)
    rows = [
        ["embedding alone", timing.median_text(rates), "1.00"],
        ["index", timing.median_text(indexed), timing.ratio_text(indexed, rates)],
    ]
    timing.print_table(
        f"{len(catalog.splits['train'].labels)} photos", ["what", "photos/s", "x embedding"], rows
    )
    print(f"\nOnce for a version: {statistics.median(other_seconds):.1f} s.")
    median = {name: statistics.median(results[name] for results in changes) for name in changes[0]}
    count = len(skus)
    rows = [
        ["add", f"{median['add one']:.2f}", f"{count / median['add']:,.0f}"],
        ["remove", f"{median['remove one']:.3f}", f"{count / median['remove']:,.0f}"],
    ]
    timing.print_table(
        f"Changes, {count} products of one photo", ["change", "one product, s", "products/s"], rows
    )


if __name__ == "__main__":
    main()
