"""The dense loss by hand; sharded loss, update and top-k equal the dense ones on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sicot_jax.classifier import losses
from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.classifier.row_state import RowState, RowUpdate, StreamingOptions
from sicot_jax.classifier.sharded import log_prob_top_k, loss_and_update
from sicot_jax.parallel import mesh

STREAM_WEIGHTS = {"visual": 1.0, "mixed": 0.5, "semantic": 2.0}


def case(num_classes, device_mesh, *, batch=16, width=5, seed=0):
    """Embeddings and labels divided by batch; weights and log prior divided by class, padded."""
    rng = np.random.default_rng(seed)
    padded = mesh.pad_classes(num_classes, device_mesh)
    kernel = np.zeros((padded, width), np.float32)
    kernel[:num_classes] = rng.normal(size=(num_classes, width))
    bias, prior = np.zeros(padded, np.float32), np.zeros(padded, np.float32)
    bias[:num_classes] = rng.normal(size=num_classes)
    prior[:num_classes] = np.log(rng.dirichlet(np.ones(num_classes)))
    label = rng.integers(0, num_classes, batch).astype(np.int32)
    embeddings = {
        stream: rng.normal(size=(batch, width)).astype(np.float32) for stream in STREAM_WEIGHTS
    }
    placed = mesh.to_global(
        {**embeddings, "label": label, "kernel": kernel, "bias": bias, "prior": prior}, device_mesh
    )
    return (
        {stream: placed[stream] for stream in STREAM_WEIGHTS},
        placed["label"],
        ClassWeights(placed["kernel"], placed["bias"]),
        placed["prior"],
    )


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
    class_weights = ClassWeights(jnp.eye(2), jnp.zeros(2))
    visual, mixed = (float(np.log1p(np.exp(-x))) for x in (1.0, 2.0))
    for stream_weights, expected in [
        ({"visual": 1.0}, visual),
        ({"visual": 2.0}, 2 * visual),
        ({"visual": 1.0, "mixed": 0.5}, visual + 0.5 * mixed),
    ]:
        total, by_stream = losses.co_training_loss(
            embeddings, label, class_weights, stream_weights=stream_weights
        )
        np.testing.assert_allclose(total, expected, rtol=1e-6)
        assert set(by_stream) == set(stream_weights)


def test_logit_adjustment_is_balanced_softmax():
    """With tau = 1, exp(logit) is multiplied by the class's prior (Menon et al. 2021)."""
    embedding = {"visual": jnp.zeros((1, 2))}
    prior = jnp.log(jnp.array([0.5, 0.2, 0.3]))
    total, _ = losses.co_training_loss(
        embedding,
        jnp.array([1]),
        ClassWeights(jnp.ones((3, 2)), jnp.zeros(3)),
        stream_weights={"visual": 1.0},
        log_prior=prior,
        options=losses.LossOptions(3, tau=1.0),
    )
    np.testing.assert_allclose(total, -np.log(0.2), rtol=1e-6)


def test_label_smoothing_by_hand():
    """Two classes, logits 1 and 0, smoothing 0.2: the target is (0.9, 0.1). A third column is
    padding.
    """
    logits = jnp.array([[1.0, 0.0, -jnp.inf]])
    log_sum = np.log(np.e + 1)
    value = losses.cross_entropy(logits, jnp.array([0]), smoothing=0.2, num_classes=2)
    np.testing.assert_allclose(value, [0.9 * (log_sum - 1) + 0.1 * log_sum], rtol=1e-6)


@pytest.mark.parametrize(
    ("tau", "keep_logits", "smoothing"),
    [(0.0, None, 0.0), (1.0, jnp.float32, 0.3)],
    ids=["computed again", "kept, smoothed"],
)
def test_sharded_loss_and_gradients_equal_dense(device_mesh, tau, keep_logits, smoothing):
    """In chunks, with a remainder."""
    assert_sharded_equals_dense(device_mesh, 300, 7, tau, keep_logits, smoothing)


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
@pytest.mark.parametrize(
    ("num_classes", "chunk", "tau", "keep_logits", "smoothing"),
    [(1, 4, 0.0, None, 0.0), (8, 8, 0.0, jnp.float32, 0.3), (37, 100, 1.0, None, 0.1)],
    ids=["one class", "one chunk, kept", "chunk larger than shard"],
)
def test_sharded_loss_and_gradients_of_few_classes(
    device_mesh, num_classes, chunk, tau, keep_logits, smoothing
):
    """Devices with nothing but padding, and single chunks."""
    assert_sharded_equals_dense(device_mesh, num_classes, chunk, tau, keep_logits, smoothing)


