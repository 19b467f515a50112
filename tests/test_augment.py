"""Random resized crop and flip: resampling against Pillow, windows inside the photo, keys and meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sicot_jax import augment, mesh
from sicot_jax import augment as augment_lib
from sicot_jax.augment import crop, random_crops, random_windows
from sicot_jax.mesh import make_mesh

resize_matrix = jax.jit(augment_lib.resize_matrix, static_argnames=("inputs", "outputs"))
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (23, 17, 3), dtype=np.uint8)
BATCH = RNG.integers(0, 256, (8, 13, 11, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "start, length, inputs, outputs",
    [(0.0, 8.0, 8, 8), (1.3, 5.2, 8, 4), (0.0, 8.0, 8, 3), (7.5, 0.5, 8, 4), (2.0, 1.0, 8, 16), (0.0, 1.0, 1, 5)],
)
def test_rows_sum_to_one(start, length, inputs, outputs):
    matrix = np.asarray(resize_matrix(start, length, inputs=inputs, outputs=outputs))
    assert matrix.shape == (outputs, inputs) and (matrix >= 0).all()
    np.testing.assert_allclose(matrix.sum(-1), 1, rtol=1e-6)


def test_whole_window_of_the_same_size_changes_nothing():
    np.testing.assert_array_equal(resize_matrix(0.0, 9.0, inputs=9, outputs=9), np.eye(9))


def test_resize_matrix_by_hand():
    """4 pixels to 2: triangles of width 4 about 1 and 3; pixels 0.5, 1.5, 2.5 lie 1/4, 1/4, 3/4 from the first."""
    weights = np.array([3, 3, 1, 0]) / 7
    np.testing.assert_allclose(resize_matrix(0.0, 4.0, inputs=4, outputs=2), [weights, weights[::-1]], rtol=1e-6)
    shifted = resize_matrix(jnp.array([0.0, 1.0]), jnp.array([2.0, 2.0]), inputs=4, outputs=2)
    np.testing.assert_allclose(shifted, [np.eye(4)[:2], np.eye(4)[1:3]], rtol=1e-6)


@pytest.mark.parametrize(
    "top, left, rows, columns, height, width",
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
    got = np.einsum("hH,wW,HWc->hwc", vertical, horizontal, PHOTO)
    box = (left, top, left + columns, top + rows)
    wanted = np.asarray(Image.fromarray(PHOTO).resize((width, height), Image.Resampling.BILINEAR, box=box), np.float32)
    # Pillow rounds to whole grey levels twice, after each direction: half a level each.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1.0)
    assert np.abs(got - wanted).mean() < 0.35


@pytest.mark.parametrize("min_area, max_ratio", [(0.35, 4 / 3), (0.08, 2.0), (0.9, 4 / 3), (1.0, 1.0)])
def test_windows_lie_in_the_photo(min_area, max_ratio):
    top, left, rows, columns = map(
        np.asarray, random_windows(jax.random.key(1), 4000, height=30, width=50, min_area=min_area, max_ratio=max_ratio)
    )
    slack = 1e-4  # float32 pixels
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + rows <= 30 + slack).all() and (left + columns <= 50 + slack).all()
    area, ratio = rows * columns / 1500, (rows / 30) / (columns / 50)
    # A window cut at the photo's edge may be smaller than min_area, by the ratio at most.
    assert area.min() >= min(min_area, 1 / max_ratio) - slack and area.max() <= 1 + slack
    assert ratio.min() >= 1 / max_ratio - slack and ratio.max() <= max_ratio + slack
    if min_area == 1.0:
        np.testing.assert_allclose(area, 1, rtol=1e-6)
        return
    # Spread over the whole range: no end is left out, and the places are too.
    assert area.min() < min_area + 0.05 and area.max() > 0.95
    free = rows < 29
    place = top[free] / (30 - rows[free])
    assert abs(place.mean() - 0.5) < 0.03  # deviation of the mean: 0.29 / sqrt(some thousand)
    if min_area < 0.4:
        assert ratio.min() < 1.05 / max_ratio and ratio.max() > max_ratio / 1.05
        whole = (rows < 30 - slack) & (columns < 50 - slack)
        assert abs(np.log(ratio)[whole].mean()) < 0.02


@functools.cache
def compiled(flip, min_area, height, width):
    return jax.jit(
        lambda key, image: crop(
            image,
            random_crops(key, image, min_area=min_area, max_ratio=4 / 3 if min_area < 1 else 1.0, flip=flip),
            height=height,
            width=width,
        )
    )


def run(key, devices=1, *, image=BATCH, flip=True, min_area=0.35, height=9, width=10):
    with jax.set_mesh(made := make_mesh(data=devices, model=1, devices=jax.devices()[:devices])):
        placed = mesh.to_global({"image": image}, made)["image"]
        return np.asarray(compiled(flip, min_area, height, width)(jax.random.key(key), placed))


def test_same_key_same_photos_on_any_mesh():
    one = run(0)
    assert one.shape == (8, 9, 10, 3) and one.dtype == np.float32
    assert one.min() >= 0 and one.max() <= 255
    np.testing.assert_array_equal(run(0), one)
    # rtol: a device multiplies one photo instead of eight, in another order of summation.
    np.testing.assert_allclose(run(0, devices=8), one, rtol=1e-5, atol=1e-3)
    assert np.abs(run(1) - one).max() > 10


def test_photos_of_a_batch_get_windows_of_their_own():
    batch = run(0, image=np.stack([BATCH[0]] * 8))
    for row in range(1, 8):
        assert np.abs(batch[row] - batch[0]).max() > 10


def test_about_half_is_flipped():
    """Window = whole photo at its own size: the result is the photo or its mirror image, nothing else."""
    image = RNG.integers(0, 256, (400, 4, 5, 3), dtype=np.uint8)
    got = run(0, image=image, min_area=1.0, height=4, width=5)
    same = (np.abs(got - image) < 1e-2).all((1, 2, 3))
    mirrored = (np.abs(got - image[:, :, ::-1]) < 1e-2).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.sum() - 200) < 40  # four deviations
    unflipped = run(0, image=image, min_area=1.0, height=4, width=5, flip=False)
    np.testing.assert_allclose(unflipped, image, rtol=0, atol=1e-2)


def test_boxes_follow_their_crops():
    """A photo of 20 x 40; the crop is its right half below row 5. Mirrored, half cut off, cut away, unknown."""
    boxes = np.float32(
        [[0.6, 0.5, 0.9, 0.75], [0.6, 0.5, 0.9, 0.75], [0.4, 0.0, 0.6, 1.0], [0, 0, 0.5, 1], [0, 0, 0, 0]]
    )
    whole = np.ones(5, np.float32)
    crops = augment.Crops(5 * whole, 20 * whole, 15 * whole, 20 * whole, np.array([False, True, False, False, False]))
    found = augment.crop_boxes(boxes, crops, height=20, width=40)
    wanted = [[0.2, 1 / 3, 0.8, 2 / 3], [0.2, 1 / 3, 0.8, 2 / 3], [0, 0, 0.2, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    crops = crops._replace(left=16 * whole)  # the mirror shows where it is not symmetric
    left, mirrored = augment.crop_boxes(boxes, crops, height=20, width=40)[:2, 0]
    np.testing.assert_allclose([left, mirrored], [0.4, 0.0], atol=1e-6)


def test_parts_are_hidden_of_the_share_that_was_asked_for():
    image = np.ones((4000, 2, 2, 3), np.float32)
    hidden = jax.jit(lambda image: augment.random_hidden(jax.random.key(0), image, share=0.4))(image)
    counts = np.bincount(hidden.shown, minlength=3) / len(image)
    np.testing.assert_allclose(counts, [0.6, 0.1, 0.3], atol=0.03)
    side = np.asarray(hidden.box[:, 2:] - hidden.box[:, :2])
    assert side.min() >= 0.2 and side.max() <= 1.0


def test_what_is_hidden_is_the_mean_colour():
    """All, what is in the box, what is not."""
    box = np.tile(np.float32([0.25, 0.25, 0.75, 0.75]), (3, 1))
    found = augment.hide(np.ones((3, 32, 32, 3), np.float32), augment.Hidden(box, np.array([0, 1, 2])))
    middle, corner = found[:, 16, 16, 0], found[:, 0, 0, 0]
    np.testing.assert_allclose(middle, [1, 1, 0], atol=1e-4)
    np.testing.assert_allclose(corner, [1, 0, 1], atol=1e-4)
