"""Losses by hand, and the sharded twins against the dense ones on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sicot_jax import class_sharded, losses, mesh

WEIGHTS = {"visual": 1.0, "mixed": 0.5, "semantic": 2.0}


def case(num_classes, device_mesh, *, batch=16, width=5, seed=0):
    """Embeddings divided by batch, kernel, bias and prior divided by class and padded; labels."""
    rng = np.random.default_rng(seed)
    padded = mesh.pad_classes(num_classes, device_mesh)
    kernel = np.zeros((padded, width), np.float32)
    kernel[:num_classes] = rng.normal(size=(num_classes, width))
    bias, prior = np.zeros(padded, np.float32), np.full(padded, -np.inf, np.float32)
    bias[:num_classes] = rng.normal(size=num_classes)
    prior[:num_classes] = np.log(rng.dirichlet(np.ones(num_classes)))
    label = rng.integers(0, num_classes, batch).astype(np.int32)
    embeddings = {stream: rng.normal(size=(batch, width)).astype(np.float32) for stream in WEIGHTS}
    placed = mesh.to_global({**embeddings, "label": label, "kernel": kernel, "bias": bias, "prior": prior}, device_mesh)
    return {s: placed[s] for s in WEIGHTS}, placed["label"], placed["kernel"], placed["bias"], placed["prior"]


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[1.0, 2.0, 5.0], [4.0, 4.0, 8.0]]))
    expected = -np.log([5 / 8, 4 / 16])
    np.testing.assert_allclose(losses.cross_entropy(logits, jnp.array([2, 0])), expected, rtol=1e-6)


def test_cross_entropy_of_huge_logits_is_finite():
    value = losses.cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([1]))
    np.testing.assert_allclose(value, [2e4], rtol=1e-6)


def test_loss_switches_by_hand():
    """Baseline, doubled baseline and Eq. 1 from the same two cross-entropies."""
    embeddings = {"visual": jnp.eye(2), "mixed": 2 * jnp.eye(2)}
    label = jnp.array([0, 1])
    kernel, bias = jnp.eye(2), jnp.zeros(2)
    visual, mixed = (float(np.log1p(np.exp(-x))) for x in (1.0, 2.0))
    for weights, expected in [
        ({"visual": 1.0}, visual),
        ({"visual": 2.0}, 2 * visual),
        ({"visual": 1.0, "mixed": 0.5}, visual + 0.5 * mixed),
    ]:
        total, by_stream = losses.co_training_loss(embeddings, label, kernel, bias, weights=weights)
        np.testing.assert_allclose(total, expected, rtol=1e-6)
        assert set(by_stream) == set(weights)


def test_logit_adjustment_is_balanced_softmax():
    """With tau = 1, exp(logit) is multiplied by the class's prior (Menon et al. 2021); no prior, no change."""
    embedding = {"visual": jnp.zeros((1, 2))}
    prior = jnp.log(jnp.array([0.75, 0.25, 0.0]))
    total, _ = losses.co_training_loss(
        embedding, jnp.array([1]), jnp.ones((3, 2)), jnp.zeros(3), weights={"visual": 1.0}, log_prior=prior, tau=1.0
    )
    np.testing.assert_allclose(total, -np.log(0.25 / (0.75 + 0.25 + 1.0)), rtol=1e-6)


@pytest.mark.parametrize("num_classes, tau", [(1, 0.0), (8, 0.0), (37, 1.0)])
def test_sharded_loss_and_gradients_equal_dense(device_mesh, num_classes, tau):
    embeddings, label, kernel, bias, prior = case(num_classes, device_mesh)

    def run(function, *arguments):
        def loss(embeddings, kernel, bias, label, prior):
            return function(
                embeddings, label, kernel, bias, weights=WEIGHTS, log_prior=prior, tau=tau, num_classes=num_classes
            )

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)

    (total, by_stream), gradients = run(class_sharded.co_training_loss, embeddings, kernel, bias, label, prior)
    whole = jax.tree.map(jnp.asarray, jax.device_get((embeddings, kernel, bias, label, prior)))
    (dense_total, dense_by_stream), dense_gradients = run(losses.co_training_loss, *whole)
    np.testing.assert_allclose(total, dense_total, rtol=1e-5)
    for stream in WEIGHTS:
        np.testing.assert_allclose(by_stream[stream], dense_by_stream[stream], rtol=1e-5)
    for got, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(dense_gradients), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    # Padding has no probability and no gradient.
    assert not np.asarray(gradients[1])[num_classes:].any()
    assert not np.asarray(gradients[2])[num_classes:].any()


@pytest.mark.parametrize("num_classes, k, chunk", [(1, 1, 4), (7, 3, 2), (37, 10, 3), (37, 37, 100)])
def test_streaming_top_k_equals_dense(device_mesh, num_classes, k, chunk):
    embeddings, label, kernel, bias, _ = case(num_classes, device_mesh)
    top_k = jax.jit(lambda *a: class_sharded.log_prob_top_k(*a, k=k, num_classes=num_classes, chunk=chunk))
    classes, values, log_prob = top_k(embeddings["visual"], kernel, bias, label)
    whole = [jnp.asarray(x) for x in jax.device_get((embeddings["visual"], kernel, bias, label))]
    offset = losses.class_offset(whole[2], None, 0.0, num_classes)
    dense_classes, dense_values, dense_log_prob = losses.log_prob_top_k(whole[0], whole[1], offset, whole[3], k)
    np.testing.assert_array_equal(classes, dense_classes)
    np.testing.assert_allclose(values, dense_values, rtol=1e-5, atol=1e-6)  # atol: logits near zero are differences
    np.testing.assert_allclose(log_prob, dense_log_prob, rtol=1e-5, atol=1e-6)


def test_top_k_ties_go_to_the_lower_class(device_mesh):
    kernel, bias = jnp.zeros((16, 3)), jnp.zeros(16)
    placed = mesh.to_global({"k": np.asarray(kernel), "b": np.asarray(bias)}, device_mesh)
    classes, _, _ = jax.jit(lambda e, k, b, y: class_sharded.log_prob_top_k(e, k, b, y, k=4, num_classes=13, chunk=1))(
        jnp.ones((2, 3)), placed["k"], placed["b"], jnp.zeros(2, jnp.int32)
    )
    np.testing.assert_array_equal(classes, [[0, 1, 2, 3]] * 2)


def test_more_candidates_than_classes_is_refused(one_device):
    with pytest.raises(ValueError, match=r"k=4 of num_classes=3"):
        class_sharded.log_prob_top_k(
            jnp.ones((2, 3)), jnp.ones((3, 3)), jnp.zeros(3), jnp.zeros(2, jnp.int32), k=4, num_classes=3
        )
