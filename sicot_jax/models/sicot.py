"""The three streams of SICoT (section 3): visual, semantic and mixed. The shared classifier lives
in `heads.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sicot_jax.config import ModelConfig, TextConfig
from sicot_jax.models.layers import BatchNorm, Linear
from sicot_jax.models.localization import BoxBranch, mean_within, visible
from sicot_jax.models.resnet import ResNet, global_average_pool
from sicot_jax.models.text_encoder import TextEncoder


def mix(visual, semantic):
    """m = max(v, s), element by element (SICoT 3.3): [B, D], [B, D] -> [B, D]."""
    return jnp.maximum(visual, semantic)


def unit_rows(x):
    """Rows at length 1, [B, D]; those of zeros stay, with a gradient of zeros."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))


class VisualStream(nnx.Module):
    """Normalised photo [B, H, W, 3] -> visual embedding v [B, D] >= 0 in float32: all that runs at
    test time.

    v = average pool of the ResNet's last map, or ReLU(BN(W f)) where `embedding_width` asks for
    another D. Where words are `told`, A v [B, told] holds a score for each: row i of A is what
    photos of word i + 1 have in common. With `word_rows` what the classifier meets is [v, A v], [B,
    D + told]: its rows [w_c, t_c] then give w_c . v + t_c . A v, so that classes share what A
    learns of the words t_c of their titles. Where `config.localization` is not "none" the product is looked
    for first, and v is of what is in its box: of the photo, looked at a second time through a soft
    mask ("image"), or of the last map ("features"). With `coded` a photo has a code too,
    `config.code_bits` shares h(v) between 0 and 1 (`code`), which the index rounds.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        told: int = 0,
        coded: bool = False,
        dtype,
        rng: np.random.Generator,
    ):
        self.resnet = ResNet(
            depth=config.depth,
            width=config.width,
            stem=config.stem,
            last_stride=config.last_stride,
            dtype=dtype,
            rng=rng,
        )
        features = self.resnet.num_features
        width = config.embedding_width
        self.project: Any = (
            Linear(features, width, bias=False, dtype=dtype, rng=rng) if width else None
        )
        self.norm: Any = BatchNorm(width) if width else None
        self.features_width = width or features
        self.to_words: Any = (
            Linear(self.features_width, told, bias=False, dtype=dtype, rng=rng) if told else None
        )
        # Of numbers of its own, so that the rest starts as it does without codes; in float32, so
        # that bits are those of the index whatever the streams compute in.
        own, bits = rng.spawn(1)[0], config.code_bits
        self.codes: Any = (
            Linear(self.features_width, bits, dtype=jnp.float32, rng=own) if coded else None
        )
        channels = [features // 2**later for later in (3, 2, 1, 0)]
        branch = rng.spawn(1)[0]
        self.box: Any = (
            BoxBranch(channels, dtype=dtype, rng=branch) if config.localization != "none" else None
        )
        self.looks_twice = config.localization == "image"
        self.word_rows = config.shared_word_weights
        self.embedding_width = self.features_width + (told if self.word_rows else 0)

    def extend(self, embedding):
        """x -> [x, A x] in float32, or x where rows share no words; of any stream's embedding [B,
        D].
        """
        return (
            jnp.concatenate([embedding, self.word_scores(embedding)], -1)
            if self.word_rows
            else embedding
        )

    def word_scores(self, embedding):
        """A x, float32 [B, told]."""
        return self.to_words(embedding).astype(jnp.float32)

    def code(self, unit):
        """h(x) = sigmoid(W (sqrt(D) x) + c), float32 [B, bits], of embeddings of length 1 [B, D].

        sqrt(D): entries of about 1, and so a logit of about 1, whatever the width; half of the bits
        would else take long to leave 1/2.
        """
        return jax.nn.sigmoid(self.codes(unit * self.features_width**0.5))

    def embed(self, image, *, train: bool, train_resnet: bool | None = None):
        """v [B, D]. `train` takes batch statistics from the batch; `train_resnet` says otherwise
        for a frozen backbone.
        """
        return self.look(image, train=train, train_resnet=train_resnet)[0]

    def look(
        self, image, *, train: bool, train_resnet: bool | None = None, train_box: bool | None = None
    ):
        """-> v [B, D] of what is in the box, and the box [B, 4], or None without a branch that
        finds one.

        The branch has no gradient to the backbone: what finds the product must not change what it
          looks like. Of a second look ("image") the first one is made with running statistics, as
          it is in use.
        """
        train_resnet = train if train_resnet is None else train_resnet
        train_box = train if train_box is None else train_box
        if self.box is None:
            return self._projected(
                global_average_pool(self.resnet(image, train=train_resnet)), train=train
            ), None
        if self.looks_twice:
            box = self._find(self.resnet.maps(image, train=False), train=train_box)
            features = self.resnet(image * visible(box, *image.shape[1:3]), train=train_resnet)
            return self._projected(global_average_pool(features), train=train), box
        maps = self.resnet.maps(image, train=train_resnet)
        box = self._find(maps, train=train_box)
        return self._projected(mean_within(maps[-1], box), train=train), box

    def outside(self, image, box):
        """The embedding [B, D] of what `box` leaves; its gradient reaches the box alone, by running
        statistics.
        """
        graphdef, state = nnx.split(self)
        still = nnx.merge(graphdef, jax.lax.stop_gradient(state))
        if self.looks_twice:
            hidden = 1 - visible(box, *image.shape[1:3])
            return still._projected(
                global_average_pool(still.resnet(image * hidden, train=False)), train=False
            )
        return still._projected(
            mean_within(still.resnet(image, train=False), box, outside=True), train=False
        )

    def _find(self, maps, *, train: bool):
        return self.box(jax.lax.stop_gradient(maps), train=train)

    def _projected(self, embedding, *, train: bool):
        if self.project is not None:
            embedding = jax.nn.relu(
                self.norm(self.project(embedding).astype(jnp.float32), train=train)
            )
        return embedding


class SemanticStream(nnx.Module):
    """Title words [B, T] (0 = padding) -> semantic embedding s = ReLU(BN(W e)) [B, D] >= 0 in
    float32.

    The range of v, because both meet in an element-wise max. Rows without a word are left out of
    BN's statistics and come back as zero, so that m = max(v, 0) = v for them.
    """

    def __init__(
        self,
        config: TextConfig,
        words: tuple[int, int],
        embedding_width: int,
        *,
        dtype,
        rng: np.random.Generator,
    ):
        self.dtype = dtype
        # Filled with the catalogue's word vectors by `start_words`.
        self.words = nnx.Param(jnp.zeros(words, jnp.float32))
        self.encoder = TextEncoder(
            config.encoder,
            words[1],
            windows=config.windows,
            hidden=config.hidden,
            weighting=config.weighting,
            dtype=dtype,
            rng=rng,
        )
        self.project = Linear(words[1], embedding_width, bias=False, dtype=dtype, rng=rng)
        self.norm = BatchNorm(embedding_width)

    def __call__(self, token_ids, *, train: bool):
        mask = token_ids > 0
        words = self.words[...][token_ids].astype(self.dtype)
        text, weights = self.encoder(words, mask)
        titled = jnp.any(mask, -1)
        embedding = self.norm(self.project(text).astype(jnp.float32), train=train, mask=titled)
        return jnp.where(titled[:, None], jax.nn.relu(embedding), 0.0), weights


class Sicot(nnx.Module):
    """Photo and title -> {"visual", "semantic", "mixed": [B, D], "attention": [B, T]}; without text
    only "visual".

    `words` is the shape (V, E) of the word table, None for the visual stream alone. Where words are
    `told`, their scores are there as "words", [B, told]. With codes: "unit", the visual embedding
    at length 1, a constant to whatever is derived from it, and its code "codes", [B, bits], whose
    gradient reaches the streams where `codes_shape_embedding`. Where photos are `compared`:
    "inside", v at length 1. With a box branch: "box" [B, 4], and "outside", the embedding of what
    the box leaves, at length 1.
    A photo without a title falls back on its visual embedding in the other two streams: m = v, s =
      v.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        words: tuple[int, int] | None,
        told: int = 0,
        coded: bool = False,
        codes_shape_embedding: bool = False,
        compared: bool = False,
        dtype,
        rng: np.random.Generator,
    ):
        self.visual = VisualStream(config, told=told, coded=coded, dtype=dtype, rng=rng)
        self.codes_shape_embedding, self.compared = codes_shape_embedding, compared
        width = self.visual.features_width
        semantic = (
            SemanticStream(config.text, words, width, dtype=dtype, rng=rng) if words else None
        )
        self.semantic = semantic

    def __call__(self, image, token_ids=None, *, train: dict[str, bool]):
        """`train`: part -> whether its batch norms take the batch's statistics, see
        `optim.trained_parts`.
        """
        parts = {
            "train_resnet": train["visual/resnet"],
            "train_box": train.get("visual/box", False),
        }
        visual, box = self.visual.look(image, train=train.get("visual", False), **parts)
        extend = self.visual.extend
        beside = (
            {"words": self.visual.word_scores(visual)} if self.visual.to_words is not None else {}
        )
        if self.compared:
            beside |= {"inside": unit_rows(visual)}
        if box is not None:
            beside |= {"box": box, "outside": unit_rows(self.visual.outside(image, box))}
        if self.visual.codes is not None:
            unit = unit_rows(visual)
            constant = jax.lax.stop_gradient(unit)
            beside |= {
                "unit": constant,
                "codes": self.visual.code(unit if self.codes_shape_embedding else constant),
            }
        if self.semantic is None:
            return {"visual": extend(visual), **beside}
        semantic, attention = self.semantic(token_ids, train=train["semantic"])
        titled = jnp.any(token_ids > 0, -1, keepdims=True)
        return {
            "visual": extend(visual),
            "semantic": extend(jnp.where(titled, semantic, visual)),
            "mixed": extend(mix(visual, semantic)),
            "attention": attention,
            **beside,
        }


def start_words(state, word_vectors: np.ndarray):
    """A TrainState whose word table [V, E] is the catalogue's vectors; ValueError on another shape."""
    words = state.params["semantic"]["words"]
    if word_vectors.shape != words.shape:
        raise ValueError(
            f"word vectors are {word_vectors.shape}, the model wants {words.shape} (vocabulary, word width); open the "
            "catalogue the model was made for"
        )
    vectors = jax.device_put(jnp.asarray(word_vectors, jnp.float32), words.sharding)
    semantic = {**state.params["semantic"], "words": vectors}
    return dataclasses.replace(state, params={**state.params, "semantic": semantic})
