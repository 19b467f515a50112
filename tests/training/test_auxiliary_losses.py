"""Auxiliary losses by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sicot_jax.training import auxiliary_losses as losses


def test_tag_prediction_by_hand():
    """Titles "a b b", "a c" and "d": every distinct word counts once; "d" is no tag, so its photo
    is left out, as is the one without a title.
    """
    token_ids = np.array([[1, 2, 2], [1, 3, 0], [4, 0, 0], [0, 0, 0]])
    logits = np.array(
        [[0.5, 1.0, -2.0], [2.0, -1.0, 0.3], [9.0, 0.0, 9.0], [0.0, 8.0, 1.0]], np.float32
    )
    wanted = [
        np.log(np.exp(z).sum()) - z[tags].mean()
        for z, tags in zip(logits, [[0, 1], [0, 2]], strict=False)
    ]
    loss = losses.tag_prediction_loss(jnp.asarray(logits), jnp.asarray(token_ids))
    np.testing.assert_allclose(loss, np.mean(wanted), rtol=1e-6)


def test_tag_prediction_without_a_title_is_zero():
    value, gradient = jax.value_and_grad(losses.tag_prediction_loss)(
        jnp.ones((2, 3)), jnp.zeros((2, 4), int)
    )
    assert value == 0
    assert not gradient.any()


def test_code_similarity_by_hand():
    """Two pairs of opposite embeddings have orthogonal codes; across the pairs embeddings are
    orthogonal and codes opposite: (0 + 1)^2 for four of the sixteen pairs, (-1 - 0)^2 for four
      more.
    """
    unit = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    bits = jnp.array([[0.9, 0.8], [0.7, 0.1], [0.2, 0.9], [0.3, 0.4]])
    codes = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    cosine = np.array([[1, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 1, -1], [0, 0, -1, 1]])
    assert np.mean((codes @ codes.T / 2 - 2 / np.pi * np.arcsin(cosine)) ** 2) == 8 / 16
    wanted = np.mean(
        (codes @ codes.T / 2 - 2 / np.pi * np.arcsin(0.999 * cosine)) ** 2
    )  # cosines are clipped
    np.testing.assert_allclose(
        losses.code_similarity_loss(bits, unit, bits, unit), wanted, rtol=1e-6
    )


def test_code_similarity_has_a_straight_through_gradient():
    """With the derivative of 2 h - 1: for one pair, d/dh of (s t - c)^2 is 2 (s t - c) 2 t,
    whatever h is.
    """
    unit, other = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    all_bits = jnp.array([[0.9], [0.8]])
    gradient = jax.grad(losses.code_similarity_loss)(jnp.array([[0.6]]), unit, all_bits, other)
    near = 2 / np.pi * np.arcsin(0.999)
    np.testing.assert_allclose(
        gradient, [[(2 * (1 - near) * 2 + 2 * (1 + near) * 2) / 2]], rtol=1e-6
    )


def test_balance_and_quantisation_by_hand():
    """The first bit is on for half of the batch and undecided, the second always on and decided."""
    bits = jnp.array([[0.5, 1.0], [0.75, 1.0], [0.25, 1.0]])
    np.testing.assert_allclose(losses.code_balance_loss(bits), (0 + 1) / 2, rtol=1e-6)
    np.testing.assert_allclose(
        losses.code_quantisation_loss(bits), (1 + 0.75 + 0.75 + 0 + 0 + 0) / 6, rtol=1e-6
    )


def test_learned_directions_beat_random_ones():
    """Recall of the nearest neighbours by 32 bits, for vectors whose variance lies mostly in 4 of
    16 directions.
    """
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((400, 16)).astype(np.float32) * np.r_[
        np.ones(4), np.full(12, 0.2)
    ].astype(np.float32)
    unit = jnp.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    start = {
        "kernel": jnp.asarray(rng.standard_normal((16, 32)).astype(np.float32)),
        "bias": jnp.zeros(32),
    }

    def loss(layer):
        bits = jax.nn.sigmoid(unit @ layer["kernel"] + layer["bias"])
        return losses.code_similarity_loss(bits, unit, bits, unit) + 0.1 * losses.code_balance_loss(
            bits
        )

    def recall(layer):
        codes = np.sign(np.asarray(unit @ layer["kernel"] + layer["bias"]))
        near, wanted = (np.argsort(-(x @ x.T), 1)[:, 1:11] for x in (codes, np.asarray(unit)))
        return np.mean([len(set(a) & set(b)) for a, b in zip(near, wanted, strict=True)]) / 10

    layer, step = (
        start,
        jax.jit(lambda layer: jax.tree.map(lambda x, g: x - 3 * g, layer, jax.grad(loss)(layer))),
    )
    for _ in range(100):
        layer = step(layer)
    assert loss(layer) < 0.8 * loss(start)
    assert recall(layer) > recall(start) + 0.02


UNIT = jnp.float32([[1, 0], [0.6, 0.8], [0, 1], [0.8, 0.6]])  # photos of products 0, 0, 1, 2
PRODUCT = jnp.array([0, 0, 1, 2])


def test_triplet_loss_by_hand():
    """Photo 0: positive 0.6, its semi-hard negative is photo 2 at 0, since 3 at 0.8 is more
    similar: 0.7 - 0.6 = 0.1 at margin 0.7. Photo 1: positive 0.6, all negatives more similar: left
    out, as are photos 2 and 3, which have no positive.
    """
    assert losses.triplet_loss(UNIT, UNIT, PRODUCT, PRODUCT, margin=0.7) == pytest.approx(
        0.1, abs=1e-6
    )
    assert losses.triplet_loss(UNIT, UNIT, PRODUCT, PRODUCT, margin=0.5) == 0


def test_background_suppression_by_hand():
    """At temperature 1: the background of photo 0 resembles photo 1, of the same product, less than
    the mean of the others, as does that of photo 1; then the former becomes photo 1 itself.
    """
    background = jnp.float32([[0, 1], [0, 1], [1, 0], [1, 0]])
    first = 0.8 - np.log((np.exp(0.8) + np.exp(1.0) + np.exp(0.6)) / 3)
    second = 0.0 - np.log((np.exp(0.0) + np.exp(1.0) + np.exp(0.6)) / 3)
    assert first < 0
    assert second < 0
    assert (
        losses.background_suppression_loss(background, UNIT, PRODUCT, PRODUCT, temperature=1.0) == 0
    )
    background = background.at[0].set(UNIT[1])
    excess = 1.0 - np.log((np.exp(1.0) + np.exp(0.8) + np.exp(0.96)) / 3)
    assert losses.background_suppression_loss(
        background, UNIT, PRODUCT, PRODUCT, temperature=1.0
    ) == pytest.approx(excess / 2, abs=1e-6)


def test_a_batch_without_a_pair_has_no_gradient():
    alone = jnp.arange(4)
    for loss in (
        lambda x: losses.triplet_loss(x, x, alone, alone, margin=0.5),
        lambda x: losses.background_suppression_loss(x, UNIT, alone, alone),
    ):
        value, gradient = jax.value_and_grad(loss)(jnp.asarray(UNIT))
        assert value == 0
        assert not np.any(gradient)


def test_foregrounds_get_no_gradient():
    gradient = jax.grad(lambda x: losses.background_suppression_loss(UNIT, x, PRODUCT, PRODUCT))(
        jnp.asarray(UNIT)
    )
    assert not np.any(gradient)


def test_unknown_boxes_do_not_count():
    box = jnp.float32([[0.1, 0.1, 0.9, 0.9], [0, 0, 1, 1]])
    known = jnp.float32([[0.1, 0.3, 0.9, 0.7], [0, 0, 0, 0]])
    assert losses.box_regression_loss(box, known) == pytest.approx(0.1, abs=1e-6)
    assert losses.box_regression_loss(box, jnp.zeros_like(known)) == 0
