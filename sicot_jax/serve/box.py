"""Bounding boxes of query photos, as fractions of the upright photo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sicot_jax.errors import InputError

MIN_SIDE = 0.02  # of a requested box, as a fraction of the photo


class Box(NamedTuple):
    """A box as fractions of a photo's width and height, after its EXIF orientation."""

    left: float
    top: float
    right: float
    bottom: float

    def expanded(self, horizontal: float, vertical: float) -> Box:
        """Returns the box scaled about its centre and clipped to the photo.

        Args:
          horizontal: factor of its width.
          vertical: factor of its height.

        Returns:
          The larger box.
        """
        x = (self.right - self.left) * (horizontal - 1) / 2
        y = (self.bottom - self.top) * (vertical - 1) / 2
        return Box(self.left - x, self.top - y, self.right + x, self.bottom + y).clipped()

    def clipped(self) -> Box:
        """Returns the part of the box inside the photo."""
        return Box(*(min(max(side, 0.0), 1.0) for side in self))

    def to_photo(self, inner: Sequence[float]) -> Box:
        """Converts a box given as fractions of this box into fractions of the photo.

        Args:
          inner: (left, top, right, bottom) as fractions of this box.

        Returns:
          The same box as fractions of the photo.
        """
        left, top, right, bottom = inner
        width, height = self.right - self.left, self.bottom - self.top
        return Box(
            self.left + width * left,
            self.top + height * top,
            self.left + width * right,
            self.top + height * bottom,
        )

    def pixel_slices(self, width: int, height: int) -> tuple[slice, slice]:
        """Returns rows and columns of the box, rounded outwards.

        Args:
          width: width of the photo, pixels.
          height: height of the photo, pixels.

        Returns:
          Slices of the rows and of the columns.
        """
        rows = slice(math.floor(self.top * height), math.ceil(self.bottom * height))
        return rows, slice(math.floor(self.left * width), math.ceil(self.right * width))


FULL_PHOTO = Box(0.0, 0.0, 1.0, 1.0)


def parse_box(text: str) -> Box:
    """Parses the box of a request.

    Args:
      text: "left,top,right,bottom".

    Returns:
      The box.

    Raises:
      InputError: other than four numbers from 0 to 1, or sides closer than MIN_SIDE.
    """
    wanted = (
        "wanted left,top,right,bottom: fractions of the photo from 0 to 1, "
        f"each pair at least {MIN_SIDE} apart"
    )
    try:
        box = Box(*map(float, text.split(",", 4)))
    except (ValueError, TypeError):
        raise InputError(f"box={text!r:.60}: {wanted}") from None
    # Comparisons with nan are false.
    ordered = box.right - box.left >= MIN_SIDE and box.bottom - box.top >= MIN_SIDE
    if not (ordered and box == box.clipped()):
        raise InputError(f"box={text!r:.60}: {wanted}")
    return box
