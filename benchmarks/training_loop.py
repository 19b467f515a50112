"""Measures the overhead of the training loop over its step, and of titles over photos.

Command:  python -m benchmarks.training_loop            (add --path DIR for an imported catalogue)
Smaller:  python -m benchmarks.training_loop --config tiny --classes 11 --train-photos 256
          --steps 20
Needs:    grain and Pillow for catalogues other than the array file, tensorflow-datasets for an
          imported one.

Loop: `sicot_jax.training.loop.train`, timed from batch to batch where batches are copied to the
device; validation, checkpoints and the final test are outside the counted steps. Compared with the
jitted step on one resident batch of the same catalogue. The default photos are generated, cut to
the config's size and written to an array file.
Streams: steps on random photos and titles, without a catalogue.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks import timing
from sicot_jax import config as config_lib
from sicot_jax.catalog.batches import HostBatch, train_batch_loader
from sicot_jax.catalog.catalog import Catalog, Record
from sicot_jax.catalog.sources.arrays import open_array_file, write_array_file
from sicot_jax.catalog.sources.generated import open_generated
from sicot_jax.config import Config, DataConfig, GeneratedSpec, LossConfig
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.models.semantic_stream import set_word_vectors
from sicot_jax.parallel import mesh
from sicot_jax.training import device_batches
from sicot_jax.training.loop import train
from sicot_jax.training.model import DataShape
from sicot_jax.training.setup import make_setup
from sicot_jax.training.state import class_log_prior, initial_state
from sicot_jax.training.step import make_train_step

_BEFORE, _AFTER = (
    8,
    6,
)  # steps of a loop that are not counted: compilation and a full prefetch, an empty one


class BareStep:
    """The jitted step on one resident batch; calling it returns milliseconds a step."""

    def __init__(
        self,
        config: Config,
        batch: HostBatch,
        *,
        counts: np.ndarray,
        word_vectors: np.ndarray,
        steps: int,
    ):
        self.mesh, self.steps = (
            mesh.make_mesh(data=config.mesh.data, model=config.mesh.model),
            steps,
        )
        with jax.set_mesh(self.mesh):
            shape = DataShape(len(counts), *word_vectors.shape, train_photos=int(counts.sum()))
            setup = make_setup(config, shape, self.mesh)
            prior = mesh.to_global({"prior": class_log_prior(counts, self.mesh)}, self.mesh)[
                "prior"
            ]
            self.state = initial_state(setup, prior)
            if config.loss.with_semantic:
                self.state = set_word_vectors(self.state, word_vectors)
            self.batch = device_batches.to_device(batch, self.mesh)
            # Compiled twice: the second time from the compilation cache, as in every loop but the
            # first, so that all run one and the same program.
            for _ in range(2):
                self.step = jax.jit(make_train_step(setup), donate_argnums=0)
                self.step.lower(self.state, self.batch).compile()
            self.state, losses = self.step(self.state, self.batch)
            jax.block_until_ready(losses)

    def __call__(self) -> float:
        with jax.set_mesh(self.mesh):
            start = time.perf_counter()
            for _ in range(self.steps):
                self.state, losses = self.step(self.state, self.batch)
            jax.block_until_ready((self.state, losses))
            return 1000 * (time.perf_counter() - start) / self.steps


@contextlib.contextmanager
def batch_times() -> Iterator[list[float]]:
    """Records when each batch inside this context is handed to the device."""
    times: list[float] = []
    to_device = device_batches.to_device

    def noting(batch, device_mesh):
        times.append(time.perf_counter())
        return to_device(batch, device_mesh)

    device_batches.to_device = noting
    try:
        yield times
    finally:
        device_batches.to_device = to_device


def loop_ms(config: Config, catalog: Catalog, steps: int) -> float:
    """Returns milliseconds a step of a training run, from the compiled step to nearly the end."""
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(
            config.train,
            steps=_BEFORE + steps + _AFTER,
            evaluate_every_epochs=1e9,
            checkpoint_every_seconds=1e9,
            tensorboard=config.train.tensorboard and not timing.missing_modules("tensorboardX"),
        ),
        eval=dataclasses.replace(config.eval, max_photos=config.eval.batch_size),
    )
    with tempfile.TemporaryDirectory() as workdir, batch_times() as times:
        train(config, Path(workdir), catalog=catalog)
    return 1000 * (times[_BEFORE + steps] - times[_BEFORE]) / steps


def with_data_config(config: Config, data: DataConfig) -> Config:
    return dataclasses.replace(
        config, data=dataclasses.replace(data, max_tokens=config.data.max_tokens)
    )


def _center_crop(size: int, shape: Preprocessing) -> Callable[[Record], np.ndarray]:
    """Returns record -> its photo's middle of `shape.resize_height` x `shape.resize_width`."""
    top, left = (size - shape.resize_height) // 2, (size - shape.resize_width) // 2

    def crop(record: Record) -> np.ndarray:
        photo = np.asarray(record["image"])
        return photo[top : top + shape.resize_height, left : left + shape.resize_width]

    return crop


