"""Defines the shapes of generated products: silhouettes as tables of signed distances."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

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
TABLE_SIZE = 256  # texels along a side of a distance table
TABLE_EXTENT = 1.5  # a table covers [-1.5, 1.5] on both axes; shapes are within about [-1, 1]
TEXELS_PER_UNIT = TABLE_SIZE / (2 * TABLE_EXTENT)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A silhouette as a table of signed distances.

    Attributes:
      distance: float32 [TABLE_SIZE * TABLE_SIZE], in shape units, negative inside.
      hull: float64 [2, P], x and y of the silhouette's convex hull.
      radius: greatest distance of the silhouette from its origin.
      mark_positions: (x, y) where a mark may be.
    """

    distance: np.ndarray
    hull: np.ndarray
    radius: float
    mark_positions: list[list[float]]


# Signed distances, evaluated once per process on the table's grid.


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
    """Returns the convex hull of points [N, 2] (Andrew's monotone chain), float64 [P, 2]."""
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
def load_shape(name: str) -> Shape:
    """Returns the shape of that name, computed once per process.

    Args:
      name: name in `BODIES` or `MARKS`.

    Returns:
      The shape.
    """
    axis = (np.arange(TABLE_SIZE) + 0.5) / TEXELS_PER_UNIT - TABLE_EXTENT
    x, y = np.meshgrid(axis, axis)
    distance = _SHAPES[name](x, y)
    inside = distance <= 0
    rows = np.flatnonzero(inside.any(1))
    # First and last texel of each row.
    ends = inside[rows].argmax(1), TABLE_SIZE - 1 - inside[rows, ::-1].argmax(1)
    outline = np.stack([axis[np.concatenate(ends)], np.tile(axis[rows], 2)], -1)
    # Half the greatest depth: a mark stays on the body, and on thin bodies (ring, cross) on their
    # middle line.
    deep = distance <= 0.5 * distance.min()
    mark_positions = np.stack([x[deep], y[deep]], -1).tolist()
    hull = _convex_hull(outline).T
    return Shape(
        distance.astype(np.float32).ravel(), hull, float(np.hypot(*hull).max()), mark_positions
    )
