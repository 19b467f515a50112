"""A bidirectional LSTM over titles of different lengths, with PyTorch's gates."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sicot_jax.errors import InputError
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
