"""Product-like pictures: shapes as signed distance tables, stamped onto a small canvas with numpy."""

from __future__ import annotations

import colorsys
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BODIES = (
    "plate",
    "box",
    "cone",
    "tile",
    "star",
    "bottle",
    "cup",
    "shirt",
    "ring",
    "cross",
    "bag",
    "vase",
)
MARKS = ("disc", "square", "triangle", "star", "ring", "cross", "heart", "moon", "bolt", "diamond")
PATTERNS = ("plain", "striped", "dotted", "fading", "checked")

_TABLE = 256  # texels a side of a distance table
_REACH = 1.5  # a table covers [-_REACH, _REACH] on both axes; shapes lie within about [-1, 1]
_PER_UNIT = _TABLE / (2 * _REACH)


@dataclasses.dataclass(frozen=True)
class Product:
    """What is the same in every photo of a class. Colours are hue, saturation, value in [0, 1]."""

    body: int  # of BODIES
    pattern: int  # of PATTERNS
    mark: int  # of MARKS
    colour: tuple[float, float, float]
    second_colour: tuple[float, float, float]
    mark_colour: tuple[float, float, float]
    aspect: float  # width over height, times the shape's own
    pattern_angle: float
    pattern_frequency: float
    mark_place: float  # in [0, 1), which of the places inside the body
    mark_size: float


@dataclasses.dataclass(frozen=True)
class _Shape:
    distance: np.ndarray  # float32 [_TABLE * _TABLE], negative inside
    hull: np.ndarray  # float64 [2, P], convex hull of the silhouette
    reach: float  # greatest distance of the silhouette from its origin
    places: list[list[float]]  # where a mark may sit


# --- signed distances, evaluated once per process on the table's grid


def _disc(x: np.ndarray, y: np.ndarray, cx: float, cy: float, r: float) -> np.ndarray:
    return np.hypot(x - cx, y - cy) - r


def _box(
    x: np.ndarray, y: np.ndarray, cx: float, cy: float, w: float, h: float, r: float = 0.08
) -> np.ndarray:
    dx, dy = np.abs(x - cx) - w + r, np.abs(y - cy) - h + r
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - r


def _polygon(x: np.ndarray, y: np.ndarray, points: list[tuple[float, float]]) -> np.ndarray:
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        ex, ey = bx - ax, by - ay
        t = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - t * ex, y - ay - t * ey))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
    return np.where(inside, -nearest, nearest)


def _regular(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    count = corners if inner == 1 else 2 * corners
    angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    radii = [1.0 if i % 2 == 0 else inner for i in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for a, r in zip(angles, radii, strict=True)]


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, 0, 0, 1, 0.36), _box(x, y, 0, 0, 0.36, 1))


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(_disc(x, y, 0, 0, 0.72)) - 0.28


def _bottle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    shoulders = _polygon(x, y, [(-0.52, -0.1), (-0.2, -0.5), (0.2, -0.5), (0.52, -0.1)])
    return np.minimum(
        np.minimum(_box(x, y, 0, 0.42, 0.52, 0.58), _box(x, y, 0, -0.6, 0.2, 0.4)), shoulders
    )


