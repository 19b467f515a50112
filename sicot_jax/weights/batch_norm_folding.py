"""Runs the visual stream for inference, with batch norms folded into the layers before them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from sicot_jax.weights.bundle import RecognizerSpec
from sicot_jax.weights.torch_names import from_torch_layout

# "conv1.kernel", "conv1.bias", "layer1.0.conv1.kernel", ..., "projection.kernel", ...
FoldedArrays = Mapping[str, Any]
_Convolution = Callable[[jax.Array, str, int], jax.Array]  # input, name of the layer, stride


def fold_batch_norms(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Folds each batch norm into the convolution or projection before it.

    (x * k - mean) / sqrt(var + eps) * scale + shift = x * (k f) + (shift - mean f), with
    f = scale / sqrt(var + eps) per output channel and eps = 1e-5.

    Args:
      arrays: Weights of the visual stream by torch's names; the classifier ("fc.") is ignored.

    Returns:
      Kernels [k, k, I, O] and [I, O] and biases [O] by layer, float32.
    """
    folded = {}
    for name, weight in arrays.items():
        norm = _batch_norm_after(name)
        if norm is None:
            continue
        factor, shift = _factor_and_shift(arrays, norm)
        layer = name.removesuffix(".weight")
        folded[f"{layer}.kernel"] = np.ascontiguousarray(from_torch_layout(weight)) * factor
        folded[f"{layer}.bias"] = shift
    if "localization.score.weight" in arrays:
        folded |= _fold_localization(arrays)
    return folded


def _factor_and_shift(arrays: Mapping[str, np.ndarray], norm: str) -> tuple[np.ndarray, np.ndarray]:
    scale, shift, mean, var = (
        arrays[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
    )
    factor = (scale / np.sqrt(var.astype(np.float64) + BATCH_NORM_EPSILON)).astype(np.float32)
    return factor, shift - mean * factor


def _fold_localization(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Folds the one batch norm of the localisation branch, which follows a sum of convolutions."""
    factor, shift = _factor_and_shift(arrays, "localization.bn")

    def kernel(layer: str) -> np.ndarray:
        return np.ascontiguousarray(from_torch_layout(arrays[f"localization.{layer}.weight"]))

    return {
        **{f"localization.conv{n}.kernel": kernel(f"conv{n}") * factor for n in (1, 2, 3, 4)},
        "localization.bias": shift,
        "localization.score.kernel": kernel("score"),
        "localization.score.bias": arrays["localization.score.bias"],
        "localization.log_scale": arrays["localization.log_scale"],
    }


def _batch_norm_after(name: str) -> str | None:
    """Returns the batch norm after the layer of a weight, None for other arrays."""
    if name == "projection.weight":
        return "projection_norm"
    if name.startswith("localization."):
        return None  # see `_fold_localization`
    if name.endswith("downsample.0.weight"):
        return name.replace("downsample.0.weight", "downsample.1")
    prefix, _, number = name.rpartition("conv")
    if number[:1].isdigit() and number.endswith(".weight"):
        return f"{prefix}bn{number.removesuffix('.weight')}"
    return None


def folded_forward(
    spec: RecognizerSpec, folded: FoldedArrays, image: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Computes embeddings and boxes as `VisualStream.embed_and_localize` does in evaluation.

    Args:
      spec: Architecture.
      folded: Output of `fold_batch_norms`.
      image: Normalised photos, float [B, H, W, 3].

    Returns:
      Embeddings, float32 [B, D], and boxes clipped to the photo, float32 [B, 4], or None without
      a localisation branch.
    """
    maps = _feature_maps(spec, folded, image)
    if spec.localization == "none":
        return _project(spec, folded, global_average_pool(maps[-1])), None
    box = _localize(folded, maps)
    if spec.localization == "image":  # second pass, on the foreground
        foreground = image * foreground_mask(box, *image.shape[1:3])
        pooled = global_average_pool(_feature_maps(spec, folded, foreground)[-1])
    else:
        pooled = masked_average_pool(maps[-1], box)
    return _project(spec, folded, pooled), clip_box(box)


def _project(spec: RecognizerSpec, folded: FoldedArrays, pooled: jax.Array) -> jax.Array:
    if not spec.embedding_width:
        return pooled
    return jax.nn.relu(pooled @ folded["projection.kernel"] + folded["projection.bias"])


def _localize(folded: FoldedArrays, maps: list[jax.Array]) -> jax.Array:
    kernels = [folded[f"localization.conv{n}.kernel"] for n in range(1, len(maps) + 1)]
    hidden = sum_resized([conv(x, kernel, 1) for x, kernel in zip(maps, kernels, strict=True)])
    hidden = jax.nn.relu(hidden + folded["localization.bias"])
    score = hidden @ folded["localization.score.kernel"] + folded["localization.score.bias"]
    return box_from_attention(attention_from_scores(score), folded["localization.log_scale"])


def _feature_maps(spec: RecognizerSpec, folded: FoldedArrays, image: jax.Array) -> list[jax.Array]:
    """Returns the last feature map of each stage."""

    def convolve(x: jax.Array, layer: str, stride: int) -> jax.Array:
        return conv(x, folded[f"{layer}.kernel"], stride) + folded[f"{layer}.bias"]

    x = jax.nn.relu(convolve(image.astype(jnp.float32), "conv1", STEMS[spec.stem][1]))
    if spec.stem == "imagenet":
        x = max_pool_3x3(x)
    maps = []
    for stage, num_blocks in enumerate(STAGES[spec.depth]):
        for block in range(num_blocks):
            stride = (1, 2, 2, spec.last_stride)[stage] if block == 0 else 1
            name = f"layer{stage + 1}.{block}"
            shortcut = x
            if f"{name}.downsample.0.kernel" in folded:
                shortcut = convolve(x, f"{name}.downsample.0", stride)
            strides = (1, stride, 1) if spec.depth >= 50 else (stride, 1)
            x = _residual_block(convolve, x, shortcut, name, strides)
        maps.append(x)
    return maps


def _residual_block(
    convolve: _Convolution,
    x: jax.Array,
    shortcut: jax.Array,
    name: str,
    strides: tuple[int, ...],
) -> jax.Array:
    for i, stride in enumerate(strides):
        x = convolve(x, f"{name}.conv{i + 1}", stride)
        x = jax.nn.relu(x if i < len(strides) - 1 else x + shortcut)
    return x
