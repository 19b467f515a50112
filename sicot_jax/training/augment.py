"""Training augmentation on the device: random resized crop, horizontal flip, random erasing.

Drawing random windows and applying them are separate functions, so that a batch that is processed
in micro-batches draws once and keeps its photos as bytes until each micro-batch is computed.

Sources: Szegedy et al. 2014 (random resized crop), Zhong et al. 2020 (random erasing).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sicot_jax.config import AugmentConfig
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.models.localization import soft_mask
from sicot_jax.parallel.array_types import Array, Float, Key, UInt8

SHOW_ALL, SHOW_BOX, HIDE_BOX = 0, 1, 2  # values of `ErasingBoxes.mode`


class CropWindows(NamedTuple):
    """One crop window per photo, in pixels of the stored photo, and whether it is mirrored.

    Attributes:
      top: float32 [B].
      left: float32 [B].
      rows: float32 [B], height of the window.
      columns: float32 [B], width of the window.
      flipped: bool [B].
    """

    top: jax.Array
    left: jax.Array
    rows: jax.Array
    columns: jax.Array
    flipped: jax.Array


class ErasingBoxes(NamedTuple):
    """One box per photo and what of the photo stays visible.

    Attributes:
      box: float32 [B, 4], left, top, right, bottom as fractions of the photo.
      mode: int32 [B], one of SHOW_ALL, SHOW_BOX (only what is in the box), HIDE_BOX.
    """

    box: jax.Array
    mode: jax.Array


class Augmentation(NamedTuple):
    """What was drawn for a batch of photos.

    Attributes:
      crops: windows, or None for the centre crop of evaluation.
      erasing: boxes, or None where nothing is erased.
    """

    crops: CropWindows | None
    erasing: ErasingBoxes | None


def resize_matrix(
    start: float | Float[Array, " ..."],
    length: float | Float[Array, " ..."],
    *,
    inputs: int,
    outputs: int,
) -> Float[Array, "... {outputs} {inputs}"]:
    """Returns the matrix that resamples a window of one image axis with a triangle filter.

    When it shrinks, the filter widens by the ratio (antialiasing), as Pillow BILINEAR does; pixels
    outside the photo have no weight.

    Args:
      start: first pixel of the window, float [...] (may be between pixels).
      length: length of the window in pixels, float [...].
      inputs: pixels of the photo along this axis.
      outputs: pixels of the result along this axis.

    Returns:
      float32 [..., outputs, inputs]; every row sums to 1.
    """
    ratio = jnp.asarray(length)[..., None, None] / outputs
    centre = jnp.asarray(start)[..., None, None] + (jnp.arange(outputs)[:, None] + 0.5) * ratio
    distance = jnp.abs(jnp.arange(inputs) + 0.5 - centre) / jnp.maximum(ratio, 1.0)
    weight = jnp.maximum(1.0 - distance, 0.0)
    return weight / jnp.sum(weight, -1, keepdims=True)


def random_windows(
    key: Key[Array, ""], batch: int, *, height: int, width: int, min_area: float, max_ratio: float
) -> tuple[Float[Array, " B"], Float[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Draws crop windows: share of the area uniform in [min_area, 1], log aspect ratio uniform.

    A window longer than the photo is cut at its edge: its area may then be less than `min_area`,
    but not less than 1 / max_ratio.

    Args:
      key: random key.
      batch: number of windows B.
      height: rows of the photos in pixels.
      width: columns of the photos in pixels.
      min_area: smallest share of the photo's area.
      max_ratio: largest aspect ratio relative to that of the photo, and 1 / smallest.

    Returns:
      (top, left, rows, columns), float32 [B] each, in pixels.
    """
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    area = jax.random.uniform(area_key, (batch,), minval=min_area, maxval=1.0)
    stretch = jnp.log(max_ratio) * jax.random.uniform(ratio_key, (batch,), minval=-0.5, maxval=0.5)
    rows = jnp.minimum(jnp.sqrt(area) * jnp.exp(stretch), 1.0) * height
    columns = jnp.minimum(jnp.sqrt(area) * jnp.exp(-stretch), 1.0) * width
    top = jax.random.uniform(top_key, (batch,)) * (height - rows)
    left = jax.random.uniform(left_key, (batch,)) * (width - columns)
    return top, left, rows, columns