def assert_sharded_equals_dense(device_mesh, num_classes, chunk, tau, keep_logits, smoothing):
    embeddings, label, class_weights, prior = case(num_classes, device_mesh)
    options = {"tau": tau, "smoothing": smoothing, "num_classes": num_classes}

    @jax.jit
    def sharded(embeddings, label, class_weights, prior):
        """The gradient as new weights, its negative as the optimizer's state."""

        def apply(gradient, state):
            negative = jax.tree.map(jnp.negative, gradient)
            opt_state = {"momentum": negative, "count": state.opt_state["count"] + 1}
            return dataclasses.replace(state, weights=gradient, opt_state=opt_state)

        opt_state = {"momentum": class_weights, "count": jnp.int32(6)}
        return loss_and_update(
            embeddings,
            label,
            RowState(class_weights, opt_state),
            prior,
            stream_weights=STREAM_WEIGHTS,
            options=StreamingOptions(**options, chunk=chunk, keep_logits=keep_logits),
            row_update=RowUpdate(apply),
        )

    actual = sharded(embeddings, label, class_weights, prior)
    on_one_device = jax.tree.map(
        jnp.asarray, jax.device_get((embeddings, label, class_weights, prior))
    )

    @jax.jit
    def dense(embeddings, label, class_weights, prior):
        def loss(embeddings, class_weights):
            return losses.co_training_loss(
                embeddings,
                label,
                class_weights,
                stream_weights=STREAM_WEIGHTS,
                log_prior=prior,
                options=losses.LossOptions(**options),
            )

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(embeddings, class_weights)

    (total, by_stream), (cotangents, gradient) = dense(*on_one_device)
    np.testing.assert_allclose(actual[0]["total"], total, rtol=1e-5)
    new = actual[2]
    # What has no entry per class is updated once, not once per chunk.
    assert new.opt_state["count"] == 7
    for a, b in [
        (actual[0], {"total": total, **by_stream}),
        (actual[1], cotangents),
        (vars(new.weights), vars(gradient)),
        (vars(new.opt_state["momentum"]), vars(jax.tree.map(jnp.negative, gradient))),
    ]:
        assert a.keys() == b.keys()
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=name)
    # Padding has no probability and no gradient.
    assert not np.asarray(new.weights.kernel)[num_classes:].any()
    assert not np.asarray(new.weights.bias)[num_classes:].any()


@pytest.mark.parametrize(("tau", "smoothing"), [(0.0, 0.0), (1.0, 0.2)])
def test_logits_kept_in_bfloat16_give_the_loss_of_rounded_logits(device_mesh, tau, smoothing):
    """Loss, cotangents and gradients equal the dense ones of rounded logits, through which the
    gradient passes as if nothing were rounded; the probabilities sum to 1. Logits are large, as
    those of a trained network are: rounding moves them by up to 0.25.
    """
    embeddings, label, class_weights, prior = case(50, device_mesh)
    embeddings = {stream: 12 * embedding for stream, embedding in embeddings.items()}
    options = {"tau": tau, "smoothing": smoothing, "num_classes": 50}
    values, cotangents, new = jax.jit(
        lambda *a: loss_and_update(
            *a,
            stream_weights=STREAM_WEIGHTS,
            options=StreamingOptions(**options, chunk=4, keep_logits=jnp.bfloat16),
            row_update=RowUpdate(lambda g, state: dataclasses.replace(state, weights=g)),
        )
    )(embeddings, label, RowState(class_weights, ()), prior)
    new, embeddings, label, weights, prior = jax.device_get(
        (new, embeddings, label, class_weights, prior)
    )
    kernel, classes, batch = weights.kernel[:50].astype(float), np.arange(50), len(label)
    wanted_kernel, wanted_bias = np.zeros_like(kernel), np.zeros(50)
    for stream, weight in STREAM_WEIGHTS.items():
        embedding = embeddings[stream].astype(float)
        exact = embedding @ kernel.T + weights.bias[:50] + tau * prior[:50]
        logits = exact.astype(jnp.bfloat16).astype(float)
        assert np.abs(logits - exact).max() > 0.1
        log_sum = np.log(np.exp(logits).sum(1, keepdims=True))
        target = (1 - smoothing) * (classes == label[:, None]) + smoothing / 50
        loss = (log_sum[:, 0] - (target * logits).sum(1)).mean()
        logit_gradient = weight / batch * (np.exp(logits - log_sum) - target)
        np.testing.assert_allclose(values[stream], loss, rtol=1e-5)
        np.testing.assert_allclose(cotangents[stream], logit_gradient @ kernel, atol=2e-5)
        wanted_kernel += logit_gradient.T @ embedding
        wanted_bias += logit_gradient.sum(0)
    np.testing.assert_allclose(new.weights.kernel[:50], wanted_kernel, atol=3e-4)
    np.testing.assert_allclose(new.weights.bias[:50], wanted_bias, atol=2e-5)
    # Targets sum to 1, and so do the probabilities where their differences sum to 0.
    np.testing.assert_allclose(np.sum(new.weights.bias), 0, atol=2e-5)


