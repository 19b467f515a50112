"""One decode of our own for every photo: any common file to upright RGB, and back to a small JPEG."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image

from sicot_jax.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 100_000_000
JPEG_QUALITY = 90

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
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
            raise ImageError(f"not a photo: wanted one of {', '.join(FORMATS)}") from None
        except Exception as error:
            raise ImageError(
                f"broken photo: {type(error).__name__}, {' '.join(str(error).split())[:120]}"
            ) from None


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Header only; no pixel is decoded before the size is known to be allowed."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"too many pixels: {width} x {height}, at most {max_pixels}; make the photo smaller"
        )
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        return 1  # an unreadable EXIF block says nothing about the pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow's own conversion clips 16-bit grey to white.
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


def _upright(opened: Image.Image) -> tuple[Image.Image, bool]:
    """The upright RGB photo, and whether it was one before."""
    orientation = _orientation(opened)
    photo = _to_rgb(opened)
    return photo.transpose(
        _UPRIGHT[orientation]
    ) if orientation in _UPRIGHT else photo, orientation not in _UPRIGHT


def _decode(data: bytes, max_pixels: int) -> tuple[Image.Image, bool]:
    """The upright RGB photo, and whether its bytes already are a plain JPEG of it."""
    with _open(data, max_pixels) as opened:
        opened.load()  # refuses truncated files
        photo, was_upright = _upright(opened)
        progressive = "progressive" in opened.info or "progression" in opened.info
        return (
            photo,
            opened.format == "JPEG" and opened.mode == "RGB" and was_upright and not progressive,
        )


def pixels(photo: Image.Image) -> np.ndarray:
    """What Pillow has opened, as `decode` makes it: uint8 RGB [H, W, 3]. Raises ImageError
    likewise.
    """
    with _one_line_errors():
        return np.asarray(_upright(photo)[0])


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Bytes of a photo to uint8 RGB [H, W, 3].

    Upright (EXIF orientation), transparency on white, CMYK and palettes to RGB, 16-bit grey scaled
    to 8 bit, the first frame of an animation. Raises ImageError: another format than FORMATS, more
    than `max_pixels` (read from the header before anything is decoded), truncated or broken.
    """
    with _one_line_errors():
        return np.asarray(_decode(data, max_pixels)[0])


def image_id(pixels: np.ndarray) -> str:
    """32 hex digits: blake2b-128 over the shape and the pixels uint8 [H, W, 3] of an upright photo
    before resizing.
    """
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def resize_short_side(photo: Image.Image, short_side: int) -> Image.Image:
    """The photo with its shorter side at most `short_side` pixels, in proportion; a small photo is
    returned as is.

    Bicubic with support over all covered pixels (no aliasing), after a box reduction where the
    photo is far larger.
    """
    shorter = min(photo.size)
    if shorter <= short_side:
        return photo
    width, height = (max(1, round(side * short_side / shorter)) for side in photo.size)
    return photo.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def encode(photo: Image.Image) -> bytes:
    """JPEG of an RGB photo."""
    out = io.BytesIO()
    photo.save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def prepare(data: bytes, *, short_side: int, max_pixels: int = MAX_PIXELS) -> tuple[str, bytes]:
    """Bytes of a photo as found to (image_id, JPEG bytes as stored).

    A plain upright RGB JPEG that needs no resizing keeps its bytes: a second encoding would only
      lose. Raises ImageError as `decode` does. JPEG's scaled decoding is not used: image_id would
      then depend on `short_side`.
    """
    with _one_line_errors():
        photo, plain = _decode(data, max_pixels)
        identity = image_id(np.asarray(photo))
        resized = resize_short_side(photo, short_side)
        if plain and resized is photo:
            return identity, data
        return identity, encode(resized)
