"""Statistics of the localization benchmarks, by hand."""

import numpy as np
import pytest

from benchmarks.iconic_photos import nearer_counts
from benchmarks.localization import (
    accuracy_cells,
    best_constant_box,
    box_area,
    iou,
    largest_region_box,
    localization_row,
)


def test_iou_by_hand():
    """The same; the right half of it; one that shares a quarter of each; one that only touches; one
    elsewhere.
    """
    box = np.array([0.0, 0.0, 0.4, 0.4])
    others = np.array(
        [box, [0.2, 0, 0.4, 0.4], [0.2, 0.2, 0.6, 0.6], [0.4, 0, 0.8, 0.4], [0.7, 0.7, 0.9, 0.9]]
    )
    assert iou(box, others) == pytest.approx([1, 0.5, 0.04 / 0.28, 0, 0])
    assert iou(others, box) == pytest.approx(iou(box, others))
    assert box_area(others) == pytest.approx([0.16, 0.08, 0.16, 0.16, 0.04])


def test_the_best_constant_box_is_right_for_most():
    """Three products lie at the left, one at the right."""
    left, right = [0.0, 0.1, 0.5, 0.9], [0.6, 0.2, 1.0, 0.8]
    box = best_constant_box(np.array([left, left, left, right]))
    assert iou(box, np.array(left)) >= 0.5 > iou(box, np.array(right))


def test_the_heaviest_region_has_the_box():
    """A rectangle of 4 x 6 of 20 x 30, and a brighter spot elsewhere, that weighs less."""
    saliency = np.zeros((20, 30))
    saliency[10:14, 3:9] = 1.0
    saliency[2, 25] = 1.5
    assert largest_region_box(saliency, 0.0, 0.5) == pytest.approx(
        [3 / 30, 10 / 20, 9 / 30, 14 / 20]
    )
    # At nine tenths of the maximum the spot alone is left.
    assert largest_region_box(saliency, 0.0, 0.9) == pytest.approx(
        [25 / 30, 2 / 20, 26 / 30, 3 / 20]
    )
    blurred = largest_region_box(saliency, 1.0, 0.2)
    assert blurred[0] < 3 / 30
    assert blurred[2] > 9 / 30
    assert iou(blurred, np.array([0.1, 0.5, 0.3, 0.7])) > 0.4


def test_a_row_counts_by_area():
    """Areas 0.04, 0.16, 0.36, 0.81: the second and the last one are right, once each of two seeds
    the first too.
    """
    known = np.array([[0, 0, side, side] for side in (0.2, 0.4, 0.6, 0.9)])
    boxes = np.stack([known, known])
    boxes[:, 2] = [0.8, 0.8, 1, 1]
    boxes[1, 0] = [0.8, 0.8, 1, 1]
    name, right, shared, *bands, accuracy = localization_row("name", boxes, known, "9.0")
    assert (name, accuracy) == ("name", "9.0")
    assert right.startswith("62.5 [")
    assert shared == "0.625"
    assert bands == ["50.0", "100.0", "0.0", "100.0"]


def test_nearer_counts_by_hand():
    """The first is nearest to the right picture, the second has three nearer ones; ties count
    for the right picture.
    """
    pictures = np.array([[1.0, 0], [0.8, 0.6], [0, 1], [0.8, 0.6]])
    queries = np.array([[1.0, 0], [1.0, 0], [0.8, 0.6]])
    assert nearer_counts(queries, pictures, np.array([0, 2, 3])).tolist() == [0, 3, 0]
    assert nearer_counts(queries, pictures, np.array([1, 1, 0])).tolist() == [1, 1, 2]


def test_recognition_by_hand():
    """Half of the photos before, three of four now, in pairs of seeds; of another number of runs
    there are no pairs.
    """
    before, now = (
        np.tile([True, False, True, False], (2, 10)),
        np.tile([True, True, True, False], (2, 10)),
    )
    share, less = accuracy_cells(now, before)
    assert share == "75.0"
    assert less.startswith("+25.00 [+")
    assert accuracy_cells(before, before) == ("50.0", "")
    assert accuracy_cells(now[:1], before) == ("75.0", "")
