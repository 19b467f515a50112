"""Decodes photos of any common format to upright sRGB pixels, and encodes them as small JPEGs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageCms

from sicot_jax.common.photo_fingerprint import photo_fingerprint
from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError


def _register_heif() -> tuple[str, ...]:
    """Teaches Pillow to read HEIC where the extra `heif` is installed; the one place that does."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return ()
    register_heif_opener()
    return ("HEIF",)


HEIF_FORMATS = _register_heif()
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *HEIF_FORMATS)
HEIF_REMEDY = "install sicot_jax[heif], or save it as JPEG"
MAX_PIXELS = 100_000_000
JPEG_QUALITY = 90

# The "brand" in bytes 8 to 12 of a HEIC file.
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Colour spaces of ICC profiles that an image of a mode can have; others do not belong to it.
_PROFILE_SPACE = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
_MAX_PROFILE_BYTES = 4 << 20  # the largest of printers have 3 MB
_SRGB_TOLERANCE = 2

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
        except Exception as error:
            raise ImageError(
                f"broken photo: {type(error).__name__}, {one_line_error(error, 120)}"
            ) from None


def wanted_formats(formats: Sequence[str], data: bytes) -> str:
    """Returns what to say of bytes that are no photo.

    Args:
      formats: formats that are read.
      data: the file's bytes.

    Returns:
      What was wanted, and the remedy for HEIC where it cannot be read.
    """
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and "HEIF" not in formats:
        return f"HEIC, wanted {', '.join(formats)}; {HEIF_REMEDY}"
    return f"wanted one of {', '.join(formats)}"


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Reads the header only; no pixel is decoded before the size is known to be allowed."""
    try:
        image = Image.open(io.BytesIO(data), formats=PHOTO_FORMATS)
    except Image.UnidentifiedImageError:
        raise ImageError(f"not a photo: {wanted_formats(PHOTO_FORMATS, data)}") from None
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


@functools.lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of a colour profile to sRGB; None where it leaves the pixels of `mode` alone.

    That is so of profiles that are sRGB in other words, belong to another kind of image or are
    damaged; browsers show these photos without a profile too.
    """
    if len(profile) > _MAX_PROFILE_BYTES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != _PROFILE_SPACE[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode == "CMYK":
        return transform
    ramp = np.linspace(0, 255, 9).round().astype(np.uint8)
    if mode == "RGB":
        levels = np.stack(np.meshgrid(ramp, ramp, ramp, indexing="ij"), -1).reshape(27, 27, 3)
    else:
        levels = np.tile(ramp, (9, 1))
    sample = Image.fromarray(levels)
    converted = np.asarray(transform.apply(sample), np.int16)
    change = np.abs(converted - np.asarray(sample.convert("RGB"), np.int16)).max()
    return None if change <= _SRGB_TOLERANCE else transform


def _convert_colours(photo: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts a photo of mode RGB, L or CMYK to RGB by its colour profile, sRGB without one."""
    transform = _to_srgb(profile, photo.mode) if profile else None
    if transform is None:
        return photo.convert("RGB")
    return transform.apply(photo)


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow's conversion clips 16-bit grey to white.
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        scaled = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
        return _convert_colours(scaled, profile)
    if image.mode == "F":
        raise ImageError(
            "floating-point pixels, wanted 8 or 16 bit; save the photo as 8-bit JPEG or PNG"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if profile:
            opaque = rgba.convert("L" if image.mode == "LA" else "RGB")
            alpha, rgba = rgba.getchannel("A"), _convert_colours(opaque, profile)
            rgba.putalpha(alpha)
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    return _convert_colours(image, profile)


def _to_upright_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """The upright sRGB photo, and whether its pixels are those of the file."""
    transpose = _TRANSPOSE.get(_orientation(image))
    profile = image.info.get("icc_profile")
    as_stored = transpose is None and not (profile and _to_srgb(profile, "RGB"))
    photo = _to_rgb(image)
    return (photo if transpose is None else photo.transpose(transpose)), as_stored


def _decode(data: bytes, max_pixels: int) -> tuple[Image.Image, bool]:
    """The upright sRGB photo, and whether its bytes already are a plain JPEG of it."""
    with _open(data, max_pixels) as image:
        image.load()  # refuses truncated files
        photo, as_stored = _to_upright_rgb(image)
        progressive = "progressive" in image.info or "progression" in image.info
        is_plain_jpeg = image.format == "JPEG" and image.mode == "RGB" and not progressive
        return photo, is_plain_jpeg and as_stored


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

    EXIF orientation is applied, a colour profile is converted to sRGB, transparency put on white,
    CMYK and palettes become RGB, 16-bit grey is scaled to 8 bit, and of an animation the first
    frame is taken.

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
) -> tuple[str, bytes, bytes]:
    """Identifies a photo and converts it to the JPEG that a catalogue stores.

    A plain upright RGB JPEG that needs no resizing keeps its bytes: a second encoding would only
    lose. JPEG's scaled decoding is not used: the identifier would then depend on `short_side`.

    Args:
      data: bytes of a photo.
      short_side: the shorter side's largest length, in pixels.
      max_pixels: see `decode_photo`.

    Returns:
      (image_id, JPEG bytes, fingerprint).

    Raises:
      ImageError: as `decode_photo`.
    """
    with _one_line_errors():
        photo, is_plain_jpeg = _decode(data, max_pixels)
        identity = image_id(np.asarray(photo))
        resized = resize_short_side(photo, short_side)
        fingerprint = photo_fingerprint(resized)
        if is_plain_jpeg and resized is photo:
            return identity, data, fingerprint
        return identity, encode_jpeg(resized), fingerprint