def measure_loops(config: Config, args: argparse.Namespace, folder: Path) -> None:
    """Prints table 1: loops against their step."""
    shape = config.preprocessing
    spec = GeneratedSpec(
        num_classes=args.classes,
        train_photos=args.train_photos,
        validation_per_class=1,
        test_per_class=1,
        image_size=max(shape.resize_height, shape.resize_width),
        word_vectors="random",
        word_vector_width=args.word_width,
    )
    generated = open_generated(spec)

    file = folder / "generated.npz"
    write_array_file(generated, file, to_image=_center_crop(spec.image_size, shape))

    step_ms = "bare step"
    contenders: dict[str, Callable[[], float]] = {}
    base_of: dict[str, str] = {}
    rows: list[tuple[str, ...]] = []

    def add(name: str, config: Config, catalog: Catalog, base: str) -> None:
        if base not in contenders:
            contenders[base] = BareStep(
                config,
                train_batch_loader(catalog, config)(0),
                counts=catalog.classes.counts["train"],
                word_vectors=catalog.word_vectors,
                steps=args.steps,
            )
            base_of[base] = base
        contenders[name] = lambda: loop_ms(config, catalog, args.steps)
        base_of[name] = base

    arrays = with_data_config(config, DataConfig(source="arrays", path=str(file)))
    add("loop, array file", arrays, open_array_file(file), step_ms)
    on_device = dataclasses.replace(arrays, data=dataclasses.replace(arrays.data, on_device=True))
    add("loop, array file, photos on the device", on_device, open_array_file(file), step_ms)
    reason = timing.missing_modules("grain", "PIL")
    if reason:
        rows.append(("loop, generated on the fly", reason))
    else:
        add(
            "loop, generated on the fly",
            with_data_config(config, DataConfig(generated=spec)),
            generated,
            step_ms,
        )
    reason = (
        timing.missing_modules("grain", "PIL", "tensorflow_datasets") if args.path else "no --path"
    )
    for workers in args.workers:
        name = f"loop, imported, {f'{workers} worker processes' if workers else 'threads'}"
        if reason:
            rows.append((name, reason))
            continue
        from sicot_jax.catalog.sources.imported import open_imported

        data = dataclasses.replace(config.data, source="imported", path=args.path, workers=workers)
        add(
            name,
            dataclasses.replace(config, data=data),
            open_imported(args.path),
            "bare step, imported",
        )
    _print_loops(contenders, base_of, rows, args, config.train.batch_size)


def _print_loops(
    contenders: dict[str, Callable[[], float]],
    base_of: dict[str, str],
    not_measured: list[tuple[str, ...]],
    args: argparse.Namespace,
    batch_size: int,
) -> None:
    results = timing.run_rounds(contenders, args.rounds)
    measured = []
    for name, ms in results.items():
        rate = [1000 * batch_size / value for value in ms]
        base = [1000 * batch_size / value for value in results[base_of[name]]]
        share = timing.ratio_text([100 * value for value in rate], base, digits=1)
        measured.append(
            (
                name,
                timing.median_text(rate),
                f"{share} %",
                timing.median_text(ms, 1),
                timing.range_text(ms, 1),
            )
        )
    timing.print_table(
        "Full training loop against the bare step (aim: 95 % or more; input that decodes shares "
        "the cores of a CPU).",
        ("loop", "images/s", "of its bare step", "ms a step", "ms, range"),
        [*measured, *not_measured],
    )


