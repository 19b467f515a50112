"""The visual stream for recognising alone: batch norms folded into the convolutions before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sicot_jax.convert.folder import Model
from sicot_jax.convert.names import from_torch_layout
from sicot_jax.models.layers import BATCH_NORM_EPSILON, conv, max_pool_3x3
from sicot_jax.models.resnet import STAGES, STEMS, global_average_pool

Folded = Mapping[
    str, Any
]  # "conv1.kernel", "conv1.bias", "layer1.0.conv1.kernel", ..., "projection.kernel", "projection.bias"


def fold(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Torch's names -> every convolution (and the projection) with the batch norm behind it in its kernel and bias.

    (x * k - mean) / sqrt(var + 1e-5) * scale + shift = x * (k f) + (shift - mean f), f = scale / sqrt(var + 1e-5), per output.
    Float32; kernels [k, k, I, O] and [I, O]. The classifier ("fc.") is left out.
    """
    folded = {}
    for name, weight in arrays.items():
        norm = _norm_of(name)
        if norm is None:
            continue
        scale, shift, mean, var = (
            arrays[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = (scale / np.sqrt(var.astype(np.float64) + BATCH_NORM_EPSILON)).astype(np.float32)
        place = name.removesuffix(".weight")
        folded[f"{place}.kernel"] = np.ascontiguousarray(from_torch_layout(weight)) * factor
        folded[f"{place}.bias"] = shift - mean * factor
    return folded


def _norm_of(name: str) -> str | None:
    """The batch norm behind the convolution (or projection) with that weight; None for other arrays."""
    if name == "projection.weight":
        return "projection_norm"
    if name.endswith("downsample.0.weight"):
        return name.replace("downsample.0.weight", "downsample.1")
    head, _, last = name.rpartition("conv")
    return f"{head}bn{last.removesuffix('.weight')}" if last[:1].isdigit() and last.endswith(".weight") else None


def embed(model: Model, folded: Folded, image):
    """Normalised photos [B, H, W, 3] -> v [B, D] in float32, as `VisualStream.embed` has it."""

    def convolved(x, place: str, stride: int):
        return conv(x, folded[f"{place}.kernel"], stride) + folded[f"{place}.bias"]

    x = jax.nn.relu(convolved(image.astype(jnp.float32), "conv1", STEMS[model.stem][1]))
    if model.stem == "imagenet":
        x = max_pool_3x3(x)
    for stage, blocks in enumerate(STAGES[model.depth]):
        for block in range(blocks):
            stride = (1, 2, 2, model.last_stride)[stage] if block == 0 else 1
            x = _block(convolved, folded, x, f"layer{stage + 1}.{block}", stride, bottleneck=model.depth >= 50)
    x = global_average_pool(x)
    if model.embedding_width:
        x = jax.nn.relu(x @ folded["projection.kernel"] + folded["projection.bias"])
    return x


def _block(convolved, folded: Folded, x, place: str, stride: int, *, bottleneck: bool):
    shortcut = x
    if f"{place}.downsample.0.kernel" in folded:
        shortcut = convolved(x, f"{place}.downsample.0", stride)
    strides = (1, stride, 1) if bottleneck else (stride, 1)
    for i, step in enumerate(strides):
        x = convolved(x, f"{place}.conv{i + 1}", step)
        x = jax.nn.relu(x if i < len(strides) - 1 else x + shortcut)
    return x
