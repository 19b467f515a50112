"""Box geometry, checked by hand."""

import pytest

from sicot_jax.errors import InputError
from sicot_jax.serve.box import FULL_PHOTO, Box, parse_box


def test_a_box_is_four_fractions():
    assert parse_box("0.25,0.5,0.75,1") == (0.25, 0.5, 0.75, 1.0)
    assert parse_box("0,0,1,1") == FULL_PHOTO


@pytest.mark.parametrize(
    "text",
    [
        "", "0.1", "0.1,0.1,0.5", "0.1,0.1,0.5,0.5,0.9", "a,b,c,d", "0,0,nan,1", "nan,nan,nan,nan",
        "0,0,inf,1", "-inf,0,1,1",
        "-0.1,0,1,1", "0,0,1.01,1", "0.5,0,0.2,1", "0,0.8,1,0.2", "0.5,0.5,0.5,0.5",
        "0.5,0,0.51,1", "0,0.5,1,0.51",
        "1e400,0,1,1", "0;0;1;1", "0x0,0,1,1", "\x00", "0,0,1," + "9" * 5000,
    ],
)  # fmt: skip
def test_malformed_boxes_are_refused(text):
    with pytest.raises(
        InputError, match="wanted left,top,right,bottom: fractions of the photo from 0 to 1"
    ) as caught:
        parse_box(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_box_relative_to_a_box():
    """The right half of the lower left quarter."""
    assert Box(0, 0.5, 0.5, 1).to_photo((0.5, 0, 1, 1)) == (0.25, 0.5, 0.5, 1)
    assert Box(-1, 0, 2, 1).to_photo((0, 0, 0.5, 1)) == (-1, 0, 0.5, 1)
    assert Box(-1, 0, 0.5, 1).clipped() == (0, 0, 0.5, 1)


def test_a_box_expands_about_its_centre_within_the_photo():
    assert Box(0.25, 0.25, 0.75, 0.5).expanded(1.5, 2) == (0.125, 0.125, 0.875, 0.625)
    assert Box(0, 0.25, 0.5, 0.5).expanded(1.5, 1) == (0, 0.25, 0.625, 0.5)
    assert FULL_PHOTO.expanded(2, 2) == FULL_PHOTO


def test_pixels_are_rounded_outwards():
    """At least one, of a photo of any size."""
    assert Box(0.25, 0.5, 0.75, 1).pixel_slices(10, 5) == (slice(2, 5), slice(2, 8))
    assert Box(0.5, 0.5, 0.52, 0.52).pixel_slices(1, 3) == (slice(1, 2), slice(0, 1))
