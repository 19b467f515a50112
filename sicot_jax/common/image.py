"""Decodes photos of any common format to upright RGB pixels, and encodes them as small JPEGs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image

from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError

PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 100_000_000
JPEG_QUALITY = 90

_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(InputError):
    """A photo that cannot or must not be decoded; the message is one line."""


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    # Pillow's decoders raise nearly any exception on hostile bytes, and warn of things that do not
    # matter here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError(f"too many pixels: {error}") from None
        except Image.UnidentifiedImageError:
            raise ImageError(f"not a photo: wanted one of {', '.join(PHOTO_FORMATS)}") from None
        except Exception as error:
            raise ImageError(
                f"broken photo: {type(error).__name__}, {one_line_error(error, 120)}"
            ) from None


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Reads the header only; no pixel is decoded before the size is known to be allowed."""
    image = Image.open(io.BytesIO(data), formats=PHOTO_FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"too many pixels: {width} x {height}, at most {max_pixels}; make the photo smaller"
        )
    return image


def _orientation(image: Image.Image) -> int:
    # ImageOps.exif_transpose also writes the remaining EXIF block back, and raises on a field that
    # it cannot write: such a photo would stay rotated.
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        return 1  # an unreadable EXIF block says nothing about the pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow's conversion clips 16-bit grey to white.
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(
            "floating-point pixels, wanted 8 or 16 bit; save the photo as 8-bit JPEG or PNG"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _to_upright_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """The upright RGB photo, and whether it was upright before."""
    transpose = _TRANSPOSE.get(_orientation(image))
    photo = _to_rgb(image)
    return (photo, True) if transpose is None else (photo.transpose(transpose), False)


def _decode(data: bytes, max_pixels: int) -> tuple[Image.Image, bool]:
    """The upright RGB photo, and whether its bytes already are a plain JPEG of it."""
    with _open(data, max_pixels) as image:
        image.load()  # refuses truncated files
        photo, was_upright = _to_upright_rgb(image)
        progressive = "progressive" in image.info or "progression" in image.info
        is_plain_jpeg = image.format == "JPEG" and image.mode == "RGB" and not progressive
        return photo, is_plain_jpeg and was_upright


def photo_pixels(photo: Image.Image) -> np.ndarray:
    """Converts an image that Pillow has opened to upright RGB pixels.

    Args:
      photo: the opened image, of any mode.

    Returns:
      uint8 [H, W, 3], as `decode_photo` gives them.

    Raises:
      ImageError: the photo cannot be decoded.
    """
    with _one_line_errors():
        return np.asarray(_to_upright_rgb(photo)[0])


def decode_photo(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes the bytes of a photo to upright RGB pixels.

    EXIF orientation is applied, transparency put on white, CMYK and palettes become RGB, 16-bit
    grey is scaled to 8 bit, and of an animation the first frame is taken.

    Args:
      data: bytes of a photo, in one of PHOTO_FORMATS.
      max_pixels: largest H * W, read from the header before anything is decoded.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ImageError: another format, too many pixels, truncated or broken.
    """
    with _one_line_errors():
        return np.asarray(_decode(data, max_pixels)[0])


def image_id(pixels: np.ndarray) -> str:
    """Returns an identifier of a photo's content: blake2b-128 over shape and pixels.

    Args:
      pixels: uint8 [H, W, 3] of an upright photo, before resizing.

    Returns:
      32 hex digits.
    """
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def resize_short_side(photo: Image.Image, short_side: int) -> Image.Image:
    """Shrinks a photo in proportion; a small photo is returned as it is.

    Bicubic with support over all covered pixels (no aliasing), after a box reduction where the
    photo is far larger.

    Args:
      photo: photo of any mode.
      short_side: the shorter side's largest length, in pixels.

    Returns:
      The photo.
    """
    shorter = min(photo.size)
    if shorter <= short_side:
        return photo
    width, height = (max(1, round(side * short_side / shorter)) for side in photo.size)
    return photo.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def encode_jpeg(photo: Image.Image) -> bytes:
    """Encodes an RGB photo as JPEG.

    Args:
      photo: photo of mode RGB.

    Returns:
      The file's bytes.
    """
    out = io.BytesIO()
    photo.save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def prepare_photo(
    data: bytes, *, short_side: int, max_pixels: int = MAX_PIXELS
) -> tuple[str, bytes]:
    """Identifies a photo and converts it to the JPEG that a catalogue stores.

    A plain upright RGB JPEG that needs no resizing keeps its bytes: a second encoding would only
    lose. JPEG's scaled decoding is not used: the identifier would then depend on `short_side`.

    Args:
      data: bytes of a photo.
      short_side: the shorter side's largest length, in pixels.
      max_pixels: see `decode_photo`.

    Returns:
      (image_id, JPEG bytes).

    Raises:
      ImageError: as `decode_photo`.
    """
    with _one_line_errors():
        photo, is_plain_jpeg = _decode(data, max_pixels)
        identity = image_id(np.asarray(photo))
        resized = resize_short_side(photo, short_side)
        if is_plain_jpeg and resized is photo:
            return identity, data
        return identity, encode_jpeg(resized)
