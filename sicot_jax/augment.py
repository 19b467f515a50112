"""Training augmentation on the device: random resized crop (Szegedy et al. 2014) and horizontal flip."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def resize_matrix(start, length, *, inputs: int, outputs: int):
    """Rows that resample `inputs` pixels to `outputs` over the window [start, start + length), triangle filter.

    Args: start, length: [...] in pixels. Returns: [..., outputs, inputs], every row sums to 1. When shrinking, the
    filter widens by the ratio (antialias), as Pillow's BILINEAR does; outside the photo there is no weight.
    """
    ratio = jnp.asarray(length)[..., None, None] / outputs
    centre = jnp.asarray(start)[..., None, None] + (jnp.arange(outputs)[:, None] + 0.5) * ratio
    distance = jnp.abs(jnp.arange(inputs) + 0.5 - centre) / jnp.maximum(ratio, 1.0)
    weight = jnp.maximum(1.0 - distance, 0.0)
    return weight / jnp.sum(weight, -1, keepdims=True)


def random_windows(key, batch: int, *, height: int, width: int, min_area: float, max_ratio: float):
    """Window (top, left, rows, columns) in pixels, each [B]: area share uniform in [min_area, 1], log aspect ratio uniform.

    A window longer than the photo is cut there: its area may then be less than min_area, but not than 1 / max_ratio.
    """
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    area = jax.random.uniform(area_key, (batch,), minval=min_area, maxval=1.0)
    stretch = jnp.log(max_ratio) * jax.random.uniform(ratio_key, (batch,), minval=-0.5, maxval=0.5)
    rows = jnp.minimum(jnp.sqrt(area) * jnp.exp(stretch), 1.0) * height
    columns = jnp.minimum(jnp.sqrt(area) * jnp.exp(-stretch), 1.0) * width
    top = jax.random.uniform(top_key, (batch,)) * (height - rows)
    left = jax.random.uniform(left_key, (batch,)) * (width - columns)
    return top, left, rows, columns


def augment(key, image, *, height: int, width: int, min_area: float, max_ratio: float, flip: bool):
    """uint8 [B, H, W, 3] -> float32 [B, height, width, 3] of 0..255; the same key gives the same result on any mesh."""
    batch, in_height, in_width, _ = image.shape
    window_key, flip_key = jax.random.split(key)
    top, left, rows, columns = random_windows(
        window_key, batch, height=in_height, width=in_width, min_area=min_area, max_ratio=max_ratio
    )
    vertical = resize_matrix(top, rows, inputs=in_height, outputs=height)
    horizontal = resize_matrix(left, columns, inputs=in_width, outputs=width)
    if flip:
        flipped = jax.random.bernoulli(flip_key, shape=(batch,))
        horizontal = jnp.where(flipped[:, None, None], horizontal[:, ::-1], horizontal)
    # Random numbers are made whole on every device; only their use is divided with the batch.
    spec = jax.typeof(image).sharding.spec
    vertical, horizontal = (jax.reshard(m, jax.P(spec[0], None, None)) for m in (vertical, horizontal))
    rows_done = jnp.einsum("bhH,bHWc->bhWc", vertical, image.astype(jnp.float32))
    return jnp.einsum("bwW,bhWc->bhwc", horizontal, rows_done)
