"""Where the product is: a box from the maps of the backbone, learned without boxes (Pailitao, Zhang
et al. 2018).

maps --attention--> a [B, h, w] --its mean and spread--> box --soft mask--> what is inside, what is
outside

The paper's branch predicts four numbers; here an attention map is summed up by two moments for each
axis: it starts as the whole photo, moves with the photo, and has as few parameters as a convolution
of a pixel to 64 channels for each stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sicot_jax.models.layers import BatchNorm, Conv, Linear

SHARPNESS = 60.0  # k of the mask: from 0.05 to 0.95 within a tenth of the photo
_MARGIN = (
    2 / SHARPNESS
)  # the mask falls outside the box: seen by 0.88 along its sides, by 0.78 in its corners
_HIDDEN = 64
_SCALE = 10.0  # of the scores: they have to get far from 0, while the streams learn slowly
_LEAST = 1e-12  # attention, in sum: none at all must not make a gradient that is no number
_ROUNDS, _WIDER, _WINDOW = 4, 1.15, 30.0


def moments_box(attention, log_scale):
    """The box whose uniform attention would have these moments, times exp(log_scale).

    p = a / sum a;  x = sum p x_i;  half width = sqrt(3 (sum p x_i^2 - x^2 + 1 / (12 w^2)))
    exp(s_x), and so for y, since a uniform interval of length L has variance L^2 / 12; the last
    term is that of a cell.

    Args:
      attention: [B, h, w] >= 0.
      log_scale: s, [2], of width and height.

    Returns: [B, 4]: left, top, right, bottom as fractions, not cut at the photo's edges.
    """
    total = jnp.sum(attention, (1, 2))[:, None] + _LEAST
    sides = []
    for axis, count in ((1, attention.shape[2]), (2, attention.shape[1])):
        p = jnp.sum(attention, axis) / total
        at = (jnp.arange(count) + 0.5) / count
        mean = p @ at
        variance = jnp.maximum(p @ (at * at) - mean * mean, 0.0) + 1 / (12 * count * count)
        half = jnp.sqrt(3 * variance) * jnp.exp(log_scale[axis - 1])
        sides.append((mean - half, mean + half))
    (left, right), (top, bottom) = sides
    return jnp.stack([left, top, right, bottom], -1)


def attention_box(attention, log_scale):
    """`moments_box`, four times more of what lies in 1.15 times the box found before: what is far
    from the rest, as another product in a corner, no longer counts.
    """
    box = moments_box(attention, log_scale)
    for _ in range(_ROUNDS):
        middle, half = (box[:, :2] + box[:, 2:]) / 2, (box[:, 2:] - box[:, :2]) / 2 * _WIDER
        window = jnp.concatenate([middle - half, middle + half], 1)
        box = moments_box(
            attention * soft_mask(window, *attention.shape[1:], sharpness=_WINDOW), log_scale
        )
    return box


def soft_mask(box, height: int, width: int, *, sharpness: float = SHARPNESS):
    """m = [h(x - left) - h(x - right)] * [h(y - top) - h(y - bottom)], h(z) = 1 / (1 + exp(-k z)).

    Args: box: [B, 4] as fractions; x, y are the middles of height x width pixels. Returns: [B,
      height, width].
    """

    def along(low, high, count):
        at = (jnp.arange(count) + 0.5) / count
        return jax.nn.sigmoid(sharpness * (at - low[:, None])) - jax.nn.sigmoid(
            sharpness * (at - high[:, None])
        )

    left, top, right, bottom = (box[:, side] for side in range(4))
    return along(top, bottom, height)[:, :, None] * along(left, right, width)[:, None, :]


def visible(box, height: int, width: int):
    """The mask of what is in the box, [B, height, width, 1]: its edge lies outside, so that the
    product is not cut.
    """
    return soft_mask(box + _MARGIN * jnp.array([-1.0, -1.0, 1.0, 1.0]), height, width)[..., None]


def within_photo(box):
    """Boxes [B, 4] cut at the photo's edges; None of a model without a branch."""
    return None if box is None else jnp.clip(box, 0, 1)


def area(box):
    """Share of the photo, [B, 4] -> [B]; of a box that is not cut at its edges it may be above 1."""
    return (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])


class BoxBranch(nnx.Module):
    """Maps of the backbone [B, h, w, F], finest first -> box [B, 4].

    a = sigmoid(10 (v . ReLU(BN(sum of W_i f_i)) + b))^2, coarser maps stretched to the finest;
    squared, so that a background of many cells has no weight. v starts as 0: the box is the whole
    photo.
    """

    def __init__(self, widths: Sequence[int], *, dtype, rng: np.random.Generator):
        self.convs = nnx.List([Conv(width, _HIDDEN, 1, dtype=dtype, rng=rng) for width in widths])
        self.norm = BatchNorm(_HIDDEN)
        self.score = Linear(_HIDDEN, 1, dtype=jnp.float32, rng=rng)
        self.score.kernel[...] = jnp.zeros_like(self.score.kernel[...])
        self.log_scale = nnx.Param(jnp.zeros((2,), jnp.float32))

    def __call__(self, maps, *, train: bool):
        hidden = summed([conv(x) for conv, x in zip(self.convs, maps, strict=True)])
        hidden = jax.nn.relu(self.norm(hidden, train=train))
        return attention_box(
            attention_of(self.score(hidden.astype(jnp.float32))), self.log_scale[...]
        )


def summed(maps):
    """Sum of maps [B, h, w, F], each stretched to the first one's size, linearly."""
    first, *others = maps
    size = first.shape[1:3]
    return sum((_stretched(x, size) for x in others), first.astype(jnp.float32))


def _stretched(x, size):
    for axis, count in enumerate(size, 1):
        x = jnp.moveaxis(
            jnp.tensordot(stretch_matrix(x.shape[axis], count), x.astype(jnp.float32), (1, axis)),
            0,
            axis,
        )
    return x


def stretch_matrix(inputs: int, outputs: int) -> np.ndarray:
    """Linear interpolation between middles of cells, edges repeated: float32 [outputs, inputs],
    rows sum to 1.
    """
    at = np.clip((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0, inputs - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(inputs)), 0).astype(np.float32)


def attention_of(score):
    """[B, h, w, 1] -> a [B, h, w], divided by the photo's largest, so that one of low scores alone
    has a box too.
    """
    level = 2 * jax.nn.log_sigmoid(_SCALE * score[..., 0])
    return jnp.exp(level - jax.lax.stop_gradient(jnp.max(level, (1, 2), keepdims=True)))


def mean_within(features, box, *, outside: bool = False):
    """Mean of the last map [B, h, w, F] in the box, or outside of it, in float32 [B, F]; the mask's
    edge is a cell wide.
    """
    height, width = features.shape[1:3]
    mask = soft_mask(box, height, width, sharpness=4.0 * max(height, width))
    mask = (1 - mask if outside else mask)[..., None]
    return jnp.sum(features.astype(jnp.float32) * mask, (1, 2)) / (jnp.sum(mask, (1, 2)) + 1e-3)
