"""The visual stream for recognising alone: batch norms folded into the convolutions before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sicot_jax.models.layers import BATCH_NORM_EPSILON, conv, max_pool_3x3
from sicot_jax.models.localization import (
    attention_from_scores,
    box_from_attention,
    clip_box,
    foreground_mask,
    masked_average_pool,
    sum_resized,
)
from sicot_jax.models.resnet import STAGES, STEMS, global_average_pool
from sicot_jax.weights.bundle import Model
from sicot_jax.weights.torch_names import from_torch_layout

Folded = Mapping[
    str, Any
]  # "conv1.kernel", "conv1.bias", "layer1.0.conv1.kernel", ..., "projection.kernel", "projection.bias"


def fold(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Torch's names -> every convolution (and the projection) with the batch norm behind it in its
    kernel and bias.

    (x * k - mean) / sqrt(var + 1e-5) * scale + shift = x * (k f) + (shift - mean f), f = scale /
    sqrt(var + 1e-5), per output. Float32; kernels [k, k, I, O] and [I, O]. The classifier ("fc.")
    is left out.
    """
    folded = {}
    for name, weight in arrays.items():
        norm = _norm_of(name)
        if norm is None:
            continue
        factor, shift = _factor_and_shift(arrays, norm)
        place = name.removesuffix(".weight")
        folded[f"{place}.kernel"] = np.ascontiguousarray(from_torch_layout(weight)) * factor
        folded[f"{place}.bias"] = shift
    return folded | (_fold_box(arrays) if "box.score.weight" in arrays else {})


def _factor_and_shift(arrays: Mapping[str, np.ndarray], norm: str) -> tuple[np.ndarray, np.ndarray]:
    scale, shift, mean, var = (
        arrays[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
    )
    factor = (scale / np.sqrt(var.astype(np.float64) + BATCH_NORM_EPSILON)).astype(np.float32)
    return factor, shift - mean * factor


def _fold_box(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The box branch: one batch norm behind the sum of three convolutions."""
    factor, shift = _factor_and_shift(arrays, "box.bn")
    found = {
        f"box.conv{n}.kernel": np.ascontiguousarray(
            from_torch_layout(arrays[f"box.conv{n}.weight"])
        )
        * factor
        for n in (1, 2, 3, 4)
    }
    score = np.ascontiguousarray(from_torch_layout(arrays["box.score.weight"]))
    rest = {name: arrays[name] for name in ("box.score.bias", "box.log_scale")}
    return found | rest | {"box.bias": shift, "box.score.kernel": score}


def _norm_of(name: str) -> str | None:
    """The batch norm behind the convolution (or projection) with that weight; None for other
    arrays.
    """
    if name == "projection.weight":
        return "projection_norm"
    if name.startswith("box."):
        return None  # `_fold_box`
    if name.endswith("downsample.0.weight"):
        return name.replace("downsample.0.weight", "downsample.1")
    head, _, last = name.rpartition("conv")
    return (
        f"{head}bn{last.removesuffix('.weight')}"
        if last[:1].isdigit() and last.endswith(".weight")
        else None
    )


def embed(model: Model, folded: Folded, image):
    """Normalised photos [B, H, W, 3] -> v [B, D] in float32, as `VisualStream.embed` has it."""
    return look(model, folded, image)[0]


def look(model: Model, folded: Folded, image):
    """Normalised photos [B, H, W, 3] -> `VisualStream.look`: v [B, D] and the box [B, 4] within the
    photo, or None.
    """
    maps = _maps(model, folded, image)
    box = None if model.box == "none" else _box(folded, maps)
    if model.box == "image":
        maps = _maps(model, folded, image * foreground_mask(box, *image.shape[1:3]))
    x = masked_average_pool(maps[-1], box) if model.box == "features" else global_average_pool(maps[-1])
    if model.embedding_width:
        x = jax.nn.relu(x @ folded["projection.kernel"] + folded["projection.bias"])
    return x, clip_box(box)


def _box(folded: Folded, maps):
    hidden = sum_resized([conv(x, folded[f"box.conv{n}.kernel"], 1) for n, x in enumerate(maps, 1)])
    score = (
        jax.nn.relu(hidden + folded["box.bias"]) @ folded["box.score.kernel"]
        + folded["box.score.bias"]
    )
    return box_from_attention(attention_from_scores(score), folded["box.log_scale"])


def _maps(model: Model, folded: Folded, image):
    """The last map of each stage."""

    def convolved(x, place: str, stride: int):
        return conv(x, folded[f"{place}.kernel"], stride) + folded[f"{place}.bias"]

    x = jax.nn.relu(convolved(image.astype(jnp.float32), "conv1", STEMS[model.stem][1]))
    if model.stem == "imagenet":
        x = max_pool_3x3(x)
    maps = []
    for stage, blocks in enumerate(STAGES[model.depth]):
        for block in range(blocks):
            stride = (1, 2, 2, model.last_stride)[stage] if block == 0 else 1
            x = _block(
                convolved,
                folded,
                x,
                f"layer{stage + 1}.{block}",
                stride,
                bottleneck=model.depth >= 50,
            )
        maps.append(x)
    return maps


def _block(convolved, folded: Folded, x, place: str, stride: int, *, bottleneck: bool):
    shortcut = x
    if f"{place}.downsample.0.kernel" in folded:
        shortcut = convolved(x, f"{place}.downsample.0", stride)
    strides = (1, stride, 1) if bottleneck else (stride, 1)
    for i, step in enumerate(strides):
        x = convolved(x, f"{place}.conv{i + 1}", step)
        x = jax.nn.relu(x if i < len(strides) - 1 else x + shortcut)
    return x
