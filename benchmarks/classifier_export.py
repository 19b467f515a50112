"""Measures time and memory of converting a classifier of a million rows to PyTorch.

Command:  python -m benchmarks.classifier_export
          (1,000,000 x 2,048 over 8 devices: 20 GiB of memory, 20 GB of disk)
Smaller:  python -m benchmarks.classifier_export --classes 50000 --width 64
Needs:    torch; Linux, for the memory.

"checkpoint" reads the classifier from an Orbax checkpoint onto the devices, with which every
conversion begins. "by device" is `sicot convert to-torch` after that: it writes one device's rows
at a time, reads the file again in blocks of rows, and compares. "gathered" gathers the classifier
into one array for the writer of safetensors, and compares nothing. Each runs in a new process.
Memory: the peak of anonymous memory (RssAnon), less what was there before, and less the classifier
that "checkpoint" reads; a shard is one device's part of the classifier.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import timing

METHODS = ("checkpoint", "by device", "gathered")
_MIB = 2**20


def anonymous_bytes() -> int:
    """Returns the memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


@contextlib.contextmanager
def measure_memory() -> Iterator[dict[str, float]]:
    """Measures the block: "bytes" beyond those at its start, and "seconds"."""
    usage: dict[str, float] = {}
    before, finished, peak = anonymous_bytes(), threading.Event(), [0]

    def watch() -> None:
        while not finished.wait(0.005):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        yield usage
    finally:
        usage["seconds"] = time.perf_counter() - start
        finished.set()
        watcher.join()
        usage["bytes"] = max(peak[0], anonymous_bytes()) - before


def read_checkpoint(options: argparse.Namespace) -> dict[str, float]:
    """Saves a classifier of random rows over all devices, drops it and reads it again."""
    import jax

    from sicot_jax.parallel import mesh
    from sicot_jax.training.checkpoint import Checkpoints

    devices = mesh.make_mesh(data=1, model=jax.device_count())
    with jax.set_mesh(devices), tempfile.TemporaryDirectory(dir=options.out) as folder:
        state = _random_classifier(options, devices)
        size = state.weights.kernel.nbytes
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        checkpoints = Checkpoints(Path(folder), num_classes=options.classes, writer=True)
        checkpoints.save(state, 0)
        checkpoints.wait()
        del state
        with measure_memory() as used:
            jax.block_until_ready(checkpoints.restore(target))
        checkpoints.close()
    return {
        "seconds": used["seconds"],
        "bytes": used["bytes"] - size,
        "shard": size / jax.device_count(),
    }


def convert(method: str, options: argparse.Namespace) -> dict[str, float]:
    """Writes a classifier of random rows over all devices to a temporary folder."""
    import jax
    import numpy as np
    import safetensors.numpy
    from flax import nnx

    from sicot_jax.catalog.sources.tables import write_class_table
    from sicot_jax.config.preprocessing import Preprocessing
    from sicot_jax.export.from_run import ExportedRun
    from sicot_jax.export.to_torch import write_torch
    from sicot_jax.parallel import mesh
    from sicot_jax.weights.bundle import RecognizerSpec
    from sicot_jax.weights.visual import init_visual_stream, visual_to_torch

    depth = 50
    network_width = options.width // 32  # a ResNet-50 whose features have `options.width`
    model = RecognizerSpec(depth, network_width, "imagenet", 2, 0, options.classes)
    _, *trees = nnx.split(init_visual_stream(model), nnx.Param, nnx.BatchStat)
    devices = mesh.make_mesh(data=1, model=jax.device_count())
    with jax.set_mesh(devices), tempfile.TemporaryDirectory(dir=options.out) as folder:
        classifier = _random_classifier(options, devices)
        table = Path(folder, "classes.csv")
        write_class_table(table, _classes(options.classes))
        arrays = visual_to_torch(*map(nnx.to_pure_dict, trees))
        exported = ExportedRun(
            model,
            Preprocessing(),
            arrays,
            classifier.weights,
            table,
            {"from": "benchmarks.classifier_export"},
        )
        new = Path(folder, "new")
        new.mkdir()
        with measure_memory() as used:
            if method == "by device":
                write_torch(new, exported)
            else:
                gathered = {
                    name: np.asarray(x)[: options.classes]
                    for name, x in classifier.weights.named_arrays().items()
                }
                safetensors.numpy.save_file(
                    {**{name: np.ascontiguousarray(a) for name, a in arrays.items()}, **gathered},
                    new / "model.safetensors",
                )
    return {**used, "shard": classifier.weights.kernel.nbytes / jax.device_count()}


def _classes(count: int) -> Any:
    import numpy as np

    from sicot_jax.catalog.catalog import SPLITS, ClassTable

    photos, no = np.zeros(count, np.int64), np.zeros(count, bool)
    sku = [f"sku-{c}" for c in range(count)]
    return ClassTable(sku, [""] * count, [""] * count, {s: photos for s in SPLITS}, no)


def _random_classifier(options: argparse.Namespace, devices: Any) -> Any:
    import jax
    import jax.numpy as jnp

    from sicot_jax.classifier.class_weights import ClassWeights
    from sicot_jax.classifier.state import ClassifierState
    from sicot_jax.parallel import mesh

    rows, sharding = mesh.pad_classes(options.classes, devices), mesh.class_sharding(devices)
    kernel = mesh.shard_rows((rows, options.width), _RandomRows(options.width), devices)
    bias, prior = (jax.device_put(jnp.zeros(rows), sharding) for _ in range(2))
    return ClassifierState(ClassWeights(kernel, bias), prior, ())


class _RandomRows:
    """Rows that are generated when they are sliced, so that no host array of all is needed."""

    def __init__(self, width: int):
        self.width = width

    def __getitem__(self, part: slice):
        import numpy as np

        return np.random.default_rng(part.start).standard_normal(
            (part.stop - part.start, self.width), np.float32
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--devices", type=int, default=8, help="devices on the CPU")
    parser.add_argument(
        "--out",
        type=Path,
        help="where the folder is written for a while; default: for temporary files",
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        results_of_method = (
            read_checkpoint(options)
            if options.only == "checkpoint"
            else convert(options.only, options)
        )
        print(json.dumps(results_of_method))
        return
    timing.print_machine(options.rounds)

    def contender(method: str):
        flags = [f"--classes={options.classes}", f"--width={options.width}", f"--only={method}"]
        command = [
            sys.executable,
            "-m",
            "benchmarks.classifier_export",
            *flags,
            *([f"--out={options.out}"] if options.out else []),
        ]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(options.devices),
        }
        finished = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        return json.loads(finished.stdout.splitlines()[-1])

    rows = []
    results = timing.run_rounds(
        {method: lambda method=method: contender(method) for method in METHODS}, options.rounds
    )
    for method, results_of_method in results.items():
        memory, shards = (
            [r["bytes"] / _MIB for r in results_of_method],
            [r["bytes"] / r["shard"] for r in results_of_method],
        )
        seconds = timing.median_text([r["seconds"] for r in results_of_method], 1)
        rows.append([method, seconds, timing.median_text(memory), timing.median_text(shards, 2)])
    title = f"{options.classes:,} x {options.width:,} over {options.devices} devices"
    timing.print_table(title, ["part", "seconds", "memory, MiB", "shards"], rows)


if __name__ == "__main__":
    main()
