"""Photos to embeddings and predicted classes, by the visual stream and the class weights alone.

No title can be read here: neither the semantic stream's parameters nor token ids are arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sicot_jax.catalog.batches import HostBatch, PhotoBatchLoader, photo_batch_loader, prefetch
from sicot_jax.catalog.catalog import Split
from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.classifier.posthoc import POSTHOC_VARIANTS
from sicot_jax.classifier.sharded import log_prob_top_k
from sicot_jax.classifier.state import ClassifierState
from sicot_jax.config import Config
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.parallel import distributed, mesh
from sicot_jax.parallel.array_types import Array, Float, Int, UInt8
from sicot_jax.training import device_batches
from sicot_jax.training.model import plain_class_weights

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predicted classes of photos, in record order.

    Logits are products of inputs rounded to `train.compute_dtype`; embeddings are not rounded.

    Attributes:
      image_id: str [N].
      label: int32 [N].
      top_classes: int32 [N, K], best first.
      top_logits: float32 [N, K].
      label_log_prob: float32 [N], log-probability of the label.
      post_hoc: int32 [N, V], best class by each of `posthoc.POSTHOC_VARIANTS`; None without them.
      embedding: float32 [N, D]; None where it is not kept.
    """

    image_id: np.ndarray
    label: np.ndarray
    top_classes: np.ndarray
    top_logits: np.ndarray
    label_log_prob: np.ndarray
    post_hoc: np.ndarray | None = None
    embedding: np.ndarray | None = None


class _HasWeights(Protocol):
    """A `TrainState` or a `RestoredModel`."""

    @property
    def params(self) -> dict[str, Any]: ...

    @property
    def batch_stats(self) -> dict[str, Any]: ...

    @property
    def classifier(self) -> ClassifierState: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisualWeights:
    """All weights that a prediction depends on.

    Attributes:
      params: parameters of the visual stream.
      batch_stats: batch statistics of the visual stream.
      class_weights: rows for the visual embedding, kernel float32 [C padded, D].
      log_prior: float32 [C padded], for post-hoc adjustments.
    """

    params: Any
    batch_stats: Any
    class_weights: ClassWeights
    log_prior: Any


def visual_weights(state: _HasWeights) -> VisualWeights:
    """Returns the weights of a state that predictions depend on.

    Args:
      state: a `TrainState` or `RestoredModel`; shared word weights are folded into plain rows.

    Returns:
      The weights, where they are.
    """
    return VisualWeights(
        params=state.params["visual"],
        batch_stats=state.batch_stats["visual"],
        class_weights=plain_class_weights(state.params, state.classifier.weights),
        log_prior=state.classifier.log_prior,
    )


def make_predict_step(
    config: Config, visual_graphdef: nnx.GraphDef, num_classes: int, *, with_post_hoc: bool = False
) -> Callable[[VisualWeights, jax.Array, jax.Array], Arrays]:
    """Builds the jitted function that predicts the classes of a batch of photos.

    Args:
      config: preprocessing, top-k and compute dtype.
      visual_graphdef: structure of the visual stream.
      num_classes: C, padding not counted.
      with_post_hoc: whether the best class by each post-hoc variant is computed too.

    Returns:
      Function of (weights, uint8 photos [B, H, W, 3], int32 labels [B]) that returns the arrays of
      `Predictions` by name, a copy on every device.
    """
    top_k = min(config.eval.top_k, num_classes)
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "chunk": config.eval.class_chunk,
        "dtype": jnp.dtype(config.train.compute_dtype),
    }

    def predict_step(
        weights: VisualWeights, image: UInt8[Array, "B H W 3"], label: Int[Array, " B"]
    ) -> Arrays:
        visual = nnx.merge(visual_graphdef, weights.params, weights.batch_stats, copy=True)
        embedding = visual.embed(_input(config.preprocessing, image), train=False)
        classes, logits, log_prob = log_prob_top_k(
            embedding, weights.class_weights, label, k=top_k, **options
        )
        arrays = {"top_classes": classes, "top_logits": logits, "label_log_prob": log_prob}
        if with_post_hoc:
            best = []
            for adjust in POSTHOC_VARIANTS.values():
                adjusted = adjust(weights.class_weights, weights.log_prior)
                classes, _, _ = log_prob_top_k(embedding, adjusted, label, k=1, **options)
                best.append(classes[:, 0])
            arrays["post_hoc"] = jnp.stack(best, -1)
        return {**arrays, "embedding": mesh.replicate(embedding)}

    return jax.jit(predict_step)


