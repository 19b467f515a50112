"""Decoding of photos: formats, orientation, colour modes, limits and broken files."""

from __future__ import annotations

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.photo_zoo import SRGB, WIDE, colours, icc_profile, photo_zoo, saved, unwritable_exif
from PIL import Image, ImageCms, ImageOps

from sicot_jax.common.image import (
    ImageError,
    decode_photo,
    image_id,
    photo_pixels,
    prepare_photo,
    resize_short_side,
    wanted_formats,
)


def corners():
    """A 20 x 10 photo: red on the left half, blue on the right."""
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, :10, 0] = 255
    pixels[:, 10:, 2] = 255
    return Image.fromarray(pixels)


def near(pixel, colour, tolerance=8):
    return np.abs(np.asarray(pixel, int) - colour).max() <= tolerance


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG"])
def test_formats(format):
    options = {"lossless": True} if format == "WEBP" else {}
    pixels = decode_photo(saved(corners(), format, **options))
    assert pixels.shape == (10, 20, 3)
    assert pixels.dtype == np.uint8
    assert near(pixels[2, 2], (255, 0, 0))
    assert near(pixels[2, 18], (0, 0, 255))


def test_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: left becomes top
    for format in ("JPEG", "PNG", "WEBP"):
        pixels = decode_photo(saved(corners(), format, exif=exif))
        assert pixels.shape == (20, 10, 3)
        assert near(pixels[2, 5], (255, 0, 0), 40)
        assert near(pixels[18, 5], (0, 0, 255), 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_equals_pillow(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    data = saved(Image.fromarray(pixels), exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decode_photo(data), expected)


def test_broken_exif_does_not_matter():
    data = saved(corners(), "JPEG", exif=b"Exif\0\0nonsense")
    assert decode_photo(data).shape == (10, 20, 3)


def test_the_orientation_is_applied_where_other_exif_fields_are_broken():
    """A field of which Pillow can read the value but not write it back."""
    data = saved(corners(), "JPEG", exif=unwritable_exif())
    with Image.open(io.BytesIO(data)) as image, pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    assert decode_photo(data).shape == (20, 10, 3)


def test_alpha_on_white():
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[:, 1] = (255, 0, 0, 255)
    pixels[:, 2] = (0, 0, 0, 128)
    decoded = decode_photo(saved(Image.fromarray(pixels, "RGBA")))
    np.testing.assert_array_equal(decoded[0, :2], [[255, 255, 255], [255, 0, 0]])
    assert near(decoded[0, 2], (127, 127, 127), 1)
    grey_alpha = Image.fromarray(np.array([[[0, 0], [9, 255]]], np.uint8), "LA")
    np.testing.assert_array_equal(decode_photo(saved(grey_alpha))[0], [[255] * 3, [9] * 3])


def test_palette_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    np.testing.assert_array_equal(decode_photo(saved(image))[0], [[255, 0, 0], [0, 255, 0]])
    for format in ("PNG", "GIF"):
        transparent = decode_photo(saved(image, format, transparency=1))
        np.testing.assert_array_equal(transparent[0], [[255, 0, 0], [255, 255, 255]])


def test_rgb_png_with_a_transparent_colour():
    image = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8))
    np.testing.assert_array_equal(
        decode_photo(saved(image, transparency=(1, 2, 3)))[0], [[255] * 3, [9] * 3]
    )


def test_cmyk():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert near(decode_photo(saved(cmyk, "JPEG"))[0, 0], (255, 0, 0), 12)
    assert near(decode_photo(saved(cmyk, "TIFF"))[0, 0], (255, 0, 0), 2)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(format):
    grey = np.array([[0, 257 * 100, 65535]], np.uint16)
    decoded = decode_photo(saved(Image.fromarray(grey), format))
    np.testing.assert_array_equal(decoded[0], [[0] * 3, [100] * 3, [255] * 3])


def test_one_bit():
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    np.testing.assert_array_equal(decode_photo(saved(image))[0], [[0] * 3, [255] * 3])


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_photo(data)[0, 0], [255, 0, 0])


def billion_pixels():
    """Header and first bytes of a PNG of 40,000 x 40,000 black pixels, a file that deflates to
    almost nothing.
    """

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    start = zlib.compress(bytes(1 << 20))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", start) + chunk(b"IEND", b"")
    )


def test_a_billion_pixels_are_refused_from_the_header():
    with pytest.raises(ImageError, match="too many pixels"):
        decode_photo(billion_pixels())
    with pytest.raises(ImageError, match="20 x 10, at most 199"):
        decode_photo(saved(corners()), max_pixels=199)
    # Between the limits of Pillow's warning and of its error.
    large = saved(Image.new("1", (10_001, 10_000)))
    with pytest.raises(ImageError, match="10001 x 10000, at most 100000000"):
        decode_photo(large)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_refused(format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    data = saved(noise, format)
    for share in (0.3, 0.7):
        with pytest.raises(ImageError) as caught:
            decode_photo(data[: int(len(data) * share)])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff\xe0", b"<svg></svg>"])
def test_no_photo(data):
    with pytest.raises(ImageError, match=r"not a photo|broken photo"):
        decode_photo(data)


def test_other_formats_are_refused():
    with pytest.raises(ImageError, match="not a photo"):
        decode_photo(saved(corners(), "PPM"))


def test_floating_point_is_refused():
    with pytest.raises(ImageError, match="floating-point"):
        decode_photo(saved(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))


def test_resize_keeps_proportions_and_never_enlarges():
    assert resize_short_side(Image.new("RGB", (300, 600)), 100).size == (100, 200)
    assert resize_short_side(Image.new("RGB", (1000, 301)), 100).size == (332, 100)
    small = Image.new("RGB", (50, 900))
    assert resize_short_side(small, 100) is small


def test_resize_does_not_alias():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(resize_short_side(Image.fromarray(stripes), 8))
    assert near(small[4, 4], (127, 127, 127), 3)


def test_plain_jpeg_keeps_its_bytes():
    data = saved(corners(), "JPEG")
    assert prepare_photo(data, short_side=10)[1] is data
    for other in (
        saved(corners(), "PNG"),
        saved(corners(), "JPEG", progressive=True),
        saved(corners().convert("L"), "JPEG"),
        saved(corners().convert("CMYK"), "JPEG"),
    ):
        stored = prepare_photo(other, short_side=10)[1]
        with Image.open(io.BytesIO(stored)) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (20, 10))


