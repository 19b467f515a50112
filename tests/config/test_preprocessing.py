"""Photo geometry and normalisation against numbers computed by hand."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sicot_jax.common.image import ImageError
from sicot_jax.config.preprocessing import FITS, Preprocessing
from sicot_jax.errors import InputError


def make(**settings):
    return Preprocessing(
        **{"height": 6, "width": 8, "resize_height": 6, "resize_width": 8, **settings}
    )


def photo(height, width):
    """Left third red, middle green, right blue; the top row white."""
    image = np.zeros((height, width, 3), np.uint8)
    for i in range(3):
        image[:, i * width // 3 : (i + 1) * width // 3, i] = 200
    return image


def png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(6, 8), (12, 16), (30, 10), (5, 40), (1, 1)])
def test_every_photo_gets_the_wanted_size(fit, size):
    actual = make(fit=fit).load(photo(*size))
    assert actual.shape == (6, 8, 3)
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(
        make(fit=fit).load(png(photo(*size))), actual
    )  # encoded: the same


def test_a_photo_of_the_wanted_size_is_left_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    for fit in FITS:
        np.testing.assert_array_equal(make(fit=fit).load(image), image)


def test_crop_takes_the_middle():
    """6 x 24 becomes 6 x 8: the middle third, all green, without resampling."""
    np.testing.assert_array_equal(
        make(fit="crop").load(photo(6, 24)), np.full((6, 8, 3), (0, 200, 0))
    )


def test_pad_is_white():
    """6 x 2 stands in the middle of 6 x 8, three white columns at either side; nothing is lost of
    it.
    """
    dark = np.random.default_rng(0).integers(0, 200, (6, 2, 3), dtype=np.uint8)
    actual = make(fit="pad").load(dark)
    np.testing.assert_array_equal(actual[:, [0, 1, 2, 5, 6, 7]], 255)
    np.testing.assert_array_equal(actual[:, 3:5], dark)


def test_stretch_keeps_everything():
    actual = make(fit="stretch").load(photo(60, 24))
    assert (actual[:, 0] == (200, 0, 0)).all()
    assert (actual[:, -1] == (0, 0, 200)).all()
    assert (actual[:, 3:5] == (0, 200, 0)).all()


def test_broken_photo_is_refused():
    with pytest.raises(ImageError, match="not a photo"):
        make().load(b"no photo")


def test_normalise_by_hand():
    settings = make(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    image = np.array([[[0, 0, 0], [255, 255, 255], [51, 51, 51]]], np.uint8)
    wanted = [[[-1, -1, 0], [1, 3, 0.5], [-0.6, -0.2, 0.1]]]  # 51 / 255 = 0.2
    for numbers in (image, image.astype(np.float32), jnp.asarray(image)):
        actual = settings.normalize(numbers)
        assert actual.dtype == np.float32
        assert isinstance(actual, jax.Array if isinstance(numbers, jax.Array) else np.ndarray)
        np.testing.assert_allclose(
            actual, wanted, rtol=1e-6, atol=1e-6
        )  # atol: the zero is a difference


def test_normalise_takes_imagenet_numbers_by_default():
    actual = Preprocessing().normalize(np.full((1, 1, 3), 255, np.uint8))
    np.testing.assert_allclose(
        actual[0, 0], [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], rtol=1e-6
    )


def test_centre_crop_by_hand():
    image = np.arange(2 * 7 * 9 * 3).reshape(2, 7, 9, 3)
    settings = make(height=3, width=4, resize_height=7, resize_width=9)
    np.testing.assert_array_equal(settings.centre_crop(image), image[:, 2:5, 2:6])
    np.testing.assert_array_equal(settings.centre_crop(image[0]), image[0, 2:5, 2:6])
    uncropped = make(height=7, width=9, resize_height=7, resize_width=9)
    np.testing.assert_array_equal(uncropped.centre_crop(image), image)


def test_visible_region_by_hand():
    """Of 300 x 100 pixels, 64 x 64 resized, 32 x 32 seen. Cut: 192 x 64, of which 80 to 112 are
    seen; padded: 64 x 21 1/3.
    """
    settings = {"height": 32, "width": 32, "resize_height": 64, "resize_width": 64}
    seen = {fit: make(fit=fit, **settings).visible_region(100, 300) for fit in FITS}
    assert seen["crop"] == pytest.approx((5 / 12, 1 / 4, 7 / 12, 3 / 4))
    assert seen["pad"] == pytest.approx((1 / 4, -1 / 4, 3 / 4, 5 / 4))
    assert seen["stretch"] == pytest.approx((1 / 4, 1 / 4, 3 / 4, 3 / 4))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(400, 300), (240, 480)])
def test_the_visible_region_is_what_the_network_gets(fit, size):
    """The rest of the photo has another one; white is what "pad" puts around it."""
    settings = make(height=32, width=48, resize_height=64, resize_width=64, fit=fit)
    left, top, right, bottom = (
        round(min(max(side, 0), 1) * pixels)
        for side, pixels in zip(settings.visible_region(*size), size[::-1] * 2, strict=True)
    )
    image = np.zeros((*size, 3), np.uint8)
    image[top:bottom, left:right] = 128
    taken = settings.batch([image])[0].astype(int)
    assert taken.min() >= 64  # at the edges the resizing mixes both
    assert (abs(taken - 128) <= 2).mean() > (0.4 if fit == "pad" else 0.85)


def ramp(height, width, axis):
    """A photo whose brightness rises from 0 to 255 along one axis."""
    pixels = (height, width)[axis]
    values = np.round((np.arange(pixels) + 0.5) / pixels * 255).astype(np.uint8)
    line = values[:, None] if axis == 0 else values[None]
    return np.repeat(np.broadcast_to(line, (height, width))[..., None], 3, 2)


@given(
    st.sampled_from(FITS),
    st.tuples(st.integers(40, 160), st.integers(40, 160)),
    st.tuples(st.integers(32, 64), st.integers(32, 64)),
    st.tuples(st.integers(16, 32), st.integers(16, 32)),
    st.integers(0, 1),
)
def test_each_pixel_of_the_input_is_where_the_visible_region_says(
    fit, size, resized, cropped, axis
):
    """Read off ramps. "pad" rounds the photo's offset in the resized one to integer pixels."""
    settings = make(
        fit=fit,
        height=cropped[0],
        width=cropped[1],
        resize_height=resized[0],
        resize_width=resized[1],
    )
    left, top, right, bottom = settings.visible_region(*size)
    low, high = ((top, bottom), (left, right))[axis]
    pixels = cropped[axis]
    expected = low + (np.arange(pixels) + 0.5) / pixels * (high - low)
    pixel = (high - low) / pixels  # as a fraction of the photo
    taken = settings.batch([ramp(*size, axis)])[0].astype(float).mean(2) / 255
    taken = taken.take(taken.shape[1 - axis] // 2, 1 - axis)
    inside = (expected > 2 * pixel) & (expected < 1 - 2 * pixel)
    np.testing.assert_allclose(taken[inside], expected[inside], atol=1.01 * pixel + 2 / 255)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit": "zoom"}, r"preprocessing.fit='zoom', wanted one of \('crop', 'pad', 'stretch'\)"),
        ({"height": 7}, r"input 7x8 does not fit into resized photo 6x8; raise resize_height"),
        ({"width": 9}, r"input 6x9 does not fit into resized photo 6x8"),
        ({"height": 0}, r"input 0x8 does not fit"),
        ({"std": (0.2, 0.0, 0.2)}, r"preprocessing.std=\(0.2, 0.0, 0.2\), wanted"),
        ({"std": (0.2, 0.2)}, r"preprocessing.std=\(0.2, 0.2\), wanted"),
        ({"mean": (0.5,)}, r"preprocessing.mean=\(0.5,\), wanted"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        make(**settings)
