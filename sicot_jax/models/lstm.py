"""A bidirectional LSTM that skips padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sicot_jax.errors import InputError
from sicot_jax.parallel.array_types import Array, Bool, Float


def lstm(
    x: Float[Array, "B T E"],
    mask: Bool[Array, "B T"],
    kernel: Float[Array, "E U4"],
    recurrent: Float[Array, "U U4"],
    bias: Float[Array, " U4"],
) -> Float[Array, "B T U"]:
    """Runs an LSTM over a sequence; padded steps keep its state (Hochreiter & Schmidhuber 1997).

    Args:
      x: inputs, float [B, T, E].
      mask: bool [B, T], False for padding.
      kernel: weights of the input, float [E, 4U], gates in the order i, f, g, o.
      recurrent: weights of the hidden state, float [U, 4U].
      bias: float [4U].

    Returns:
      hidden states, float [B, T, U], zero at padded steps.
    """
    units = recurrent.shape[0]
    projected = jnp.einsum("bte,eu->btu", x, kernel) + bias
    start = jnp.zeros_like(projected[:, 0, :units])  # inherits dtype and sharding

    def step(carry: tuple[Array, Array], inputs: tuple[Array, Array]) -> tuple:
        hidden, cell = carry
        gates, is_word = inputs
        i, f, g, o = jnp.split(gates + hidden @ recurrent, 4, axis=-1)
        new_cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        new_hidden = jax.nn.sigmoid(o) * jnp.tanh(new_cell)
        is_word = is_word[:, None]
        state = jnp.where(is_word, new_hidden, hidden), jnp.where(is_word, new_cell, cell)
        return state, jnp.where(is_word, new_hidden, 0)

    _, outputs = jax.lax.scan(step, (start, start), (projected.swapaxes(0, 1), mask.swapaxes(0, 1)))
    return outputs.swapaxes(0, 1)


class BiLSTM(nnx.Module):
    """Forward and backward LSTM of E / 2 units each, outputs concatenated to [B, T, E].

    The forget gate's bias starts at 1 (Jozefowicz et al. 2015).
    """

    def __init__(self, width: int, *, rng: np.random.Generator) -> None:
        """Initialises both directions.

        Args:
          width: E, width of inputs and outputs, even.
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
        self.kernel = nnx.Param(
            jnp.asarray(rng.standard_normal((2, width, 4 * units), np.float32) * width**-0.5)
        )
        self.recurrent = nnx.Param(jnp.asarray(np.stack(recurrent), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((2, 4 * units)).at[:, units : 2 * units].set(1.0))

    def __call__(
        self, words: Float[Array, "B T E"], mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T E"]:
        """Runs both directions.

        Args:
          words: float [B, T, E].
          mask: bool [B, T], False for padding.

        Returns:
          hidden states of both directions, [B, T, E] in the dtype of `words`, zero at padded
          steps.
        """

        def run(x: Array, mask: Array, direction: int) -> Array:
            parameters = (
                p[...][direction].astype(x.dtype) for p in (self.kernel, self.recurrent, self.bias)
            )
            return lstm(x, mask, *parameters)

        forward = run(words, mask, 0)
        backward = run(words[:, ::-1], mask[:, ::-1], 1)[:, ::-1]
        return jnp.concatenate([forward, backward], -1)
