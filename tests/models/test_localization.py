"""Localisation by hand: boxes from moments, masks, a new branch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sicot_jax.models.localization import (
    LocalizationBranch,
    attention_from_scores,
    box_from_attention,
    box_from_moments,
    clip_box,
    foreground_mask,
    interpolation_matrix,
    masked_average_pool,
    soft_mask,
)

NO_SCALE = jnp.zeros(2)


def rectangle(rows, columns, height=8, width=10, level=1.0):
    attention = np.zeros((1, height, width), np.float32)
    attention[0, slice(*rows), slice(*columns)] = level
    return jnp.asarray(attention)


def test_uniform_attention_gives_the_full_photo():
    assert box_from_moments(jnp.ones((2, 7, 5)), NO_SCALE) == pytest.approx(
        np.tile([0, 0, 1, 1], (2, 1)), abs=1e-6
    )


def test_a_rectangle_of_attention_gives_that_box():
    """Rows 2 to 5 of 8, columns 3 to 4 of 10, whatever the level; the soft window moves the refined
    box by a hundredth of a side, since it lowers the outer cells' attention.
    """
    attention = rectangle((2, 6), (3, 5), level=0.1)
    assert box_from_moments(attention, NO_SCALE)[0] == pytest.approx(
        [0.3, 0.25, 0.5, 0.75], abs=1e-6
    )
    assert box_from_attention(attention, NO_SCALE)[0] == pytest.approx(
        [0.3, 0.25, 0.5, 0.75], abs=3e-3
    )


def test_scales_widen_about_the_middle():
    """Twice as wide, half as high."""
    box = box_from_moments(rectangle((2, 6), (3, 5)), jnp.log(jnp.array([2.0, 0.5])))
    assert box[0] == pytest.approx([0.2, 0.375, 0.6, 0.625], abs=1e-6)


def test_refinement_ignores_attention_far_from_the_product():
    """One cell in a corner besides 4 x 4 cells of 16 x 16."""
    attention = rectangle((8, 12), (8, 12), 16, 16)
    attention = attention.at[0, 0, 0].set(1)
    assert box_from_moments(attention, NO_SCALE)[0, 0] < 0.4
    assert box_from_attention(attention, NO_SCALE)[0] == pytest.approx(
        [0.5, 0.5, 0.75, 0.75], abs=0.02
    )


def test_no_attention_at_all_is_finite():
    value, gradient = jax.value_and_grad(lambda a: box_from_attention(a, NO_SCALE).sum())(
        jnp.zeros((1, 4, 4))
    )
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_soft_mask_by_hand():
    """h(0.25 - 0.25) - h(0.25 - 0.75) = 1/2 - 1 / (1 + e^5) along x at k = 10, and the same along
    y.
    """
    mask = soft_mask(jnp.array([[0.25, 0.25, 0.75, 0.75]]), 2, 2, sharpness=10.0)
    along = 0.5 - 1 / (1 + np.exp(5))
    assert mask == pytest.approx(np.full((1, 2, 2), along**2), abs=1e-6)


def test_what_is_in_the_box_is_foreground_mask():
    mask = foreground_mask(jnp.array([[0.25, 0.5, 0.5, 0.75]]), 64, 64)[0, :, :, 0]
    assert mask[32:48, 16:32].min() > 0.75
    assert mask[36:44, 20:28].min() > 0.98
    assert mask[:24].max() < 0.01
    assert mask[:, 44:].max() < 0.01


def test_mask_has_a_gradient_for_each_side():
    def inside(box):
        return foreground_mask(box, 32, 32).sum()

    left, top, right, bottom = jax.grad(inside)(jnp.array([[0.3, 0.3, 0.7, 0.7]]))[0]
    assert min(right, bottom) > 1
    assert max(left, top) < -1


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 8), (2, 8), (3, 5), (5, 8), (4, 4)])
def test_resizing_is_linear_interpolation(inputs, outputs):
    x = np.random.default_rng(0).standard_normal(inputs).astype(np.float32)
    wanted = jax.image.resize(x, (outputs,), "bilinear")
    assert interpolation_matrix(inputs, outputs) @ x == pytest.approx(np.asarray(wanted), abs=1e-6)


def test_masked_average_pool_inside_and_outside_the_box():
    """A map whose left half is 1 and right half is 3."""
    features = jnp.concatenate([jnp.ones((1, 8, 4, 1)), 3 * jnp.ones((1, 8, 4, 1))], 2)
    left_half = jnp.array([[-1.0, -1.0, 0.5, 2.0]])
    assert masked_average_pool(features, left_half)[0, 0] == pytest.approx(1.0, abs=0.15)
    assert masked_average_pool(features, left_half, background=True)[0, 0] == pytest.approx(
        3.0, abs=0.15
    )


@pytest.fixture(scope="module")
def branch():
    return LocalizationBranch([4, 8, 16], dtype=jnp.float32, rng=np.random.default_rng(0))


def maps_of(x):
    return [
        jnp.tile(x[:, ::step, ::step], (1, 1, 1, width))
        for step, width in ((1, 4), (2, 8), (4, 16))
    ]


def test_a_new_branch_predicts_the_full_photo(branch, one_device):
    x = jax.random.normal(jax.random.key(0), (3, 8, 12, 1))
    assert branch(maps_of(x), train=False) == pytest.approx(np.tile([0, 0, 1, 1], (3, 1)), abs=0.02)


def test_attention_increases_with_the_score():
    """Squares of sigmoids relative to the photo's largest, also where all of them underflow."""
    levels = attention_from_scores(
        jnp.array([[-1.0, 0.0, 1.0], [-90.0, -90.0, -90.1]]).reshape(2, 1, 3, 1)
    )[:, 0]
    assert levels == pytest.approx(np.array([[0, 0.25, 1], [1, 1, np.exp(-2)]]), abs=1e-3)