def make_embed_step(
    preprocessing: Preprocessing, visual_graphdef: nnx.GraphDef
) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """Builds the jitted function that embeds a batch of photos.

    Args:
      preprocessing: how photos become the input of the network.
      visual_graphdef: structure of the visual stream.

    Returns:
      Function of (visual parameters, visual batch statistics, uint8 photos [B, H, W, 3]) that
      returns embeddings, float32 [B, D], a copy on every device.
    """

    def embed_step(
        params: Any, batch_stats: Any, image: UInt8[Array, "B H W 3"]
    ) -> Float[Array, "B D"]:
        visual = nnx.merge(visual_graphdef, params, batch_stats, copy=True)
        return mesh.replicate(visual.embed(_input(preprocessing, image), train=False))

    return jax.jit(embed_step)


def _input(preprocessing: Preprocessing, image: jax.Array) -> jax.Array:
    return preprocessing.normalize(preprocessing.centre_crop(image))


def predict_split(
    predict_step: Callable[[VisualWeights, jax.Array, jax.Array], Arrays],
    weights: VisualWeights,
    split: Split,
    config: Config,
    device_mesh: jax.sharding.Mesh,
    *,
    max_photos: int = 0,
    keep_embedding: bool = False,
) -> Predictions:
    """Predicts the classes of a split's photos.

    Args:
      predict_step: see `make_predict_step`.
      weights: see `visual_weights`.
      split: the records.
      config: batch size, preprocessing and reading.
      device_mesh: the devices.
      max_photos: read at most so many, spread evenly over the split; 0: all.
      keep_embedding: whether embeddings are kept.

    Returns:
      The predictions, on every process.

    Raises:
      InputError: the split is empty.
    """
    loader = photo_batch_loader(
        split,
        config.preprocessing,
        batch_size=config.eval.batch_size,
        max_photos=max_photos,
        shard=device_batches.process_shard(),
    )

    def compute(image: jax.Array, label: jax.Array) -> Arrays:
        arrays = predict_step(weights, image, label)
        return {name: x for name, x in arrays.items() if keep_embedding or name != "embedding"}

    return Predictions(**map_photos(compute, loader, config, device_mesh))


def map_photos(
    compute: Callable[[jax.Array, jax.Array], Arrays],
    loader: PhotoBatchLoader,
    config: Config,
    device_mesh: jax.sharding.Mesh,
) -> dict[str, np.ndarray]:
    """Applies a function of a batch to all photos of a loader.

    Results are fetched one batch late, so that the devices never wait.

    Args:
      compute: function of (uint8 photos [B, H, W, 3], int32 labels [B]) that returns arrays
        [B, ...] by name, a copy on every device.
      loader: the photos.
      config: how they are read.
      device_mesh: the devices.

    Returns:
      Name -> array [N, ...] in the order of the photos, with "label" int32 [N] and "image_id" str
      [N]; the same on every process.

    Raises:
      InputError: there is no photo.
    """
    rows: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []
    pending: tuple[HostBatch, Arrays] | None = None
    data = config.data
    for batch in prefetch(loader, 0, len(loader), workers=data.workers, source=data.source):
        arrays = device_batches.to_device(batch, device_mesh)
        result = compute(arrays["image"], arrays["label"])
        if pending is not None:
            rows.append(_fetch(*pending))
        pending = batch, result
    if pending is None:
        raise InputError(
            "no photo to evaluate: the split is empty; import with a test split "
            "(sicot import --help)"
        )
    rows.append(_fetch(*pending))
    local, computed = (
        {name: np.stack([row[name] for row in part]) for name in part[0]}
        for part in zip(*rows, strict=True)
    )
    read = {name: distributed.all_gather_columns(array) for name, array in local.items()}
    is_photo = read["label"] >= 0  # [batches, B]; others fill up the last batch
    return {name: array[is_photo] for name, array in (read | computed).items()}


def _fetch(
    batch: HostBatch, result: Mapping[str, jax.Array]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What this process has read, and what all processes have computed."""
    local = {"label": batch["label"], "image_id": batch["image_id"].astype(str)}
    return local, {name: np.asarray(x) for name, x in result.items()}
