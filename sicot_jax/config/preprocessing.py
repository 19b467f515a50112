"""How a photo becomes network input: one object for training, evaluation, export and service.

Host:   photo -> `[resize_height, resize_width, 3]` uint8 (decode, orient, fit).
Device: centre crop to `[height, width]` (evaluation) or random resized crop (training,
  `augment.py`), then normalise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sicot_jax.errors import InputError

FITS = ("crop", "pad", "stretch")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Photo geometry in pixels; mean and deviation per channel on the 0..1 scale (ImageNet's by
    default).

    `fit` says how a photo of another aspect ratio meets `resize_*`: "crop" covers it and cuts the
    middle, "pad" fits inside on white, "stretch" ignores the ratio.
    """

    height: int = 224
    width: int = 224
    resize_height: int = 256
    resize_width: int = 256
    fit: str = "crop"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        if self.fit not in FITS:
            raise InputError(f"preprocessing.fit={self.fit!r}, wanted one of {FITS}")
        if not (0 < self.height <= self.resize_height and 0 < self.width <= self.resize_width):
            raise InputError(
                f"preprocessing: input {self.height}x{self.width} does not fit into resized photo "
                f"{self.resize_height}x{self.resize_width}; raise resize_height / resize_width"
            )
        if len(self.mean) != 3:
            raise InputError(f"preprocessing.mean={self.mean}, wanted 3 numbers (red, green, blue)")
        if len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(f"preprocessing.std={self.std}, wanted 3 positive numbers")

    def load(self, photo: bytes | np.ndarray) -> np.ndarray:
        """Encoded bytes or uint8 [H, W, 3] -> uint8 [resize_height, resize_width, 3]. Raises
        ImageError on a broken photo.
        """
        wanted = (self.resize_height, self.resize_width, 3)
        if isinstance(photo, np.ndarray):
            if photo.shape == wanted:
                return photo
        else:
            from sicot_jax.common import image

            photo = image.decode(photo)
        return _fit(photo, wanted[0], wanted[1], self.fit)

    def batch(self, photos: Sequence[bytes | np.ndarray]) -> np.ndarray:
        """Photos as `load` takes them -> uint8 [B, height, width, 3], as a recogniser sees them."""
        return self.centre_crop(np.stack([self.load(photo) for photo in photos]))

    def normalise(self, image):
        """Uint8 or float [..., H, W, 3] of 0..255 -> float32, (x / 255 - mean) / std; numpy or jax
        in, the same out.
        """
        # One multiply and one add: x * scale - offset.
        std = np.asarray(self.std, np.float32)
        scale = np.float32(1 / 255) / std
        offset = np.asarray(self.mean, np.float32) / std
        return image.astype(np.float32) * scale - offset

    def centre_crop(self, image):
        """[..., resize_height, resize_width, 3] -> [..., height, width, 3]."""
        top = (self.resize_height - self.height) // 2
        left = (self.resize_width - self.width) // 2
        return image[..., top : top + self.height, left : left + self.width, :]

    def seen(self, height: int, width: int) -> tuple[float, float, float, float]:
        """What a recogniser sees of a photo of that many pixels: left, top, right, bottom as
        fractions of it; below 0 and above 1 where there is the white of "pad".

        Along either side the whole photo has `size` pixels of the resized one, and lies in its
        middle: so the input starts at (corner of the centre crop - (resized - size) / 2) / size.
        """
        scale = max if self.fit == "crop" else min
        larger = scale(self.resize_height / height, self.resize_width / width)
        sides = []
        for photo, resized, given in (
            (width, self.resize_width, self.width),
            (height, self.resize_height, self.height),
        ):
            size = resized if self.fit == "stretch" else photo * larger
            start = (resized - given) // 2 - (resized - size) / 2
            sides.append((start / size, (start + given) / size))
        (left, right), (top, bottom) = sides
        return left, top, right, bottom


def _fit(photo: np.ndarray, height: int, width: int, fit: str) -> np.ndarray:
    from PIL import Image, ImageOps

    if photo.shape == (height, width, 3):
        return photo
    source = Image.fromarray(photo)
    match fit:
        case "crop":
            result = ImageOps.fit(source, (width, height), Image.Resampling.BILINEAR)
        case "pad":
            result = ImageOps.pad(
                source, (width, height), Image.Resampling.BILINEAR, color=(255, 255, 255)
            )
        case "stretch":
            result = source.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(result)
