"""Measures photos per second of `sicot import`, in total and by its parts.

Command:  python -m benchmarks.catalog_import
Needs:    what `sicot import` needs (Pillow, tensorflow-datasets, array-record, gensim).

The script makes JPEGs with titles and a manifest in a temporary folder and imports them. "photos"
is the time that the import waits for photos (read, decode, hash, shrink, encode; starting the
workers too), "words" that of vocabulary and word vectors, the third part all the rest. No worker is
started below 100 photos each: use thousands.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks import timing


def make_photos(folder: Path, count: int, width: int, height: int) -> tuple[Path, list[str], float]:
    """Writes a manifest of product-like JPEGs; returns photo names and kilobytes a photo."""
    from PIL import Image

    from sicot_jax.catalog.sources.generated import open_generated
    from sicot_jax.config import GeneratedSpec

    spec = GeneratedSpec(
        num_classes=max(1, count // 20),
        train_photos=count,
        image_size=min(max(width, height), 160),
        word_vectors="random",
    )
    split = open_generated(spec).splits["train"]
    names, size = [], 0
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "sku", "title"))
        for index in range(count):
            record = split[index]
            photo = Image.fromarray(np.asarray(record["image"])).resize(
                (width, height), Image.Resampling.BICUBIC
            )
            # Noise of a camera: smooth images would be smaller and faster to decode than photos
            # are.
            grain = np.random.default_rng(index).normal(scale=3, size=(height, width, 1))
            pixels = np.clip(np.asarray(photo) + grain, 0, 255).astype(np.uint8)
            name = f"{index:06d}.jpg"
            Image.fromarray(pixels).save(folder / name, "JPEG", quality=85)
            size += (folder / name).stat().st_size
            writer.writerow((name, record["sku"], record["title"]))
            names.append(name)
    return folder / "manifest.csv", names, size / count / 1000


@contextlib.contextmanager
def measure_stages() -> Iterator[dict[str, float]]:
    """Measures the seconds that an import inside this context spends on photos and on words."""
    from sicot_jax.catalog.importing import builder, catalog_tables

    seconds = {"photos": 0.0, "words": 0.0}
    modules = {
        "prepare_photos": builder,
        "build_tokenizer": catalog_tables,
        "train_word_vectors": catalog_tables,
    }
    real = {name: getattr(module, name) for name, module in modules.items()}

    def prepare_photos(*args, **options):
        photos = real["prepare_photos"](*args, **options)
        while True:
            start = time.perf_counter()
            photo = next(photos, None)
            seconds["photos"] += time.perf_counter() - start
            if photo is None:
                return
            yield photo

    def words(name: str) -> Callable:
        def timed(*args, **options):
            start = time.perf_counter()
            result = real[name](*args, **options)
            seconds["words"] += time.perf_counter() - start
            return result

        return timed

    watched = {
        "prepare_photos": prepare_photos,
        **{name: words(name) for name in real if name != "prepare_photos"},
    }
    try:
        for name, function in watched.items():
            setattr(modules[name], name, function)
        yield seconds
    finally:
        for name, function in real.items():
            setattr(modules[name], name, function)


def import_seconds(manifest: Path, workers: int) -> dict[str, float]:
    """Returns the seconds of one import and of its parts."""
    from sicot_jax.catalog.importing.run import import_catalog

    with (
        tempfile.TemporaryDirectory() as out,
        contextlib.redirect_stderr(io.StringIO()),
        measure_stages() as seconds,
    ):
        start = time.perf_counter()
        import_catalog(manifest, Path(out, "catalogue"), name="benchmark", workers=workers)
        total = time.perf_counter() - start
    parts = {"photos": seconds["photos"], "words": seconds["words"]}
    return {"entire import": total, **parts, "splits, tables, records": total - sum(parts.values())}


def photo_parts(folder: Path, names: list[str]) -> dict[str, float]:
    """Returns the seconds of each part of preparing these photos, in one thread."""
    from PIL import Image

    from sicot_jax.catalog.importing.settings import ImportSettings
    from sicot_jax.common import image

    short_side = ImportSettings().short_side
    seconds = dict.fromkeys(("read file", "decode", "hash pixels", "shrink", "encode"), 0.0)
    for name in names:
        stamps = [time.perf_counter()]
        data = (folder / name).read_bytes()
        stamps.append(time.perf_counter())
        pixels = image.decode_photo(data)
        stamps.append(time.perf_counter())
        image.image_id(pixels)
        stamps.append(time.perf_counter())
        photo = Image.fromarray(pixels)
        shrunk = image.resize_short_side(photo, short_side)
        stamps.append(time.perf_counter())
        if shrunk is not photo:  # a photo that is small enough keeps its bytes
            image.encode_jpeg(shrunk)
        stamps.append(time.perf_counter())
        for part, start, end in zip(seconds, stamps, stamps[1:], strict=False):
            seconds[part] += end - start
    return seconds


def measure(folder: Path, args: argparse.Namespace, width: int, height: int) -> None:
    """Prints both tables of one photo size."""
    manifest, names, kilobytes = make_photos(folder, args.photos, width, height)
    size, count, values = f"{width}x{height}", len(names), names[: args.part_photos]

    contenders: dict[str, Callable[[], dict[str, float]]] = {
        f"{workers} worker{'s' if workers > 1 else ''}": lambda workers=workers: import_seconds(
            manifest, workers
        )
        for workers in args.workers
    }
    import_seconds(manifest, 1)  # libraries are loaded once
    parts = "parts"
    results = timing.run_rounds(
        {**contenders, parts: lambda: photo_parts(folder, values)}, args.rounds
    )
    alone = results.pop(parts)

    def row(name: str, seconds: list[float], photos: int) -> tuple[str, ...]:
        microseconds = [1e6 * value / photos for value in seconds]
        rate = [photos / value for value in seconds if value > 0]
        return (
            f"{size}: {name}",
            timing.median_text(rate),
            timing.median_text(microseconds, 1),
            timing.range_text(microseconds, 1),
        )

    def rows(results: list[dict[str, float]], label: str, photos: int) -> list[tuple[str, ...]]:
        return [
            row(f"{part}{label}", [result[part] for result in results], photos)
            for part in results[0]
        ]

    header = ("part", "photos/s", "us a photo", "us a photo, range")
    timing.print_table(
        f"Import of {count:,} JPEGs of {size} ({kilobytes:.1f} kB each), and its parts.",
        header,
        [line for label, seconds in results.items() for line in rows(seconds, f", {label}", count)],
    )
    timing.print_table(
        f"Preparing a photo of {size}, one thread (one that needs no shrinking is not encoded "
        "again).",
        header,
        rows(alone, "", len(values)),
    )


def photo_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=photo_size, nargs="+", default=[(60, 80), (800, 600)], metavar="WxH"
    )
    parser.add_argument("--photos", type=int, default=2000, help="photos of each size")
    parser.add_argument(
        "--part-photos", type=int, default=200, help="of them, for the parts of a photo"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    timing.print_machine(args.rounds)
    reason = timing.missing_modules(
        "PIL", "tensorflow_datasets", "array_record", "gensim", "pyarrow"
    )
    for width, height in args.sizes:
        if reason:
            timing.print_table(
                f"Import of JPEGs of {width}x{height}.",
                ("part", "photos/s"),
                [("entire import", reason)],
            )
            continue
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), args, width, height)


if __name__ == "__main__":
    main()
