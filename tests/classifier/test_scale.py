"""The step of a million classes, compiled for eight devices: its collectives and its memory."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sicot_jax import config as config_lib
from sicot_jax.classifier.heads import make_head
from sicot_jax.classifier.lazy_update import make_lazy_update
from sicot_jax.classifier.memory import HeadSizes, head_temporary_bytes
from sicot_jax.classifier.state import init_classifier, make_hyperparams
from sicot_jax.parallel import mesh
from sicot_jax.training import optimizer as optim
from sicot_jax.training.model import DataShape
from sicot_jax.training.setup import make_setup
from sicot_jax.training.state import abstract_state
from sicot_jax.training.step import make_train_step

VOCABULARY = 345_656  # of the paper's Table 1
CLASSES, CLASSES_PADDED = 998_131, 998_136


def check_collectives(compiled, *, largest: int):
    """No collective's size has to do with the number of classes, or is above `largest` numbers."""
    any_collective = False
    for line in compiled.as_text().splitlines():
        match = re.search(
            r"= (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)"
            r"(-start)?\(",
            line,
        )
        if not match:
            continue
        any_collective = True
        for shape in re.findall(r"\[([\d,]+)\]", match.group(1)):
            sizes = [int(n) for n in shape.split(",")]
            assert not {CLASSES_PADDED // 8, CLASSES, CLASSES_PADDED} & set(sizes), line
            assert math.prod(sizes) <= largest, line
    assert any_collective


@pytest.mark.parametrize(
    "options",
    [{}, {"keep_logits": "bfloat16"}, {"kind": "sampled", "sample_rate": 0.1}],
    ids=["exact", "kept logits", "sampled"],
)
@pytest.mark.parametrize(("data", "model"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_million_class_head_sends_only_embeddings_within_its_memory(data, model, options):
    batch, width = 256, 2048
    device_mesh = mesh.make_mesh(data=data, model=model)
    config = config_lib.HeadConfig(**options)
    rate, sgd = optax.constant_schedule(0.1), config_lib.OptimConfig()
    optimizer = optim.make_optimizer(sgd, rate)
    head = make_head(
        config,
        config_lib.LossConfig(),
        num_classes=CLASSES,
        optimizer=optimizer,
        lazy_update=make_lazy_update(sgd, rate),
    )
    with jax.set_mesh(device_mesh):
        prior = jax.ShapeDtypeStruct(
            (CLASSES_PADDED,), jnp.float32, sharding=mesh.class_sharding(device_mesh)
        )
        classifier = jax.eval_shape(
            lambda p: init_classifier(
                config,
                jax.random.key(0),
                p,
                num_classes=CLASSES,
                width=width,
                optimizer=optimizer,
            ),
            prior,
        )
        classifier = mesh.with_shardings(classifier, device_mesh)
        embedding = mesh.sharded_struct(
            jax.ShapeDtypeStruct((batch, width), jnp.float32), device_mesh
        )
        label = mesh.sharded_struct(jax.ShapeDtypeStruct((batch,), jnp.int32), device_mesh)
        hyperparams = make_hyperparams(config_lib.LossConfig(), learning_rate=0.1)
        compiled = (
            jax.jit(head, donate_argnums=2)
            .lower({"visual": embedding, "mixed": embedding}, label, classifier, hyperparams)
            .compile()
        )
    check_collectives(compiled, largest=2 * batch * width)
    memory = compiled.memory_analysis()
    shard_classes = CLASSES_PADDED // 8
    kernel = 4 * shard_classes * width
    assert memory.alias_size_in_bytes >= 2 * kernel  # kernel and momentum stay where they are
    sizes = HeadSizes(num_streams=2, batch=batch, width=width, shard_classes=shard_classes)
    temporary = head_temporary_bytes(config, sizes)
    np.testing.assert_allclose(memory.temp_size_in_bytes, temporary, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "model"), [(8, 1), (2, 4)])
def test_million_class_step_sends_nothing_that_grows_with_classes(data, model):
    config = config_lib.load_config("1m")
    device_mesh = mesh.make_mesh(data=data, model=model)
    with jax.set_mesh(device_mesh):
        num_classes = config.data.generated.num_classes
        setup = make_setup(config, DataShape(num_classes, VOCABULARY, 128, 55_776_960), device_mesh)
        state = abstract_state(setup)
        assert state.classifier.weights.kernel.shape == (998_136, 2048)
        batch = {
            "image": jax.ShapeDtypeStruct((256, 224, 224, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((256,), jnp.int32),
            "token_ids": jax.ShapeDtypeStruct((256, config.data.max_tokens), jnp.int32),
        }
        batch = {n: mesh.sharded_struct(x, device_mesh) for n, x in batch.items()}
        compiled = jax.jit(make_train_step(setup), donate_argnums=0).lower(state, batch).compile()
    # The largest that may travel is the gradient of the word table, which every device holds.
    check_collectives(compiled, largest=VOCABULARY * 128)
    rows = 998_136 // 8
    memory = compiled.memory_analysis()
    kernel = rows * 2048 * 4
    # Donated: kernel and momentum are updated where they are; the words too.
    state_bytes = 2 * kernel + 2 * 4 * (VOCABULARY * 128 + 30_000_000)
    assert memory.argument_size_in_bytes < 1.05 * state_bytes + 256 * 224 * 224 * 3
    assert memory.alias_size_in_bytes > 0.95 * 2 * kernel
