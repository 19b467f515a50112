"""Learning rates by hand; LARS against optax's, over rows that are divided among devices and chunks
too.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sicot_jax import config as config_lib
from sicot_jax.classifier import trust_ratio
from sicot_jax.classifier.heads import make_head
from sicot_jax.classifier.state import init_classifier, make_hyperparams
from sicot_jax.config import HeadConfig, LossConfig, OptimConfig
from sicot_jax.config.batch_plan import BatchPlan
from sicot_jax.parallel import mesh
from sicot_jax.training import optimizer as optim
from sicot_jax.training.model import DataShape
from sicot_jax.training.setup import make_setup

PLAN = BatchPlan(20)  # 100 photos: five steps an epoch


def rates(config, steps, plan=PLAN):
    schedule = optim.make_schedule(config, plan, steps=steps, photos=100)
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)))


@pytest.mark.parametrize(
    ("name", "by_epoch"),
    [
        ("step", lambda epoch: 0.8 ** np.floor(epoch / 2)),
        ("exponential", lambda epoch: 0.8 ** (epoch / 2)),
        ("cosine", lambda epoch: (1 + np.cos(np.pi * epoch / 6)) / 2),
        ("constant", np.ones_like),
    ],
)
def test_a_schedule_by_hand_after_its_warm_up(name, by_epoch):
    config = OptimConfig(
        learning_rate=0.5, schedule=name, gamma=0.8, decay_epochs=2.0, warmup_epochs=1.0
    )
    actual = rates(config, 35)
    np.testing.assert_allclose(actual[:5], 0.1 + 0.4 * np.arange(5) / 5, rtol=1e-6)
    np.testing.assert_allclose(actual[5:], 0.5 * by_epoch(np.arange(30) / 5), rtol=1e-5)


@pytest.mark.parametrize("name", ["step", "exponential", "cosine"])
def test_a_schedule_follows_the_epoch_where_the_batch_grows(name):
    """Steps on 20, 40 and 80 photos: the rate of each is the one that steps on 20 had after as many
    photos.
    """
    plan = BatchPlan(20, (7, 10))
    config = OptimConfig(schedule=name, decay_epochs=1.5, warmup_epochs=0.6)
    before = np.array([*range(7), 7, 9, 11, 13, 17, 21])  # batches of 20 before each step
    np.testing.assert_allclose(rates(config, 13, plan), rates(config, 25)[before], rtol=1e-6)


LARS = OptimConfig(name="lars", learning_rate=4.0, weight_decay=0.05, trust_coefficient=0.02)


def optax_lars(config, schedule):
    return optax.lars(
        schedule,
        config.weight_decay,
        optim.decay_mask,
        trust_coefficient=config.trust_coefficient,
        trust_ratio_mask=optim.decay_mask,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_is_that_of_optax(nesterov):
    config = dataclasses.replace(LARS, nesterov=nesterov, trainable="(?!frozen)")
    schedule = optax.linear_schedule(4.0, 1.0, 5)
    rng = np.random.default_rng(0)
    params = {
        "kernel": rng.normal(size=(3, 4)),
        "bias": rng.normal(size=4),
        "zero": np.zeros((2, 2)),
    }
    params = jax.tree.map(jnp.float32, params)
    wanted, frozen = params, {"frozen": jnp.ones((2, 2))}
    params = params | frozen
    tx, reference = optim.make_optimizer(config, schedule), optax_lars(config, schedule)
    state, wanted_state = tx.init(params), reference.init(wanted)
    for _ in range(3):
        gradient = {name: jnp.float32(rng.normal(size=x.shape)) for name, x in params.items()}
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        gradient.pop("frozen")
        updates, wanted_state = reference.update(gradient, wanted_state, wanted)
        wanted = optax.apply_updates(wanted, updates)
    for name in wanted:
        np.testing.assert_array_equal(params[name], wanted[name])
    np.testing.assert_array_equal(params["frozen"], frozen["frozen"])


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_a_learning_rate_may_come_with_the_update(name):
    """A schedule of height 1 and 0.3 given is a schedule of height 0.3."""
    config, rng = dataclasses.replace(LARS, name=name), np.random.default_rng(0)
    given = optim.make_optimizer(config, optax.linear_schedule(1.0, 0.5, 3))
    fixed = optim.make_optimizer(config, optax.linear_schedule(0.3, 0.15, 3))
    given_params = fixed_params = {
        "kernel": jnp.float32(rng.normal(size=(3, 4))),
        "bias": jnp.float32(rng.normal(size=4)),
    }
    given_state, fixed_state = given.init(given_params), fixed.init(fixed_params)
    for _ in range(3):
        gradient = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), given_params)
        updates, given_state = given.update(
            gradient, given_state, given_params, learning_rate=jnp.float32(0.3)
        )
        given_params = optax.apply_updates(given_params, updates)
        updates, fixed_state = fixed.update(gradient, fixed_state, fixed_params)
        fixed_params = optax.apply_updates(fixed_params, updates)
    for a, b in zip(
        jax.tree.leaves((given_params, given_state)),
        jax.tree.leaves((fixed_params, fixed_state)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kernel_scale", "gradient_scale", "decay"),
    [(1, 1, 0.1), (0, 1, 0.1), (1, 0, 0.0), (1, 0, 0.1)],
)
def test_trust_ratio_accumulated_over_rows_equals_optax(kernel_scale, gradient_scale, decay):
    """Also where a norm is zero, and the ratio 1."""
    rng = np.random.default_rng(0)
    kernel = jnp.float32(kernel_scale * rng.normal(size=(10, 3)))
    gradient = jnp.float32(gradient_scale * rng.normal(size=(10, 3)))
    trust = trust_ratio.TrustRatio(0.02, decay)
    ratio = trust.from_squared_norms(
        sum(trust.squared_norms(gradient[i : i + 4], kernel[i : i + 4]) for i in (0, 4, 8))
    )
    update = gradient + decay * kernel
    complete = optax.scale_by_trust_ratio(trust_coefficient=0.02)
    wanted, _ = complete.update(update, complete.init(kernel), kernel)
    np.testing.assert_allclose(ratio * update, wanted, rtol=1e-6)


def test_only_lars_on_a_kernel_that_trains_wants_a_trust_ratio():
    assert trust_ratio.make_trust_ratio(LARS) == trust_ratio.TrustRatio(0.02, 0.05)
    assert trust_ratio.make_trust_ratio(OptimConfig()) is None
    assert trust_ratio.make_trust_ratio(dataclasses.replace(LARS, trainable="visual")) is None


NUM_CLASSES, WIDTH, BATCH, STEPS = 37, 5, 16, 3
WEIGHTS = LossConfig(visual=1.0, mixed=0.5, logit_adjustment=1.0)


def run_head(head, config, tx, device_mesh, *, learning_rate=1.0):
    """(losses, cotangents) of each of three steps, then kernel, bias and optimizer state, padding
    cut off.
    """
    rng = np.random.default_rng(0)
    prior = np.zeros(mesh.pad_classes(NUM_CLASSES, device_mesh), np.float32)
    prior[:NUM_CLASSES] = np.log(rng.dirichlet(np.ones(NUM_CLASSES)))
    placed = mesh.to_global({"prior": prior}, device_mesh)["prior"]
    start = jax.jit(
        lambda p: init_classifier(
            config, jax.random.key(1), p, num_classes=NUM_CLASSES, width=WIDTH, optimizer=tx
        )
    )
    classifier, seen = start(placed), []
    head = jax.jit(head)
    for _ in range(STEPS):
        batch = {
            s: 3 * rng.normal(size=(BATCH, WIDTH)).astype(np.float32) for s in ("visual", "mixed")
        }
        batch["label"] = rng.integers(0, NUM_CLASSES, BATCH).astype(np.int32)
        batch = mesh.to_global(batch, device_mesh)
        hyperparams = make_hyperparams(WEIGHTS, learning_rate=learning_rate)
        losses, cotangents, classifier = head(batch, batch.pop("label"), classifier, hyperparams)
        seen.append((losses, cotangents))
    after = jax.device_get(
        (classifier.weights.kernel, classifier.weights.bias, jax.tree.leaves(classifier.opt_state))
    )
    return jax.device_get(seen), jax.tree.map(lambda x: x[:NUM_CLASSES] if x.ndim else x, after)


@pytest.fixture(scope="module")
def dense_lars():
    """The dense head with the LARS of optax on one device."""
    device_mesh = mesh.make_mesh(devices=jax.devices()[:1])
    config = HeadConfig(kind="dense")
    tx = optax.with_extra_args_support(
        optax_lars(LARS, optax.constant_schedule(LARS.learning_rate))
    )
    with jax.set_mesh(device_mesh):
        head = make_head(
            config,
            WEIGHTS,
            num_classes=NUM_CLASSES,
            optimizer=tx,
            lazy_update=lambda state, **_: state,
        )
        return run_head(head, config, tx, device_mesh)


def lars_setup(head, device_mesh):
    config = config_lib.load_config("tiny")
    config = dataclasses.replace(
        config, optim=dataclasses.replace(LARS, schedule="constant"), head=head, loss=WEIGHTS
    )
    return make_setup(
        config, DataShape(NUM_CLASSES, 30, word_width=16, train_photos=160), device_mesh
    )


def assert_equals_dense(head, dense_lars, device_mesh):
    setup = lars_setup(head, device_mesh)
    actual = run_head(
        setup.head, head, setup.optimizer, device_mesh, learning_rate=LARS.learning_rate
    )
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(dense_lars), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max(), err_msg=name)


def test_sharded_lars_equals_optax_on_the_dense_head(device_mesh, dense_lars):
    """37 rows divide over no mesh of more than one device, and their chunks of 2 leave a rest."""
    assert_equals_dense(HeadConfig(chunk=2), dense_lars, device_mesh)


@pytest.mark.parametrize(
    "head", [HeadConfig(chunk=2, keep_logits="float32"), HeadConfig(kind="dense")]
)
def test_other_heads_lars_equals_optax_on_the_dense_head(head, dense_lars):
    device_mesh = mesh.make_mesh(data=4, model=2)
    with jax.set_mesh(device_mesh):
        assert_equals_dense(head, dense_lars, device_mesh)
