"""Localises the product in a photo: a box from backbone feature maps, learned without box labels.

feature maps --attention--> a [B, h, w] --mean and variance--> box --soft mask--> foreground,
background

Pailitao's localisation branch (Zhang et al. 2018) regresses four numbers. Here the
box follows from the first two moments of an attention map on each axis: it starts as the full
  photo, is equivariant to translation, and costs one 1x1 convolution to 64 channels for each stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sicot_jax.models.layers import BatchNorm, Conv, Linear
from sicot_jax.parallel.array_types import Array, Float

MASK_SHARPNESS = 60.0  # k of the mask: it rises from 0.05 to 0.95 within a tenth of the photo
# The mask's edge is this far outside the box: the mask is 0.88 along the box's sides and 0.78 in
# its corners.
_MARGIN = 2 / MASK_SHARPNESS
_HIDDEN_CHANNELS = 64
_SCORE_SCALE = 10.0  # scores have to get far from 0 although the streams learn slowly
_EPSILON = 1e-12  # added to the attention's sum, so that a map of zeros has a finite gradient
# `box_from_attention`: how often the box is refined, the width of the window in boxes, and the
# sharpness of the window's edge.
_REFINEMENTS, _WINDOW_SCALE, _WINDOW_SHARPNESS = 4, 1.15, 30.0


def box_from_moments(
    attention: Float[Array, "B h w"], log_scale: Float[Array, " 2"]
) -> Float[Array, "B 4"]:
    """Returns the box whose uniform attention has the map's moments, times exp(log_scale).

    p = a / sum a;  x = sum p x_i;  half width = sqrt(3 (sum p x_i^2 - x^2 + 1 / (12 w^2)))
    exp(s_x), and so for y: a uniform interval of length L has variance L^2 / 12, and the last term
    is the variance within one cell.

    Args:
      attention: attention map, values >= 0, float [B, h, w].
      log_scale: s, logarithm of the factors of width and height, float [2].

    Returns:
      left, top, right, bottom as fractions of the photo, float [B, 4]; not clipped at its
      edges.
    """
    total = jnp.sum(attention, (1, 2))[:, None] + _EPSILON
    sides = []
    for axis, cells in ((1, attention.shape[2]), (2, attention.shape[1])):
        p = jnp.sum(attention, axis) / total
        centers = (jnp.arange(cells) + 0.5) / cells
        mean = p @ centers
        variance = jnp.maximum(p @ (centers * centers) - mean * mean, 0.0) + 1 / (
            12 * cells * cells
        )
        half = jnp.sqrt(3 * variance) * jnp.exp(log_scale[axis - 1])
        sides.append((mean - half, mean + half))
    (left, right), (top, bottom) = sides
    return jnp.stack([left, top, right, bottom], -1)


def box_from_attention(
    attention: Float[Array, "B h w"], log_scale: Float[Array, " 2"]
) -> Float[Array, "B 4"]:
    """Returns `box_from_moments`, refined within a window around the previous box.

    Each of four refinements weights the attention by a soft window of 1.15 times the previous box,
    so that attention far from the product, such as another product in a corner, loses its
    influence.

    Args:
      attention: attention map, values >= 0, float [B, h, w].
      log_scale: logarithm of the factors of width and height, float [2].

    Returns:
      left, top, right, bottom as fractions of the photo, float [B, 4].
    """
    box = box_from_moments(attention, log_scale)
    height, width = attention.shape[1:]
    for _ in range(_REFINEMENTS):
        center, half = (box[:, :2] + box[:, 2:]) / 2, (box[:, 2:] - box[:, :2]) / 2 * _WINDOW_SCALE
        window = jnp.concatenate([center - half, center + half], 1)
        box = box_from_moments(
            attention * soft_mask(window, height, width, sharpness=_WINDOW_SHARPNESS), log_scale
        )
    return box


def soft_mask(
    box: Float[Array, "B 4"], height: int, width: int, *, sharpness: float = MASK_SHARPNESS
) -> Float[Array, "B {height} {width}"]:
    """Returns a differentiable mask of a box.

    m = [h(x - left) - h(x - right)] * [h(y - top) - h(y - bottom)], h(z) = 1 / (1 + exp(-k z)).

    Args:
      box: left, top, right, bottom as fractions of the photo, float [B, 4].
      height: rows of the mask, in pixels.
      width: columns of the mask, in pixels.
      sharpness: k, the slope of the edges, per photo width.

    Returns:
      m at the centers of the pixels, float [B, height, width] within (0, 1).
    """

    def along(low: Array, high: Array, pixels: int) -> Array:
        centers = (jnp.arange(pixels) + 0.5) / pixels
        return jax.nn.sigmoid(sharpness * (centers - low[:, None])) - jax.nn.sigmoid(
            sharpness * (centers - high[:, None])
        )

    left, top, right, bottom = (box[:, side] for side in range(4))
    return along(top, bottom, height)[:, :, None] * along(left, right, width)[:, None, :]


def foreground_mask(
    box: Float[Array, "B 4"], height: int, width: int
) -> Float[Array, "B {height} {width} 1"]:
    """Returns the soft mask that keeps the box's content; its edge is just outside the box.

    Args:
      box: left, top, right, bottom as fractions of the photo, float [B, 4].
      height: rows of the mask, in pixels.
      width: columns of the mask, in pixels.

    Returns:
      mask within (0, 1), float [B, height, width, 1].
    """
    return soft_mask(box + _MARGIN * jnp.array([-1.0, -1.0, 1.0, 1.0]), height, width)[..., None]


def clip_box(box: Float[Array, "B 4"] | None) -> Float[Array, "B 4"] | None:
    """Returns boxes clipped at the photo's edges.

    Args:
      box: left, top, right, bottom as fractions, float [B, 4]; None for a model that does not
        localise.

    Returns:
      the same with values within [0, 1], or None.
    """
    return None if box is None else jnp.clip(box, 0, 1)


def box_area(box: Float[Array, "B 4"]) -> Float[Array, " B"]:
    """Returns the area of boxes as a share of the photo.

    Args:
      box: left, top, right, bottom as fractions, float [B, 4].

    Returns:
      float [B]; may exceed 1 for boxes that are not clipped.
    """
    return (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])


class LocalizationBranch(nnx.Module):
    """Predicts a product's box from the backbone's feature maps.

    a = sigmoid(10 (v . ReLU(BN(sum of W_i f_i)) + b))^2, coarser maps resized to the finest;
    squared, so that a large background of low scores has little weight. v starts as 0: the first
    box is the full photo.
    """

    def __init__(
        self, channels: Sequence[int], *, dtype: DTypeLike, rng: np.random.Generator
    ) -> None:
        """Initialises the branch.

        Args:
          channels: channels of each feature map, finest map first.
          dtype: dtype of the convolutions; the scores are float32.
          rng: generator of the starting values.
        """
        self.convs = nnx.List(
            [Conv(width, _HIDDEN_CHANNELS, 1, dtype=dtype, rng=rng) for width in channels]
        )
        self.norm = BatchNorm(_HIDDEN_CHANNELS)
        self.score = Linear(_HIDDEN_CHANNELS, 1, dtype=jnp.float32, rng=rng)
        self.score.kernel[...] = jnp.zeros_like(self.score.kernel[...])
        self.log_scale = nnx.Param(jnp.zeros((2,), jnp.float32))

    def __call__(self, maps: Sequence[Array], *, train: bool) -> Float[Array, "B 4"]:
        """Predicts boxes.

        Args:
          maps: feature maps, float [B, h_i, w_i, F_i] each, finest first.
          train: normalise by the statistics of the batch instead of the running ones.

        Returns:
          left, top, right, bottom as fractions of the photo, float32 [B, 4].
        """
        hidden = sum_resized([conv(x) for conv, x in zip(self.convs, maps, strict=True)])
        hidden = jax.nn.relu(self.norm(hidden, train=train))
        return box_from_attention(
            attention_from_scores(self.score(hidden.astype(jnp.float32))), self.log_scale[...]
        )


def sum_resized(maps: Sequence[Array]) -> Float[Array, "B h w F"]:
    """Returns the sum of feature maps, each resized bilinearly to the size of the first.

    Args:
      maps: float [B, h_i, w_i, F] each.

    Returns:
      float32 [B, h_0, w_0, F].
    """
    first, *others = maps
    size = first.shape[1:3]
    return sum((_resize(x, size) for x in others), first.astype(jnp.float32))


def _resize(x: Array, size: tuple[int, ...]) -> Array:
    for axis, cells in enumerate(size, 1):
        x = jnp.moveaxis(
            jnp.tensordot(
                interpolation_matrix(x.shape[axis], cells), x.astype(jnp.float32), (1, axis)
            ),
            0,
            axis,
        )
    return x


def interpolation_matrix(inputs: int, outputs: int) -> Float[np.ndarray, "{outputs} {inputs}"]:
    """Returns the matrix that resizes a vector by linear interpolation between cell centers.

    Args:
      inputs: length of the vector.
      outputs: length after resizing.

    Returns:
      float32 [outputs, inputs]; rows sum to 1, edge values are repeated.
    """
    centers = np.clip((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0, inputs - 1)
    return np.maximum(1 - np.abs(centers[:, None] - np.arange(inputs)), 0).astype(np.float32)


def attention_from_scores(score: Float[Array, "B h w 1"]) -> Float[Array, "B h w"]:
    """Returns attention sigmoid(10 score)^2, divided by the photo's largest value.

    Because of the division a photo whose scores are all low has a box too.

    Args:
      score: float32 [B, h, w, 1].

    Returns:
      attention within (0, 1], float32 [B, h, w].
    """
    log_attention = 2 * jax.nn.log_sigmoid(_SCORE_SCALE * score[..., 0])
    return jnp.exp(
        log_attention - jax.lax.stop_gradient(jnp.max(log_attention, (1, 2), keepdims=True))
    )


def masked_average_pool(
    features: Float[Array, "B h w F"], box: Float[Array, "B 4"], *, background: bool = False
) -> Float[Array, "B F"]:
    """Returns the mean of a feature map inside a box, or outside of it.

    Args:
      features: last feature map of the backbone, float [B, h, w, F].
      box: left, top, right, bottom as fractions, float [B, 4]; the mask's edge is one cell wide.
      background: average outside of the box.

    Returns:
      float32 [B, F].
    """
    height, width = features.shape[1:3]
    mask = soft_mask(box, height, width, sharpness=4.0 * max(height, width))
    mask = (1 - mask if background else mask)[..., None]
    return jnp.sum(features.astype(jnp.float32) * mask, (1, 2)) / (jnp.sum(mask, (1, 2)) + 1e-3)
