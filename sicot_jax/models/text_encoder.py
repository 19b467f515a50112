"""Encodes a title's word vectors as one vector: bilinear word attention, and alternatives.

Bilinear word attention is section 3.2 of SICoT. A title without a word gives a zero vector.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sicot_jax.config import TEXT_ENCODERS, TextConfig
from sicot_jax.errors import InputError
from sicot_jax.models.layers import Linear
from sicot_jax.parallel.array_types import Array, Bool, Float


class BiLSTM(nnx.Module):
    """Forward and backward LSTM of E / 2 units each, outputs concatenated to [B, T, E].

    Flax's cells (gates in the order i, f, g, o as in PyTorch; Hochreiter & Schmidhuber 1997). The
    forget gate's bias starts at 1 (Jozefowicz et al. 2015), recurrent kernels orthogonal.
    """

    def __init__(self, width: int, *, dtype: DTypeLike, rng: np.random.Generator) -> None:
        """Initialises both directions.

        Args:
          width: E, width of inputs and outputs, even.
          dtype: dtype of the computation; parameters stay float32.
          rng: generator of the starting values.

        Raises:
          InputError: for an odd width.
        """
        if width % 2:
            raise InputError(
                f"word vectors of width {width}: a bi-LSTM wants an even width; import with "
                "another word width"
            )
        units = width // 2
        recurrent = [np.linalg.qr(rng.standard_normal((4 * units, units)))[0].T for _ in range(2)]
        kernels = rng.standard_normal((2, width, 4 * units), np.float32) * width**-0.5
        bias = np.zeros(4 * units, np.float32)
        bias[units : 2 * units] = 1.0

        def rnn(kernel: np.ndarray, recurrent_kernel: np.ndarray) -> nnx.RNN:
            # Drawn by NumPy as all starting values (`layers`); Flax's generator is not used.
            cell = nnx.OptimizedLSTMCell(
                width,
                units,
                kernel_init=lambda *_: jnp.asarray(kernel),
                recurrent_kernel_init=lambda *_: jnp.asarray(recurrent_kernel, jnp.float32),
                bias_init=lambda *_: jnp.asarray(bias),
                dtype=dtype,
                rngs=nnx.Rngs(0),
            )
            return nnx.RNN(cell, rngs=False)

        self.units = units
        self.forward, self.backward = (
            rnn(*arrays) for arrays in zip(kernels, recurrent, strict=True)
        )

    def __call__(
        self, words: Float[Array, "B T E"], mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T E"]:
        """Runs both directions.

        Args:
          words: float [B, T, E].
          mask: bool [B, T], False for padding, which follows the words.

        Returns:
          Hidden states of both directions, [B, T, E] in the computation's dtype, zero at padding.
        """
        lengths = jnp.sum(mask, -1)
        zeros = jnp.zeros_like(words[:, 0, : self.units])  # inherits dtype and sharding
        start = zeros, zeros
        forward = self.forward(words, initial_carry=start, seq_lengths=lengths)
        backward = self.backward(
            words, initial_carry=start, seq_lengths=lengths, reverse=True, keep_order=True
        )
        return jnp.where(mask[..., None], jnp.concatenate([forward, backward], -1), 0)


WEIGHTINGS = ("softmax", "sigmoid")


def context_vector(words: Float[Array, "B T E"], mask: Bool[Array, "B T"]) -> Float[Array, "B E"]:
    """Returns the context c of a title: the mean of its word vectors.

    Args:
      words: word vectors, float [B, T, E].
      mask: bool [B, T], False for padding.

    Returns:
      float [B, E], zeros for a title without a word.
    """
    count = jnp.maximum(jnp.sum(mask, -1, keepdims=True), 1)
    return jnp.sum(jnp.where(mask[..., None], words, 0), 1) / count


def pool_windows(x: Float[Array, "... E"], windows: int) -> Float[Array, "... P"]:
    """Returns averages over equal windows of the last axis.

    Args:
      x: float [..., E].
      windows: P, number of windows; divides E.

    Returns:
      float [..., P].
    """
    return jnp.mean(x.reshape(*x.shape[:-1], windows, x.shape[-1] // windows), -1)


def bilinear_features(
    words: Float[Array, "B T E"], mask: Bool[Array, "B T"], windows: int
) -> Float[Array, "B T P2"]:
    """Returns the average-pooled outer product of context and word (SICoT, section 3.2).

    Pooling the outer product c e_i^T over windows x windows blocks equals the outer product of the
    pooled vectors, (P c)(P e_i)^T, so no [B, T, E, E] array is made. Scaled by the block size E /
    windows so that the features do not shrink with E.

    Args:
      words: word vectors e_i, float [B, T, E].
      mask: bool [B, T], False for padding.
      windows: P, number of windows of each axis; divides E.

    Returns:
      float [B, T, P * P].
    """
    block = words.shape[-1] // windows
    left = pool_windows(context_vector(words, mask), windows)  # [B, P]
    right = pool_windows(words, windows)  # [B, T, P]
    outer = left[:, None, :, None] * right[:, :, None, :]  # [B, T, P, P]
    return outer.reshape(*outer.shape[:2], windows * windows) * block


def attention_weights(
    scores: Float[Array, "B T"], mask: Bool[Array, "B T"], weighting: str = "softmax"
) -> Float[Array, "B T"]:
    """Returns the weight of each word.

    Args:
      scores: float [B, T].
      mask: bool [B, T], False for padding.
      weighting: "softmax" over the words of a title, or "sigmoid" of each score divided by the
        number of words.

    Returns:
      float32 [B, T], 0 for padding.
    """
    scores = scores.astype(jnp.float32)
    if weighting == "softmax":
        scores = jnp.where(mask, scores, -jnp.inf)
        highest = jnp.max(scores, -1, keepdims=True)
        exp = jnp.exp(scores - jnp.where(jnp.isfinite(highest), highest, 0.0))
        return exp / jnp.maximum(jnp.sum(exp, -1, keepdims=True), 1e-30)
    return jnp.where(mask, jax.nn.sigmoid(scores), 0.0) / jnp.maximum(
        jnp.sum(mask, -1, keepdims=True), 1
    )


def attend(weights: Float[Array, "B T"], words: Float[Array, "B T E"]) -> Float[Array, "B E"]:
    """Returns the weighted sum of word vectors, sum_i a_i e_i.

    Args:
      weights: a, float [B, T].
      words: e, float [B, T, E].

    Returns:
      [B, E] in the dtype of `words`.
    """
    return jnp.einsum("bt,bte->be", weights.astype(words.dtype), words)


class WordAttention(nnx.Module):
    """Scores each word of a title against the title's context c.

    "bilinear"       MLP(pooled c e_i^T), SICoT section 3.2
    "low_rank"       w^T tanh((U c) * (V e_i))
    "bilinear_form"  c^T W e_i
    "dot"            c^T e_i / sqrt(E), no parameters
    """

    def __init__(
        self, config: TextConfig, word_width: int, *, dtype: DTypeLike, rng: np.random.Generator
    ) -> None:
        """Initialises the scoring function `config.encoder`.

        Args:
          config: kind, windows, hidden width and weighting.
          word_width: E, width of the word vectors.
          dtype: dtype of the computation; parameters stay float32.
          rng: generator of the starting values.

        Raises:
          InputError: when the windows do not divide the word width.
        """
        self.kind, self.windows = config.encoder, config.windows
        hidden = config.hidden
        first: Any = None
        second: Any = None
        out: Any = None
        match self.kind:
            case "bilinear":
                if word_width % self.windows:
                    raise InputError(
                        f"text.windows={self.windows} does not divide the word width {word_width} "
                        "of the catalogue; change text.windows"
                    )
                first = Linear(self.windows * self.windows, hidden, dtype=dtype, rng=rng)
                # A softmax does not see a constant added to every score; a sigmoid does.
                with_bias = config.weighting == "sigmoid"
                out = Linear(hidden, 1, bias=with_bias, dtype=dtype, rng=rng)
            case "low_rank":
                first = Linear(word_width, hidden, bias=False, dtype=dtype, rng=rng)
                second = Linear(word_width, hidden, bias=False, dtype=dtype, rng=rng)
                out = Linear(hidden, 1, bias=False, dtype=dtype, rng=rng)
            case "bilinear_form":
                first = Linear(word_width, word_width, bias=False, dtype=dtype, rng=rng)
        self.first, self.second, self.out = first, second, out

    def __call__(
        self, words: Float[Array, "B T E"], mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T"]:
        """Scores words.

        Args:
          words: word vectors, float [B, T, E].
          mask: bool [B, T], False for padding.

        Returns:
          float [B, T]; the values of padding have no meaning.
        """
        context = context_vector(words, mask)
        match self.kind:
            case "bilinear":
                features = bilinear_features(words, mask, self.windows)
                return self.out(jnp.tanh(self.first(features)))[..., 0]
            case "low_rank":
                return self.out(jnp.tanh(self.first(context)[:, None] * self.second(words)))[..., 0]
            case "bilinear_form":
                return jnp.einsum("be,bte->bt", self.first(context), words)
            case _:
                return jnp.einsum("be,bte->bt", context, words) / jnp.sqrt(
                    jnp.float32(words.shape[-1])
                )


class TextEncoder(nnx.Module):
    """Word vectors of a title -> one vector, by one of `TEXT_ENCODERS`.

    "mean" weights all words equally; "lstm" averages the states of a bidirectional LSTM;
    "lstm_attention" weights them by softmax(w^T tanh(W h_i)) (Lin et al. 2017, arXiv:1703.03130);
    the others are `WordAttention`.
    """

    def __init__(
        self, config: TextConfig, word_width: int, *, dtype: DTypeLike, rng: np.random.Generator
    ) -> None:
        """Initialises the encoder `config.encoder`.

        Args:
          config: kind, windows, hidden width and weighting.
          word_width: E, width of the word vectors.
          dtype: dtype of the computation; parameters stay float32.
          rng: generator of the starting values.

        Raises:
          InputError: for an unknown encoder or weighting, or a word width that it cannot take.
        """
        if config.encoder not in TEXT_ENCODERS:
            raise InputError(f"text.encoder={config.encoder!r}, wanted one of {TEXT_ENCODERS}")
        if config.weighting not in WEIGHTINGS:
            raise InputError(f"text.weighting={config.weighting!r}, wanted one of {WEIGHTINGS}")
        self.weighting = config.weighting
        attention: Any = None
        lstm: Any = None
        first: Any = None
        out: Any = None
        match config.encoder:
            case "mean":
                pass
            case "lstm":
                lstm = BiLSTM(word_width, dtype=dtype, rng=rng)
            case "lstm_attention":
                lstm = BiLSTM(word_width, dtype=dtype, rng=rng)
                first = Linear(word_width, config.hidden, bias=False, dtype=dtype, rng=rng)
                out = Linear(config.hidden, 1, bias=False, dtype=dtype, rng=rng)
            case _:
                attention = WordAttention(config, word_width, dtype=dtype, rng=rng)
        self.attention, self.lstm, self.first, self.out = attention, lstm, first, out

    def __call__(
        self, words: Float[Array, "B T E"], mask: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B E"], Float[Array, "B T"]]:
        """Encodes titles.

        Args:
          words: word vectors, float [B, T, E].
          mask: bool [B, T], False for padding.

        Returns:
          title vectors [B, E] in the dtype of `words`; weights of the words, float32 [B, T],
          0 for padding.
        """
        if self.lstm is not None:
            words = self.lstm(words, mask)
        if self.attention is not None:
            scores = self.attention(words, mask)
        elif self.out is not None:
            scores = self.out(jnp.tanh(self.first(words)))[..., 0]
        else:
            scores = jnp.zeros_like(words[..., 0])  # equal weights
            return context_vector(words, mask), attention_weights(scores, mask)
        weights = attention_weights(scores, mask, self.weighting)
        return attend(weights, words), weights
