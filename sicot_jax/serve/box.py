"""Boxes in a photo: given with a request, and a model's, told of the photo as a person sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sicot_jax.errors import InputError

SMALLEST = 0.02  # of the photo, a side


class Box(NamedTuple):
    """Fractions of a photo's width and height, after its EXIF orientation."""

    left: float
    top: float
    right: float
    bottom: float

    def grown(self, across: float, down: float) -> Box:
        """About its centre, by factors of its width and height, as far as the photo goes."""
        x, y = (
            (self.right - self.left) * (across - 1) / 2,
            (self.bottom - self.top) * (down - 1) / 2,
        )
        return Box(self.left - x, self.top - y, self.right + x, self.bottom + y).inside()

    def inside(self) -> Box:
        """What of it lies in the photo."""
        return Box(*(min(max(side, 0.0), 1.0) for side in self))

    def within(self, inner: Sequence[float]) -> Box:
        """Of the photo: a box (left, top, right, bottom) that is given as fractions of this one."""
        left, top, right, bottom = inner
        width, height = self.right - self.left, self.bottom - self.top
        return Box(
            self.left + width * left,
            self.top + height * top,
            self.left + width * right,
            self.top + height * bottom,
        )

    def pixels(self, width: int, height: int) -> tuple[slice, slice]:
        """Rows and columns of a photo of that size, rounded outwards."""
        rows = slice(math.floor(self.top * height), math.ceil(self.bottom * height))
        return rows, slice(math.floor(self.left * width), math.ceil(self.right * width))


WHOLE = Box(0.0, 0.0, 1.0, 1.0)


def parse(text: str) -> Box:
    """Of "left,top,right,bottom". InputError: other than four numbers from 0 to 1, or sides closer
    than `SMALLEST`.
    """
    wanted = f"wanted left,top,right,bottom: fractions of the photo from 0 to 1, each pair at least {SMALLEST} apart"
    try:
        box = Box(*map(float, text.split(",", 4)))
    except (ValueError, TypeError):
        raise InputError(f"box={text!r:.60}: {wanted}") from None
    ordered = (
        box.right - box.left >= SMALLEST and box.bottom - box.top >= SMALLEST
    )  # of nan neither
    if not (ordered and box == box.inside()):
        raise InputError(f"box={text!r:.60}: {wanted}")
    return box