def random_crops(
    key: Key[Array, ""],
    image: UInt8[Array, "B H W 3"],
    *,
    min_area: float,
    max_ratio: float,
    flip: bool,
) -> CropWindows:
    """Draws a crop window for each photo; the same key gives the same windows on any mesh.

    Args:
      key: random key.
      image: uint8 [B, H, W, 3], divided over devices by photo.
      min_area: see `random_windows`.
      max_ratio: see `random_windows`.
      flip: whether half of the windows are mirrored.

    Returns:
      Windows, divided over devices like the photos.
    """
    batch, height, width, _ = image.shape
    window_key, flip_key = jax.random.split(key)
    top, left, rows, columns = random_windows(
        window_key, batch, height=height, width=width, min_area=min_area, max_ratio=max_ratio
    )
    flipped = jax.random.bernoulli(flip_key, shape=(batch,)) if flip else jnp.zeros(batch, bool)
    # All devices draw all random numbers; only their use is divided with the batch.
    return jax.reshard(
        CropWindows(top, left, rows, columns, flipped), jax.P(jax.typeof(image).sharding.spec[0])
    )


def crop(
    image: UInt8[Array, "B H W 3"], crops: CropWindows, *, height: int, width: int
) -> Float[Array, "B {height} {width} 3"]:
    """Cuts a window out of each photo and resizes it.

    Args:
      image: uint8 [B, H, W, 3].
      crops: one window per photo.
      height: rows of the result.
      width: columns of the result.

    Returns:
      float32 [B, height, width, 3], values 0 to 255.
    """
    _, in_height, in_width, _ = image.shape
    vertical = resize_matrix(crops.top, crops.rows, inputs=in_height, outputs=height)
    horizontal = resize_matrix(crops.left, crops.columns, inputs=in_width, outputs=width)
    horizontal = jnp.where(crops.flipped[:, None, None], horizontal[:, ::-1], horizontal)
    resized_rows = jnp.einsum("bhH,bHWc->bhWc", vertical, image.astype(jnp.float32))
    return jnp.einsum("bwW,bhWc->bhwc", horizontal, resized_rows)


