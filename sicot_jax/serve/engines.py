"""Selects a worker's engine and batch size by measurements at the start, and its GPU."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.util
import itertools
import json
import logging
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np

from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout
from sicot_jax.recognizer import DeviceEngine, Engine, jax_engine, onnx_engine
from sicot_jax.serve.batcher import MAX_CONCURRENT_CALLS
from sicot_jax.weights.bundle import read_bundle

_log = logging.getLogger("sicot")
ENGINE_KINDS = ("onnx", "jax")
_REPEATS = 5
_REPEATS_UNDER_LOAD = 3
_MIN_GAIN = 0.1  # a larger batch has to save this share of the time of a photo


@dataclasses.dataclass(frozen=True)
class SelectedEngine:
    """An engine with every batch size compiled.

    Attributes:
      kind: one of ENGINE_KINDS.
      run: the engine.
      preprocessing: how photos are prepared for it.
      num_classes: classes of its model, C.
      batch_ms: batch size -> median time of a call in milliseconds, where MAX_CONCURRENT_CALLS
        calls share the machine, divided by that number.
      batch_size: the batch size in use.
      provider: what runs it, as `recognizer.DeviceEngine.provider`.
    """

    kind: str
    run: Engine
    preprocessing: Preprocessing
    num_classes: int
    batch_ms: dict[int, float]
    batch_size: int
    provider: str

    @property
    def photo_ms(self) -> float:
        """Milliseconds per photo in a full batch."""
        return self.batch_ms[self.batch_size] / self.batch_size


def select_engine(
    version: Path,
    kind: str = "auto",
    *,
    largest: int = 32,
    threads: int = 0,
    require_gpu: bool = False,
) -> SelectedEngine:
    """Selects the engine that answers a single photo soonest, and its batch size.

    The batch size is the one, up to `largest`, from which on twice and four times as many photos
    gain less than a tenth of the time per photo, called as under load; larger ones are not tried.

    Args:
      version: version folder of an index.
      kind: "auto", or one of ENGINE_KINDS.
      largest: maximum batch size.
      threads: threads of ONNX Runtime, 0 for all cores.
      require_gpu: leave out engines that run on the CPU.

    Returns:
      The engine.

    Raises:
      InputError: no engine can be loaded, or each runs on the CPU and `require_gpu` is given.
    """
    converted = read_bundle(version / layout.MODEL)
    loaded = _load_engines(version, kind, threads)
    for engine in loaded.values():
        if engine.fallback:
            _log.warning("%s; --require-gpu refuses that", engine.fallback)
    if require_gpu:
        loaded = _engines_on_accelerators(loaded)
    shape = converted.preprocessing.height, converted.preprocessing.width, 3
    alone = {name: _call_ms(engine, shape, 1, concurrent=1) for name, engine in loaded.items()}
    name = min(alone, key=lambda name: alone[name])
    engine = loaded[name]
    batch_ms = {1: _call_ms(engine, shape, 1, concurrent=MAX_CONCURRENT_CALLS)}
    size = best = 1
    while 2 * size <= min(largest, 4 * best):
        size *= 2
        batch_ms[size] = _call_ms(engine, shape, size, concurrent=MAX_CONCURRENT_CALLS)
        if batch_ms[size] / size < (1 - _MIN_GAIN) * batch_ms[best] / best:
            best = size
    return SelectedEngine(
        name,
        engine,
        converted.preprocessing,
        converted.model.num_classes,
        batch_ms,
        best,
        engine.provider,
    )


def _engines_on_accelerators(loaded: dict[str, DeviceEngine]) -> dict[str, DeviceEngine]:
    if kept := {name: engine for name, engine in loaded.items() if not engine.on_cpu}:
        return kept
    providers = ", ".join(f"{name} on {engine.provider}" for name, engine in loaded.items())
    reasons = [engine.fallback for engine in loaded.values() if engine.fallback]
    raise InputError(
        f"--require-gpu, and no engine here runs on one: {providers}; "
        + (
            "; ".join(reasons)
            or "install onnxruntime-gpu or 'sicot_jax[cuda]', and look for the GPU with nvidia-smi"
        )
    )


def available_engines(version: Path, kind: str) -> list[str]:
    """Returns the engines that can serve an index here.

    Args:
      version: version folder of an index.
      kind: "auto", or one of ENGINE_KINDS.

    Returns:
      Names from ENGINE_KINDS, at least one.

    Raises:
      InputError: an unknown kind, or none of it is available.
    """
    if kind not in ("auto", *ENGINE_KINDS):
        raise InputError(f"engine {kind!r}, wanted auto, {' or '.join(ENGINE_KINDS)}")
    graph = (version / layout.ONNX_MODEL).is_dir()
    installed = {
        "onnx": graph and importlib.util.find_spec("onnxruntime") is not None,
        "jax": importlib.util.find_spec("jax") is not None,
    }
    if kind == "onnx" and not graph:
        raise InputError(
            f"{version}: holds no ONNX graph; build the index where torch and onnx are installed"
        )
    names = [name for name in ENGINE_KINDS if installed[name] and kind in ("auto", name)]
    if not names:
        raise InputError(
            f"{version}: no engine {kind} here; install one: pip install 'sicot_jax[onnx]' (or jax)"
        )
    return names


def _load_engines(version: Path, kind: str, threads: int) -> dict[str, DeviceEngine]:
    makers: dict[str, Callable[[], DeviceEngine]] = {
        "onnx": lambda: onnx_engine(version / layout.ONNX_MODEL, threads=threads),
        "jax": lambda: jax_engine(read_bundle(version / layout.MODEL)),
    }
    return {name: makers[name]() for name in available_engines(version, kind)}


def _call_ms(engine: Engine, shape: tuple[int, ...], size: int, *, concurrent: int) -> float:
    """Returns the median time of `concurrent` calls at once, divided by their number."""
    photos = np.zeros((size, *shape), np.uint8)
    engine(photos)  # compiles
    times = []
    with ThreadPoolExecutor(concurrent) as threads:
        for _ in range(_REPEATS if concurrent == 1 else _REPEATS_UNDER_LOAD):
            start = time.perf_counter()
            list(threads.map(engine, [photos] * concurrent))
            times.append((time.perf_counter() - start) / concurrent)
    return statistics.median(times) * 1e3


_VISIBLE = "CUDA_VISIBLE_DEVICES"
_POOL = "SICOT_SERVE_GPUS"  # folder of locks and names of GPUs, for worker processes
_TIMEOUT_SECONDS = 10.0  # for a worker that was killed to release its GPU
_GPU = re.compile(r"\d+|(GPU|MIG)-[\w/.-]+")
_held_locks: list[IO[str]] = []  # locks last as long as the process


def visible_gpus() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    names = os.environ.get(_VISIBLE)
    if names is not None:
        # CUDA stops at the first name that is no GPU.
        return list(itertools.takewhile(_GPU.fullmatch, map(str.strip, names.split(","))))
    # CUDA counts from 0 whatever the files are called: a container may have the last two of eight.
    count = sum(path.name[6:].isdecimal() for path in Path("/dev").glob("nvidia*"))
    return [str(number) for number in range(count)]


def create_gpu_pool(workers: int) -> str | None:
    """Prepares one GPU for each of several worker processes.

    Args:
      workers: number of worker processes.

    Returns:
      A temporary folder to remove at the end; None where there is no GPU or one worker.

    Raises:
      InputError: more workers than GPUs.
    """
    names = visible_gpus()
    if not names or workers == 1:
        return None
    if workers > len(names):
        raise InputError(
            f"--workers {workers} on {len(names)} GPUs, wanted at most one a GPU; "
            f"{_VISIBLE}= (empty) leaves them unused"
        )
    folder = tempfile.mkdtemp(prefix="sicot-gpus-")
    os.environ[_POOL] = json.dumps({"folder": folder, "names": names})
    return folder


def claim_gpu() -> str | None:
    """Claims a GPU of the pool for this worker process; call it before JAX is imported.

    Returns:
      Name of the GPU; None where there is no pool.

    Raises:
      RuntimeError: no GPU becomes free within ten seconds.
    """
    if _POOL not in os.environ:
        return None
    pool = json.loads(os.environ[_POOL])
    end = time.monotonic() + _TIMEOUT_SECONDS
    while True:
        for name in pool["names"]:
            lock = Path(pool["folder"], re.sub(r"\W", "_", name)).open("w")  # noqa: SIM115 (stays open)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            _held_locks.append(lock)
            os.environ[_VISIBLE] = name
            return name
        if time.monotonic() > end:
            raise RuntimeError(f"no GPU of {', '.join(pool['names'])} is free for this worker")
        time.sleep(0.1)
