"""The visual stream: photo -> embedding v, with optional localisation, tag scores and binary code.

It is all that runs when a photo is recognised.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sicot_jax.config import ModelConfig
from sicot_jax.models.layers import BatchNorm, Linear
from sicot_jax.models.localization import (
    LocalizationBranch,
    foreground_mask,
    masked_average_pool,
)
from sicot_jax.models.resnet import ResNet, global_average_pool
from sicot_jax.parallel.array_types import Array, Float


class VisualStream(nnx.Module):
    """Normalised photo [B, H, W, 3] -> visual embedding v >= 0, float32 [B, D].

    v is the average pool of the ResNet's last feature map, or ReLU(BN(W f)) where
    `config.embedding_width` asks for another D. Options add to it:

    Tag head (`num_tags`): logits A v [B, V] of the V most frequent words of the training titles.
      With `config.shared_word_weights` the classifier's input is [v, A v] and its rows are [w_c,
      t_c], t_c the shares of words in the titles of class c: logits w_c . v + t_c . A v, so that
      classes share what A learns about words.
    Localisation (`config.localization`): a box is predicted first and v describes its content.
      "image" multiplies the photo by a soft mask and runs the backbone a second time (two-pass
      forward); "features" pools the last feature map inside the box.
    Binary code (`binary_code`): `config.code_bits` probabilities, which the index rounds to bits.

    Attributes:
      embedding_width: D, width of v.
      classifier_width: width of the classifier's rows: D, or D + V with shared word weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_tags: int = 0,
        binary_code: bool = False,
        dtype: DTypeLike,
        rng: np.random.Generator,
    ) -> None:
        """Initialises backbone, projection and heads.

        Args:
          config: shape of the stream.
          num_tags: V, words that the tag head scores; 0 for no tag head.
          binary_code: whether there is a binary-code head.
          dtype: dtype of the computation; parameters, embeddings and codes are float32.
          rng: generator of the starting values.
        """
        self.resnet = ResNet(
            depth=config.depth,
            width=config.width,
            stem=config.stem,
            last_stride=config.last_stride,
            dtype=dtype,
            rng=rng,
        )
        features, width = self.resnet.num_features, config.embedding_width
        self.projection: Any = (
            Linear(features, width, bias=False, dtype=dtype, rng=rng) if width else None
        )
        self.projection_norm: Any = BatchNorm(width) if width else None
        self.embedding_width = width or features
        self.tag_head: Any = (
            Linear(self.embedding_width, num_tags, bias=False, dtype=dtype, rng=rng)
            if num_tags
            else None
        )
        # The optional parts draw from separate generators, so that the rest starts from the
        # same values with and without them.
        code_rng, localization_rng = rng.spawn(1)[0], rng.spawn(1)[0]
        # Float32 whatever the streams compute in, so that bits agree with those of the index.
        self.code_head: Any = (
            Linear(self.embedding_width, config.code_bits, dtype=jnp.float32, rng=code_rng)
            if binary_code
            else None
        )
        channels = [features // 2**later for later in (3, 2, 1, 0)]
        self.localization: Any = (
            LocalizationBranch(channels, dtype=dtype, rng=localization_rng)
            if config.localization != "none"
            else None
        )
        self.two_pass = config.localization == "image"
        self.shared_word_weights = config.shared_word_weights
        self.classifier_width = self.embedding_width + (num_tags if self.shared_word_weights else 0)

    def classifier_input(self, embedding: Float[Array, "B D"]) -> Float[Array, "B D2"]:
        """Returns what the classifier's rows are multiplied with.

        Args:
          embedding: embedding x of any stream, float [B, D].

        Returns:
          [x, A x], float32 [B, D + V] with shared word weights, else x itself.
        """
        return (
            jnp.concatenate([embedding, self.tag_logits(embedding)], -1)
            if self.shared_word_weights
            else embedding
        )

    def tag_logits(self, embedding: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Returns the scores A x of the tag vocabulary.

        Args:
          embedding: embedding x of any stream, float [B, D].

        Returns:
          float32 [B, V].
        """
        return self.tag_head(embedding).astype(jnp.float32)

    def binary_code(self, unit_embedding: Float[Array, "B D"]) -> Float[Array, "B bits"]:
        """Returns bit probabilities sigmoid(W (sqrt(D) x) + c).

        The factor sqrt(D) gives logits of about 1 whatever the width; without it half of the bits
        take long to leave 1/2.

        Args:
          unit_embedding: x, embeddings of length 1, float [B, D].

        Returns:
          float32 [B, bits] within (0, 1); the index keeps whether they exceed 1/2.
        """
        return jax.nn.sigmoid(self.code_head(unit_embedding * self.embedding_width**0.5))

    def embed(
        self, image: Float[Array, "B H W 3"], *, train: bool, train_resnet: bool | None = None
    ) -> Float[Array, "B D"]:
        """Returns the visual embedding.

        Args:
          image: normalised photos, float [B, H, W, 3].
          train: whether batch norms use the statistics of the batch.
          train_resnet: the same for the backbone, which may be frozen; None takes `train`.

        Returns:
          v >= 0, float32 [B, D].
        """
        return self.embed_and_localize(image, train=train, train_resnet=train_resnet)[0]

    def embed_and_localize(
        self,
        image: Float[Array, "B H W 3"],
        *,
        train: bool,
        train_resnet: bool | None = None,
        train_localization: bool | None = None,
    ) -> tuple[Float[Array, "B D"], Float[Array, "B 4"] | None]:
        """Returns the embedding of the foreground, and the box that bounds it.

        The localisation branch passes no gradient to the backbone, whose features must not change
        for the sake of the box. In the two-pass forward the first pass uses running statistics, as
        it does when a photo is recognised.

        Args:
          image: normalised photos, float [B, H, W, 3].
          train: whether batch norms use the statistics of the batch.
          train_resnet: the same for the backbone; None takes `train`.
          train_localization: the same for the localisation branch; None takes `train`.

        Returns:
          v >= 0, float32 [B, D]; boxes float32 [B, 4] (left, top, right, bottom as fractions
          of the photo, not clipped), None without a localisation branch.
        """
        train_resnet = train if train_resnet is None else train_resnet
        train_localization = train if train_localization is None else train_localization
        if self.localization is None:
            features = self.resnet(image, train=train_resnet)
            return self._project(global_average_pool(features), train=train), None
        if self.two_pass:
            maps = self.resnet.feature_maps(image, train=False)
            box = self._localize(maps, train=train_localization)
            foreground = image * foreground_mask(box, *image.shape[1:3])
            features = self.resnet(foreground, train=train_resnet)
            return self._project(global_average_pool(features), train=train), box
        maps = self.resnet.feature_maps(image, train=train_resnet)
        box = self._localize(maps, train=train_localization)
        return self._project(masked_average_pool(maps[-1], box), train=train), box

    def background_embedding(
        self, image: Float[Array, "B H W 3"], box: Float[Array, "B 4"]
    ) -> Float[Array, "B D"]:
        """Returns the embedding of what is outside a box.

        Parameters are constants here and batch norms use running statistics, so that the gradient
        reaches the box alone.

        Args:
          image: normalised photos, float [B, H, W, 3].
          box: left, top, right, bottom as fractions, float [B, 4].

        Returns:
          float32 [B, D], values >= 0.
        """
        graphdef, state = nnx.split(self)
        frozen = nnx.merge(graphdef, jax.lax.stop_gradient(state))
        if self.two_pass:
            background = image * (1 - foreground_mask(box, *image.shape[1:3]))
            pooled = global_average_pool(frozen.resnet(background, train=False))
        else:
            pooled = masked_average_pool(frozen.resnet(image, train=False), box, background=True)
        return frozen._project(pooled, train=False)

    def _localize(self, maps: list[Array], *, train: bool) -> Array:
        return self.localization(jax.lax.stop_gradient(maps), train=train)

    def _project(self, pooled: Array, *, train: bool) -> Array:
        if self.projection is None:
            return pooled
        projected = self.projection(pooled).astype(jnp.float32)
        return jax.nn.relu(self.projection_norm(projected, train=train))
