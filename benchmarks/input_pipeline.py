"""Measures images per second from disk to device, and the time of each part.

Command:  python -m benchmarks.input_pipeline --path DIR
          (DIR: what `sicot import` wrote; without it those rows are empty)
Needs:    grain for all rows but the array file; Pillow and tensorflow-datasets for an imported
          catalogue.

Pipelines run as in training (records in sample order, decoded, resized, titles read, copied to the
device), without a training step. "a core" is images per second of CPU time, of this process and its
workers: it depends least on other load of the machine. Files have been read before: they come from
the page cache, not from the disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks import timing
from sicot_jax import config as config_lib
from sicot_jax.catalog.batches import prefetch, train_batch_loader
from sicot_jax.catalog.catalog import Catalog
from sicot_jax.catalog.sources.arrays import open_array_file, write_array_file
from sicot_jax.catalog.sources.generated import open_generated
from sicot_jax.config import Config, DataConfig, GeneratedSpec
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.parallel import mesh
from sicot_jax.training import device_batches

SIZE = 48  # of a generated photo


def workers_name(workers: int) -> str:
    match workers:
        case 0:
            return "threads"
        case 1:
            return "1 worker process"
        case _:
            return f"{workers} worker processes"


def cpu_seconds() -> float:
    """Returns the CPU time of this process and its workers; nan where it is not known."""
    try:
        ticks = 0
        for process in multiprocessing.active_children():
            after_name = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(after_name[11]) + int(after_name[12])  # user, system
        return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return float("nan")


def pipeline_rate(
    catalog: Catalog, config: Config, workers: int, *, batches: int
) -> tuple[float, float]:
    """Returns images per second, and per second of CPU time, in the steady state.

    Some batches before and after the `batches` counted ones are left out: at the start the
    workers start, at the end they run dry.
    """
    make = train_batch_loader(catalog, config)
    device_mesh = mesh.make_mesh(data=1, devices=jax.devices()[:1])
    before, after = 4 + 2 * workers, 6 + 2 * workers
    stamps = []
    source = prefetch(make, 0, before + batches + after, workers=workers, source=config.data.source)
    for number, batch in enumerate(source, 1):
        jax.block_until_ready(device_batches.to_device(batch, device_mesh))
        if number in (before, before + batches):
            stamps.append((time.perf_counter(), cpu_seconds()))
    (start, cpu_start), (end, cpu_end) = stamps
    images = batches * config.train.batch_size
    return images / (end - start), images / (cpu_end - cpu_start) if cpu_end > cpu_start else float(
        "nan"
    )


def part_seconds(catalog: Catalog, config: Config) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yields name and seconds a photo of each part of making one batch, in one thread."""
    make = train_batch_loader(catalog, config)
    device_mesh = mesh.make_mesh(data=1, devices=jax.devices()[:1])
    size, step = config.train.batch_size, 0
    indices = [int(i) for i in make.sampler(0)]
    records = [make.split[i] for i in indices]
    images = [config.preprocessing.load(record["image"]) for record in records]
    batch = make(0)

    def timed(function: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) / size

        return run

    def read():
        nonlocal step
        step += 1  # other records every time, as in training
        for i in make.sampler(step):
            make.split[int(i)]

    yield "read record", timed(read)
    yield (
        "decode and fit photo",
        timed(lambda: [config.preprocessing.load(record["image"]) for record in records]),
    )
    titles = make.titles
    if titles is not None:
        yield (
            "read title",
            timed(lambda: [titles(record, i) for record, i in zip(records, indices, strict=True)]),
        )
    yield "stack photos", timed(lambda: np.stack(images))
    yield (
        "put on device",
        timed(lambda: jax.block_until_ready(device_batches.to_device(batch, device_mesh))),
    )


def with_data(config: Config, data: DataConfig, batch_size: int) -> Config:
    """Returns the config with other data and another batch size."""
    train = dataclasses.replace(config.train, batch_size=batch_size)
    return dataclasses.replace(config, data=data, train=train)


