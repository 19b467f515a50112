"""Finds the query photo in a request and decodes it, bytes from anyone, within limits."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import io
import json
import threading
import urllib.parse
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from fastapi import Request
from PIL import Image
from starlette.formparsers import MultiPartException, MultiPartParser

from sicot_jax.common.image import HEIF_FORMATS, ImageError, decode_photo, wanted_formats
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.serve.admission import PhotoClock
from sicot_jax.serve.box import FULL_PHOTO, Box

# base64 of JSON clients: URL-safe, with line breaks
_STANDARD_ALPHABET, _LINE_BREAKS = bytes.maketrans(b"-_", b"+/"), b"\t\r\n\f\v"
_SHORTEST_LINE = 60  # of base64 that is broken into lines
_NO_CLOCK = contextlib.nullcontext()
QUERY_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", *HEIF_FORMATS)


@dataclasses.dataclass(frozen=True)
class PhotoLimits:
    """Limits of one query photo.

    Attributes:
      bytes: size of the file in bytes, at most.
      pixels: width times height. While it is decoded a pixel takes up to 28 bytes (WebP with
        transparency; JPEG 7).
      side: limit of width and height, pixels.
    """

    bytes: int = 10_000_000
    pixels: int = 30_000_000
    side: int = 16_000


class PixelBudget:
    """Limits the pixels of all photos that are decoded at the same time; thread-safe.

    Args:
      pixels: number of pixels at most; a larger photo is decoded alone.
    """

    def __init__(self, pixels: int):
        self.pixels, self._reserved, self._changed = pixels, 0, threading.Condition()

    @contextlib.contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        """Waits until the pixels fit into the budget, and holds them while the context lasts.

        Args:
          pixels: number of pixels of a photo.

        Yields:
          Nothing.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: not self._reserved or self._reserved + pixels <= self.pixels
            )
            self._reserved += pixels
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= pixels
                self._changed.notify_all()


class PhotoError(InputError):
    """A photo that is refused.

    Attributes:
      status: HTTP status.
      code: code of the error, for programs.
    """

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


def decode_base64(text: str, limits: PhotoLimits) -> bytes:
    """Returns the photo of a JSON request.

    Args:
      text: base64 in the standard or the URL-safe alphabet, with or without padding and line
        breaks, also as a data URL, percent-escaped, or with blanks that a form made of `+`.
      limits: limits of the photo.

    Returns:
      The file's bytes.

    Raises:
      PhotoError: too large, or not base64.
    """
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    try:
        if "%" in text:
            text = urllib.parse.unquote(text, errors="strict")
        plain = text.strip().encode("ascii").translate(_STANDARD_ALPHABET, _LINE_BREAKS)
        encoded = _form_blanks(plain).rstrip(b"=")
        if len(encoded) > limits.bytes * 4 // 3 + 4:
            raise PhotoError(
                413,
                "photo_too_large",
                f"the photo has more than {limits.bytes} bytes; make it smaller",
            )
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise PhotoError(400, "bad_base64", f"photo is no base64 ({error!s:.100})") from error


def _form_blanks(encoded: bytes) -> bytes:
    """Base64 without blanks: with those as `+` that a form made of `+`, without those of lines."""
    lines = encoded.split(b" ")
    same_length = len({len(line) for line in lines[:-1]}) < 2 and len(lines[0]) >= _SHORTEST_LINE
    if b"+" in encoded or same_length:
        return encoded.replace(b" ", b"")
    return encoded.replace(b" ", b"+")


class DecodedPhoto(NamedTuple):
    """A query photo as the engine takes it.

    Attributes:
      pixels: uint8 [height, width, 3].
      visible: the part of the photo that they show.
    """

    pixels: np.ndarray
    visible: Box


