"""Sums of gradients over devices, complete and top-k, against a loop in numpy."""

import jax
import numpy as np
import pytest

from sicot_jax import config as config_lib
from sicot_jax.config import ConfigError
from sicot_jax.parallel import gradient_sync, mesh

SHAPES = {"a/kernel": (3, 5), "a/bias": (5,), "b/kernel": (2, 2, 4, 3)}


def put_on_mesh(tree, device_mesh):
    with jax.set_mesh(device_mesh):
        return jax.tree.map(lambda x: mesh.to_global({"x": x}, device_mesh)["x"], tree)


def nested(flat):
    return {
        part: {
            leaf: flat[f"{part}/{leaf}"] for leaf in ("kernel", "bias") if f"{part}/{leaf}" in flat
        }
        for part in "ab"
    }


def assert_close(actual, wanted):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.device_get(actual),
        wanted,
    )


def random_gradients(devices: int, seed: int):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=(devices, *shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def by_hand(gradient, residual, ratio):
    """Device by device, entry by entry."""
    total, kept = {}, {}
    for name, stacked in gradient.items():
        total[name] = np.zeros(SHAPES[name], np.float64)
        kept[name] = []
        for device, local in enumerate(stacked):
            if name not in residual:
                total[name] += local
                continue
            corrected = local + residual[name][device]
            order = np.argsort(-np.abs(corrected).ravel(), kind="stable")
            sent = np.zeros(corrected.size, np.float32)
            largest = order[: gradient_sync.num_entries_sent(corrected.size, ratio)]
            sent[largest] = corrected.ravel()[largest]
            sent = sent.reshape(corrected.shape)
            total[name] += sent
            kept[name].append(corrected - sent)
    return total, {name: np.stack(kept[name]) for name in residual}


def kernels(devices: int):
    return {
        name: np.zeros((devices, *SHAPES[name]), np.float32)
        for name in SHAPES
        if name.endswith("kernel")
    }


@pytest.mark.parametrize("ratio", [1.0, 0.3, 1e-9])
def test_the_largest_entries_are_summed_and_the_others_are_kept(device_mesh, ratio):
    devices = device_mesh.size
    expected = kernels(devices)
    residual = put_on_mesh(expected, device_mesh)
    run = jax.jit(
        lambda gradient, residual: gradient_sync.topk_allreduce(gradient, residual, ratio=ratio)
    )
    with jax.set_mesh(device_mesh):
        for step in range(3):
            gradient = random_gradients(devices, step)
            total, residual = run(nested(put_on_mesh(gradient, device_mesh)), residual)
            wanted, expected = by_hand(gradient, expected, ratio)
            assert_close(total, nested(wanted))
            assert_close(residual, expected)


def test_a_ratio_of_1_is_the_complete_sum(device_mesh):
    gradient = nested(put_on_mesh(random_gradients(device_mesh.size, 0), device_mesh))
    residual = put_on_mesh(kernels(device_mesh.size), device_mesh)
    with jax.set_mesh(device_mesh):
        total, kept = jax.jit(lambda g, e: gradient_sync.topk_allreduce(g, e, ratio=1.0))(
            gradient, residual
        )
        assert_close(total, jax.device_get(jax.jit(gradient_sync.allreduce)(gradient)))
    assert not any(np.any(x) for x in jax.device_get(kept).values())


def test_optimizers_that_scale_by_the_gradient_are_refused():
    for name in ("lars", "adamw"):
        with pytest.raises(
            ConfigError, match=f"gradient_ratio=0.1 with optim.name='{name}'.*set optim.name=sgd"
        ):
            config_lib.load_config(
                "tiny", ["--config.train.gradient_ratio=0.1", f"--config.optim.name={name}"]
            )


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ConfigError, match=r"train.gradient_ratio=.*wanted above 0, up to 1"):
        config_lib.load_config("tiny", [f"--config.train.gradient_ratio={ratio}"])
