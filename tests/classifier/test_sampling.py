"""Choice of classes by sampled heads, and their update against a loop by hand."""

import jax
import numpy as np
import optax
import pytest

from sicot_jax.classifier.heads import check_head, make_head
from sicot_jax.classifier.lazy_update import make_lazy_update
from sicot_jax.classifier.sampling import (
    grid_size,
    neighbour_classes,
    random_rows,
    uniform_classes,
)
from sicot_jax.classifier.state import init_classifier, make_hyperparams
from sicot_jax.config import Config, ConfigError, HeadConfig, LossConfig, OptimConfig
from sicot_jax.parallel import mesh
from sicot_jax.training import optimizer as optim

SGD = OptimConfig(momentum=0.9, weight_decay=0.05)


@pytest.mark.parametrize("rows", [1, 2, 7, 100, 1000])
def test_random_rows_are_a_permutation(rows):
    slots = grid_size(rows)
    drawn = np.asarray(random_rows(jax.random.key(3), rows, slots))
    assert sorted(drawn[drawn >= 0]) == list(range(rows))
    assert slots - rows <= max(1, np.sqrt(rows))


def test_random_rows_take_every_row_equally_often():
    draws = jax.jit(jax.vmap(lambda key: random_rows(key, 100, 10)))(
        jax.random.split(jax.random.key(0), 4000)
    )
    counts = np.bincount(np.asarray(draws).ravel() + 1, minlength=101)[1:]
    # 4,000 draws of 10 of 100: 400 each, binomial standard deviation 19; five of them.
    assert np.abs(counts - 400).max() < 95
    both = (np.asarray(draws) == 7).any(1) & (np.asarray(draws) == 8).any(1)
    assert (
        15 < both.sum() < 65
    )  # 4,000 * 10 / 100 * 9 / 99 = 36, standard deviation 6: rows 7 and 8 are no pair


def to_devices(device_mesh, **arrays):
    return mesh.to_global({name: np.asarray(x) for name, x in arrays.items()}, device_mesh)


