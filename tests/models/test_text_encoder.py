"""Title encoders: pooled outer products, attention weights, padding, word order, LSTM, mixing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sicot_jax.config import TEXT_ENCODERS, ModelConfig, TextConfig
from sicot_jax.models.sicot import Sicot, mix
from sicot_jax.models.text_encoder import (
    BiLSTM,
    TextEncoder,
    attention_weights,
    bilinear_features,
    context_vector,
    pool_windows,
)

WIDTH, WINDOWS, HIDDEN = 8, 4, 6
LENGTHS = np.array([5, 2, 0, 1])
MASK = np.arange(5) < LENGTHS[:, None]
WORDS = np.random.default_rng(0).normal(size=(4, 5, WIDTH)).astype(np.float32)


def make(encoder, *, weighting="softmax", width=WIDTH, windows=WINDOWS):
    config = TextConfig(encoder, windows=windows, hidden=HIDDEN, weighting=weighting)
    return TextEncoder(config, width, dtype=jnp.float32, rng=np.random.default_rng(1))


@functools.cache
def compiled(encoder, weighting):
    """The encoder, and a jitted (words, mask) -> (vector, weights, gradients by words and by
    parameters).
    """
    module = make(encoder, weighting=weighting)
    graphdef, parameters = nnx.split(module)

    @jax.jit
    def run(words, mask):
        def loss(words, parameters):
            vector, weights = nnx.merge(graphdef, parameters)(words, mask)
            return jnp.sum((vector - 1) ** 2) + jnp.sum(weights**2), (vector, weights)

        gradients, (vector, weights) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
            words, parameters
        )
        return vector, weights, gradients

    return module, run


def test_context_and_pooling_by_hand():
    words = jnp.array([[[1.0, 2.0, 3.0, 6.0], [3.0, 0.0, 1.0, 2.0], [100.0, 100.0, 100.0, 100.0]]])
    mask = jnp.array([[True, True, False]])
    np.testing.assert_allclose(context_vector(words, mask), [[2.0, 1.0, 2.0, 4.0]])
    np.testing.assert_allclose(pool_windows(words[0, 0], 2), [1.5, 4.5])


def test_bilinear_features_equal_the_pooled_outer_product():
    """The full E x E product of context and word, averaged over square blocks one by one."""
    block = WIDTH // WINDOWS
    actual = np.asarray(bilinear_features(jnp.asarray(WORDS), jnp.asarray(MASK), WINDOWS))
    assert actual.shape == (4, 5, WINDOWS**2)
    for row, position in itertools.product(range(4), range(5)):
        real = WORDS[row][MASK[row]].astype(np.float64)
        centre = real.mean(0) if len(real) else np.zeros(WIDTH)
        outer = np.outer(centre, WORDS[row, position])
        for i, j in itertools.product(range(WINDOWS), repeat=2):
            window = outer[i * block : (i + 1) * block, j * block : (j + 1) * block]
            # Documented scale: times the block size. atol: float32 sums of a few terms of size one.
            np.testing.assert_allclose(
                actual[row, position, i * WINDOWS + j], window.mean() * block, rtol=1e-5, atol=1e-6
            )


def test_softmax_weights_by_hand():
    scores = jnp.log(jnp.array([[1.0, 3.0, 50.0], [2.0, 7.0, 7.0], [1.0, 2.0, 3.0]]))
    mask = jnp.array([[True, True, False], [True, False, False], [False] * 3])
    wanted = [[0.25, 0.75, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(attention_weights(scores, mask), wanted, rtol=1e-6)


def test_sigmoid_weights_by_hand():
    scores = jnp.log(jnp.array([[1.0, 3.0, 50.0], [2.0, 7.0, 7.0], [1.0, 2.0, 3.0]]))
    mask = jnp.array([[True, True, False], [True, False, False], [False] * 3])
    wanted = [
        [0.5 / 2, 0.75 / 2, 0.0],
        [2 / 3, 0.0, 0.0],
        [0.0, 0.0, 0.0],
    ]  # sigmoid(log x) = x / (1 + x)
    np.testing.assert_allclose(attention_weights(scores, mask, "sigmoid"), wanted, rtol=1e-6)


def test_huge_scores_stay_finite_and_weights_are_float32():
    weights = attention_weights(jnp.array([[1e30, -1e30, 1e30]]), jnp.ones((1, 3), bool))
    np.testing.assert_allclose(weights, [[0.5, 0.0, 0.5]])
    assert (
        attention_weights(jnp.zeros((1, 2), jnp.bfloat16), jnp.ones((1, 2), bool)).dtype
        == jnp.float32
    )


@pytest.mark.parametrize("encoder", ["mean", "dot", "bilinear_form", "low_rank", "bilinear"])
def test_encoder_by_its_formula(encoder):
    """Word by word in float64 from the module's matrices."""
    module, run = compiled(encoder, "softmax")
    vector, weights, _ = run(WORDS, MASK)
    assert vector.shape == (4, WIDTH)
    assert weights.shape == (4, 5)

    def kernel(name):
        return np.asarray(getattr(module.attention, name).kernel[...], np.float64)

    def score(c, e):
        match encoder:
            case "mean":
                return 0.0
            case "dot":
                return c @ e / np.sqrt(WIDTH)
            case "bilinear_form":
                return c @ kernel("first") @ e
            case "low_rank":
                return np.tanh((c @ kernel("first")) * (e @ kernel("second"))) @ kernel("out")[:, 0]
        pooled = [x.reshape(WINDOWS, -1).mean(1) for x in (c, e)]
        features = np.outer(*pooled).ravel() * (WIDTH // WINDOWS)  # biases start at zero
        return np.tanh(features @ kernel("first")) @ kernel("out")[:, 0]

    for row, length in enumerate(LENGTHS):
        real = WORDS[row, :length].astype(np.float64)
        raised = np.exp([score(real.mean(0), e) for e in real])
        wanted = raised / raised.sum() if length else np.zeros(0)
        np.testing.assert_allclose(weights[row, :length], wanted, rtol=1e-5)
        np.testing.assert_array_equal(weights[row, length:], 0)
        np.testing.assert_allclose(
            vector[row], wanted @ real, rtol=1e-5, atol=1e-6
        )  # atol: sums that cancel


@pytest.mark.parametrize(
    ("encoder", "weighting"), [*((e, "softmax") for e in TEXT_ENCODERS), ("bilinear", "sigmoid")]
)
def test_padding_changes_nothing(encoder, weighting):
    """Other vectors at padded positions: the same output, no gradient; a row of padding alone gives
    zeros, never NaN.
    """
    _, run = compiled(encoder, weighting)
    vector, weights, (by_words, by_parameters) = run(WORDS, MASK)
    altered = np.where(MASK[..., None], WORDS, 7 * WORDS[::-1] + 3)
    other_vector, other_weights, (other_by_words, other_by_parameters) = run(altered, MASK)
    np.testing.assert_array_equal(vector, other_vector)
    np.testing.assert_array_equal(weights, other_weights)
    np.testing.assert_array_equal(by_words, other_by_words)
    for one, other in zip(
        jax.tree.leaves(by_parameters), jax.tree.leaves(other_by_parameters), strict=True
    ):
        np.testing.assert_array_equal(one, other)
        assert np.isfinite(one).all()
    assert np.isfinite(vector).all()
    assert np.isfinite(weights).all()
    assert np.isfinite(by_words).all()
    np.testing.assert_array_equal(vector[2], 0)
    np.testing.assert_array_equal(np.asarray(weights)[~MASK], 0)
    np.testing.assert_array_equal(np.asarray(by_words)[~MASK], 0)
    assert np.asarray(by_words)[MASK].any()
    if weighting == "softmax":
        np.testing.assert_allclose(np.asarray(weights).sum(-1), LENGTHS > 0, rtol=1e-6)


@pytest.mark.parametrize("encoder", TEXT_ENCODERS)
def test_word_order(encoder):
    """Only the LSTMs read a title in order."""
    _, run = compiled(encoder, "softmax")
    order = np.array([3, 0, 4, 2, 1])
    vector, weights, _ = run(WORDS, np.ones((4, 5), bool))
    other_vector, other_weights, _ = run(WORDS[:, order], np.ones((4, 5), bool))
    if encoder.startswith("lstm"):
        assert np.abs(vector - other_vector).max() > 0.01
    else:
        np.testing.assert_allclose(other_weights, weights[:, order], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(
            other_vector, vector, rtol=1e-5, atol=1e-6
        )  # another order of summation


def test_bi_lstm_equals_torch():
    torch = pytest.importorskip("torch")
    units, lengths = WIDTH // 2, [5, 2, 1]
    module = BiLSTM(WIDTH, dtype=jnp.float32, rng=np.random.default_rng(2))
    reference = torch.nn.LSTM(WIDTH, units, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for rnn, suffix in [(module.forward, ""), (module.backward, "_reverse")]:
            for name, parameter in [
                ("weight_ih", rnn.cell.dense_i.kernel),
                ("weight_hh", rnn.cell.dense_h.kernel),
                ("bias_ih", rnn.cell.dense_h.bias),
            ]:
                values = np.array(parameter[...].T)
                getattr(reference, f"{name}_l0{suffix}").copy_(torch.from_numpy(values))
            getattr(reference, f"bias_hh_l0{suffix}").zero_()
        words = WORDS[[0, 1, 3]]
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            torch.from_numpy(words), lengths, batch_first=True
        )
        wanted, _ = torch.nn.utils.rnn.pad_packed_sequence(reference(packed)[0], batch_first=True)
    actual = module(jnp.asarray(words), jnp.arange(5) < jnp.array(lengths)[:, None])
    np.testing.assert_allclose(
        actual[..., :units], wanted[..., :units], rtol=1e-5, atol=1e-6
    )  # forward
    np.testing.assert_allclose(
        actual[..., units:], wanted[..., units:], rtol=1e-5, atol=1e-6
    )  # backward


def test_mix_is_the_greater_element():
    np.testing.assert_array_equal(
        mix(jnp.array([[1.0, 0.0, 3.0]]), jnp.array([[0.5, 2.0, 3.0]])), [[1.0, 2.0, 3.0]]
    )


PHOTO = jnp.zeros((3, 8, 8, 3))
TRAIN = {"visual": True, "visual/resnet": True, "semantic": True}


@pytest.mark.parametrize("with_text", [True, False])
def test_untitled_photo_falls_back_on_its_visual_embedding(one_device, with_text):
    config = ModelConfig(
        depth=18,
        width=4,
        stem="small",
        embedding_width=6,
        text=TextConfig(windows=WINDOWS, hidden=HIDDEN),
    )
    model = Sicot(
        config,
        word_table_shape=(9, WIDTH) if with_text else None,
        dtype=jnp.float32,
        rng=np.random.default_rng(3),
    )
    if not with_text:
        model.visual.embed_and_localize = lambda image, **train: (jnp.ones((3, 6)), None)
        outputs = model(PHOTO, jnp.ones((3, 4), jnp.int32), train=TRAIN)
        assert [name for name, x in vars(outputs).items() if x is not None] == ["visual"]
        return
    visual = jnp.asarray(np.random.default_rng(4).random((3, 6), np.float32))
    # The ResNet is tested separately.
    model.visual.embed_and_localize = lambda image, **train: (visual, None)
    model.semantic.word_vectors[...] = jnp.asarray(
        np.random.default_rng(5).normal(size=(9, WIDTH)), jnp.float32
    )
    tokens = jnp.array([[3, 4, 0, 0], [0, 0, 0, 0], [7, 0, 0, 0]])
    outputs = model(PHOTO, tokens, train=TRAIN)
    assert {name: x.shape for name, x in vars(outputs).items() if x is not None} == {
        "visual": (3, 6),
        "semantic": (3, 6),
        "mixed": (3, 6),
        "word_attention": (3, 4),
    }
    np.testing.assert_array_equal(outputs.semantic[1], visual[1])
    np.testing.assert_array_equal(outputs.mixed[1], visual[1])
    for row in (0, 2):
        assert np.abs(outputs.semantic[row] - visual[row]).max() > 0.01
        np.testing.assert_array_equal(
            outputs.mixed[row], np.maximum(visual[row], outputs.semantic[row])
        )
    assert (np.asarray(outputs.semantic) >= 0).all()
    # Batch norm counts the two rows with a title alone: their projections are symmetric about
    # zero, so ReLU clips one of each pair.
    with_title = np.asarray(outputs.semantic)[[0, 2]]
    assert ((with_title > 0).sum(0) == 1).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make("bilinear", windows=3), r"text.windows=3 does not divide the word width 8"),
        (lambda: make("lstm", width=7), r"width 7: a bi-LSTM wants an even width"),
        (
            lambda: make("transformer"),
            r"text.encoder='transformer', wanted one of \('mean', 'bilinear'",
        ),
        (
            lambda: make("dot", weighting="relu"),
            r"text.weighting='relu', wanted one of \('softmax', 'sigmoid'\)",
        ),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
