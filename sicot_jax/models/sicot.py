"""The SICoT model (section 3): visual, semantic and mixed embeddings, and auxiliary outputs.

The classifier that all streams share is not part of the model; see `sicot_jax.classifier`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sicot_jax.config import ModelConfig
from sicot_jax.models.semantic_stream import SemanticStream
from sicot_jax.models.visual_stream import VisualStream
from sicot_jax.parallel.array_types import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SicotOutputs:
    """What the model computes from a batch; None for what it was not asked for. All float32.

    The embeddings of the three streams are the classifier's inputs: [B, D], or [B, D + V] with
    shared word weights (`VisualStream.classifier_input`).

    Attributes:
      visual: embedding v of the photo.
      semantic: embedding s of the title, v for a photo without one.
      mixed: max(v, s).
      word_attention: the title encoder's weight of each word, [B, T].
      tag_logits: scores of the tag vocabulary, [B, V].
      foreground: v at length 1, [B, D].
      box: left, top, right, bottom of the product as fractions of the photo, [B, 4].
      background: embedding of what is outside the box, at length 1, [B, D].
      unit_visual: v at length 1 without a gradient, [B, D]: the target of the binary code.
      binary_code: bit probabilities, [B, bits].
    """

    # Not annotated with shapes: JAX also makes trees of this type whose leaves are no arrays.
    visual: Array
    semantic: Array | None = None
    mixed: Array | None = None
    word_attention: Array | None = None
    tag_logits: Array | None = None
    foreground: Array | None = None
    box: Array | None = None
    background: Array | None = None
    unit_visual: Array | None = None
    binary_code: Array | None = None

    def streams(self, names: Iterable[str]) -> dict[str, Array]:
        """Returns the embeddings of some streams.

        Args:
          names: any of "visual", "semantic", "mixed".

        Returns:
          name -> embedding, float32 [B, D].
        """
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class AuxiliaryOutputs:
    """Selects what a model computes besides the embeddings of its streams.

    Attributes:
      num_tags: V, words that the tag head scores; 0 for no tag head.
      binary_code: whether there is a binary-code head.
      code_trains_embedding: whether the gradient of the binary code reaches the visual stream.
      foreground: whether v at length 1 is an output.
    """

    num_tags: int = 0
    binary_code: bool = False
    code_trains_embedding: bool = False
    foreground: bool = False


class Sicot(nnx.Module):
    """Photo and title -> `SicotOutputs`.

    A photo without a title uses its visual embedding in the other two streams: s = v, m = v.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        word_table_shape: tuple[int, int] | None,
        auxiliary: AuxiliaryOutputs = AuxiliaryOutputs(),
        dtype: DTypeLike,
        rng: np.random.Generator,
    ) -> None:
        """Initialises the streams.

        Args:
          config: shape of the model.
          word_table_shape: (V, E), vocabulary size and width of the word vectors; None for the
            visual stream alone.
          auxiliary: what else is computed.
          dtype: dtype of the computation; parameters and embeddings are float32.
          rng: generator of the starting values.
        """
        self.visual = VisualStream(
            config,
            num_tags=auxiliary.num_tags,
            binary_code=auxiliary.binary_code,
            dtype=dtype,
            rng=rng,
        )
        self.auxiliary = auxiliary
        width = self.visual.embedding_width
        self.semantic: Any = (
            SemanticStream(config.text, word_table_shape, width, dtype=dtype, rng=rng)
            if word_table_shape
            else None
        )

    def __call__(
        self,
        image: Float[Array, "B H W 3"],
        token_ids: Int[Array, "B T"] | None = None,
        *,
        train: Mapping[str, bool],
    ) -> SicotOutputs:
        """Runs the streams.

        Args:
          image: normalised photos, float [B, H, W, 3].
          token_ids: word ids of their titles, int [B, T], 0 = padding; None for a model without a
            semantic stream.
          train: part of the model -> whether its batch norms use the statistics of the batch, see
            `training.optimizer.trained_parts`.

        Returns:
          the outputs.
        """
        visual, box = self.visual.embed_and_localize(
            image,
            train=train.get("visual", False),
            train_resnet=train["visual/resnet"],
            train_localization=train.get("visual/localization", False),
        )
        auxiliary = self._auxiliary(image, visual, box)
        classifier_input = self.visual.classifier_input
        if self.semantic is None:
            return SicotOutputs(visual=classifier_input(visual), **auxiliary)
        semantic, attention = self.semantic(token_ids, train=train["semantic"])
        assert token_ids is not None
        has_title = jnp.any(token_ids > 0, -1, keepdims=True)
        return SicotOutputs(
            visual=classifier_input(visual),
            semantic=classifier_input(jnp.where(has_title, semantic, visual)),
            mixed=classifier_input(mix(visual, semantic)),
            word_attention=attention,
            **auxiliary,
        )

    def _auxiliary(self, image: Array, visual: Array, box: Array | None) -> dict[str, Array]:
        outputs = {}
        if self.visual.tag_head is not None:
            outputs["tag_logits"] = self.visual.tag_logits(visual)
        if self.auxiliary.foreground:
            outputs["foreground"] = unit_rows(visual)
        if box is not None:
            outputs["box"] = box
            outputs["background"] = unit_rows(self.visual.background_embedding(image, box))
        if self.visual.code_head is not None:
            unit = unit_rows(visual)
            outputs["unit_visual"] = jax.lax.stop_gradient(unit)
            outputs["binary_code"] = self.visual.binary_code(
                unit if self.auxiliary.code_trains_embedding else outputs["unit_visual"]
            )
        return outputs


def mix(visual: Float[Array, "B D"], semantic: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Returns the mixed embedding max(v, s), element by element (SICoT, section 3.3).

    Args:
      visual: v, float [B, D].
      semantic: s, float [B, D].

    Returns:
      float [B, D].
    """
    return jnp.maximum(visual, semantic)


def unit_rows(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Returns rows scaled to length 1; rows of zeros stay, with a gradient of zeros.

    Args:
      x: float [B, D].

    Returns:
      float [B, D].
    """
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))
