"""Writes a small weights bundle with random weights, for examples and tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flax import nnx

from sicot_jax.catalog.catalog import SPLITS, ClassTable
from sicot_jax.catalog.sources.tables import write_class_table
from sicot_jax.classifier.class_weights import BIAS_NAME, KERNEL_NAME
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.weights.bundle import (
    CLASS_TABLE_FILE,
    WEIGHTS_FILE,
    RecognizerSpec,
    WeightsBundle,
    write_bundle_config,
    write_bundle_manifest,
)
from sicot_jax.weights.safetensors_io import write_weights
from sicot_jax.weights.visual import init_visual_stream, visual_to_torch


def write_untrained_bundle(folder: str | Path, *, num_classes: int = 5) -> Path:
    """Writes a recogniser with random weights: a narrow ResNet-18 for photos of 32 x 32 pixels.

    Needs neither PyTorch nor a training run.

    Args:
      folder: Folder to write into; it may exist.
      num_classes: Number of products, named "sku-0", "sku-1", ...

    Returns:
      The folder, which `sicot_jax.load` reads.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec = RecognizerSpec(
        18, 8, "small", last_stride=2, embedding_width=16, num_classes=num_classes
    )
    _, *trees = nnx.split(init_visual_stream(spec), nnx.Param, nnx.BatchStat)
    arrays = visual_to_torch(*map(nnx.to_pure_dict, trees))
    rng = np.random.default_rng(0)
    arrays[KERNEL_NAME] = rng.normal(size=(num_classes, spec.embedding_width)).astype(np.float32)
    arrays[BIAS_NAME] = np.zeros(num_classes, np.float32)
    write_weights(folder / WEIGHTS_FILE, arrays)
    write_bundle_config(
        WeightsBundle(folder, spec, Preprocessing(32, 32, 32, 32), {"from": "untrained"})
    )
    table = ClassTable(
        sku=[f"sku-{n}" for n in range(num_classes)],
        title=[f"product {n}" for n in range(num_classes)],
        category=["things"] * num_classes,
        counts={split: np.zeros(num_classes, np.int64) for split in SPLITS},
        discontinued=np.zeros(num_classes, bool),
    )
    write_class_table(folder / CLASS_TABLE_FILE, table)
    write_bundle_manifest(folder, [])
    return folder
