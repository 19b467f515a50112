"""Batch-norm moments over devices equal the textbook formula, differentiated, on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sicot_jax.models.layers import batch_moments, conv
from sicot_jax.parallel import mesh

ROWS = 16
MASKS = {
    "all": None,
    "some": np.arange(ROWS) % 3 > 0,
    "rows of one device": np.arange(ROWS) < 2,  # of eight devices, two rows each
    "none": np.zeros(ROWS, bool),
}


def moments_on_one_device(x, mask):
    weight = np.ones(ROWS) if mask is None else mask.astype(np.float64)
    weight = weight[:, None, None] / max(weight.sum() * x.shape[1], 1)
    mean = (x * weight).sum((0, 1))
    return mean, (jnp.square(x - mean) * weight).sum((0, 1))


@pytest.mark.parametrize("name", MASKS)
def test_moments_and_gradients_cover_all_devices(device_mesh, name):
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (ROWS, 5, 4)).astype(np.float32)
    mask = MASKS[name]
    weights = rng.normal(size=(2, 4)).astype(np.float32)

    def score(moments):
        return sum(jnp.sum(jnp.sin(moment) * w) for moment, w in zip(moments, weights, strict=True))

    divided = mesh.to_global({"x": x} if mask is None else {"x": x, "mask": mask}, device_mesh)

    def over_devices(x, mask):
        specs = (mesh.BATCH, None if mask is None else mesh.BATCH)
        return jax.shard_map(batch_moments, in_specs=specs, out_specs=jax.P())(x, mask)

    moments = jax.jit(over_devices)(divided["x"], divided.get("mask"))
    gradient = jax.jit(jax.grad(lambda x, mask: score(over_devices(x, mask))))(
        divided["x"], divided.get("mask")
    )
    expected = moments_on_one_device(jnp.asarray(x), mask)
    for actual, wanted in zip(moments, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5)
    wanted = jax.grad(lambda x: score(moments_on_one_device(x, mask)))(jnp.asarray(x))
    np.testing.assert_allclose(jax.device_get(gradient), wanted, rtol=1e-4, atol=1e-6)
    assert np.any(wanted) == (name != "none")


@pytest.mark.parametrize("shape", [(3, 2), (2, 1), (1, 1), (4, 5), (2, 9)])
@pytest.mark.parametrize(
    ("size", "stride"), [(3, 1), (3, 2), pytest.param(7, 2, marks=pytest.mark.slow)]
)
def test_im2col_equals_convolution(shape, size, stride):
    """Value and gradients, for maps small enough for im2col and for larger ones."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *shape, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 3, 4)), jnp.float32)

    def plain(x, kernel):
        padding = [(size // 2, size // 2)] * 2
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=names
        )

    wanted, pull_wanted = jax.vjp(plain, x, kernel)
    actual, pull_actual = jax.vjp(lambda x, kernel: conv(x, kernel, stride), x, kernel)
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)
    for a, b in zip(pull_actual(wanted), pull_wanted(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
