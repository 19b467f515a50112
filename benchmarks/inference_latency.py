"""Measures milliseconds from resized photos to embeddings and logits, by inference engine.

Command:  python -m benchmarks.inference_latency        (ResNet-50 at 224x224; some minutes)
Smaller:  python -m benchmarks.inference_latency --depth 18 --width 8 --size 32 --rounds 1
Needs:    torch, onnxruntime and onnxscript.

A run of one step is converted as a user would (`sicot convert`); every engine gets the same bytes
[batch, height, width, 3], already decoded and resized. All but StableHLO's weights are as loaded by
`sicot_jax.load` or by the `model.py` of the bundle.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import sicot_jax
from benchmarks import timing
from sicot_jax import config as config_lib
from sicot_jax.recognizer import Engine, EngineOutputs
from sicot_jax.training.loop import train
from sicot_jax.weights.bundle import CONFIG_FILE, STABLEHLO_FILE, WEIGHTS_FILE
from sicot_jax.weights.visual import load_module

NEEDS = {
    "jax": (),
    "stablehlo": (),
    "torch": ("torch",),
    "onnx": ("torch", "onnxruntime", "onnxscript"),
}
NAMES = {
    "jax": "JAX, batch norms folded",
    "stablehlo": "StableHLO (jax.export)",
    "torch": "PyTorch, eager",
    "onnx": "ONNX Runtime",
}


def train_one_step(workdir: Path, options: argparse.Namespace) -> None:
    """Trains a run of one step with the requested network."""
    side = [
        f"preprocessing.{name}={options.size}"
        for name in ("height", "width", "resize_height", "resize_width")
    ]
    model = [f"model.depth={options.depth}", f"model.width={options.width}", "model.stem=imagenet"]
    catalogue = [
        f"data.generated.num_classes={options.classes}",
        f"data.generated.train_photos={10 * options.classes}",
    ]
    overrides = ["model.embedding_width=0", "train.steps=1", "train.batch_size=8", "mesh.data=1"]
    flags = [f"--config.{flag}" for flag in (*side, *model, *catalogue, *overrides)]
    train(config_lib.load_config("tiny", flags), workdir)


def open_engine(kind: str, run: Path, out: Path) -> Engine:
    """Returns the engine, converted and loaded as its users do."""
    if kind == "jax":
        return sicot_jax.load(run).engine
    if kind == "onnx":
        from sicot_jax.export.to_onnx import to_onnx

        to_onnx(run, out / kind)
        return sicot_jax.load(out / kind).engine
    if kind == "stablehlo":
        from sicot_jax.export.to_stablehlo import to_stablehlo

        to_stablehlo(run, out / kind)
        return _program(out / kind)
    from sicot_jax.export.to_torch import to_torch

    to_torch(run, out / kind)
    return _recognizer(out / kind)


def _program(folder: Path) -> Engine:
    import safetensors.numpy

    weights = jax.device_put(safetensors.numpy.load_file(folder / WEIGHTS_FILE), jax.devices()[0])
    call = jax.jit(jax.export.deserialize(bytearray((folder / STABLEHLO_FILE).read_bytes())).call)

    def engine(photos: np.ndarray) -> EngineOutputs:
        arrays = call(weights, photos)
        return EngineOutputs(np.asarray(arrays["embedding"]), np.asarray(arrays["logits"]))

    return engine


def _recognizer(folder: Path) -> Engine:
    import torch

    recognizer = load_module(folder / "model.py").SicotRecognizer.from_pretrained(folder)
    stored = json.loads((folder / CONFIG_FILE).read_text())["preprocessing"]
    mean, std = (torch.tensor(stored[name]).reshape(3, 1, 1) for name in ("mean", "std"))

    def engine(photos: np.ndarray) -> EngineOutputs:
        with torch.inference_mode():
            images = (torch.from_numpy(photos).permute(0, 3, 1, 2).float() / 255 - mean) / std
            embedding = recognizer.embed(images)
            return EngineOutputs(embedding.numpy(), recognizer.fc(embedding).numpy())

    return engine


def time_engine(engine: Engine, photos: np.ndarray) -> Callable[[], float]:
    """Returns the milliseconds of the second of two calls."""

    def once() -> float:
        time.sleep(0.1)  # threads of the previous engine still spin, waiting for work,
        engine(photos)  # and the first call after another engine's is slow
        start = time.perf_counter()
        engine(photos)
        return 1e3 * (time.perf_counter() - start)

    return once


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--classes", type=int, default=11)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    timing.print_machine(options.rounds)
    absent = {kind: timing.missing_modules(*needs) for kind, needs in NEEDS.items()}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        train_one_step(run, options)
        engines = {
            kind: open_engine(kind, run, Path(folder))
            for kind, reason in absent.items()
            if not reason
        }
        times: dict[int, dict[str, list[float]]] = {}
        for batch in options.batches:
            rng = np.random.default_rng(batch)
            photos = rng.integers(0, 256, (batch, options.size, options.size, 3), dtype=np.uint8)
            expected = engines["jax"](photos)
            for kind, engine in engines.items():  # also compiles
                other = engine(photos)
                for name in ("embedding", "logits"):
                    a, b = getattr(expected, name), getattr(other, name)
                    np.testing.assert_allclose(
                        b, a, atol=1e-4 * np.abs(a).max(), err_msg=f"{kind}: {name}"
                    )
            times[batch] = timing.run_rounds(
                {kind: time_engine(engine, photos) for kind, engine in engines.items()},
                options.rounds,
            )
    header = [f"ResNet-{options.depth}, {options.size}x{options.size}"]
    for batch in options.batches:
        header += [f"batch {batch}: ms", "least to greatest", "x JAX's time"]
    rows = []
    for kind, name in NAMES.items():
        if absent[kind]:
            rows.append([name, absent[kind]])
            continue
        cells = [name]
        for of_batch in times.values():
            cells += [
                timing.median_text(of_batch[kind], 1),
                timing.range_text(of_batch[kind], 1),
                timing.ratio_text(of_batch[kind], of_batch["jax"]),
            ]
        rows.append(cells)
    timing.print_table("Latency", header, rows)


if __name__ == "__main__":
    main()
