"""Box geometry, checked by hand."""

import pytest
from helpers.damage import result_or_one_line
from hypothesis import given
from hypothesis import strategies as st

from sicot_jax.errors import InputError
from sicot_jax.serve.box import FULL_PHOTO, MIN_SIDE, Box, parse_box


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


def boxes(low=0.0, high=1.0, side=MIN_SIDE):
    """Boxes between two numbers whose sides are at least `side` long."""
    sides = st.tuples(st.floats(low, high), st.floats(low, high)).filter(
        lambda pair: pair[1] - pair[0] >= side
    )
    return st.tuples(sides, sides).map(
        lambda pairs: Box(pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1])
    )


@given(boxes())
def test_a_written_box_is_read_as_it_was(box):
    assert parse_box(",".join(map(repr, box))) == box


@given(st.text(max_size=30) | st.text("0123456789.,-+einfa ", max_size=30))
def test_any_text_is_a_box_or_an_error_of_one_line(text):
    box = result_or_one_line(lambda: parse_box(text))
    assert box is None or box == box.clipped()


@given(boxes(-1, 2), boxes(-1, 2), boxes(-1, 2))
def test_a_box_in_a_box_in_a_box(outer, middle, inner):
    """Both orders of conversion give the same box; the full box changes nothing."""
    assert outer.to_photo(middle.to_photo(inner)) == pytest.approx(
        outer.to_photo(middle).to_photo(inner), abs=1e-9
    )
    assert outer.to_photo(FULL_PHOTO) == pytest.approx(outer, abs=1e-12)
    assert FULL_PHOTO.to_photo(outer) == outer


@given(boxes(), boxes())
def test_fractions_of_a_box_and_back(outer, box):
    width, height = outer.right - outer.left, outer.bottom - outer.top
    inner = (
        (box.left - outer.left) / width,
        (box.top - outer.top) / height,
        (box.right - outer.left) / width,
        (box.bottom - outer.top) / height,
    )
    assert outer.to_photo(inner) == pytest.approx(box, abs=1e-12)


@given(boxes(), st.floats(1, 10), st.floats(1, 10))
def test_an_expanded_box_holds_the_box_and_lies_in_the_photo(box, horizontal, vertical):
    larger = box.expanded(horizontal, vertical)
    assert larger == larger.clipped()
    rounding = 1e-12
    assert larger.left <= box.left + rounding
    assert larger.top <= box.top + rounding
    assert larger.right >= box.right - rounding
    assert larger.bottom >= box.bottom - rounding


@given(boxes(), st.integers(1, 5000), st.integers(1, 5000))
def test_the_pixels_of_a_box_cover_it_and_lie_in_the_photo(box, width, height):
    rows, columns = box.pixel_slices(width, height)
    for part, low, high, size in (
        (rows, box.top, box.bottom, height),
        (columns, box.left, box.right, width),
    ):
        assert 0 <= part.start < part.stop <= size
        assert part.start <= low * size
        assert part.stop >= high * size
