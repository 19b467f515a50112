"""Renders photos of generated products: shapes stamped onto a small canvas with numpy."""

from __future__ import annotations

import colorsys
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sicot_jax.catalog.sources.shapes import (
    BODIES,
    MARKS,
    TABLE_SIZE,
    TEXELS_PER_UNIT,
    Shape,
    load_shape,
)

PATTERNS = ("plain", "striped", "dotted", "fading", "checked")


@dataclasses.dataclass(frozen=True)
class ProductAppearance:
    """What all photos of a class have in common.

    Attributes:
      body: index into `BODIES`.
      pattern: index into `PATTERNS`.
      mark: index into `MARKS`.
      colour: hue, saturation, value in [0, 1], of the body.
      second_colour: hue, saturation, value, of the pattern.
      mark_colour: hue, saturation, value, of the mark.
      aspect: width over height, times that of the shape.
      pattern_angle: radians.
      pattern_frequency: radians a shape unit.
      mark_position: number in [0, 1) that chooses one of the body's mark positions.
      mark_size: size of the mark, in shape units.
    """

    body: int
    pattern: int
    mark: int
    colour: tuple[float, float, float]
    second_colour: tuple[float, float, float]
    mark_colour: tuple[float, float, float]
    aspect: float
    pattern_angle: float
    pattern_frequency: float
    mark_position: float
    mark_size: float