def test_stored_photo_is_upright_and_resized():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = prepare_photo(saved(corners(), "JPEG", exif=exif), short_side=8)[1]
    with Image.open(io.BytesIO(stored)) as image:
        assert image.size == (8, 16)
        assert not image.getexif()


def test_image_id_names_the_pixels():
    png, bmp = (
        prepare_photo(saved(corners(), "PNG"), short_side=10),
        prepare_photo(saved(corners(), "BMP"), short_side=5),
    )
    assert png[0] == bmp[0] == image_id(np.asarray(corners()))
    assert len(png[0]) == 32
    assert image_id(np.zeros((2, 3, 3), np.uint8)) != image_id(np.zeros((3, 2, 3), np.uint8))
    assert image_id(np.asarray(corners())[:, ::2]) == image_id(np.asarray(corners())[:, ::2].copy())


def encode_srgb(linear):
    linear = np.clip(linear, 0, 1)
    low = linear * 12.92
    return 255 * np.where(linear < 0.0031308, low, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_a_colour_profile_is_converted_to_srgb():
    pixels = np.asarray(colours())
    linear = (pixels / 255) ** 2.2
    expected = encode_srgb(linear @ (np.linalg.inv(SRGB) @ WIDE).T)
    decoded = decode_photo(saved(colours(), icc_profile=icc_profile(WIDE, 2.2)))
    # Dark values differ by the straight start of sRGB's curve, and by rounding.
    np.testing.assert_allclose(decoded, expected, atol=3)
    assert np.abs(decoded - pixels.astype(int)).max() > 30


def test_the_profile_of_a_grey_photo_is_converted():
    grey = np.arange(256, dtype=np.uint8)[None]
    decoded = decode_photo(saved(Image.fromarray(grey), icc_profile=icc_profile(None, 1.8)))
    expected = np.repeat(encode_srgb((grey / 255) ** 1.8)[..., None], 3, -1)
    np.testing.assert_allclose(decoded, expected, atol=2)


@pytest.mark.parametrize(
    "profile",
    [icc_profile(SRGB, 2.2), icc_profile(None, 1.0), icc_profile(WIDE, 2.2)[:150], b"nonsense"],
    ids=["sRGB in other words", "of grey", "damaged", "nonsense"],
)
def test_profiles_that_leave_the_pixels_alone(profile):
    """The curve of sRGB is not quite a power of 2.2: the dark colours are left out here."""
    light = Image.fromarray(np.maximum(np.asarray(colours()), 60))
    decoded = decode_photo(saved(light, icc_profile=profile))
    assert np.abs(decoded - np.asarray(light, int)).max() <= 5


def test_a_photo_with_an_srgb_profile_keeps_its_bytes_and_one_with_another_does_not():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = saved(colours(), "JPEG", icc_profile=srgb)
    np.testing.assert_array_equal(decode_photo(data), decode_photo(saved(colours(), "JPEG")))
    assert prepare_photo(data, short_side=20)[1] is data
    wide = saved(colours(), "JPEG", icc_profile=icc_profile(WIDE, 2.2), quality=95)
    stored = prepare_photo(wide, short_side=20)[1]
    with Image.open(io.BytesIO(stored)) as image:
        assert "icc_profile" not in image.info
    assert np.abs(decode_photo(stored).astype(int) - decode_photo(wide)).max() < 40


@pytest.mark.parametrize("name", photo_zoo())
def test_the_zoo_is_decoded_or_refused(name):
    data = photo_zoo()[name]
    if name.startswith("refused"):
        with pytest.raises(ImageError):
            decode_photo(data)
        return
    pixels = decode_photo(data)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert np.ptp(pixels) > 100  # neither white nor black
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(photo_pixels(opened), pixels)


def test_threads_convert_colours_alike():
    data = saved(colours(200, 300), icc_profile=icc_profile(WIDE, 2.2))
    expected = decode_photo(data)
    with ThreadPoolExecutor(8) as pool:
        for pixels in pool.map(decode_photo, [data] * 32):
            np.testing.assert_array_equal(pixels, expected)


def test_heic_without_its_library_names_the_remedy():
    heic = b"\0\0\0\x18ftypheic" + bytes(100)
    assert wanted_formats(("JPEG", "PNG"), heic) == (
        "HEIC, wanted JPEG, PNG; install sicot_jax[heif], or save it as JPEG"
    )
    assert wanted_formats(("JPEG",), b"\0\0\0\x18ftypmp42") == "wanted one of JPEG"
    assert wanted_formats(("HEIF",), heic) == "wanted one of HEIF"


def test_heic_is_decoded_upright():
    heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(colours(40, 64), "HEIF", quality=-1, chroma=444, exif=exif.tobytes())
    assert heif.is_supported(data)
    decoded = decode_photo(data)
    assert decoded.shape == (64, 40, 3)
    upright = np.asarray(colours(40, 64).transpose(Image.Transpose.ROTATE_270), int)
    assert np.abs(decoded - upright).max() < 8
    for end in (100, len(data) // 2):
        with pytest.raises(ImageError):
            decode_photo(data[:end])
