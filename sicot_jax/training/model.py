"""The network of a config for the data of a catalogue, without optimizer, head or schedule."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sicot_jax.catalog.catalog import Catalog
from sicot_jax.classifier.class_weights import ClassWeights, fold_shared_word_weights
from sicot_jax.config import Config
from sicot_jax.models.sicot import AuxiliaryOutputs, Sicot


@dataclasses.dataclass(frozen=True)
class DataShape:
    """Sizes of a catalogue that the model and the schedule depend on.

    Attributes:
      num_classes: classes C, one per product.
      vocabulary_size: entries V of the vocabulary, the padding token included.
      word_width: width E of a word vector.
      train_photos: photos of the training split.
    """

    num_classes: int
    vocabulary_size: int
    word_width: int
    train_photos: int

    @classmethod
    def of(cls, catalog: Catalog) -> DataShape:
        """Returns the sizes of a catalogue.

        Args:
          catalog: an opened catalogue.

        Returns:
          Its sizes.
        """
        vocabulary_size, word_width = catalog.word_vectors.shape
        return cls(len(catalog.classes), vocabulary_size, word_width, len(catalog.splits["train"]))


@dataclasses.dataclass(frozen=True)
class ModelGraphs:
    """The structure of a network, to be merged with parameters and batch statistics.

    Attributes:
      model: structure of the complete network (visual and semantic stream).
      visual: structure of the visual stream alone, which is all that inference needs.
      params: shapes and dtypes of the parameters, a tree of ShapeDtypeStruct.
      batch_stats: shapes and dtypes of the batch statistics, likewise.
      classifier_width: columns D of the classifier's weights.
    """

    model: nnx.GraphDef
    visual: nnx.GraphDef
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    classifier_width: int


def compute_dtype(config: Config) -> np.dtype:
    """Returns the dtype of the inputs of matrix products and convolutions.

    Args:
      config: the run's config.

    Returns:
      `train.compute_dtype` as a NumPy dtype.
    """
    return jnp.dtype(config.train.compute_dtype)


def num_tags(config: Config, shape: DataShape) -> int:
    """Returns how many words have a tag score: the first, most frequent ones of the vocabulary.

    Args:
      config: the run's config.
      shape: sizes of its catalogue.

    Returns:
      Number of tags; 0 without tag prediction and shared word weights.
    """
    wanted = config.model.shared_word_weights or config.loss.tag_prediction
    return min(config.model.tag_vocabulary, shape.vocabulary_size - 1) if wanted else 0


def num_word_columns(config: Config, shape: DataShape) -> int:
    """Returns how many trailing columns of the class weights are shares of words.

    Args:
      config: the run's config.
      shape: sizes of its catalogue.

    Returns:
      Number of columns; 0 without shared word weights.
    """
    return num_tags(config, shape) if config.model.shared_word_weights else 0


def build_model(config: Config, shape: DataShape) -> Sicot:
    """Builds the network with random parameters, a pure function of the config's seed.

    Args:
      config: the run's config.
      shape: sizes of its catalogue.

    Returns:
      The network.
    """
    return Sicot(
        config.model,
        word_table_shape=(
            (shape.vocabulary_size, shape.word_width) if config.loss.with_semantic else None
        ),
        auxiliary=AuxiliaryOutputs(
            num_tags=num_tags(config, shape),
            binary_code=bool(config.loss.codes),
            code_trains_embedding=config.loss.codes_shape_embedding,
            foreground=bool(config.loss.background_suppression or config.loss.triplet),
        ),
        dtype=compute_dtype(config),
        rng=np.random.default_rng(config.seed),
    )


def model_graphs(config: Config, shape: DataShape) -> ModelGraphs:
    """Returns the structure of a config's network; allocates nothing.

    Args:
      config: the run's config.
      shape: sizes of its catalogue.

    Returns:
      Graphs, shapes and dtypes.
    """
    model = nnx.eval_shape(lambda: build_model(config, shape))
    graph, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    return ModelGraphs(
        model=graph,
        visual=nnx.split(model.visual, nnx.Param, nnx.BatchStat)[0],
        params=nnx.to_pure_dict(params),
        batch_stats=nnx.to_pure_dict(batch_stats),
        classifier_width=model.visual.classifier_width,
    )


def plain_class_weights(params: dict[str, Any], weights: ClassWeights) -> ClassWeights:
    """Returns class weights that apply to the visual embedding alone, with the same logits.

    Args:
      params: parameters of the streams, the tag head among them with shared word weights.
      weights: class weights as trained, kernel float32 [C padded, D], or [C padded, D + V] with
        shared word weights.

    Returns:
      Kernel float32 [C padded, D] and bias float32 [C padded]; `weights` without shared word
      weights.
    """
    tag_head = params["visual"].get("tag_head")
    return fold_shared_word_weights(weights, tag_head["kernel"] if tag_head is not None else None)
