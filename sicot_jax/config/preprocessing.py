"""Preprocessing from photo to network input, the same for training, export and service.

On the host a photo is decoded, turned upright and resized to `[resize_height, resize_width, 3]`
uint8. On the device it is cropped to `[height, width]` (the centre for evaluation, a random resized
crop for training, see `training/augment.py`) and normalised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sicot_jax.config.checks import ConfigError, FieldChecks

FITS = ("crop", "pad", "stretch")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Sets photo geometry and normalisation: `preprocessing.*`.

    Attributes:
      height: height of the network input, in pixels.
      width: width of the network input, in pixels.
      resize_height: height of the resized photo, in pixels.
      resize_width: width of the resized photo, in pixels.
      fit: how a photo of another aspect ratio becomes `resize_*`: "crop" covers it and cuts off the
        rest, "pad" fits the photo inside on white, for products that fill their photos, "stretch"
        ignores the ratio. Converted weights bring the one they were trained with.
      mean: mean per channel, on the 0..1 scale; ImageNet's by default. Set for converted weights
        that were trained with others.
      std: standard deviation per channel, likewise.

    Raises:
      ConfigError: a field outside its range.
    """

    height: int = 224
    width: int = 224
    resize_height: int = 256
    resize_width: int = 256
    fit: str = "crop"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        check = FieldChecks("preprocessing", self)
        check.choice("fit", FITS)
        if not (0 < self.height <= self.resize_height and 0 < self.width <= self.resize_width):
            raise ConfigError(
                f"preprocessing: input {self.height}x{self.width} does not fit into resized photo "
                f"{self.resize_height}x{self.resize_width}; raise resize_height / resize_width"
            )
        if len(self.mean) != 3 or not np.isfinite(self.mean).all():
            check.refuse("mean", "3 numbers (red, green, blue)")
        if len(self.std) != 3 or not np.isfinite(self.std).all() or min(self.std) <= 0:
            check.refuse("std", "3 positive numbers")

    def load(self, photo: bytes | np.ndarray) -> np.ndarray:
        """Decodes a photo and resizes it.

        Args:
          photo: encoded bytes, or pixels uint8 [H, W, 3].

        Returns:
          uint8 [resize_height, resize_width, 3].

        Raises:
          ImageError: a broken photo.
        """
        if not isinstance(photo, np.ndarray):
            from sicot_jax.common.image import decode_photo  # Pillow

            photo = decode_photo(photo)
        if photo.shape == (self.resize_height, self.resize_width, 3):
            return photo
        return _resize(photo, self.resize_height, self.resize_width, self.fit)

    def batch(self, photos: Sequence[bytes | np.ndarray]) -> np.ndarray:
        """Decodes, resizes and centre-crops photos, as a recogniser sees them.

        Args:
          photos: encoded bytes or uint8 [H, W, 3].

        Returns:
          uint8 [B, height, width, 3].

        Raises:
          ImageError: a broken photo.
        """
        return self.centre_crop(np.stack([self.load(photo) for photo in photos]))

    def normalize(self, image: Any) -> Any:
        """Computes (x / 255 - mean) / std.

        Args:
          image: uint8 or float [..., H, W, 3] of 0..255, of numpy or JAX.

        Returns:
          float32 [..., H, W, 3], of the same library.
        """
        # One multiply and one add: x * scale - offset.
        std = np.asarray(self.std, np.float32)
        scale = np.float32(1 / 255) / std
        offset = np.asarray(self.mean, np.float32) / std
        return image.astype(np.float32) * scale - offset

    def centre_crop(self, image: Any) -> Any:
        """Cuts the network input from the middle of resized photos.

        Args:
          image: [..., resize_height, resize_width, 3], of numpy or JAX.

        Returns:
          [..., height, width, 3], of the same library and dtype.
        """
        top = (self.resize_height - self.height) // 2
        left = (self.resize_width - self.width) // 2
        return image[..., top : top + self.height, left : left + self.width, :]

    def visible_region(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Returns the part of a photo that the network sees after the centre crop.

        Args:
          height: height of the original photo, in pixels.
          width: width of the original photo, in pixels.

        Returns:
          (left, top, right, bottom) as fractions of the photo; below 0 and above 1 for the white
          margin of "pad".
        """
        # Along either side the original photo has `size` pixels of the resized one, and is in its
        # middle: the input starts at (corner of the centre crop - (resized - size) / 2) / size.
        scale = max if self.fit == "crop" else min
        ratio = scale(self.resize_height / height, self.resize_width / width)
        sides = []
        for original, resized, cropped in (
            (width, self.resize_width, self.width),
            (height, self.resize_height, self.height),
        ):
            size = resized if self.fit == "stretch" else original * ratio
            start = (resized - cropped) // 2 - (resized - size) / 2
            sides.append((start / size, (start + cropped) / size))
        (left, right), (top, bottom) = sides
        return left, top, right, bottom


def _resize(photo: np.ndarray, height: int, width: int, fit: str) -> np.ndarray:
    from PIL import Image, ImageOps  # a bare accelerator image trains from arrays, without Pillow

    source = Image.fromarray(photo)
    match fit:
        case "crop":
            result = ImageOps.fit(source, (width, height), Image.Resampling.BILINEAR)
        case "pad":
            result = ImageOps.pad(
                source, (width, height), Image.Resampling.BILINEAR, color=(255, 255, 255)
            )
        case _:  # "stretch"; the config knows no other
            result = source.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(result)
