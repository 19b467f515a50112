"""Training augmentation on the device: random resized crop (Szegedy et al. 2014), horizontal flip,
hidden parts.

Drawing and cropping are two functions, so that a batch in micro-batches draws once and keeps its
photos as they came.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sicot_jax.models.localization import soft_mask


class Crops(NamedTuple):
    """A window in pixels for each photo, and whether it is mirrored: [B] each."""

    top: jax.Array
    left: jax.Array
    rows: jax.Array
    columns: jax.Array
    flipped: jax.Array


def resize_matrix(start, length, *, inputs: int, outputs: int):
    """Rows that resample `inputs` pixels to `outputs` over the window [start, start + length),
    triangle filter.

    Args: start, length: [...] in pixels. Returns: [..., outputs, inputs], every row sums to 1. When
      shrinking, the filter widens by the ratio (antialias), as Pillow's BILINEAR does; outside the
      photo there is no weight.
    """
    ratio = jnp.asarray(length)[..., None, None] / outputs
    centre = jnp.asarray(start)[..., None, None] + (jnp.arange(outputs)[:, None] + 0.5) * ratio
    distance = jnp.abs(jnp.arange(inputs) + 0.5 - centre) / jnp.maximum(ratio, 1.0)
    weight = jnp.maximum(1.0 - distance, 0.0)
    return weight / jnp.sum(weight, -1, keepdims=True)


def random_windows(key, batch: int, *, height: int, width: int, min_area: float, max_ratio: float):
    """Window (top, left, rows, columns) in pixels, each [B]: area share uniform in [min_area, 1],
    log aspect ratio uniform.

    A window longer than the photo is cut there: its area may then be less than min_area, but not
      than 1 / max_ratio.
    """
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    area = jax.random.uniform(area_key, (batch,), minval=min_area, maxval=1.0)
    stretch = jnp.log(max_ratio) * jax.random.uniform(ratio_key, (batch,), minval=-0.5, maxval=0.5)
    rows = jnp.minimum(jnp.sqrt(area) * jnp.exp(stretch), 1.0) * height
    columns = jnp.minimum(jnp.sqrt(area) * jnp.exp(-stretch), 1.0) * width
    top = jax.random.uniform(top_key, (batch,)) * (height - rows)
    left = jax.random.uniform(left_key, (batch,)) * (width - columns)
    return top, left, rows, columns


def random_crops(key, image, *, min_area: float, max_ratio: float, flip: bool) -> Crops:
    """For photos [B, H, W, 3], divided as they are; the same key gives the same on any mesh."""
    batch, height, width, _ = image.shape
    window_key, flip_key = jax.random.split(key)
    top, left, rows, columns = random_windows(
        window_key, batch, height=height, width=width, min_area=min_area, max_ratio=max_ratio
    )
    flipped = jax.random.bernoulli(flip_key, shape=(batch,)) if flip else jnp.zeros(batch, bool)
    # Random numbers are made whole on every device; only their use is divided with the batch.
    return jax.reshard(
        Crops(top, left, rows, columns, flipped), jax.P(jax.typeof(image).sharding.spec[0])
    )


def crop(image, crops: Crops, *, height: int, width: int):
    """uint8 [B, H, W, 3] -> float32 [B, height, width, 3] of 0..255."""
    _, in_height, in_width, _ = image.shape
    vertical = resize_matrix(crops.top, crops.rows, inputs=in_height, outputs=height)
    horizontal = resize_matrix(crops.left, crops.columns, inputs=in_width, outputs=width)
    horizontal = jnp.where(crops.flipped[:, None, None], horizontal[:, ::-1], horizontal)
    rows_done = jnp.einsum("bhH,bHWc->bhWc", vertical, image.astype(jnp.float32))
    return jnp.einsum("bwW,bhWc->bhwc", horizontal, rows_done)


def crop_boxes(box, crops: Crops, *, height: int, width: int):
    """Boxes [B, 4] as fractions of photos of height x width -> as fractions of their crops,
    mirrored as they are; all zero where nothing is left of one, or was there.
    """
    low = jnp.stack([crops.left, crops.top], -1)
    size = jnp.stack([crops.columns, crops.rows], -1)
    corners = (box.reshape(-1, 2, 2) * jnp.array([width, height]) - low[:, None]) / size[:, None]
    corners = jnp.clip(corners, 0.0, 1.0)
    left, top, right, bottom = (corners.reshape(-1, 4)[:, side] for side in range(4))
    left, right = (
        jnp.where(crops.flipped, 1 - right, left),
        jnp.where(crops.flipped, 1 - left, right),
    )
    there = (left < right) & (top < bottom)
    return jnp.where(there[:, None], jnp.stack([left, top, right, bottom], -1), 0.0)


class Hidden(NamedTuple):
    """A box in each photo [B, 4], as fractions, and what is shown [B]: 0 all, 1 what is in it, 2
    what is not.
    """

    box: jax.Array
    shown: jax.Array


def random_hidden(key, image, *, share: float) -> Hidden:
    """For photos [B, H, W, 3], divided as they are: of a `share` of them a part is hidden, of three
    quarters of these the box, of the others all but the box. Sides are log-uniform from a fifth of
    the photo to all of it; a box may lie over the edge.

    So a network learns to tell a product by what is left of it (random erasing: Zhong et al. 2020).
    """
    batch = image.shape[0]
    side_key, place_key, kind_key = jax.random.split(key, 3)
    side = jnp.exp(jax.random.uniform(side_key, (batch, 2), minval=jnp.log(0.2), maxval=0.0))
    low = jax.random.uniform(place_key, (batch, 2), minval=-0.15, maxval=1.15) * (1 - side)
    draw = jax.random.uniform(kind_key, (batch,))
    shown = jnp.where(draw >= share, 0, jnp.where(draw < share / 4, 1, 2))
    return jax.reshard(
        Hidden(jnp.concatenate([low, low + side], 1), shown),
        jax.P(jax.typeof(image).sharding.spec[0]),
    )


def hide(image, hidden: Hidden):
    """Normalised photos [B, H, W, 3] with 0, the mean colour, where they are hidden, softly as
    `models.box.soft_mask` does.
    """
    mask = soft_mask(hidden.box, *image.shape[1:3])[..., None]
    shown = hidden.shown[:, None, None, None]
    return image * jnp.where(shown == 0, 1.0, jnp.where(shown == 1, mask, 1 - mask))