def open_catalogs(
    args: argparse.Namespace, folder: Path
) -> tuple[dict[str, tuple[Catalog, Config]], str]:
    """Opens the catalogues that can be measured.

    Returns:
      name -> catalogue and its config, and why there is no imported catalogue ("" where there is).
    """
    catalogs: dict[str, tuple[Catalog, Config]] = {}
    reason = (
        timing.missing_modules("grain", "PIL", "tensorflow_datasets") if args.path else "no --path"
    )
    if not reason:
        from sicot_jax.catalog.sources.imported import open_imported

        config = config_lib.load_config(args.config)
        data = dataclasses.replace(config.data, source="imported", path=args.path)
        size = f"{config.preprocessing.resize_width}x{config.preprocessing.resize_height}"
        catalogs[f"imported {size}"] = (
            open_imported(args.path),
            with_data(config, data, args.batch_size),
        )
    spec = GeneratedSpec(
        train_photos=args.photos,
        num_classes=min(100, args.photos),
        word_vectors="random",
        image_size=SIZE,
    )
    generated = open_generated(spec)
    preprocessing = Preprocessing(height=SIZE, width=SIZE, resize_height=SIZE, resize_width=SIZE)
    config = dataclasses.replace(config_lib.load_config("generated"), preprocessing=preprocessing)
    array_file = folder / "generated.npz"
    write_array_file(
        generated,
        array_file,
        to_image=lambda record: preprocessing.load(record["image"]),
        splits=("train",),
    )
    catalogs[f"generated {SIZE}x{SIZE}"] = (
        generated,
        with_data(config, DataConfig(generated=spec), args.batch_size),
    )
    catalogs[f"array file {SIZE}x{SIZE}"] = (
        open_array_file(array_file),
        with_data(config, DataConfig(source="arrays", path=str(array_file)), args.batch_size),
    )
    return catalogs, reason


def print_pipelines(
    catalogs: dict[str, tuple[Catalog, Config]], args: argparse.Namespace, reason: str
) -> None:
    """Prints the rates from disk to device, or why no imported catalogue is measured."""
    pipelines: dict[str, Callable[[], tuple[float, float]]] = {}
    rows: list[tuple[str, ...]] = [
        (f"imported, {workers_name(num_workers)}", reason) for num_workers in args.workers if reason
    ]
    no_grain = timing.missing_modules("grain")
    for name, (catalog, config) in catalogs.items():
        for workers in args.workers:
            label = f"{name}, {workers_name(workers)}"
            if config.data.source == "arrays":
                label = f"{name}, in line"
            elif no_grain:
                rows.append((label, no_grain))
                continue
            pipelines[label] = functools.partial(
                pipeline_rate, catalog, config, workers, batches=args.batches
            )
    for name, results in timing.run_rounds(pipelines, args.rounds).items():
        wall, cpu = ([result[i] for result in results if result[i] == result[i]] for i in (0, 1))
        rows.append(
            (name, timing.median_text(wall), timing.median_text(cpu), timing.range_text(wall))
        )
    timing.print_table(
        f"Disk to device, batches of {args.batch_size}.",
        ("pipeline", "images/s", "images/s a core", "images/s, range"),
        rows,
    )


def print_parts(
    catalogs: dict[str, tuple[Catalog, Config]], args: argparse.Namespace, reason: str
) -> None:
    """Prints the time of each part of making a batch."""
    parts = {
        f"{name}: {part}": function
        for name, (catalog, config) in catalogs.items()
        for part, function in part_seconds(catalog, config)
    }
    timing.run_rounds(parts, 1)  # first reads open files
    rows: list[tuple[str, ...]] = [("imported", reason)] if reason else []
    for name, seconds in timing.run_rounds(parts, args.rounds).items():
        microseconds = [1e6 * value for value in seconds]
        rates_a_core = [1 / value for value in seconds]
        rows.append(
            (
                name,
                timing.median_text(microseconds, 1),
                timing.median_text(rates_a_core),
                timing.range_text(microseconds, 1),
            )
        )
    timing.print_table(
        "Parts, one thread.",
        ("part", "us a photo", "images/s a core", "us a photo, range"),
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--path", help="imported catalogue; its photos are resized as the config says"
    )
    parser.add_argument(
        "--config",
        default="fashion",
        help="config whose preprocessing and titles --path is read with",
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2], help="worker processes; 0: threads"
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=40, help="counted batches a round")
    parser.add_argument(
        "--photos", type=int, default=4000, help="training photos of the generated catalogue"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        catalogs, reason = open_catalogs(args, Path(folder))
        timing.print_machine(args.rounds)
        print_pipelines(catalogs, args, reason)
        print_parts(catalogs, args, reason)


if __name__ == "__main__":
    main()
