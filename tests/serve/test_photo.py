"""Decoding of query photos within limits."""

import base64
import io
import struct
import threading
import time
import urllib.parse
import zlib

import numpy as np
import pytest
from helpers.made_photos import jpeg
from helpers.photo_zoo import photo_zoo
from helpers.small_index import PREPROCESSING
from PIL import Image

from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.serve.box import Box
from sicot_jax.serve.photo import (
    QUERY_FORMATS,
    PhotoError,
    PhotoLimits,
    PixelBudget,
    decode_base64,
    decode_query_photo,
)

BUDGET = PixelBudget(100_000)
LIMITS = PhotoLimits(bytes=50_000, pixels=100_000, side=2_000)


def some(width=40, height=30, kind="JPEG"):
    return jpeg(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8), kind)


def bomb(width, height):
    """A PNG of that size in a few bytes, as its header says."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", QUERY_FORMATS)
def test_supported_formats(kind):
    assert decode_query_photo(some(kind=kind), PREPROCESSING, LIMITS, BUDGET).pixels.shape == (
        24,
        24,
        3,
    )


def test_heic_without_the_extra_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr("sicot_jax.serve.photo.QUERY_FORMATS", ("JPEG", "PNG"))
    heic = b"\0\0\0\x18ftypheic" + bytes(100)
    with pytest.raises(PhotoError, match=r"HEIC, wanted JPEG, PNG; install sicot_jax\[heif\]"):
        decode_query_photo(heic, PREPROCESSING, LIMITS, BUDGET)


@pytest.mark.parametrize("name", ["wide colours", "16-bit grey", "damaged EXIF"])
def test_a_query_is_decoded_as_the_catalogue_is(name):
    data = photo_zoo()[name]
    answered = decode_query_photo(data, PREPROCESSING, LIMITS, BUDGET).pixels
    np.testing.assert_array_equal(answered, PREPROCESSING.batch([data])[0])


def refused(data, limits=LIMITS):
    with pytest.raises(PhotoError) as caught:
        decode_query_photo(data, PREPROCESSING, limits, BUDGET)
    assert "\n" not in str(caught.value)
    return caught.value.status, caught.value.code


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"", (400, "no_photo")),
        (b"\0" * 60_000, (413, "photo_too_large")),
        (b"GET / HTTP/1.1", (415, "not_a_photo")),
        (b"<svg onload='alert(1)'/>", (415, "not_a_photo")),
        (some(kind="TIFF"), (415, "not_a_photo")),
        (some(kind="PDF"), (415, "not_a_photo")),
        (some()[:-100], (400, "broken_photo")),
        (some(kind="PNG")[:900], (400, "broken_photo")),
        (jpeg(np.zeros((300, 400, 3), np.uint8)), (413, "too_many_pixels")),
        (bomb(2**31 - 1, 2**31 - 1), (413, "too_many_pixels")),
        (bomb(3_000, 1), (413, "too_many_pixels")),
        (bomb(300, 300), (400, "broken_photo")),
    ],
)
def test_refused_photos_have_a_code(data, wanted):
    assert refused(data) == wanted


def test_a_bomb_is_refused_before_it_is_decoded():
    """Its pixels would take 3 GB."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refused(bomb(32_000, 32_000), PhotoLimits())[0] == 413
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_base64():
    data = some()
    while len(data) % 3 == 0:
        data += b"\0"
    text = base64.b64encode(data).decode()
    assert "+" in text
    assert text.endswith("=")
    assert (
        decode_base64(text, LIMITS)
        == decode_base64(f"data:image/jpeg;base64,{text}", LIMITS)
        == data
    )
    for other in (
        base64.encodebytes(data).decode(),  # a line break after 76 characters
        base64.encodebytes(data).decode().replace("\n", "\r\n"),
        base64.urlsafe_b64encode(data).decode(),
        text.rstrip("="),
        f"DATA:image/jpeg;base64,{text}",
        f"data:image/jpeg;charset=utf-8;base64,{urllib.parse.quote(text, safe='')}",
        text.replace("+", " "),  # by a form
        base64.encodebytes(data).decode().replace("\n", " "),
    ):
        assert decode_base64(other, LIMITS) == data
    for bad, status in (("???", 400), ("abcde", 400), ("a" * 70_000, 413)):
        with pytest.raises(PhotoError) as caught:
            decode_base64(bad, LIMITS)
        assert caught.value.status == status


def test_a_photo_lies_upright():
    """As its EXIF says; a camera's photo is turned."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 20:] = 255  # right half white
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees to the right: white is below
    Image.fromarray(pixels).save(out, "JPEG", exif=exif, quality=95)
    upright = decode_query_photo(out.getvalue(), PREPROCESSING, LIMITS, BUDGET).pixels
    assert upright[:10].mean() < 20
    assert upright[-10:].mean() > 235


def test_a_box_is_cut_from_the_upright_photo():
    """Upright, the lower half is white: a box around it gives white pixels alone."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 20:] = 255
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(out, "PNG", exif=exif)
    white = decode_query_photo(out.getvalue(), PREPROCESSING, LIMITS, BUDGET, Box(0, 0.5, 1, 1))
    black = decode_query_photo(out.getvalue(), PREPROCESSING, LIMITS, BUDGET, Box(0, 0, 1, 0.5))
    assert white.pixels.min() == 255
    assert black.pixels.max() == 0
    assert white.visible == (0, 0.5, 1, 1)


def test_a_box_has_the_margin_that_the_centre_crop_takes():
    """The middle 40 x 40 of 80 x 80; resized to 32, of which 16 are seen: all 80 are cut, and the
    box is what is seen.
    """
    preprocessing = Preprocessing(height=16, width=16, resize_height=32, resize_width=32)
    pixels = np.zeros((80, 80, 3), np.uint8)
    pixels[20:60, 20:60] = 200
    decoded = decode_query_photo(
        jpeg(pixels, "PNG"), preprocessing, LIMITS, BUDGET, Box(0.25, 0.25, 0.75, 0.75)
    )
    assert decoded.visible == (0.25, 0.25, 0.75, 0.75)
    assert np.all(decoded.pixels[2:-2, 2:-2] == 200)
    corner = decode_query_photo(
        jpeg(pixels, "PNG"), preprocessing, LIMITS, BUDGET, Box(0, 0, 0.5, 0.5)
    )
    assert corner.visible == (
        0.1875,
        0.1875,
        0.5625,
        0.5625,
    )  # the margin ends with the photo: 60 x 60 are cut, 30 x 30 seen


def test_photos_are_decoded_together_up_to_a_number_of_pixels():
    """Two of 40 fit into 100, the third waits; one that is larger than all goes alone; none is left
    behind.
    """
    budget, inside, most = PixelBudget(100), [], []
    lock = threading.Lock()

    def decode(pixels):
        with budget.reserve(pixels):
            with lock:
                inside.append(pixels)
                most.append(list(inside))
            time.sleep(0.01)
            with lock:
                inside.remove(pixels)

    threads = [threading.Thread(target=decode, args=(pixels,)) for pixels in [40] * 9 + [500] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(most) == 11
    assert max(map(len, most)) == 2
    assert all(sum(together) <= 100 or together == [500] for together in most)