@functools.cache
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixel centres, fractions [size], and a matrix [size, 6] that interpolates values."""
    centres = ((np.arange(size) + 0.5) / size).astype(np.float32)
    at = centres * 5
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(6))).astype(np.float32)
    return centres, weights


def _rgb(colour: tuple[float, float, float]) -> np.ndarray:
    h, s, v = colour
    return np.array(colorsys.hsv_to_rgb(h % 1, s, v), np.float32)[:, None, None]


class _Pose(NamedTuple):
    """A shape on the canvas; all lengths are fractions of the canvas, the angle is in radians."""

    x: float
    y: float
    sx: float  # size of one shape unit along the axes of the shape
    sy: float
    angle: float
    # (left, top, right, bottom) about (x, y), which holds the shape.
    extent: tuple[float, float, float, float]


def _silhouette_extent(
    shape: Shape, sx: float, sy: float, angle: float
) -> tuple[float, float, float, float]:
    """Returns (left, top, right, bottom) of the scaled, turned silhouette about its origin."""
    cos, sin = math.cos(angle), math.sin(angle)
    hull = np.array([[cos * sx, -sin * sy], [sin * sx, cos * sy]]) @ shape.hull
    return (*hull.min(1).tolist(), *hull.max(1).tolist())


def _stamp(
    size: int, shape: Shape, pose: _Pose
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray, np.ndarray]:
    """Returns the window that the shape touches, and on it distance, table column and row."""
    cos, sin = math.cos(pose.angle), math.sin(pose.angle)
    left, top, right, bottom = pose.extent
    x0, x1 = max(0, int((pose.x + left) * size) - 1), min(size, int((pose.x + right) * size) + 2)
    y0, y1 = max(0, int((pose.y + top) * size) - 1), min(size, int((pose.y + bottom) * size) + 2)
    window = (slice(y0, max(y0, y1)), slice(x0, max(x0, x1)))
    centres, _ = _grid(size)
    dx = (centres[window[1]] - pose.x) * TEXELS_PER_UNIT
    dy = (centres[window[0], None] - pose.y) * TEXELS_PER_UNIT
    middle = TABLE_SIZE / 2
    column = (dx * (cos / pose.sx) + middle) + dy * (sin / pose.sx)
    row = (dy * (cos / pose.sy) + middle) - dx * (sin / pose.sy)
    index = _clamp(row, 0, TABLE_SIZE - 1).astype(np.intp)
    index *= TABLE_SIZE
    index += _clamp(column, 0, TABLE_SIZE - 1).astype(np.intp)
    return window, shape.distance.take(index), column, row


def _clamp(values: np.ndarray, low: float, high: float) -> np.ndarray:
    # np.clip costs three times as much on arrays of this size.
    return np.minimum(np.maximum(values, low), high)


def _coverage(distance: np.ndarray, pixels_per_unit: float) -> np.ndarray:
    return _clamp(0.5 - distance * pixels_per_unit, 0, 1)


def _paint(
    canvas: np.ndarray, window: tuple[slice, slice], coverage: np.ndarray, colour: np.ndarray
) -> None:
    part = canvas[:, window[0], window[1]]
    part += coverage * (colour - part)


def _draw_plain(
    canvas: np.ndarray,
    name: str,
    pose: tuple[float, float, float, float, float],
    colour: tuple[float, float, float],
) -> None:
    """Draws a shape of one colour at pose (x, y, sx, sy, angle)."""
    size, shape, (x, y, sx, sy, angle) = canvas.shape[1], load_shape(name), pose
    radius = shape.radius * max(sx, sy)
    window, distance, _, _ = _stamp(
        size, shape, _Pose(x, y, sx, sy, angle, (-radius, -radius, radius, radius))
    )
    _paint(canvas, window, _coverage(distance, size * min(sx, sy)), _rgb(colour))


def _pattern(product: ProductAppearance, column: np.ndarray, row: np.ndarray) -> np.ndarray | None:
    """Returns the share of the second colour on each pixel, None where there is none."""
    kind = PATTERNS[product.pattern]
    if kind == "plain":
        return None
    cos, sin = (
        math.cos(product.pattern_angle) / TEXELS_PER_UNIT,
        math.sin(product.pattern_angle) / TEXELS_PER_UNIT,
    )
    along = cos * column + (sin * row - ((cos + sin) * TABLE_SIZE / 2))
    frequency = product.pattern_frequency
    if kind == "fading":
        return _clamp(0.5 + 0.6 * along, 0, 1)
    across = cos * row - (sin * column + ((cos - sin) * TABLE_SIZE / 2))
    if kind == "striped":
        wave = np.sin(frequency * along)
    elif kind == "dotted":
        wave = np.cos(frequency * along) * np.cos(frequency * across) - 0.35
    else:
        wave = np.sin(frequency * along) * np.sin(frequency * across)
    return _clamp(4 * wave + 0.5, 0, 1)


def _draw_product(canvas: np.ndarray, product: ProductAppearance, pose: _Pose) -> None:
    size = canvas.shape[1]
    shape = load_shape(BODIES[product.body])
    window, distance, column, row = _stamp(size, shape, pose)
    colour = _rgb(product.colour)
    share = _pattern(product, column, row)
    if share is not None:
        colour = colour + share * (_rgb(product.second_colour) - colour)
    shade = np.minimum(0.72 - distance, 1)  # darker towards the rim
    layer = canvas.copy()
    layer[:, window[0], window[1]] = colour * shade

    mark_x, mark_y = shape.mark_positions[int(product.mark_position * len(shape.mark_positions))]
    cos, sin = math.cos(pose.angle), math.sin(pose.angle)
    mx, my = mark_x * pose.sx, mark_y * pose.sy
    x, y = pose.x + cos * mx - sin * my, pose.y + sin * mx + cos * my
    side = product.mark_size * math.sqrt(pose.sx * pose.sy)
    # A ground of the other lightness parts the mark from a body of the same colour.
    _draw_plain(
        layer,
        "disc",
        (x, y, 1.45 * side, 1.45 * side, 0),
        (0, 0, 0.1 if product.mark_colour[2] > 0.7 else 0.95),
    )
    _draw_plain(layer, MARKS[product.mark], (x, y, side, side, pose.angle), product.mark_colour)
    # The silhouette cuts the mark too, or the product would leave its box.
    coverage = _coverage(distance, size * min(pose.sx, pose.sy))
    _paint(canvas, window, coverage, layer[:, window[0], window[1]])


def _pose_in_canvas(
    product: ProductAppearance, area: float, angle: float, x: float, y: float
) -> tuple[_Pose, tuple[float, ...]]:
    """Returns a pose and its tight box, which covers `area` of the canvas where it fits.

    x, y in [0, 1] choose a position among those where the box is on the canvas.
    """
    ax, ay = math.sqrt(product.aspect), 1 / math.sqrt(product.aspect)
    left, top, right, bottom = _silhouette_extent(load_shape(BODIES[product.body]), ax, ay, angle)
    width, height = right - left, bottom - top
    scale = min(math.sqrt(area / (width * height)), 0.98 / max(width, height))
    width, height = scale * width, scale * height
    x0, y0 = x * (1 - width), y * (1 - height)
    extent = (scale * left, scale * top, scale * right, scale * bottom)
    pose = _Pose(x0 - scale * left, y0 - scale * top, scale * ax, scale * ay, angle, extent)
    return pose, (x0, y0, x0 + width, y0 + height)


def _background(size: int, rng: np.random.Generator, draw: Callable[[], float]) -> np.ndarray:
    hue, kind = draw(), draw()
    first = _rgb((hue, 0.45 * draw(), 0.35 + 0.65 * draw()))
    second = _rgb((hue + 0.3 * draw(), 0.45 * draw(), 0.35 + 0.65 * draw()))
    centres, stretch = _grid(size)
    canvas = np.empty((3, size, size), np.float32)
    if kind < 0.35:
        canvas[:] = first
    elif kind < 0.65:
        slope = draw()
        canvas[:] = first + (slope * centres + (1 - slope) * centres[:, None]) * (second - first)
    else:
        coarse = rng.random((6, 6), dtype=np.float32)
        canvas[:] = first + (stretch @ coarse @ stretch.T) * (second - first)
    return canvas


def _blur(canvas: np.ndarray, k: float) -> None:
    """Blurs in place: inner pixels become k, 1 - 2k, k of their neighbours, along both axes."""
    for before, after, middle in (
        (np.s_[:, :-2], np.s_[:, 2:], np.s_[:, 1:-1]),
        (np.s_[:, :, :-2], np.s_[:, :, 2:], np.s_[:, :, 1:-1]),
    ):
        blurred = canvas[before] + canvas[after]
        blurred *= k
        blurred += (1 - 2 * k) * canvas[middle]
        canvas[middle] = blurred


def _vary_product(product: ProductAppearance, draw: Callable[[], float]) -> ProductAppearance:
    """Returns the product from a slightly other side and in another camera's colours."""
    hue, saturation, value = product.colour
    return dataclasses.replace(
        product,
        aspect=product.aspect * math.exp(0.4 * (draw() - 0.5)),
        colour=(hue + 0.05 * (draw() - 0.5), min(1.0, saturation * (0.75 + 0.5 * draw())), value),
    )


