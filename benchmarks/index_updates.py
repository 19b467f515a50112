"""Making a product index and changing it: photos a second of a build against embedding alone, and
of additions and removals.

Command:  python -m benchmarks.index_updates --workdir RUN
Smaller:  python -m benchmarks.index_updates --workdir RUN --add 100 --rounds 1

Bare: the run's training photos from the catalogue through the same network, and nothing else.
  Index: the same with all that a build does for each photo (features and cards onto the disk,
  commits); what comes once for a version, beside it: recogniser, graph, codes, calibration, check.
  Additions: photos of the catalogue's validation split as products of their own, by `change.add` as
  `sicot index add` calls it, from files; removals: the same products. Rounds start from a new
  folder.
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
from benchmarks.finished_runs import catalog_of
from sicot_jax.catalog.batches import PhotoBatchLoader
from sicot_jax.catalog.catalog import Catalog
from sicot_jax.catalog.prefetch import prefetch
from sicot_jax.export.from_run import exported
from sicot_jax.indexing import build as building
from sicot_jax.indexing import update as change
from sicot_jax.training import run as runs


def bare(workdir: Path, catalog: Catalog) -> float:
    """Photos a second."""
    run = runs.read_run(workdir)
    run = runs.on_devices_here(run, runs.start_mesh(run.config))
    split = catalog.splits["train"]
    with exported(workdir) as found, building.embedder(found) as embed:

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


def built(workdir: Path, index: Path) -> tuple[float, float]:
    """Photos a second while photos are indexed, and the seconds of all else."""
    spent: list[tuple[int, float]] = []
    inner = building.embed_photos

    def timed(found, run, source, seen, vectors, cards) -> None:
        with building.embedder(found) as embed:
            list(embed(iter([_one(source, run)])))  # compiles
            with mock.patch.object(building, "embedder", lambda _: contextlib.nullcontext(embed)):
                start = time.perf_counter()
                inner(found, run, source, seen, vectors, cards)
                spent.append((len(source.order), time.perf_counter() - start))

    start = time.perf_counter()
    with mock.patch.object(building, "embed_photos", timed):
        building.build(workdir, index)
    (count, seconds), whole = spent[0], time.perf_counter() - start
    return count / seconds, whole - seconds


def _one(source, run) -> dict:
    split, order = source.catalog.splits["train"], source.order[:1]
    batches = PhotoBatchLoader(
        split, run.config.preprocessing, run.config.eval.batch_size, order
    )
    return next(iter(prefetch(batches, 0, 1, workers=0, source=run.config.data.source)))


def changed(index: Path, manifest: Path, skus: Sequence[str]) -> dict[str, float]:
    """Seconds of each change."""

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    one = manifest.with_name("one.csv")
    one.write_text("\n".join(manifest.read_text().splitlines()[:2]) + "\n")
    return {
        "add one": seconds(lambda: change.add(index, one)),
        "add": seconds(lambda: change.add(index, manifest)),
        "remove one": seconds(lambda: change.remove(index, skus[:1])),
        "remove": seconds(lambda: change.remove(index, skus)),
    }


def write_manifest(catalog: Catalog, count: int, folder: Path) -> tuple[Path, list[str]]:
    """A manifest of `count` products with a photo each; their SKUs."""
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
    catalog = catalog_of(runs.read_run(options.workdir))
    rates: list[float] = []
    whole: list[tuple[float, float]] = []
    changes: list[dict[str, float]] = []
    for _ in range(options.rounds):
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            rates.append(bare(options.workdir, catalog))
            whole.append(built(options.workdir, folder / "index"))
            (folder / "photos").mkdir()
            manifest, skus = write_manifest(catalog, options.add, folder / "photos")
            changes.append(changed(folder / "index", manifest, skus))
    indexed, once = zip(*whole, strict=True)
    rows = [
        ["embedding alone", timing.middle(rates), "1.00"],
        ["index", timing.middle(indexed), timing.ratio(indexed, rates)],
    ]
    timing.print_table(
        f"{len(catalog.splits['train'].labels)} photos", ["what", "photos/s", "x embedding"], rows
    )
    print(f"\nOnce for a version: {statistics.median(once):.1f} s.")
    middle = {name: statistics.median(found[name] for found in changes) for name in changes[0]}
    count = len(skus)
    rows = [
        ["add", f"{middle['add one']:.2f}", f"{count / middle['add']:,.0f}"],
        ["remove", f"{middle['remove one']:.3f}", f"{count / middle['remove']:,.0f}"],
    ]
    timing.print_table(
        f"Changes, {count} products of one photo", ["change", "one product, s", "products/s"], rows
    )


if __name__ == "__main__":
    main()