def decode_query_photo(
    data: bytes,
    preprocessing: Preprocessing,
    limits: PhotoLimits,
    budget: PixelBudget,
    box: Box | None = None,
    clock: PhotoClock | None = None,
) -> DecodedPhoto:
    """Decodes a query photo and prepares it for the engine.

    The size is read from the header before a pixel is decoded; decoding then waits for its share of
    the budget.

    Args:
      data: the file's bytes.
      preprocessing: how the engine takes photos.
      limits: limits of the photo.
      budget: limits the photos that are decoded at the same time.
      box: this part is prepared as if it were the full photo, with a margin as wide as what the
        centre crop removes.
      clock: the photo's clock; None where it may wait for as long as it takes.

    Returns:
      Pixels and the part of the photo that they show.

    Raises:
      BusyError: the photo has waited too long.
      PhotoError: empty, too large, no photo, another format, or broken.
    """
    if not data:
        raise PhotoError(400, "no_photo", "the photo is empty; send the bytes of a photo")
    if len(data) > limits.bytes:
        raise PhotoError(
            413,
            "photo_too_large",
            f"{len(data)} bytes, at most {limits.bytes}; make the photo smaller",
        )
    with budget.reserve(_pixels_in_header(data, limits)), clock.work() if clock else _NO_CLOCK:
        try:
            pixels = decode_photo(data, max_pixels=limits.pixels)
        except ImageError as error:
            raise PhotoError(400, "broken_photo", str(error)) from error
        margin = (
            preprocessing.resize_width / preprocessing.width,
            preprocessing.resize_height / preprocessing.height,
        )
        part = FULL_PHOTO if box is None else box.expanded(*margin)
        height, width, _ = pixels.shape
        pixels = pixels[part.pixel_slices(width, height)]
        visible = part.to_photo(preprocessing.visible_region(*pixels.shape[:2]))
        return DecodedPhoto(preprocessing.centre_crop(preprocessing.load(pixels)), visible)


def _pixels_in_header(data: bytes, limits: PhotoLimits) -> int:
    """Returns the number of pixels that the header says; raises PhotoError beyond the limits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=QUERY_FORMATS) as image:
                width, height = image.size
    except Exception as error:  # Pillow raises nearly anything on hostile bytes
        if isinstance(error, Image.DecompressionBombError):
            raise PhotoError(
                413, "too_many_pixels", f"more than {limits.pixels} pixels; make it smaller"
            ) from None
        raise PhotoError(
            415, "not_a_photo", f"not a photo; {wanted_formats(QUERY_FORMATS, data)}"
        ) from None
    if width * height > limits.pixels or max(width, height) > limits.side:
        raise PhotoError(
            413,
            "too_many_pixels",
            f"{width} x {height} pixels, at most {limits.pixels} and {limits.side} a side; "
            "make it smaller",
        )
    return width * height


async def read_photo(request: Request, limits: PhotoLimits) -> bytes:
    """Returns the photo of a request.

    Args:
      request: multipart/form-data with a field "photo", application/json {"photo": BASE64}, or
        image/* with the photo as its body.
      limits: limits of a photo.

    Returns:
      The photo file's bytes.

    Raises:
      PhotoError: no photo in the request, or another content type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_form(request, limits)
    body = await request.body()
    if kind == "application/json":
        content = parse_json(body)
        if not isinstance(content, dict) or not isinstance(content.get("photo"), str):
            raise PhotoError(400, "no_photo", 'wanted {"photo": "BASE64"}')
        return decode_base64(content["photo"], limits)
    if kind.startswith("image/") or kind == "application/octet-stream":
        return body
    raise PhotoError(415, "content_type", "wanted multipart/form-data, application/json or image/*")


def parse_json(body: bytes) -> object:
    """Parses the body of a request.

    Args:
      body: bytes of the request.

    Returns:
      The JSON value.

    Raises:
      PhotoError: not JSON.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise PhotoError(
            400, "bad_json", f"the request is no JSON ({type(error).__name__})"
        ) from error


async def _read_form(request: Request, limits: PhotoLimits) -> bytes:
    try:
        form = await MultiPartParser(
            request.headers,
            request.stream(),
            max_files=1,
            max_fields=10,
            max_part_size=limits.bytes,
        ).parse()
    except (MultiPartException, KeyError, UnicodeDecodeError, ValueError) as error:
        raise PhotoError(
            400, "bad_form", f"the form cannot be read ({str(error)[:100]})"
        ) from error
    try:
        field = form.get("photo")
        if field is None or isinstance(field, str):
            raise PhotoError(400, "no_photo", 'wanted a file in the form\'s field "photo"')
        return await field.read()
    finally:
        await form.close()