def test_nothing_is_updated_where_the_loss_is_not_finite(device_mesh):
    embeddings, label, class_weights, prior = case(37, device_mesh)
    embeddings["mixed"] = embeddings["mixed"] * jnp.where(jnp.arange(5) == 2, jnp.nan, 1.0)
    state = RowState(class_weights, jnp.int32(6))

    def apply(gradient, state):
        weights = jax.tree.map(jnp.add, state.weights, gradient)
        return dataclasses.replace(state, weights=weights, opt_state=state.opt_state + 1)

    values, _, new = jax.jit(
        lambda *a: loss_and_update(
            *a,
            stream_weights=STREAM_WEIGHTS,
            options=StreamingOptions(num_classes=37, chunk=2),
            row_update=RowUpdate(apply),
        )
    )(embeddings, label, state, prior)
    assert np.isnan(values["total"])
    assert np.isfinite(values["visual"])
    jax.tree.map(np.testing.assert_array_equal, new, state)


def test_streaming_top_k_equals_dense(device_mesh):
    """More candidates than a device has rows, in chunks, with a remainder."""
    assert_top_k_equals_dense(device_mesh, 37, 10, 3)


@pytest.mark.parametrize("device_mesh", [(4, 2)], indirect=True)
@pytest.mark.parametrize(("num_classes", "k", "chunk"), [(1, 1, 4), (7, 3, 2), (37, 37, 100)])
def test_streaming_top_k_of_few_classes_or_all(device_mesh, num_classes, k, chunk):
    assert_top_k_equals_dense(device_mesh, num_classes, k, chunk)


def assert_top_k_equals_dense(device_mesh, num_classes, k, chunk):
    embeddings, label, class_weights, _ = case(num_classes, device_mesh)
    top_k = jax.jit(lambda *a: log_prob_top_k(*a, k=k, num_classes=num_classes, chunk=chunk))
    classes, values, log_prob = top_k(embeddings["visual"], class_weights, label)
    embedding, dense_weights, dense_label = jax.tree.map(
        jnp.asarray, jax.device_get((embeddings["visual"], class_weights, label))
    )
    offsets = losses.logit_offsets(dense_weights.bias, None, 0.0, num_classes)
    dense_classes, dense_values, dense_log_prob = losses.dense_log_prob_top_k(
        embedding, dense_weights.kernel, offsets, dense_label, k
    )
    np.testing.assert_array_equal(classes, dense_classes)
    # atol: logits near zero are differences.
    np.testing.assert_allclose(values, dense_values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_prob, dense_log_prob, rtol=1e-5, atol=1e-6)


def test_top_k_ties_go_to_the_lower_class(device_mesh):
    arrays = {"kernel": np.zeros((16, 3), np.float32), "bias": np.zeros(16, np.float32)}
    class_weights = ClassWeights(**mesh.to_global(arrays, device_mesh))
    classes, _, _ = jax.jit(lambda *a: log_prob_top_k(*a, k=4, num_classes=13, chunk=1))(
        jnp.ones((2, 3)), class_weights, jnp.zeros(2, jnp.int32)
    )
    np.testing.assert_array_equal(classes, [[0, 1, 2, 3]] * 2)


def test_more_candidates_than_classes_is_refused(one_device):
    class_weights = ClassWeights(jnp.ones((3, 3)), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"k=4 of num_classes=3"):
        log_prob_top_k(jnp.ones((2, 3)), class_weights, jnp.zeros(2, jnp.int32), k=4, num_classes=3)