def crop_boxes(
    box: Float[Array, " ..."], crops: CropWindows, *, height: int, width: int
) -> Float[Array, " ..."]:
    """Converts boxes from fractions of the photos to fractions of their crops.

    Args:
      box: float32 [B, 4], left, top, right, bottom as fractions; all zero where unknown.
      crops: one window per photo; boxes of mirrored windows are mirrored.
      height: rows of the photos in pixels.
      width: columns of the photos in pixels.

    Returns:
      float32 [B, 4], cut at the crop's edges; all zero where the box is unknown or outside it.
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
    visible = (left < right) & (top < bottom)
    return jnp.where(visible[:, None], jnp.stack([left, top, right, bottom], -1), 0.0)


def centre_crop_boxes(
    box: Float[Array, " ..."], preprocessing: Preprocessing
) -> Float[Array, " ..."]:
    """Converts boxes from fractions of the resized photos to fractions of their centre crops.

    Args:
      box: float32 [B, 4], see `crop_boxes`.
      preprocessing: sizes of the resized photo and of the centre crop.

    Returns:
      float32 [B, 4], see `crop_boxes`.
    """
    p = preprocessing
    zeros = jnp.zeros_like(box[:, 0])
    rows, columns = (p.resize_height - p.height) / 2, (p.resize_width - p.width) / 2
    crops = CropWindows(zeros + rows, zeros + columns, zeros + p.height, zeros + p.width, zeros > 0)
    return crop_boxes(box, crops, height=p.resize_height, width=p.resize_width)


def random_erasing_boxes(
    key: Key[Array, ""], image: UInt8[Array, "B H W 3"], *, share: float
) -> ErasingBoxes:
    """Draws which photos have a part erased, and the box (random erasing, Zhong et al. 2020).

    Of the photos with an erased part three quarters lose the box and one quarter everything but the
    box. Sides of boxes are log-uniform from a fifth of the photo to all of it; boxes may cross
    the photo's edge.

    Args:
      key: random key.
      image: uint8 [B, H, W, 3], divided over devices by photo.
      share: share of the photos with an erased part, 0 to 1.

    Returns:
      Boxes, divided over devices like the photos.
    """
    batch = image.shape[0]
    side_key, place_key, kind_key = jax.random.split(key, 3)
    side = jnp.exp(jax.random.uniform(side_key, (batch, 2), minval=jnp.log(0.2), maxval=0.0))
    low = jax.random.uniform(place_key, (batch, 2), minval=-0.15, maxval=1.15) * (1 - side)
    draw = jax.random.uniform(kind_key, (batch,))
    mode = jnp.where(draw >= share, SHOW_ALL, jnp.where(draw < share / 4, SHOW_BOX, HIDE_BOX))
    return jax.reshard(
        ErasingBoxes(jnp.concatenate([low, low + side], 1), mode),
        jax.P(jax.typeof(image).sharding.spec[0]),
    )


def erase(image: Float[Array, "B H W 3"], erasing: ErasingBoxes) -> Float[Array, "B H W 3"]:
    """Sets the erased parts of normalized photos to 0, the mean colour, with soft edges.

    Args:
      image: float32 [B, H, W, 3], normalized.
      erasing: boxes and modes; edges are those of `models.localization.soft_mask`.

    Returns:
      float32 [B, H, W, 3].
    """
    mask = soft_mask(jnp.asarray(erasing.box), *image.shape[1:3])[..., None]
    mode = erasing.mode[:, None, None, None]
    visible = jnp.where(mode == SHOW_ALL, 1.0, jnp.where(mode == SHOW_BOX, mask, 1 - mask))
    return image * visible


def draw_augmentation(
    key: Key[Array, ""], image: UInt8[Array, "B H W 3"], config: AugmentConfig
) -> Augmentation:
    """Draws the augmentation of a batch: small arrays, unlike the augmented photos.

    Args:
      key: random key of the step.
      image: uint8 [B, H, W, 3], divided over devices by photo.
      config: section `augment` of the config.

    Returns:
      Windows and boxes; None for each that the config turns off.
    """
    if not config.enabled:
        return Augmentation(None, None)
    crops = random_crops(
        key, image, min_area=config.min_area, max_ratio=config.max_ratio, flip=config.flip
    )
    if not config.random_erasing:
        return Augmentation(crops, None)
    erasing_key = jax.random.fold_in(key, 1)
    return Augmentation(
        crops, random_erasing_boxes(erasing_key, image, share=config.random_erasing)
    )


def network_input(
    image: UInt8[Array, "B H W 3"], augmentation: Augmentation, preprocessing: Preprocessing
) -> Float[Array, "B H2 W2 3"]:
    """Returns the normalized input of the network for photos with the augmentation drawn for them.

    Args:
      image: uint8 [B, H, W, 3].
      augmentation: what was drawn for these photos.
      preprocessing: size, mean and standard deviation of the input.

    Returns:
      float32 [B, height, width, 3].
    """
    crops, erasing = augmentation
    if crops is None:
        return preprocessing.normalize(preprocessing.centre_crop(image))
    cropped = crop(image, crops, height=preprocessing.height, width=preprocessing.width)
    normalized = preprocessing.normalize(cropped)
    return normalized if erasing is None else erase(normalized, erasing)


def augmented_boxes(
    box: Float[Array, " ..."], augmentation: Augmentation, preprocessing: Preprocessing
) -> Float[Array, " ..."]:
    """Converts known boxes from fractions of the photos to fractions of the network's input.

    Args:
      box: float32 [B, 4], see `crop_boxes`.
      augmentation: what was drawn for these photos.
      preprocessing: sizes of the photo and of the input.

    Returns:
      float32 [B, 4], see `crop_boxes`.
    """
    if augmentation.crops is None:
        return centre_crop_boxes(box, preprocessing)
    p = preprocessing
    return crop_boxes(box, augmentation.crops, height=p.resize_height, width=p.resize_width)
