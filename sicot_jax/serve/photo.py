"""A query photo: bytes from anyone to pixels, within limits."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import io
import threading
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from sicot_jax.common import image
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.serve.box import WHOLE, Box

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a photo may have. While it is decoded a pixel takes up to 28 bytes (WebP with
    transparency; JPEG 7).
    """

    bytes: int = 10_000_000
    pixels: int = 30_000_000
    side: int = 16_000


class PixelBudget:
    """Lets photos be decoded together as long as they have at most `pixels` in all; a larger one
    alone.
    """

    def __init__(self, pixels: int):
        self.pixels, self._taken, self._changed = pixels, 0, threading.Condition()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + pixels <= self.pixels)
            self._taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self._taken -= pixels
                self._changed.notify_all()


class PhotoError(InputError):
    """A photo that is not taken: `code` for programs, `status` for HTTP."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


def from_base64(text: str, limits: Limits) -> bytes:
    """The bytes that a JSON request carries; a data URL is taken too."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if len(text) > limits.bytes * 4 // 3 + 4:
        raise PhotoError(
            413, "photo_too_large", f"the photo has more than {limits.bytes} bytes; make it smaller"
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PhotoError(400, "bad_base64", f"photo is no base64 ({error})") from error


class Decoded(NamedTuple):
    """pixels: uint8 [height, width, 3], as the engine takes them. seen: which part of the photo
    they are.
    """

    pixels: np.ndarray
    seen: Box


def decode(
    data: bytes,
    preprocessing: Preprocessing,
    limits: Limits,
    budget: PixelBudget,
    box: Box | None = None,
) -> Decoded:
    """As the engine takes it. Raises PhotoError: empty, too large, no photo, another format,
    broken.

    `box`: this part as if it were the whole photo, with a margin as wide as what the centre crop
    cuts off again. Its size is read from the header before a pixel is decoded; then it waits for
    its share of `budget`.
    """
    if not data:
        raise PhotoError(400, "no_photo", "the photo is empty; send the bytes of a photo")
    if len(data) > limits.bytes:
        raise PhotoError(
            413,
            "photo_too_large",
            f"{len(data)} bytes, at most {limits.bytes}; make the photo smaller",
        )
    with budget.taken(_checked_pixels(data, limits)):
        try:
            pixels = image.decode(data, max_pixels=limits.pixels)
        except image.ImageError as error:
            raise PhotoError(400, "broken_photo", str(error)) from error
        margin = (
            preprocessing.resize_width / preprocessing.width,
            preprocessing.resize_height / preprocessing.height,
        )
        part = WHOLE if box is None else box.grown(*margin)
        height, width, _ = pixels.shape
        pixels = pixels[part.pixels(width, height)]
        seen = part.within(preprocessing.seen(*pixels.shape[:2]))
        return Decoded(preprocessing.centre_crop(preprocessing.load(pixels)), seen)


def _checked_pixels(data: bytes, limits: Limits) -> int:
    """How many the header says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                width, height = opened.size
    except Exception as error:  # Pillow raises nearly anything on hostile bytes
        if isinstance(error, Image.DecompressionBombError):
            raise PhotoError(
                413, "too_many_pixels", f"more than {limits.pixels} pixels; make it smaller"
            ) from None
        raise PhotoError(
            415, "not_a_photo", f"not a photo; wanted one of {', '.join(FORMATS)}"
        ) from None
    if width * height > limits.pixels or max(width, height) > limits.side:
        raise PhotoError(
            413,
            "too_many_pixels",
            f"{width} x {height} pixels, at most {limits.pixels} and {limits.side} a side; make it smaller",
        )
    return width * height