def active_classes(active, num_rows, device_mesh):
    """Class ids of the slots; checks that no device takes one twice."""
    slots = np.asarray(active).reshape(device_mesh.size, -1)
    ids = [device * (num_rows // device_mesh.size) + s[s >= 0] for device, s in enumerate(slots)]
    assert all(len(set(i)) == len(i) for i in ids)
    assert all((s < num_rows // device_mesh.size).all() for s in slots)
    return set(np.concatenate(ids).tolist())


def test_uniform_classes_hold_the_labels_and_a_share_of_the_others(device_mesh):
    label = np.array([3, 1499, 3, 0] * 2, np.int32)
    arrays = to_devices(device_mesh, label=label)
    choose = jax.jit(
        lambda key, y, rate: uniform_classes(key, y, num_rows=1600, rate=rate),
        static_argnums=2,
    )
    first = active_classes(choose(jax.random.key(0), arrays["label"], 0.1), 1600, device_mesh)
    second = active_classes(choose(jax.random.key(1), arrays["label"], 0.1), 1600, device_mesh)
    assert set(label.tolist()) <= first & second
    assert 140 <= len(first) <= 180
    assert len(first & second) < 50  # two draws share a tenth of a tenth, and the labels
    assert active_classes(
        choose(jax.random.key(0), arrays["label"], 1.0), 1600, device_mesh
    ) == set(range(1600))


def test_neighbour_classes_are_the_nearest_ones_first(device_mesh):
    """320 classes on a ring, each with 20 neighbours: c + 1, c - 1, c + 2, ...; a quarter of the
    rows fits 8 of them.
    """
    classes = np.arange(320)
    steps = np.stack([np.arange(1, 11), -np.arange(1, 11)], 1).ravel()
    neighbours = ((classes[:, None] + steps) % 320).astype(np.int32)
    label = np.array([5, 5, 200, 319] * 2, np.int32)
    arrays = to_devices(device_mesh, neighbours=neighbours, label=label)
    choose = jax.jit(lambda key, y, n: neighbour_classes(key, y, n, rate=0.25))
    active_ids = active_classes(
        choose(jax.random.key(0), arrays["label"], arrays["neighbours"]), 320, device_mesh
    )
    assert set(label.tolist()) <= active_ids
    nearest = {int(n) for c in (5, 200, 319) for n in neighbours[c][:4]}
    assert (
        nearest <= active_ids
    )  # at most 8 of 40 rows of a device: all first four ranks fit on every mesh
    assert 60 <= len(active_ids) <= 3 + 90


def test_neighbours_that_do_not_fit_are_the_farthest(one_device):
    """One label, 20 neighbours, 10 slots: ranks 0 to 9 and not one of the others before them."""
    neighbours = np.tile(np.arange(100, 120, dtype=np.int32), (1000, 1))
    arrays = to_devices(one_device, neighbours=neighbours, label=np.array([7], np.int32))
    choose = jax.jit(lambda key, y, n: neighbour_classes(key, y, n, rate=10 / 1024))
    active = choose(jax.random.key(0), arrays["label"], arrays["neighbours"])
    active_ids = active_classes(active, 1000, one_device)
    assert set(range(100, 110)) | {7} == active_ids


def run_head(config, device_mesh, *, steps, num_classes=37, batch=16, width=5):
    """Classifier before and after, and the batches, of `steps` steps with a learning rate that
    changes.
    """
    schedule = optax.linear_schedule(0.5, 0.1, 10)
    optimizer = optim.make_optimizer(SGD, schedule)
    head = make_head(
        config,
        LossConfig(visual=1.0, mixed=0.5, logit_adjustment=1.0),
        num_classes=num_classes,
        optimizer=optimizer,
        lazy_update=make_lazy_update(SGD, schedule),
    )
    hyperparams = make_hyperparams(LossConfig(visual=1.0, mixed=0.5), learning_rate=1.0, seed=4)
    rng = np.random.default_rng(0)
    prior = np.zeros(mesh.pad_classes(num_classes, device_mesh), np.float32)
    prior[:num_classes] = np.log(rng.dirichlet(np.ones(num_classes)))
    start = jax.jit(
        lambda p: init_classifier(
            config,
            jax.random.key(1),
            p,
            num_classes=num_classes,
            width=width,
            optimizer=optimizer,
        )
    )
    classifier = start(to_devices(device_mesh, prior=prior)["prior"])
    before, batches, losses = jax.device_get(classifier), [], []
    head = jax.jit(head)
    for _ in range(steps):
        embeddings = {
            s: 3 * rng.normal(size=(batch, width)).astype(np.float32) for s in ("visual", "mixed")
        }
        label = rng.integers(0, num_classes, batch).astype(np.int32)
        arrays = to_devices(device_mesh, label=label, **embeddings)
        label_on_devices = arrays.pop("label")
        values, cotangents, classifier = head(arrays, label_on_devices, classifier, hyperparams)
        batches.append((embeddings, label))
        losses.append(jax.device_get((values, cotangents)))
    return before, jax.device_get(classifier), batches, losses


@pytest.fixture(scope="module")
def dense_run():
    device_mesh = mesh.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(device_mesh):
        return run_head(HeadConfig(kind="dense"), device_mesh, steps=3)


def assert_rate_one_equals_dense(kind, dense_run, device_mesh):
    _, exact, _, exact_losses = dense_run
    some = HeadConfig(kind=kind, sample_rate=1.0, neighbours=3, rebuild_steps=2, chunk=4)
    _, sampled, _, losses = run_head(some, device_mesh, steps=3)
    trained = [(c.weights.kernel, c.weights.bias, c.opt_state) for c in (sampled, exact)]
    for a, b in zip(
        jax.tree.leaves((losses, trained[0])),
        jax.tree.leaves((exact_losses, trained[1])),
        strict=True,
    ):
        a = a[: len(b)] if b.ndim else a  # without padding
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "device_mesh",
    [
        (1, 1),
        (4, 2),
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(8, 1), (1, 8), (2, 4)]),
    ],
    indirect=True,
)
def test_neighbours_at_rate_one_equal_the_dense_head(device_mesh, dense_run):
    """The graph and the choice of neighbours have separate fast tests on all meshes."""
    assert_rate_one_equals_dense("knn", dense_run, device_mesh)


@pytest.mark.parametrize(
    "device_mesh",
    [
        (4, 2),
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in [(1, 1), (8, 1), (1, 8), (2, 4)]
        ),
    ],
    indirect=True,
)
def test_random_classes_at_rate_one_equal_the_dense_head(device_mesh, dense_run):
    assert_rate_one_equals_dense("sampled", dense_run, device_mesh)


