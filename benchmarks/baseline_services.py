"""Serves a network with plain FastAPI: baselines of benchmarks/service_load.py.

No limits, no batches, no search. A route decodes the photo, calls the network and returns the five
best classes.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool

from sicot_jax.index.storage import layout
from sicot_jax.weights.bundle import ONNX_FILE, WEIGHTS_FILE, read_bundle
from sicot_jax.weights.visual import load_torch_arrays, torch_template

ONNX, TORCH = "plain ONNX Runtime", "plain PyTorch"


def _onnx_logits(version: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(version / layout.ONNX_MODEL / ONNX_FILE))
    return lambda batch: session.run(["logits"], {"photos": batch})[0]


def _torch_logits(version: Path) -> Callable[[np.ndarray], np.ndarray]:
    import safetensors.numpy
    import torch

    converted = read_bundle(version / layout.MODEL)
    settings = dataclasses.asdict(converted.model), dataclasses.asdict(converted.preprocessing)
    network_module = torch_template().SicotRecognizer(*settings, [""] * converted.model.num_classes)
    load_torch_arrays(
        network_module, safetensors.numpy.load_file(version / layout.MODEL / WEIGHTS_FILE)
    )

    def logits(batch: np.ndarray) -> np.ndarray:
        image = torch.from_numpy(converted.preprocessing.normalize(batch).transpose(0, 3, 1, 2))
        with torch.inference_mode():
            return network_module(image).numpy()

    return logits


def create_baseline_app(kind: str, version: Path) -> FastAPI:
    """Returns a service of the model in an index version."""
    preprocessing = read_bundle(version / layout.MODEL).preprocessing
    logits = _onnx_logits(version) if kind == ONNX else _torch_logits(version)

    def answer(data: bytes) -> dict[str, Any]:
        scores = logits(preprocessing.batch([data]))[0]
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        return {"products": [(int(c), float(shares[c])) for c in np.argsort(-scores)[:5]]}

    service = FastAPI()

    @service.post("/v1/recognize")
    async def recognize(request: Request) -> dict[str, Any]:
        return await run_in_threadpool(answer, await request.body())

    return service


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=[ONNX, TORCH])
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    uvicorn.run(
        create_baseline_app(options.kind, layout.current_version(options.index)),
        port=options.port,
        log_level="error",
    )


if __name__ == "__main__":
    main()