def measure_streams(config: Config, args: argparse.Namespace) -> None:
    """Prints table 2: what the text encoder adds to a step, by encoder."""
    rng = np.random.default_rng(0)
    size, shape, tokens = config.train.batch_size, config.preprocessing, config.data.max_tokens
    token_ids = rng.integers(1, args.vocabulary, (size, tokens), dtype=np.int32)
    lengths = rng.integers(1, tokens + 1, (size, 1))
    photos = {
        "image": rng.integers(
            0, 256, (size, shape.resize_height, shape.resize_width, 3), dtype=np.uint8
        ),
        "label": rng.integers(0, args.classes, size, dtype=np.int32),
    }
    titled = {**photos, "token_ids": np.where(np.arange(tokens) < lengths, token_ids, 0)}
    vectors = rng.normal(size=(args.vocabulary, args.word_width)).astype(np.float32)
    counts = np.full(args.classes, 10)

    def bare(config: Config, batch: HostBatch) -> BareStep:
        return BareStep(config, batch, counts=counts, word_vectors=vectors, steps=args.steps)

    baseline = "baseline"
    alone = dataclasses.replace(config, loss=LossConfig(visual=1.0, mixed=0.0))
    contenders = {baseline: bare(alone, photos)}
    for encoder in args.encoders:
        text = dataclasses.replace(config.model.text, encoder=encoder)
        co_training = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, text=text),
            loss=LossConfig(visual=1.0, mixed=1.0),
        )
        contenders[f"co-training, {encoder}"] = bare(co_training, titled)
    results = timing.run_rounds(contenders, args.rounds)
    timing.print_table(
        "Co-training against the baseline, bare steps (aim: at most 1.25 with `bilinear`).",
        ("step", "ms a step", "of the baseline", "images/s", "ms, range"),
        [
            (
                name,
                timing.median_text(ms, 1),
                timing.ratio_text(ms, results[baseline]),
                timing.median_text([1000 * size / value for value in ms]),
                timing.range_text(ms, 1),
            )
            for name, ms in results.items()
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        default="fashion",
        help="its photo size, model, optimizer and batch size are used",
    )
    parser.add_argument("--path", help="imported catalogue for more rows")
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[0],
        help="worker processes for --path; 0: threads",
    )
    parser.add_argument("--batch-size", type=int, help="instead of the config's")
    parser.add_argument(
        "--compute-dtype", choices=("float32", "bfloat16"), help="instead of the config's"
    )
    parser.add_argument("--classes", type=int, default=672)
    parser.add_argument(
        "--vocabulary", type=int, default=1801, help="words of the bare steps' random titles"
    )
    parser.add_argument("--word-width", type=int, default=128, help="numbers a word vector")
    parser.add_argument("--train-photos", type=int, default=2048, help="of the generated catalogue")
    parser.add_argument("--encoders", nargs="+", default=["mean", "bilinear", "lstm"])
    parser.add_argument("--only", choices=("loop", "streams"), help="one of the two tables")
    parser.add_argument("--steps", type=int, default=40, help="counted steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    config = config_lib.load_config(args.config)
    train_options = {"batch_size": args.batch_size, "compute_dtype": args.compute_dtype}
    train_options = {name: value for name, value in train_options.items() if value is not None}
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, **train_options),
        eval=dataclasses.replace(config.eval, batch_size=args.batch_size or config.eval.batch_size),
    )
    timing.print_machine(args.rounds)
    model, shape = config.model, config.preprocessing
    print(
        f"config {args.config}: ResNet-{model.depth} of width {model.width}, photos "
        f"{shape.width}x{shape.height}, batch "
        f"{config.train.batch_size}, {args.classes} classes, {config.train.compute_dtype}; "
        f"{args.steps} steps a round",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        # Every loop compiles its step anew; the second and later ones find it here.
        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
        if args.only != "loop":
            measure_streams(config, args)
        if args.only != "streams":
            measure_loops(config, args, Path(folder))


if __name__ == "__main__":
    main()