def render_photo(
    product: ProductAppearance,
    distractor: ProductAppearance,
    *,
    size: int,
    box_area: tuple[float, float],
    clutter: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Renders one photo of a product, with background, clutter, distractor, light and noise.

    Args:
      product: what is shown.
      distractor: another product, drawn smaller with a chance of `clutter`.
      size: pixels of a side.
      box_area: (low, high), share of the photo that the product's box covers.
      clutter: amount of clutter in [0, 1], also scales the number of clutter shapes (0 to 8).
      rng: random numbers of this photo.

    Returns:
      uint8 [size, size, 3], and the product's tight box, float32 [4] (x_min, y_min, x_max, y_max)
      as fractions. It bounds the entire silhouette, hidden parts included.
    """
    draw = iter(rng.random(128).tolist()).__next__
    canvas = _background(size, rng, draw)
    product = _vary_product(product, draw)
    low, high = box_area
    angle = 0.7 * (draw() - 0.5)
    # In proportion, not by difference: else most boxes are large and central, and one guess
    # finds them.
    pose, box = _pose_in_canvas(product, low * (high / low) ** draw(), angle, draw(), draw())

    _draw_clutter(canvas, clutter, draw)
    if draw() < clutter:
        _draw_distractor(canvas, distractor, box, draw)
    _draw_product(canvas, product, pose)
    if draw() < 0.4:
        _draw_occluder(canvas, box, draw)
    _apply_light(canvas, draw)
    if draw() < 0.5:
        _blur(canvas, 0.3 * draw())
    noise = rng.integers(0, 256, canvas.shape, dtype=np.uint8)
    canvas *= 255
    canvas += (noise.astype(np.float32) - 127.5) * (0.02 + 0.08 * draw())
    image = np.ascontiguousarray(_clamp(canvas, 0, 255).astype(np.uint8).transpose(1, 2, 0))
    return image, np.array(box, np.float32)


def _draw_clutter(canvas: np.ndarray, clutter: float, draw: Callable[[], float]) -> None:
    """Draws up to 8 * clutter small shapes of one colour."""
    for _ in range(round(8 * clutter * draw())):
        name = MARKS[int(draw() * len(MARKS))]
        side = 0.03 + 0.09 * draw()
        pose = (draw(), draw(), side, side * (0.5 + draw()), 6.3 * draw())
        _draw_plain(canvas, name, pose, (draw(), 0.9 * draw(), 0.25 + 0.75 * draw()))


def _draw_distractor(
    canvas: np.ndarray,
    distractor: ProductAppearance,
    box: tuple[float, ...],
    draw: Callable[[], float],
) -> None:
    """Draws another product of at most a quarter of the product's area.

    Its middle is outside the product's box where there is room.
    """
    area = (0.1 + 0.15 * draw()) * (box[2] - box[0]) * (box[3] - box[1])
    x, y = draw(), draw()
    if box[0] < x < box[2] and box[1] < y < box[3]:
        sides = [(box[0], 0.5 * box[0], y), (1 - box[2], 0.5 + 0.5 * box[2], y)]
        sides += [(box[1], x, 0.5 * box[1]), (1 - box[3], x, 0.5 + 0.5 * box[3])]
        _, x, y = max(sides)
    pose, _ = _pose_in_canvas(distractor, area, 0.7 * (draw() - 0.5), 0.5, 0.5)
    _draw_product(canvas, distractor, pose._replace(x=x, y=y))


def _draw_occluder(canvas: np.ndarray, box: tuple[float, ...], draw: Callable[[], float]) -> None:
    """Draws a shape in front of the product, over an edge of it."""
    side = (0.1 + 0.15 * draw()) * math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    edge_x = box[0] if draw() < 0.5 else box[2]
    pose = (
        edge_x,
        box[1] + draw() * (box[3] - box[1]),
        side,
        side * (0.7 + draw()),
        6.3 * draw(),
    )
    name = "box" if draw() < 0.5 else "disc"
    _draw_plain(canvas, name, pose, (draw(), 0.6 * draw(), 0.2 + 0.7 * draw()))


def _apply_light(canvas: np.ndarray, draw: Callable[[], float]) -> None:
    """Multiplies by a brightness that varies over the photo and by a colour cast."""
    centres, _ = _grid(canvas.shape[1])
    gain, slope_x, slope_y = 0.65 + 0.5 * draw(), 0.4 * (draw() - 0.5), 0.4 * (draw() - 0.5)
    light = gain + slope_x * (centres - 0.5) + slope_y * (centres[:, None] - 0.5)
    cast = np.array([0.85 + 0.3 * draw(), 0.85 + 0.3 * draw(), 0.85 + 0.3 * draw()], np.float32)
    canvas *= light * cast[:, None, None]
