"""The box branch, by hand: moments, masks, what a fresh branch says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sicot_jax.models import localization as boxes
from sicot_jax.models.localization import (
    BoxBranch,
    attention_box,
    mean_within,
    moments_box,
    soft_mask,
    stretch_matrix,
    visible,
)

NO_SCALE = jnp.zeros(2)


def rectangle(rows, columns, height=8, width=10, level=1.0):
    attention = np.zeros((1, height, width), np.float32)
    attention[0, slice(*rows), slice(*columns)] = level
    return attention


def test_uniform_attention_is_the_whole_photo():
    assert moments_box(jnp.ones((2, 7, 5)), NO_SCALE) == pytest.approx(
        np.tile([0, 0, 1, 1], (2, 1)), abs=1e-6
    )


def test_a_rectangle_of_cells_is_that_rectangle():
    """Rows 2 to 5 of 8, columns 3 to 4 of 10; the level does not count. The soft window, near the
    box's edges, dims the outer
    cells: a hundredth of a side.
    """
    attention = rectangle((2, 6), (3, 5), level=0.1)
    assert moments_box(attention, NO_SCALE)[0] == pytest.approx([0.3, 0.25, 0.5, 0.75], abs=1e-6)
    assert attention_box(attention, NO_SCALE)[0] == pytest.approx([0.3, 0.25, 0.5, 0.75], abs=3e-3)


def test_scales_widen_about_the_middle():
    """Twice as wide, half as high."""
    found = moments_box(rectangle((2, 6), (3, 5)), jnp.log(jnp.array([2.0, 0.5])))
    assert found[0] == pytest.approx([0.2, 0.375, 0.6, 0.625], abs=1e-6)


def test_what_is_far_from_the_rest_no_longer_counts():
    """A cell in a corner beside 4 x 4 of 16 x 16."""
    attention = rectangle((8, 12), (8, 12), 16, 16)
    attention[0, 0, 0] = 1
    assert moments_box(attention, NO_SCALE)[0, 0] < 0.4
    assert attention_box(attention, NO_SCALE)[0] == pytest.approx([0.5, 0.5, 0.75, 0.75], abs=0.02)


def test_no_attention_at_all_is_finite():
    value, gradient = jax.value_and_grad(lambda a: attention_box(a, NO_SCALE).sum())(
        jnp.zeros((1, 4, 4))
    )
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_the_soft_mask_by_hand():
    """h(0.25 - 0.25) - h(0.25 - 0.75) = 1/2 - 1 / (1 + e^5) along x at k = 10, and the same along
    y.
    """
    mask = soft_mask(jnp.array([[0.25, 0.25, 0.75, 0.75]]), 2, 2, sharpness=10.0)
    along = 0.5 - 1 / (1 + np.exp(5))
    assert mask == pytest.approx(np.full((1, 2, 2), along**2), abs=1e-6)


def test_what_is_in_the_box_is_visible():
    seen = visible(jnp.array([[0.25, 0.5, 0.5, 0.75]]), 64, 64)[0, :, :, 0]
    assert seen[32:48, 16:32].min() > 0.75
    assert seen[36:44, 20:28].min() > 0.98
    assert seen[:24].max() < 0.01
    assert seen[:, 44:].max() < 0.01


def test_the_mask_has_a_gradient_to_each_side():
    def inside(box):
        return visible(box, 32, 32).sum()

    left, top, right, bottom = jax.grad(inside)(jnp.array([[0.3, 0.3, 0.7, 0.7]]))[0]
    assert min(right, bottom) > 1
    assert max(left, top) < -1


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 8), (2, 8), (3, 5), (5, 8), (4, 4)])
def test_stretching_is_linear_interpolation(inputs, outputs):
    x = np.random.default_rng(0).standard_normal(inputs).astype(np.float32)
    wanted = jax.image.resize(x, (outputs,), "bilinear")
    assert stretch_matrix(inputs, outputs) @ x == pytest.approx(np.asarray(wanted), abs=1e-6)


def test_means_in_and_out_of_the_box():
    """A map whose left half is 1 and right half is 3."""
    features = jnp.concatenate([jnp.ones((1, 8, 4, 1)), 3 * jnp.ones((1, 8, 4, 1))], 2)
    left_half = jnp.array([[-1.0, -1.0, 0.5, 2.0]])
    assert mean_within(features, left_half)[0, 0] == pytest.approx(1.0, abs=0.15)
    assert mean_within(features, left_half, outside=True)[0, 0] == pytest.approx(3.0, abs=0.15)


@pytest.fixture(scope="module")
def branch():
    return BoxBranch([4, 8, 16], dtype=jnp.float32, rng=np.random.default_rng(0))


def maps_of(x):
    return [
        jnp.tile(x[:, ::step, ::step], (1, 1, 1, width))
        for step, width in ((1, 4), (2, 8), (4, 16))
    ]


def test_a_fresh_branch_says_the_whole_photo(branch, one_device):
    x = jax.random.normal(jax.random.key(0), (3, 8, 12, 1))
    assert branch(maps_of(x), train=False) == pytest.approx(np.tile([0, 0, 1, 1], (3, 1)), abs=0.02)


def test_attention_rises_with_the_score():
    """As squares of sigmoids, of the photo's largest; also where all scores are so low that none is
    left of these.
    """
    levels = boxes.attention_of(
        jnp.array([[-1.0, 0.0, 1.0], [-90.0, -90.0, -90.1]]).reshape(2, 1, 3, 1)
    )[:, 0]
    assert levels == pytest.approx(np.array([[0, 0.25, 1], [1, 1, np.exp(-2)]]), abs=1e-3)