def test_lazy_update_applies_steps_behind_momentum_and_decay(device_mesh):
    """Eight steps at rate 0.2, against a loop by hand in numpy."""
    num_classes, steps = 37, 8
    config = HeadConfig(kind="sampled", sample_rate=0.2, chunk=3)
    before, after, batches, losses = run_head(config, device_mesh, steps=steps)
    rows = before.weights.kernel.shape[0]
    kernel = before.weights.kernel.astype(np.float64)
    bias = before.weights.bias.astype(np.float64)
    momentum, bias_momentum = np.zeros_like(kernel), np.zeros_like(bias)
    last_update = np.zeros(rows, int)
    skipped = 0
    choose = jax.jit(lambda key, label: uniform_classes(key, label, num_rows=rows, rate=0.2))
    for step, ((embeddings, label), (values, cotangents)) in enumerate(
        zip(batches, losses, strict=True)
    ):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(4), 2), step)
        label_on_devices = to_devices(device_mesh, label=label)["label"]
        active = choose(key, label_on_devices)
        active_ids = np.array(
            sorted(c for c in active_classes(active, rows, device_mesh) if c < num_classes)
        )
        rate = float(np.float32(0.5 - 0.04 * step))
        steps_behind = (step - last_update[active_ids])[:, None]
        skipped += int((steps_behind > 1).sum())
        momentum[active_ids] *= 0.9**steps_behind
        bias_momentum[active_ids] *= 0.9 ** steps_behind[:, 0]
        kernel[active_ids] *= (1 - rate * 0.05) ** steps_behind
        gradient, bias_gradient, total = (
            np.zeros((len(active_ids), 5)),
            np.zeros(len(active_ids)),
            0.0,
        )
        for stream, weight in (("visual", 1.0), ("mixed", 0.5)):
            x = embeddings[stream].astype(np.float64)
            logits = x @ kernel[active_ids].T + bias[active_ids] + before.log_prior[active_ids]
            probability = np.exp(logits - logits.max(1, keepdims=True))
            probability /= probability.sum(1, keepdims=True)
            is_label = label[:, None] == active_ids
            total += weight * -np.log(probability[is_label]).mean()
            logit_gradient = weight * (probability - is_label) / len(label)
            np.testing.assert_allclose(
                cotangents[stream], logit_gradient @ kernel[active_ids], rtol=1e-4, atol=1e-6
            )
            gradient += logit_gradient.T @ x
            bias_gradient += logit_gradient.sum(0)
        np.testing.assert_allclose(values["total"], total, rtol=1e-5)
        momentum[active_ids] = 0.9 * momentum[active_ids] + gradient + 0.05 * kernel[active_ids]
        bias_momentum[active_ids] = 0.9 * bias_momentum[active_ids] + bias_gradient
        kernel[active_ids] -= rate * momentum[active_ids]
        bias[active_ids] -= rate * bias_momentum[active_ids]
        last_update[active_ids] = step + 1
    assert skipped > 10  # rows took part again after more than one step
    np.testing.assert_allclose(after.weights.kernel, kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after.weights.bias, bias, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(
        after.sampling.last_update[:num_classes], last_update[:num_classes]
    )
    assert after.sampling.step == steps


def test_heads_that_cannot_run_are_refused():
    for config, num_classes, devices, message in [
        (HeadConfig(), 7, 8, r"7 classes on 8 devices.*lower mesh"),
        (
            HeadConfig(kind="sampled", sample_rate=0.01),
            100,
            8,
            r"head.sample_rate=0.01 of 13 classes a device.*raise it",
        ),
        (
            HeadConfig(kind="knn", neighbours=64),
            64,
            1,
            r"head.neighbours=64 of 64 classes.*lower it",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_head(config, num_classes=num_classes, devices=devices)
    with pytest.raises(ConfigError, match=r"head.sample_rate=0.0, wanted"):
        Config(head=HeadConfig(sample_rate=0.0))
    with pytest.raises(ConfigError, match=r"'knn' with optim.name='adamw'.*set optim.name=sgd"):
        Config(head=HeadConfig(kind="knn"), optim=OptimConfig(name="adamw"))
