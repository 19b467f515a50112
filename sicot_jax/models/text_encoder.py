"""Words of a title -> one semantic vector: bilinear word attention (SICoT 3.2) and the encoders it
is compared with.

Shapes: words [B, T, E] float, mask [B, T] bool (True = a real word). A row without a real word
  gives a zero vector.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sicot_jax.config import TEXT_ENCODERS
from sicot_jax.errors import InputError
from sicot_jax.models.layers import Linear

WEIGHTINGS = ("softmax", "sigmoid")


def context(words, mask):
    """c = mean of the real word vectors: [B, T, E], [B, T] -> [B, E]."""
    count = jnp.maximum(jnp.sum(mask, -1, keepdims=True), 1)
    return jnp.sum(jnp.where(mask[..., None], words, 0), 1) / count


def pool_windows(x, windows: int):
    """P: average over `windows` equal windows of the last axis, [..., E] -> [..., windows]."""
    return jnp.mean(x.reshape(*x.shape[:-1], windows, x.shape[-1] // windows), -1)


def bilinear_features(words, mask, windows: int):
    """Second-order map of context and word, average-pooled: [B, T, E] -> [B, T, windows * windows].

    Pooling the outer product c e_i^T over windows x windows blocks equals the outer product of the
    pooled vectors, (P c)(P e_i)^T, so no [B, T, E, E] array is made. Scaled by the block size E /
    windows so that the features do not shrink with E.
    """
    block = words.shape[-1] // windows
    left = pool_windows(context(words, mask), windows)  # [B, P]
    right = pool_windows(words, windows)  # [B, T, P]
    outer = left[:, None, :, None] * right[:, :, None, :]  # [B, T, P, P]
    return outer.reshape(*outer.shape[:2], windows * windows) * block


def attention_weights(scores, mask, weighting: str = "softmax"):
    """Scores [B, T] -> weights [B, T] in float32: softmax over the real words, or sigmoid each
    divided by their count.
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


def attend(weights, words):
    """sum_i a_i e_i: [B, T], [B, T, E] -> [B, E]."""
    return jnp.einsum("bt,bte->be", weights.astype(words.dtype), words)


def lstm(x, mask, kernel, recurrent, bias):
    """One direction of an LSTM; a padded step keeps the state (Hochreiter & Schmidhuber 1997).

    Args: x [B, T, E]; mask [B, T]; kernel [E, 4U]; recurrent [U, 4U]; bias [4U], gates in the order
      i, f, g, o.
    Returns: hidden states [B, T, U], zero at padded steps.
    """
    units = recurrent.shape[0]
    projected = jnp.einsum("bte,eu->btu", x, kernel) + bias
    start = jnp.zeros_like(projected[:, 0, :units])  # inherits dtype and sharding

    def step(carry, inputs):
        hidden, cell = carry
        gates, real = inputs
        i, f, g, o = jnp.split(gates + hidden @ recurrent, 4, axis=-1)
        new_cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        new_hidden = jax.nn.sigmoid(o) * jnp.tanh(new_cell)
        real = real[:, None]
        state = jnp.where(real, new_hidden, hidden), jnp.where(real, new_cell, cell)
        return state, jnp.where(real, new_hidden, 0)

    _, outputs = jax.lax.scan(step, (start, start), (projected.swapaxes(0, 1), mask.swapaxes(0, 1)))
    return outputs.swapaxes(0, 1)


class WordAttention(nnx.Module):
    """Scores of the attention encoders, [B, T, E] -> [B, T].

    "bilinear"       MLP(pooled c e_i^T), the default reading of SICoT 3.2
    "low_rank"       w^T tanh((U c) * (V e_i))
    "bilinear_form"  c^T W e_i
    "dot"            c^T e_i / sqrt(E), no parameters
    """

    def __init__(
        self,
        kind: str,
        width: int,
        *,
        windows: int,
        hidden: int,
        weighting: str,
        dtype,
        rng: np.random.Generator,
    ):
        self.kind = kind
        self.windows = windows
        first: Any = None
        second: Any = None
        out: Any = None
        match kind:
            case "bilinear":
                if width % windows:
                    raise InputError(
                        f"text.windows={windows} does not divide the word width {width} of the catalogue; change text.windows"
                    )
                first = Linear(windows * windows, hidden, dtype=dtype, rng=rng)
                # A softmax does not see a constant added to every score; a sigmoid does.
                out = Linear(hidden, 1, bias=weighting == "sigmoid", dtype=dtype, rng=rng)
            case "low_rank":
                first = Linear(width, hidden, bias=False, dtype=dtype, rng=rng)
                second = Linear(width, hidden, bias=False, dtype=dtype, rng=rng)
                out = Linear(hidden, 1, bias=False, dtype=dtype, rng=rng)
            case "bilinear_form":
                first = Linear(width, width, bias=False, dtype=dtype, rng=rng)
        self.first, self.second, self.out = first, second, out

    def __call__(self, words, mask):
        centre = context(words, mask)
        match self.kind:
            case "bilinear":
                return self.out(jnp.tanh(self.first(bilinear_features(words, mask, self.windows))))[
                    ..., 0
                ]
            case "low_rank":
                return self.out(jnp.tanh(self.first(centre)[:, None] * self.second(words)))[..., 0]
            case "bilinear_form":
                return jnp.einsum("be,bte->bt", self.first(centre), words)
            case _:
                return jnp.einsum("be,bte->bt", centre, words) / jnp.sqrt(
                    jnp.float32(words.shape[-1])
                )


