"""Random resized crop, flip and random erasing: resampling against Pillow, windows inside the
photo, the same numbers on every mesh.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sicot_jax.parallel import mesh
from sicot_jax.parallel.mesh import make_mesh
from sicot_jax.training import augment as augment_lib
from sicot_jax.training.augment import (
    CropWindows,
    ErasingBoxes,
    crop,
    crop_boxes,
    erase,
    random_crops,
    random_erasing_boxes,
    random_windows,
)

resize_matrix = jax.jit(augment_lib.resize_matrix, static_argnames=("inputs", "outputs"))
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (23, 17, 3), dtype=np.uint8)
BATCH = RNG.integers(0, 256, (8, 13, 11, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("start", "length", "inputs", "outputs"),
    [
        (0.0, 8.0, 8, 8),
        (1.3, 5.2, 8, 4),
        (0.0, 8.0, 8, 3),
        (7.5, 0.5, 8, 4),
        (2.0, 1.0, 8, 16),
        (0.0, 1.0, 1, 5),
    ],
)
def test_rows_sum_to_one(start, length, inputs, outputs):
    matrix = np.asarray(resize_matrix(start, length, inputs=inputs, outputs=outputs))
    assert matrix.shape == (outputs, inputs)
    assert (matrix >= 0).all()
    np.testing.assert_allclose(matrix.sum(-1), 1, rtol=1e-6)


def test_a_full_window_of_the_same_size_changes_nothing():
    np.testing.assert_array_equal(resize_matrix(0.0, 9.0, inputs=9, outputs=9), np.eye(9))


def test_resize_matrix_by_hand():
    """4 pixels to 2: triangles of width 4 about 1 and 3; pixels 0.5, 1.5, 2.5 lie 1/4, 1/4, 3/4
    from the first.
    """
    weights = np.array([3, 3, 1, 0]) / 7
    np.testing.assert_allclose(
        resize_matrix(0.0, 4.0, inputs=4, outputs=2), [weights, weights[::-1]], rtol=1e-6
    )
    shifted = resize_matrix(jnp.array([0.0, 1.0]), jnp.array([2.0, 2.0]), inputs=4, outputs=2)
    np.testing.assert_allclose(shifted, [np.eye(4)[:2], np.eye(4)[1:3]], rtol=1e-6)


@pytest.mark.parametrize(
    ("top", "left", "rows", "columns", "height", "width"),
    [
        (0.0, 0.0, 23.0, 17.0, 9, 7),  # smaller
        (2.4, 1.7, 18.3, 12.9, 8, 8),  # smaller, window between pixels
        (0.0, 0.0, 23.0, 17.0, 30, 40),  # larger
        (5.5, 3.25, 6.0, 12.0, 12, 6),  # larger one way, smaller the other
    ],
)
def test_resampling_equals_pillow(top, left, rows, columns, height, width):
    vertical = np.asarray(resize_matrix(top, rows, inputs=23, outputs=height))
    horizontal = np.asarray(resize_matrix(left, columns, inputs=17, outputs=width))
    actual = np.einsum("hH,wW,HWc->hwc", vertical, horizontal, PHOTO)
    box = (left, top, left + columns, top + rows)
    wanted = np.asarray(
        Image.fromarray(PHOTO).resize((width, height), Image.Resampling.BILINEAR, box=box),
        np.float32,
    )
    # Pillow rounds to integer grey levels twice, after each direction: half a level each.
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1.0)
    assert np.abs(actual - wanted).mean() < 0.35


@pytest.mark.parametrize(
    ("min_area", "max_ratio"), [(0.35, 4 / 3), (0.08, 2.0), (0.9, 4 / 3), (1.0, 1.0)]
)
def test_windows_lie_in_the_photo(min_area, max_ratio):
    top, left, rows, columns = map(
        np.asarray,
        random_windows(
            jax.random.key(1), 4000, height=30, width=50, min_area=min_area, max_ratio=max_ratio
        ),
    )
    slack = 1e-4  # float32 pixels
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + rows <= 30 + slack).all()
    assert (left + columns <= 50 + slack).all()
    area, ratio = rows * columns / 1500, (rows / 30) / (columns / 50)
    # A window cut at the photo's edge may be smaller than min_area, by the ratio at most.
    assert area.min() >= min(min_area, 1 / max_ratio) - slack
    assert area.max() <= 1 + slack
    assert ratio.min() >= 1 / max_ratio - slack
    assert ratio.max() <= max_ratio + slack
    if min_area == 1.0:
        np.testing.assert_allclose(area, 1, rtol=1e-6)
        return
    # Spread over the full range, both ends included, and so are the offsets.
    assert area.min() < min_area + 0.05
    assert area.max() > 0.95
    free = rows < 29
    position = top[free] / (30 - rows[free])
    assert abs(position.mean() - 0.5) < 0.03  # deviation of the mean: 0.29 / sqrt(some thousand)
    if min_area < 0.4:
        assert ratio.min() < 1.05 / max_ratio
        assert ratio.max() > max_ratio / 1.05
        uncut = (rows < 30 - slack) & (columns < 50 - slack)
        assert abs(np.log(ratio)[uncut].mean()) < 0.02


@functools.cache
def compiled(flip, min_area, height, width):
    return jax.jit(
        lambda key, image: crop(
            image,
            random_crops(
                key, image, min_area=min_area, max_ratio=4 / 3 if min_area < 1 else 1.0, flip=flip
            ),
            height=height,
            width=width,
        )
    )


def run(key, devices=1, *, image=BATCH, flip=True, min_area=0.35, height=9, width=10):
    with jax.set_mesh(
        device_mesh := make_mesh(data=devices, model=1, devices=jax.devices()[:devices])
    ):
        placed = mesh.to_global({"image": image}, device_mesh)["image"]
        return np.asarray(compiled(flip, min_area, height, width)(jax.random.key(key), placed))


def test_same_key_same_photos_on_any_mesh():
    one = run(0)
    assert one.shape == (8, 9, 10, 3)
    assert one.dtype == np.float32
    assert one.min() >= 0
    assert one.max() <= 255
    np.testing.assert_array_equal(run(0), one)
    # rtol: a device multiplies one photo instead of eight, in another order of summation.
    np.testing.assert_allclose(run(0, devices=8), one, rtol=1e-5, atol=1e-3)
    assert np.abs(run(1) - one).max() > 10


def test_each_photo_of_a_batch_has_a_separate_window():
    batch = run(0, image=np.stack([BATCH[0]] * 8))
    for row in range(1, 8):
        assert np.abs(batch[row] - batch[0]).max() > 10


def test_about_half_of_the_photos_are_mirrored():
    """Window = full photo at its size: the result is the photo or its mirror image, nothing
    else.
    """
    image = RNG.integers(0, 256, (400, 4, 5, 3), dtype=np.uint8)
    actual = run(0, image=image, min_area=1.0, height=4, width=5)
    same = (np.abs(actual - image) < 1e-2).all((1, 2, 3))
    mirrored = (np.abs(actual - image[:, :, ::-1]) < 1e-2).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.sum() - 200) < 40  # four deviations
    unflipped = run(0, image=image, min_area=1.0, height=4, width=5, flip=False)
    np.testing.assert_allclose(unflipped, image, rtol=0, atol=1e-2)


def crops_of(*windows, flipped):
    """Windows (top, left, rows, columns) in pixels."""
    return CropWindows(*np.float32(windows).T, np.array(flipped))


def test_boxes_follow_their_crops():
    """Of photos of 20 x 40: the right half; the same, mirrored; the lower half; the full photo,
    mirrored.
    """
    box = np.tile(np.float32([0.625, 0.25, 0.75, 1.0]), (4, 1))
    half, full = (0, 20, 20, 20), (0, 0, 20, 40)
    crops = crops_of(half, half, (10, 0, 10, 40), full, flipped=[False, True, False, True])
    wanted = [
        [0.25, 0.25, 0.5, 1],
        [0.5, 0.25, 0.75, 1],
        [0.625, 0, 0.75, 1],
        [0.25, 0.25, 0.375, 1],
    ]
    np.testing.assert_allclose(
        crop_boxes(jnp.asarray(box), crops, height=20, width=40), wanted, atol=1e-6
    )


def test_boxes_are_cut_at_the_crop_and_zero_outside_it():
    """A crop of columns 20 to 39 of 40: over its edge, left of it, at its very edge, and a box that
    is not known.
    """
    box = np.float32(
        [[0.25, 0.2, 0.75, 0.6], [0.1, 0.2, 0.4, 0.6], [0.1, 0.2, 0.5, 0.6], [0, 0, 0, 0]]
    )
    for flipped, seen in ((False, [0, 0.2, 0.5, 0.6]), (True, [0.5, 0.2, 1, 0.6])):
        crops = crops_of(*[(0, 20, 20, 20)] * 4, flipped=[flipped] * 4)
        cropped = crop_boxes(jnp.asarray(box), crops, height=20, width=40)
        np.testing.assert_allclose(cropped, [seen, *[[0] * 4] * 3], atol=1e-6)
    unknown = crop_boxes(
        jnp.asarray(box[3:]), crops_of((0, 0, 20, 40), flipped=[True]), height=20, width=40
    )
    np.testing.assert_array_equal(unknown, np.zeros((1, 4)))


def test_a_box_and_its_pixels_stay_together():
    """A white rectangle in a black photo, cropped at random: its box in the crop is where the white
    pixels are.
    """
    image = np.zeros((16, 48, 48, 3), np.uint8)
    image[:, 16:32, 12:40] = 255
    box = np.tile(np.float32([12, 16, 40, 32]) / 48, (16, 1))
    with jax.set_mesh(mesh_of_one := make_mesh(devices=jax.devices()[:1])):
        placed = mesh.to_global({"image": image}, mesh_of_one)["image"]
        crops = random_crops(jax.random.key(3), placed, min_area=0.5, max_ratio=4 / 3, flip=True)
        pixels = np.asarray(crop(placed, crops, height=48, width=48))[..., 0] > 127
        boxes = np.asarray(crop_boxes(jnp.asarray(box), crops, height=48, width=48))
    assert np.ptp(boxes, 0).max() > 0.1
    assert {True, False} == set(np.asarray(crops.flipped).tolist())
    for white, (left, top, right, bottom) in zip(pixels, boxes, strict=True):
        rows, columns = np.where(white)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(seen, 48 * np.array([left, top, right, bottom]), atol=1.01)


def erasing_of(share, count=8000, devices=1, key=0):
    with jax.set_mesh(
        device_mesh := make_mesh(data=devices, model=1, devices=jax.devices()[:devices])
    ):
        placed = mesh.to_global({"image": np.zeros((count, 1, 1, 3), np.uint8)}, device_mesh)[
            "image"
        ]
        return jax.device_get(random_erasing_boxes(jax.random.key(key), placed, share=share))


def test_erasing_modes_have_their_shares():
    """Of 8000 photos 40 % have an erased part: a quarter of these keep the box alone, the others
    lose it.
    """
    box, mode = erasing_of(0.4)
    counts = np.bincount(mode, minlength=3) / 8000
    np.testing.assert_allclose(
        counts, [0.6, 0.1, 0.3], atol=0.022
    )  # four deviations of the greatest
    side = box[:, 2:] - box[:, :2]
    assert side.min() >= 0.2 - 1e-6
    assert side.max() <= 1 + 1e-6
    np.testing.assert_allclose(np.log(side).mean(0), np.log(0.2) / 2, atol=0.03)  # log-uniform
    position = box[:, :2] / np.maximum(1 - side, 1e-6)
    assert -0.151 <= position.min() < -0.1
    assert 1.1 < position.max() <= 1.151
    assert not erasing_of(0.0, 64).mode.any()
    assert erasing_of(1.0, 64).mode.all()


def test_erasing_boxes_are_the_same_on_any_mesh():
    for one, eight in zip(erasing_of(0.5, 16), erasing_of(0.5, 16, devices=8), strict=True):
        np.testing.assert_array_equal(one, eight)
    assert (erasing_of(0.5, 16).mode != erasing_of(0.5, 16, key=1).mode).any()


def test_erased_pixels_have_the_mean_colour():
    """Photos of ones, box in the upper left quarter: nothing, all but the box, and the box
    erased; edges are soft.
    """
    box = np.tile(np.float32([-1, -1, 0.5, 0.5]), (3, 1))
    photos = erase(jnp.ones((3, 40, 40, 3)), ErasingBoxes(box, np.array([0, 1, 2])))
    everything, inside, outside = np.asarray(photos)
    np.testing.assert_array_equal(everything, np.ones((40, 40, 3)))
    assert inside[:17, :17].min() > 0.95
    assert inside[23:].max() < 0.05
    assert inside[:, 23:].max() < 0.05
    np.testing.assert_allclose(outside, 1 - inside, atol=1e-6)
    middle = 1 / (1 + np.exp(-60 * 0.0125))  # half a pixel of 40 within the edge
    np.testing.assert_allclose(inside[0, 19], middle, atol=1e-5)
