"""Boxes by hand."""

import pytest

from sicot_jax.errors import InputError
from sicot_jax.serve.box import WHOLE, Box, parse


def test_a_box_is_four_fractions():
    assert parse("0.25,0.5,0.75,1") == (0.25, 0.5, 0.75, 1.0)
    assert parse("0,0,1,1") == WHOLE


@pytest.mark.parametrize(
    "text",
    [
        "", "0.1", "0.1,0.1,0.5", "0.1,0.1,0.5,0.5,0.9", "a,b,c,d", "0,0,nan,1", "nan,nan,nan,nan", "0,0,inf,1", "-inf,0,1,1",
        "-0.1,0,1,1", "0,0,1.01,1", "0.5,0,0.2,1", "0,0.8,1,0.2", "0.5,0.5,0.5,0.5", "0.5,0,0.51,1", "0,0.5,1,0.51",
        "1e400,0,1,1", "0;0;1;1", "0x0,0,1,1", "\x00", "0,0,1," + "9" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_box(text):
    with pytest.raises(
        InputError, match="wanted left,top,right,bottom: fractions of the photo from 0 to 1"
    ) as found:
        parse(text)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 250


def test_a_box_within_a_box():
    """The right half of the lower left quarter."""
    assert Box(0, 0.5, 0.5, 1).within((0.5, 0, 1, 1)) == (0.25, 0.5, 0.5, 1)
    assert Box(-1, 0, 2, 1).within((0, 0, 0.5, 1)) == (-1, 0, 0.5, 1)
    assert Box(-1, 0, 0.5, 1).inside() == (0, 0, 0.5, 1)


def test_a_box_grows_about_its_centre_within_the_photo():
    assert Box(0.25, 0.25, 0.75, 0.5).grown(1.5, 2) == (0.125, 0.125, 0.875, 0.625)
    assert Box(0, 0.25, 0.5, 0.5).grown(1.5, 1) == (0, 0.25, 0.625, 0.5)
    assert WHOLE.grown(2, 2) == WHOLE


def test_pixels_are_rounded_outwards():
    """At least one, of a photo of any size."""
    assert Box(0.25, 0.5, 0.75, 1).pixels(10, 5) == (slice(2, 5), slice(2, 8))
    assert Box(0.5, 0.5, 0.52, 0.52).pixels(1, 3) == (slice(1, 2), slice(0, 1))
