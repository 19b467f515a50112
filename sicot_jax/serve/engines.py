"""Which engine answers, and in which batch sizes: measured when the service starts."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout
from sicot_jax.recognizer import Engine, jax_engine, onnx_engine
from sicot_jax.serve.batcher import IN_FLIGHT
from sicot_jax.weights import bundle as folders

KINDS = ("onnx", "jax")
_ROUNDS = 5
_ROUNDS_AT_ONCE = 3
_GAIN = 0.1  # a larger batch has to save this share of the time of a photo


@dataclasses.dataclass(frozen=True)
class Chosen:
    """An engine with every batch size compiled. milliseconds: batch size -> median of a call, where
    `IN_FLIGHT` of them share the machine, divided by that number.
    """

    kind: str
    run: Engine
    preprocessing: Preprocessing
    classes: int
    milliseconds: dict[int, float]
    largest: int


def choose(version: Path, kind: str = "auto", *, largest: int = 32, threads: int = 0) -> Chosen:
    """The engine of an index's model that answers one photo soonest, or the one that `kind` names.

    `Chosen.largest` is the batch size, up to `largest`, from which on twice and four times as many
    photos gain less than a tenth of the time of each, called as under load; larger ones are not
    tried. InputError where no engine can be loaded.
    """
    converted = folders.read_converted(version / layout.MODEL)
    loaded = _load(version, kind, threads)
    shape = converted.preprocessing.height, converted.preprocessing.width, 3
    alone = {name: _milliseconds(engine, shape, 1, at_once=1) for name, engine in loaded.items()}
    name = min(alone, key=lambda name: alone[name])
    engine = loaded[name]
    sizes, size, use = {1: _milliseconds(engine, shape, 1, at_once=IN_FLIGHT)}, 1, 1
    while 2 * size <= min(largest, 4 * use):
        size *= 2
        sizes[size] = _milliseconds(engine, shape, size, at_once=IN_FLIGHT)
        if sizes[size] / size < (1 - _GAIN) * sizes[use] / use:
            use = size
    return Chosen(name, engine, converted.preprocessing, converted.model.classes, sizes, use)


def check(version: Path, kind: str) -> list[str]:
    """The engines that `kind` stands for here. InputError where there is none."""
    if kind not in ("auto", *KINDS):
        raise InputError(f"engine {kind!r}, wanted auto, {' or '.join(KINDS)}")
    graph = (version / layout.ONNX_MODEL).is_dir()
    there = {
        "onnx": graph and importlib.util.find_spec("onnxruntime") is not None,
        "jax": importlib.util.find_spec("jax") is not None,
    }
    if kind == "onnx" and not graph:
        raise InputError(
            f"{version}: holds no ONNX graph; build the index where torch and onnx are installed"
        )
    wanted = [name for name in KINDS if there[name] and kind in ("auto", name)]
    if not wanted:
        raise InputError(
            f"{version}: no engine {kind} here; install one: pip install 'sicot_jax[onnx]' (or jax)"
        )
    return wanted


def _load(version: Path, kind: str, threads: int) -> dict[str, Engine]:
    makers: dict[str, Callable[[], Engine]] = {
        "onnx": lambda: onnx_engine(version / layout.ONNX_MODEL, threads=threads),
        "jax": lambda: jax_engine(folders.read_converted(version / layout.MODEL)),
    }
    return {name: makers[name]() for name in check(version, kind)}


def _milliseconds(engine: Engine, shape: tuple[int, ...], size: int, *, at_once: int) -> float:
    """Of a call, each from a thread of its own: the time of all of them, divided by their number."""
    photos = np.zeros((size, *shape), np.uint8)
    engine(photos)  # compiles
    times = []
    with concurrent.futures.ThreadPoolExecutor(at_once) as threads:
        for _ in range(_ROUNDS if at_once == 1 else _ROUNDS_AT_ONCE):
            start = time.perf_counter()
            list(threads.map(engine, [photos] * at_once))
            times.append((time.perf_counter() - start) / at_once)
    return statistics.median(times) * 1e3
