"""Converts a finished run to a folder that recognises photos with plain PyTorch."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sicot_jax.classifier.class_weights import BIAS_NAME, KERNEL_NAME
from sicot_jax.common.files import atomic_directory
from sicot_jax.export.from_run import ExportedRun, export_run, write_recognizer
from sicot_jax.weights.bundle import WEIGHTS_FILE, read_bundle_config, write_bundle_manifest
from sicot_jax.weights.parity import ModelOutputs, ParityReport, check_parity, parity_photos
from sicot_jax.weights.semantic import write_text_encoder
from sicot_jax.weights.visual import (
    load_module,
    load_torch_arrays,
    torch_template,
    visual_outputs_torch,
)

_LABEL = "JAX against PyTorch"
_CHUNK_SIZE = 2**23  # weights of the classifier that PyTorch multiplies at a time: 32 MiB


def to_torch(workdir: Path, out: Path, *, with_text: bool = False) -> list[ParityReport]:
    """Converts a finished run to a folder for plain PyTorch.

    Args:
      workdir: Run folder.
      out: Folder to write, which must not exist.
      with_text: Convert the semantic stream and its vocabulary too.

    Returns:
      Parity checks of JAX and the written folder.

    Raises:
      InputError: No finished run, no PyTorch, PyTorch and JAX do not agree, or `out` exists.
    """
    torch_template()  # fails here without PyTorch, before anything is computed
    with atomic_directory(out) as new, export_run(workdir, with_text=with_text) as exported:
        return write_torch(new, exported)


def write_torch(folder: Path, exported: ExportedRun) -> list[ParityReport]:
    """Writes a recogniser as a folder for plain PyTorch.

    Copies the classifier one device's rows at a time, so host memory needs one shard.

    Args:
      folder: Empty folder.
      exported: The recogniser; its mesh is set.

    Returns:
      Parity checks of JAX and the written folder.

    Raises:
      InputError: The two do not agree.
    """
    write_recognizer(folder, exported)
    shutil.copy(str(torch_template().__file__), folder / "model.py")
    photos = parity_photos()
    expected, actual = exported.outputs(photos), bundle_outputs_torch(folder, photos)
    reports = [check_parity(expected, actual, label=_LABEL)]
    if exported.text is not None:
        exported.text.tokenizer.save(folder)
        reports.append(write_text_encoder(folder, exported.text.spec, exported.text.arrays))
    write_bundle_manifest(folder, reports)
    return reports


def bundle_outputs_torch(folder: Path, photos: Sequence[np.ndarray]) -> ModelOutputs:
    """Computes embeddings, logits and boxes with the exported PyTorch module.

    Reads the classifier in blocks of rows.

    Args:
      folder: Folder of `write_torch`.
      photos: Uint8 photos [H, W, 3] of any size.

    Returns:
      Embeddings, logits and boxes.
    """
    import safetensors
    import torch

    bundle = read_bundle_config(folder)
    recognizer = load_module(folder / "model.py").SicotRecognizer(
        {**dataclasses.asdict(bundle.model), "num_classes": 0},
        dataclasses.asdict(bundle.preprocessing),
        [],
    )
    with safetensors.safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        names = set(recognizer.state_dict()) & set(file.keys())
        load_torch_arrays(recognizer, {name: file.get_tensor(name) for name in names})
        outputs = visual_outputs_torch(recognizer, photos)
        embedding = torch.from_numpy(outputs.embedding)
        kernel, bias = file.get_slice(KERNEL_NAME), file.get_tensor(BIAS_NAME)
        step = max(1, _CHUNK_SIZE // embedding.shape[1])
        logits = [
            embedding @ kernel[start : start + step].T + bias[start : start + step]
            for start in range(0, bundle.model.num_classes, step)
        ]
    return dataclasses.replace(outputs, logits=torch.cat(logits, 1).numpy())
