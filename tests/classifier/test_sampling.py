"""Which classes a sampled head takes, the graph behind it, and its update against a hand loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sicot_jax.classifier import heads, lazy_update
from sicot_jax.classifier import sampling as sampled
from sicot_jax.config import Config, ConfigError, HeadConfig, LossConfig, OptimConfig
from sicot_jax.parallel import mesh
from sicot_jax.training import optimizer as optim

SGD = OptimConfig(momentum=0.9, weight_decay=0.05)


@pytest.mark.parametrize("rows", [1, 2, 7, 100, 1000])
def test_random_places_are_a_permutation(rows):
    slots = sampled.grid_size(rows)
    places = np.asarray(sampled.random_places(jax.random.key(3), rows, slots))
    assert sorted(places[places >= 0]) == list(range(rows))
    assert slots - rows <= max(1, np.sqrt(rows))


def test_random_places_take_every_row_equally_often():
    draws = jax.jit(jax.vmap(lambda key: sampled.random_places(key, 100, 10)))(
        jax.random.split(jax.random.key(0), 4000)
    )
    counts = np.bincount(np.asarray(draws).ravel() + 1, minlength=101)[1:]
    # 4,000 draws of 10 of 100: 400 each, binomial standard deviation 19; five of them.
    assert np.abs(counts - 400).max() < 95
    together = (np.asarray(draws) == 7).any(1) & (np.asarray(draws) == 8).any(1)
    assert (
        15 < together.sum() < 65
    )  # 4,000 * 10 / 100 * 9 / 99 = 36, standard deviation 6: rows 7 and 8 are no pair


def place(device_mesh, **arrays):
    return mesh.to_global({name: np.asarray(x) for name, x in arrays.items()}, device_mesh)


def taken_classes(active, num_rows, device_mesh):
    """Class ids of the slots, and that no device takes one twice."""
    places = np.asarray(active).reshape(device_mesh.size, -1)
    ids = [device * (num_rows // device_mesh.size) + p[p >= 0] for device, p in enumerate(places)]
    assert all(len(set(i)) == len(i) for i in ids)
    assert all((p < num_rows // device_mesh.size).all() for p in places)
    return set(np.concatenate(ids).tolist())


def test_uniform_classes_hold_the_labels_and_a_share_of_the_others(device_mesh):
    label = np.array([3, 1499, 3, 0] * 2, np.int32)
    placed = place(device_mesh, label=label)
    choose = jax.jit(
        lambda key, y, rate: sampled.uniform_classes(key, y, num_rows=1600, rate=rate),
        static_argnums=2,
    )
    one = taken_classes(choose(jax.random.key(0), placed["label"], 0.1), 1600, device_mesh)
    other = taken_classes(choose(jax.random.key(1), placed["label"], 0.1), 1600, device_mesh)
    assert set(label.tolist()) <= one & other
    assert 140 <= len(one) <= 180
    assert len(one & other) < 50  # two draws share a tenth of a tenth, and the labels
    assert taken_classes(choose(jax.random.key(0), placed["label"], 1.0), 1600, device_mesh) == set(
        range(1600)
    )


@pytest.mark.parametrize(("width", "k"), [(160, 3), (1600, 99), (160, 10), (161, 3), (5, 5)])
def test_top_k_of_groups_is_top_k(width, k):
    """Grouped where there are more groups than k, else XLA's own; nine in ten entries are equal."""
    x = np.random.default_rng(0).normal(size=(20, width)).astype(np.float32)
    x[:, ::10] += 3
    values, places = jax.jit(lambda x: sampled.top_k(x, k))(np.maximum(x, 1))
    np.testing.assert_array_equal(values, np.sort(np.maximum(x, 1), 1)[:, ::-1][:, :k])
    np.testing.assert_array_equal(
        np.take_along_axis(np.maximum(x, 1), np.asarray(places), 1), values
    )
    assert all(len(set(row)) == k for row in np.asarray(places).tolist())


