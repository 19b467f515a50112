"""The million-class step, compiled for eight devices from shapes alone: what it may not do, and what it may hold."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from sicot_jax import config as config_lib
from sicot_jax import mesh
from sicot_jax.step import DataShape, abstract_state, make_setup, make_train_step

VOCABULARY = 345_656  # of the paper's Table 1


@pytest.mark.parametrize("data, model", [(8, 1), (2, 4)])
def test_the_million_class_step_compiles_and_moves_nothing_that_grows_with_classes(data, model):
    config = config_lib.load("1m")
    device_mesh = mesh.make_mesh(data=data, model=model)
    with jax.set_mesh(device_mesh):
        num_classes = config.data.generated.num_classes
        setup = make_setup(config, DataShape(num_classes, VOCABULARY, 128, 55_776_960), device_mesh)
        state = abstract_state(setup)
        assert state.classifier.kernel.shape == (998_136, 2048)
        batch = {
            "image": jax.ShapeDtypeStruct((256, 224, 224, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((256,), jnp.int32),
            "token_ids": jax.ShapeDtypeStruct((256, config.data.max_tokens), jnp.int32),
        }
        batch = {n: mesh.divided(x, device_mesh) for n, x in batch.items()}
        compiled = jax.jit(make_train_step(setup), donate_argnums=0).lower(state, batch).compile()
    rows = 998_136 // 8
    # The largest that may travel is the gradient of the word table, which every device holds.
    largest_allowed = VOCABULARY * 128
    for line in compiled.as_text().splitlines():
        found = re.search(
            r"= (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(-start)?\(", line
        )
        if not found:
            continue
        for shape in re.findall(r"\[([\d,]+)\]", found.group(1)):
            sizes = [int(n) for n in shape.split(",")]
            assert not {rows, 998_131, 998_136} & set(sizes), line
            assert math.prod(sizes) <= largest_allowed, line
    memory = compiled.memory_analysis()
    kernel = rows * 2048 * 4
    # Donated: kernel and momentum are updated where they are; the words too.
    state_bytes = 2 * kernel + 2 * 4 * (VOCABULARY * 128 + 30_000_000)
    assert memory.argument_size_in_bytes < 1.05 * state_bytes + 256 * 224 * 224 * 3
    assert memory.alias_size_in_bytes > 0.95 * 2 * kernel
