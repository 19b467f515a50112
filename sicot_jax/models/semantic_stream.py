"""The semantic stream: words of a title -> embedding s in the space of the visual embedding."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sicot_jax.config import TextConfig
from sicot_jax.models.layers import BatchNorm, Linear
from sicot_jax.models.text_encoder import TextEncoder
from sicot_jax.parallel.array_types import Array, Float, Int


class SemanticStream(nnx.Module):
    """Title words [B, T] -> semantic embedding s = ReLU(BN(W e)) >= 0, float32 [B, D].

    s has the range of v because both meet in an element-wise maximum. Titles without a word are
    left out of the batch-norm statistics and give zeros, so that max(v, s) = v for them.
    """

    def __init__(
        self,
        config: TextConfig,
        word_table_shape: tuple[int, int],
        embedding_width: int,
        *,
        dtype: DTypeLike,
        rng: np.random.Generator,
    ) -> None:
        """Initialises word table, encoder and projection.

        Args:
          config: the title encoder.
          word_table_shape: (V, E), vocabulary size and width of the word vectors. The table is zero
            until `set_word_vectors` fills it.
          embedding_width: D.
          dtype: dtype of the computation; parameters and embeddings are float32.
          rng: generator of the starting values.
        """
        self.dtype = dtype
        word_width = word_table_shape[1]
        self.word_vectors = nnx.Param(jnp.zeros(word_table_shape, jnp.float32))
        self.encoder = TextEncoder(config, word_width, dtype=dtype, rng=rng)
        self.projection = Linear(word_width, embedding_width, bias=False, dtype=dtype, rng=rng)
        self.projection_norm = BatchNorm(embedding_width)

    def __call__(
        self, token_ids: Int[Array, "B T"], *, train: bool
    ) -> tuple[Float[Array, "B D"], Float[Array, "B T"]]:
        """Embeds titles.

        Args:
          token_ids: word ids, int [B, T], 0 = padding.
          train: whether the batch norm uses the statistics of the batch.

        Returns:
          s, float32 [B, D]; the encoder's weight of each word, float32 [B, T].
        """
        mask = token_ids > 0
        words = self.word_vectors[...][token_ids].astype(self.dtype)
        text, attention = self.encoder(words, mask)
        has_title = jnp.any(mask, -1)
        projected = self.projection(text).astype(jnp.float32)
        embedding = self.projection_norm(projected, train=train, mask=has_title)
        return jnp.where(has_title[:, None], jax.nn.relu(embedding), 0.0), attention


def set_word_vectors(state: Any, word_vectors: Float[np.ndarray, "V E"]) -> Any:
    """Returns a train state whose word table holds the catalogue's word vectors.

    Args:
      state: a `TrainState` of a model with a semantic stream.
      word_vectors: float [V, E], row i for word id i.

    Returns:
      the state with another word table, on the same devices.

    Raises:
      ValueError: when the model's word table has another shape.
    """
    table = state.params["semantic"]["word_vectors"]
    if word_vectors.shape != table.shape:
        raise ValueError(
            f"word vectors are {word_vectors.shape}, the model wants {table.shape} (vocabulary, "
            "word width); open the catalogue the model was made for"
        )
    vectors = jax.device_put(jnp.asarray(word_vectors, jnp.float32), table.sharding)
    semantic = {**state.params["semantic"], "word_vectors": vectors}
    return dataclasses.replace(state, params={**state.params, "semantic": semantic})