@pytest.mark.parametrize(
    ("rows", "chunk"), [(1, 4), (15, 100), (16, 16), (100, 100), (100, 40), (96, 32), (97, 32)]
)
def test_equal_chunks_see_each_row_once(rows, chunk):
    def add(seen_rows, first, size, seen):
        assert size <= chunk + sampled.TOP_K_GROUP
        assert size == rows or size % sampled.TOP_K_GROUP == 0
        return seen_rows.at[first + jnp.arange(size)].add(~seen)

    assert (
        sampled.over_equal_chunks(add, jnp.zeros(rows, jnp.int32), rows, chunk).tolist()
        == [1] * rows
    )


@pytest.mark.parametrize(
    ("num_classes", "k", "chunk"), [(37, 5, 3), (40, 39, 100), (1000, 3, 100), (1001, 2, 1000)]
)
def test_class_graph_equals_dense(device_mesh, num_classes, k, chunk):
    rng = np.random.default_rng(0)
    padded = mesh.pad_classes(num_classes, device_mesh)
    kernel = np.zeros((padded, 6), np.float32)
    kernel[:num_classes] = rng.normal(size=(num_classes, 6))
    placed = place(device_mesh, kernel=kernel)
    graph = jax.jit(
        lambda w: sampled.class_graph(w, num_classes=num_classes, k=k, queries=7, chunk=chunk)
    )(placed["kernel"])
    unit = kernel[:num_classes] / np.linalg.norm(kernel[:num_classes], axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    np.testing.assert_array_equal(np.asarray(graph)[:num_classes], np.argsort(-cosine, 1)[:, :k])


def test_neighbour_classes_are_the_nearest_ones_first(device_mesh):
    """320 classes on a ring, each with 20 neighbours: c + 1, c - 1, c + 2, ...; a quarter of the
    rows fits 8 of them.
    """
    classes = np.arange(320)
    steps = np.stack([np.arange(1, 11), -np.arange(1, 11)], 1).ravel()
    neighbours = ((classes[:, None] + steps) % 320).astype(np.int32)
    label = np.array([5, 5, 200, 319] * 2, np.int32)
    placed = place(device_mesh, neighbours=neighbours, label=label)
    choose = jax.jit(lambda key, y, n: sampled.neighbour_classes(key, y, n, rate=0.25))
    taken = taken_classes(
        choose(jax.random.key(0), placed["label"], placed["neighbours"]), 320, device_mesh
    )
    assert set(label.tolist()) <= taken
    nearest = {int(n) for c in (5, 200, 319) for n in neighbours[c][:4]}
    assert (
        nearest <= taken
    )  # at most 8 of 40 rows of a device: all first four ranks fit on every mesh
    assert 60 <= len(taken) <= 3 + 90


def test_neighbours_that_do_not_fit_leave_the_farthest_out(one_device):
    """One label, 20 neighbours, 10 slots: ranks 0 to 9 and not one of the others before them."""
    neighbours = np.tile(np.arange(100, 120, dtype=np.int32), (1000, 1))
    placed = place(one_device, neighbours=neighbours, label=np.array([7], np.int32))
    choose = jax.jit(lambda key, y, n: sampled.neighbour_classes(key, y, n, rate=10 / 1024))
    active = choose(jax.random.key(0), placed["label"], placed["neighbours"])
    taken = taken_classes(active, 1000, one_device)
    assert set(range(100, 110)) | {7} == taken


def run_head(config, device_mesh, *, steps, num_classes=37, batch=16, width=5):
    """Classifier before and after, and the batches, of `steps` steps with a learning rate that
    changes.
    """
    schedule = optax.linear_schedule(0.5, 0.1, 10)
    tx = optim.make_optimizer(SGD, schedule)
    head = heads.make_head(
        config,
        LossConfig(visual=1.0, mixed=0.5, logit_adjustment=1.0),
        num_classes=num_classes,
        tx=tx,
        catch_up=lazy_update.make_catch_up(SGD, schedule),
    )
    numbers = heads.numbers_of(LossConfig(visual=1.0, mixed=0.5), learning_rate=1.0, seed=4)
    rng = np.random.default_rng(0)
    prior = np.zeros(mesh.pad_classes(num_classes, device_mesh), np.float32)
    prior[:num_classes] = np.log(rng.dirichlet(np.ones(num_classes)))
    start = jax.jit(
        lambda p: heads.start_classifier(
            config, jax.random.key(1), p, num_classes=num_classes, width=width, tx=tx
        )
    )
    classifier = start(place(device_mesh, prior=prior)["prior"])
    before, batches, losses = jax.device_get(classifier), [], []
    head = jax.jit(head)
    for _ in range(steps):
        embeddings = {
            s: 3 * rng.normal(size=(batch, width)).astype(np.float32) for s in ("visual", "mixed")
        }
        label = rng.integers(0, num_classes, batch).astype(np.int32)
        placed = place(device_mesh, label=label, **embeddings)
        label_placed = placed.pop("label")
        values, cotangents, classifier = head(placed, label_placed, classifier, numbers)
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
    _, got, _, losses = run_head(some, device_mesh, steps=3)
    trained = [(c.kernel, c.bias, c.opt_state) for c in (got, exact)]
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
    """The graph and the choice of neighbours have fast tests of their own on all meshes."""
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


def test_untouched_rows_stand_still_and_catch_up_on_return(device_mesh):
    """Eight steps at rate 0.2, against a loop by hand in numpy."""
    num_classes, steps = 37, 8
    config = HeadConfig(kind="sampled", sample_rate=0.2, chunk=3)
    before, after, batches, losses = run_head(config, device_mesh, steps=steps)
    rows = before.kernel.shape[0]
    kernel, bias = before.kernel.astype(np.float64), before.bias.astype(np.float64)
    momentum, bias_momentum = np.zeros_like(kernel), np.zeros_like(bias)
    touched = np.zeros(rows, int)
    skipped = 0
    choose = jax.jit(
        lambda key, label: sampled.uniform_classes(key, label, num_rows=rows, rate=0.2)
    )
    for step, ((embeddings, label), (values, cotangents)) in enumerate(
        zip(batches, losses, strict=True)
    ):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(4), 2), step)
        placed = place(device_mesh, label=label)["label"]
        active = choose(key, placed)
        taken = np.array(
            sorted(c for c in taken_classes(active, rows, device_mesh) if c < num_classes)
        )
        rate = float(np.float32(0.5 - 0.04 * step))
        missed = (step - touched[taken])[:, None]
        skipped += int((missed > 1).sum())
        momentum[taken] *= 0.9**missed
        bias_momentum[taken] *= 0.9 ** missed[:, 0]
        kernel[taken] *= (1 - rate * 0.05) ** missed
        gradient, bias_gradient, total = np.zeros((len(taken), 5)), np.zeros(len(taken)), 0.0
        for stream, weight in (("visual", 1.0), ("mixed", 0.5)):
            x = embeddings[stream].astype(np.float64)
            logits = x @ kernel[taken].T + bias[taken] + before.log_prior[taken]
            probability = np.exp(logits - logits.max(1, keepdims=True))
            probability /= probability.sum(1, keepdims=True)
            hit = label[:, None] == taken
            total += weight * -np.log(probability[hit]).mean()
            pull = weight * (probability - hit) / len(label)
            np.testing.assert_allclose(
                cotangents[stream], pull @ kernel[taken], rtol=1e-4, atol=1e-6
            )
            gradient += pull.T @ x
            bias_gradient += pull.sum(0)
        np.testing.assert_allclose(values["total"], total, rtol=1e-5)
        momentum[taken] = 0.9 * momentum[taken] + gradient + 0.05 * kernel[taken]
        bias_momentum[taken] = 0.9 * bias_momentum[taken] + bias_gradient
        kernel[taken] -= rate * momentum[taken]
        bias[taken] -= rate * bias_momentum[taken]
        touched[taken] = step + 1
    assert skipped > 10  # rows came back after more than one step
    np.testing.assert_allclose(after.kernel, kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after.bias, bias, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(after.sampling["touched"][:num_classes], touched[:num_classes])
    assert after.sampling["step"] == steps


def test_a_head_that_cannot_run_is_refused_with_both_numbers():
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
            heads.check(config, num_classes=num_classes, devices=devices)
    with pytest.raises(ConfigError, match="head.sample_rate=0.0, wanted"):
        Config(head=HeadConfig(sample_rate=0.0))
    with pytest.raises(ConfigError, match=r"'knn' with optim.name='adamw'.*set optim.name=sgd"):
        Config(head=HeadConfig(kind="knn"), optim=OptimConfig(name="adamw"))