def _cup(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    body = _polygon(x, y, [(-0.9, -0.8), (0.5, -0.8), (0.36, 0.8), (-0.76, 0.8)])
    return np.minimum(body, np.abs(_disc(x, y, 0.52, -0.1, 0.38)) - 0.11)


def _shirt(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    right = [(0.25, -0.85), (0.55, -0.8), (1.0, -0.25), (0.74, 0.02), (0.52, -0.22), (0.52, 0.9)]
    return _polygon(x, y, [(0.0, -0.65), *right, *[(-a, b) for a, b in reversed(right)]])


def _bag(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    body = _polygon(x, y, [(-0.75, -0.3), (0.75, -0.3), (0.9, 0.85), (-0.9, 0.85)])
    return np.minimum(body, np.maximum(np.abs(_disc(x, y, 0, -0.35, 0.5)) - 0.1, y + 0.25))


def _vase(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    half = [(0.5, -0.95), (0.26, -0.5), (0.68, 0.15), (0.62, 0.55), (0.36, 0.95)]
    return _polygon(x, y, [*half, *[(-a, b) for a, b in reversed(half)]])


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    lobes = np.minimum(_disc(x, y, -0.46, -0.3, 0.54), _disc(x, y, 0.46, -0.3, 0.54))
    return np.minimum(lobes, _polygon(x, y, [(-0.9, 0.0), (0, -0.4), (0.9, 0.0), (0, 1.0)]))


def _moon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(_disc(x, y, 0, 0, 1), -_disc(x, y, 0.55, -0.2, 0.8))


_BOLT = [(0.25, -1.0), (-0.7, 0.2), (-0.05, 0.2), (-0.25, 1.0), (0.7, -0.25), (0.05, -0.25)]
_DIAMOND = [(0.0, -1.0), (0.7, 0.0), (0.0, 1.0), (-0.7, 0.0)]
_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plate": lambda x, y: _disc(x, y, 0, 0, 0.95),
    "box": lambda x, y: _box(x, y, 0, 0, 0.85, 0.85, 0.25),
    "cone": lambda x, y: _polygon(x, y, [(0, -0.95), (0.95, 0.8), (-0.95, 0.8)]),
    "tile": lambda x, y: _polygon(x, y, _regular(6)),
    "star": lambda x, y: _polygon(x, y, _regular(5, 0.5)),
    "bottle": _bottle,
    "cup": _cup,
    "shirt": _shirt,
    "ring": _ring,
    "cross": _cross,
    "bag": _bag,
    "vase": _vase,
    "disc": lambda x, y: _disc(x, y, 0, 0, 0.9),
    "square": lambda x, y: _box(x, y, 0, 0, 0.8, 0.8),
    "triangle": lambda x, y: _polygon(x, y, _regular(3)),
    "heart": _heart,
    "moon": _moon,
    "bolt": lambda x, y: _polygon(x, y, _BOLT),
    "diamond": lambda x, y: _polygon(x, y, _DIAMOND),
}


def _convex_hull(points: np.ndarray) -> np.ndarray:
    ordered = sorted(map(tuple, points.tolist()))
    hull: list[tuple[float, float]] = []
    for side in (ordered, ordered[::-1]):
        start = len(hull)
        for x, y in side:
            while len(hull) >= start + 2:
                (ax, ay), (bx, by) = hull[-2:]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                    break
                hull.pop()
            hull.append((x, y))
        hull.pop()
    return np.array(hull)


@functools.cache
def _shape(name: str) -> _Shape:
    axis = (np.arange(_TABLE) + 0.5) / _PER_UNIT - _REACH
    x, y = np.meshgrid(axis, axis)
    distance = _SHAPES[name](x, y)
    inside = distance <= 0
    rows = np.flatnonzero(inside.any(1))
    ends = (
        inside[rows].argmax(1),
        _TABLE - 1 - inside[rows, ::-1].argmax(1),
    )  # first and last texel of each row
    outline = np.stack([axis[np.concatenate(ends)], np.tile(axis[rows], 2)], -1)
    # Half the greatest depth: a mark stays on the body, and on thin bodies (ring, cross) on their
    # middle line.
    deep = distance <= 0.5 * distance.min()
    places = np.stack([x[deep], y[deep]], -1).tolist()
    hull = _convex_hull(outline).T
    return _Shape(distance.astype(np.float32).ravel(), hull, float(np.hypot(*hull).max()), places)


# --- the canvas


@functools.cache
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres as fractions [size], and the [size, 6] matrix that stretches six values
    smoothly over them.
    """
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
    sx: float  # size of one shape unit along the shape's own axes
    sy: float
    angle: float
    extent: tuple[
        float, float, float, float
    ]  # (left, top, right, bottom) about (x, y) that holds the shape


def _extent(shape: _Shape, sx: float, sy: float, angle: float) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the scaled and turned silhouette about its origin."""
    cos, sin = math.cos(angle), math.sin(angle)
    hull = np.array([[cos * sx, -sin * sy], [sin * sx, cos * sy]]) @ shape.hull
    return (*hull.min(1).tolist(), *hull.max(1).tolist())


def _stamp(
    size: int, shape: _Shape, pose: _Pose
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray, np.ndarray]:
    """Window of the canvas that the shape touches and, on it, the signed distance and the table
    coordinates.
    """
    cos, sin = math.cos(pose.angle), math.sin(pose.angle)
    left, top, right, bottom = pose.extent
    x0, x1 = max(0, int((pose.x + left) * size) - 1), min(size, int((pose.x + right) * size) + 2)
    y0, y1 = max(0, int((pose.y + top) * size) - 1), min(size, int((pose.y + bottom) * size) + 2)
    window = (slice(y0, max(y0, y1)), slice(x0, max(x0, x1)))
    centres, _ = _grid(size)
    dx = (centres[window[1]] - pose.x) * _PER_UNIT
    dy = (centres[window[0], None] - pose.y) * _PER_UNIT
    middle = _TABLE / 2
    column = (dx * (cos / pose.sx) + middle) + dy * (sin / pose.sx)
    row = (dy * (cos / pose.sy) + middle) - dx * (sin / pose.sy)
    index = _limit(row, 0, _TABLE - 1).astype(np.intp)
    index *= _TABLE
    index += _limit(column, 0, _TABLE - 1).astype(np.intp)
    return window, shape.distance.take(index), column, row


def _limit(values: np.ndarray, low: float, high: float) -> np.ndarray:
    # np.clip costs three times as much on arrays of this size.
    return np.minimum(np.maximum(values, low), high)


def _coverage(distance: np.ndarray, pixels_per_unit: float) -> np.ndarray:
    return _limit(0.5 - distance * pixels_per_unit, 0, 1)


def _paint(
    canvas: np.ndarray, window: tuple[slice, slice], coverage: np.ndarray, colour: np.ndarray
) -> None:
    part = canvas[:, window[0], window[1]]
    part += coverage * (colour - part)


def _draw_plain(
    canvas: np.ndarray,
    name: str,
    at: tuple[float, float, float, float, float],
    colour: tuple[float, float, float],
) -> None:
    """A shape of one colour at (x, y, sx, sy, angle)."""
    size, shape, (x, y, sx, sy, angle) = canvas.shape[1], _shape(name), at
    reach = shape.reach * max(sx, sy)
    window, distance, _, _ = _stamp(
        size, shape, _Pose(x, y, sx, sy, angle, (-reach, -reach, reach, reach))
    )
    _paint(canvas, window, _coverage(distance, size * min(sx, sy)), _rgb(colour))


def _pattern(product: Product, column: np.ndarray, row: np.ndarray) -> np.ndarray | None:
    """Share of the second colour on each pixel, None where there is none."""
    kind = PATTERNS[product.pattern]
    if kind == "plain":
        return None
    cos, sin = (
        math.cos(product.pattern_angle) / _PER_UNIT,
        math.sin(product.pattern_angle) / _PER_UNIT,
    )
    along = cos * column + (sin * row - ((cos + sin) * _TABLE / 2))
    frequency = product.pattern_frequency
    if kind == "fading":
        return _limit(0.5 + 0.6 * along, 0, 1)
    across = cos * row - (sin * column + ((cos - sin) * _TABLE / 2))
    if kind == "striped":
        wave = np.sin(frequency * along)
    elif kind == "dotted":
        wave = np.cos(frequency * along) * np.cos(frequency * across) - 0.35
    else:
        wave = np.sin(frequency * along) * np.sin(frequency * across)
    return _limit(4 * wave + 0.5, 0, 1)


def _draw_product(canvas: np.ndarray, product: Product, pose: _Pose) -> None:
    size = canvas.shape[1]
    shape = _shape(BODIES[product.body])
    window, distance, column, row = _stamp(size, shape, pose)
    colour = _rgb(product.colour)
    share = _pattern(product, column, row)
    if share is not None:
        colour = colour + share * (_rgb(product.second_colour) - colour)
    shade = np.minimum(0.72 - distance, 1)  # darker towards the rim
    layer = canvas.copy()
    layer[:, window[0], window[1]] = colour * shade

    place_x, place_y = shape.places[int(product.mark_place * len(shape.places))]
    cos, sin = math.cos(pose.angle), math.sin(pose.angle)
    mx, my = place_x * pose.sx, place_y * pose.sy
    x, y = pose.x + cos * mx - sin * my, pose.y + sin * mx + cos * my
    side = product.mark_size * math.sqrt(pose.sx * pose.sy)
    # A ground of the other lightness parts the mark from a body of its own colour.
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


def _place(
    product: Product, area: float, angle: float, x: float, y: float
) -> tuple[_Pose, tuple[float, ...]]:
    """Pose whose tight box has `area` of the canvas where the canvas allows it; x, y in [0, 1] over
    where it fits.
    """
    ax, ay = math.sqrt(product.aspect), 1 / math.sqrt(product.aspect)
    left, top, right, bottom = _extent(_shape(BODIES[product.body]), ax, ay, angle)
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
    """In place: every inner pixel becomes k, 1 - 2k, k of its neighbours, along both axes."""
    for before, after, middle in (
        (np.s_[:, :-2], np.s_[:, 2:], np.s_[:, 1:-1]),
        (np.s_[:, :, :-2], np.s_[:, :, 2:], np.s_[:, :, 1:-1]),
    ):
        blurred = canvas[before] + canvas[after]
        blurred *= k
        blurred += (1 - 2 * k) * canvas[middle]
        canvas[middle] = blurred


def _as_seen(product: Product, draw: Callable[[], float]) -> Product:
    """The product from a slightly other side and in another camera's colours."""
    hue, saturation, value = product.colour
    return dataclasses.replace(
        product,
        aspect=product.aspect * math.exp(0.4 * (draw() - 0.5)),
        colour=(hue + 0.05 * (draw() - 0.5), min(1.0, saturation * (0.75 + 0.5 * draw())), value),
    )


def render(
    product: Product,
    distractor: Product,
    *,
    size: int,
    box_area: tuple[float, float],
    clutter: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """One photo: uint8 [size, size, 3] and the product's tight box, float32 [4] as fractions.

    The box bounds the whole silhouette, hidden parts included. `clutter` in [0, 1] is the chance of
    the distractor and scales the number of clutter shapes (0 to 8).
    """
    draw = iter(rng.random(128).tolist()).__next__
    canvas = _background(size, rng, draw)
    product = _as_seen(product, draw)
    low, high = box_area
    angle = 0.7 * (draw() - 0.5)
    # In proportion, not by difference: else most boxes are large, lie in the middle, and one guess
    # finds them.
    pose, box = _place(product, low * (high / low) ** draw(), angle, draw(), draw())

    for _ in range(round(8 * clutter * draw())):
        name = MARKS[int(draw() * len(MARKS))]
        side = 0.03 + 0.09 * draw()
        where = (draw(), draw(), side, side * (0.5 + draw()), 6.3 * draw())
        _draw_plain(canvas, name, where, (draw(), 0.9 * draw(), 0.25 + 0.75 * draw()))
    if draw() < clutter:
        # At most a quarter of the product's area, its middle outside the product's box where there
        # is room.
        area = (0.1 + 0.15 * draw()) * (box[2] - box[0]) * (box[3] - box[1])
        x, y = draw(), draw()
        if box[0] < x < box[2] and box[1] < y < box[3]:
            sides = [(box[0], 0.5 * box[0], y), (1 - box[2], 0.5 + 0.5 * box[2], y)]
            sides += [(box[1], x, 0.5 * box[1]), (1 - box[3], x, 0.5 + 0.5 * box[3])]
            _, x, y = max(sides)
        other, _ = _place(distractor, area, 0.7 * (draw() - 0.5), 0.5, 0.5)
        _draw_product(canvas, distractor, other._replace(x=x, y=y))

    _draw_product(canvas, product, pose)

    if draw() < 0.4:  # something in front, over an edge of the product
        side = (0.1 + 0.15 * draw()) * math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        edge_x = box[0] if draw() < 0.5 else box[2]
        where = (
            edge_x,
            box[1] + draw() * (box[3] - box[1]),
            side,
            side * (0.7 + draw()),
            6.3 * draw(),
        )
        _draw_plain(
            canvas,
            "box" if draw() < 0.5 else "disc",
            where,
            (draw(), 0.6 * draw(), 0.2 + 0.7 * draw()),
        )

    centres, _ = _grid(size)
    gain, slope_x, slope_y = 0.65 + 0.5 * draw(), 0.4 * (draw() - 0.5), 0.4 * (draw() - 0.5)
    light = gain + slope_x * (centres - 0.5) + slope_y * (centres[:, None] - 0.5)
    cast = np.array([0.85 + 0.3 * draw(), 0.85 + 0.3 * draw(), 0.85 + 0.3 * draw()], np.float32)
    canvas *= light * cast[:, None, None]
    if draw() < 0.5:
        _blur(canvas, 0.3 * draw())
    noise = rng.integers(0, 256, canvas.shape, dtype=np.uint8)
    canvas *= 255
    canvas += (noise.astype(np.float32) - 127.5) * (0.02 + 0.08 * draw())
    image = np.ascontiguousarray(_limit(canvas, 0, 255).astype(np.uint8).transpose(1, 2, 0))
    return image, np.array(box, np.float32)