HEIGHT, WIDTH = 8, 10  # one shape, which is compiled once
SPANS = [
    st.tuples(st.integers(0, cells), st.integers(0, cells)).filter(lambda pair: pair[0] < pair[1])
    for cells in (HEIGHT, WIDTH)
]


@given(*SPANS)
def test_any_rectangle_of_attention_gives_that_box(rows, columns):
    box = box_from_moments(rectangle(rows, columns), NO_SCALE)[0]
    sides = [columns[0] / WIDTH, rows[0] / HEIGHT, columns[1] / WIDTH, rows[1] / HEIGHT]
    assert box == pytest.approx(sides, abs=2e-5)  # a difference of squares, rounded to float32


@given(
    st.lists(st.floats(0, 1, width=32), min_size=HEIGHT * WIDTH, max_size=HEIGHT * WIDTH),
    st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
)
def test_the_box_of_any_attention_has_its_middle_in_the_photo(values, log_scale):
    """Its sides before they are scaled: a cell at least, two points at the photo's ends at most."""
    attention = jnp.asarray(np.reshape(np.float32(values), (1, HEIGHT, WIDTH)))
    # A value below those of `attention_from_scores`, whose largest is 1, would be lost in rounding.
    attention = attention.at[0, 0, 0].set(1.0)
    box = np.asarray(box_from_moments(attention, jnp.asarray(log_scale, jnp.float32))[0])
    assert np.isfinite(box).all()
    for low, high, cells, scale in (
        (box[0], box[2], WIDTH, np.exp(log_scale[0])),
        (box[1], box[3], HEIGHT, np.exp(log_scale[1])),
    ):
        assert 0 < (low + high) / 2 < 1
        longest = 2 * np.sqrt(3 * (0.25 + 1 / (12 * cells**2)))
        assert 0.999 / cells * scale <= high - low <= longest * scale
    clipped = np.asarray(clip_box(jnp.asarray(box)[None]))
    assert ((clipped >= 0) & (clipped <= 1)).all()
    np.testing.assert_array_equal(clip_box(jnp.asarray(clipped)), clipped)
    inside = (box >= 0) & (box <= 1)
    np.testing.assert_array_equal(clipped[0][inside], box[inside])


def test_a_model_without_boxes_clips_none():
    assert clip_box(None) is None