class BiLSTM(nnx.Module):
    """Forward and backward LSTM of width E / 2 each, outputs side by side: [B, T, E] -> [B, T, E]."""

    def __init__(self, width: int, *, rng: np.random.Generator):
        if width % 2:
            raise InputError(
                f"word vectors of width {width}: a bi-LSTM wants an even width; import with another word width"
            )
        units = width // 2
        recurrent = [np.linalg.qr(rng.standard_normal((4 * units, units)))[0].T for _ in range(2)]
        self.kernel = nnx.Param(
            jnp.asarray(rng.standard_normal((2, width, 4 * units), np.float32) * width**-0.5)
        )
        self.recurrent = nnx.Param(jnp.asarray(np.stack(recurrent), jnp.float32))
        # A forget gate that starts open (Jozefowicz et al. 2015).
        self.bias = nnx.Param(jnp.zeros((2, 4 * units)).at[:, units : 2 * units].set(1.0))

    def __call__(self, words, mask):
        def run(x, real, side):
            parameters = (
                p[...][side].astype(x.dtype) for p in (self.kernel, self.recurrent, self.bias)
            )
            return lstm(x, real, *parameters)

        forward = run(words, mask, 0)
        backward = run(words[:, ::-1], mask[:, ::-1], 1)[:, ::-1]
        return jnp.concatenate([forward, backward], -1)


class TextEncoder(nnx.Module):
    """Word vectors of a title -> (vector [B, E], weight of each word [B, T]) by one of `ENCODERS`.

    "mean" weighs all words alike; "lstm" averages the bi-LSTM's states; "lstm_attention" weighs
    them by softmax(w^T tanh(W h_i)) (Lin et al. 2017); the rest are `WordAttention`.
    """

    def __init__(
        self,
        encoder: str,
        width: int,
        *,
        windows: int,
        hidden: int,
        weighting: str,
        dtype,
        rng: np.random.Generator,
    ):
        if encoder not in TEXT_ENCODERS:
            raise InputError(f"text.encoder={encoder!r}, wanted one of {TEXT_ENCODERS}")
        if weighting not in WEIGHTINGS:
            raise InputError(f"text.weighting={weighting!r}, wanted one of {WEIGHTINGS}")
        self.encoder = encoder
        self.weighting = weighting
        attention: Any = None
        lstm: Any = None
        first: Any = None
        out: Any = None
        match encoder:
            case "mean":
                pass
            case "lstm":
                lstm = BiLSTM(width, rng=rng)
            case "lstm_attention":
                lstm = BiLSTM(width, rng=rng)
                first = Linear(width, hidden, bias=False, dtype=dtype, rng=rng)
                out = Linear(hidden, 1, bias=False, dtype=dtype, rng=rng)
            case _:
                attention = WordAttention(
                    encoder,
                    width,
                    windows=windows,
                    hidden=hidden,
                    weighting=weighting,
                    dtype=dtype,
                    rng=rng,
                )
        self.attention, self.lstm, self.first, self.out = attention, lstm, first, out

    def __call__(self, words, mask):
        if self.lstm is not None:
            words = self.lstm(words, mask)
        if self.attention is not None:
            scores = self.attention(words, mask)
        elif self.out is not None:
            scores = self.out(jnp.tanh(self.first(words)))[..., 0]
        else:
            scores = jnp.zeros_like(words[..., 0])  # equal weights
            return context(words, mask), attention_weights(scores, mask)
        weights = attention_weights(scores, mask, self.weighting)
        return attend(weights, words), weights
