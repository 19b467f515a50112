"""Photos -> predictions -> accuracy. Only the visual stream and the classifier are here: text
cannot be seen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sicot_jax.catalog.batches import PhotoBatchLoader, photo_batch_loader
from sicot_jax.catalog.catalog import Catalog, Split
from sicot_jax.catalog.prefetch import prefetch
from sicot_jax.classifier import posthoc as post_hoc
from sicot_jax.classifier import sharded as class_sharded
from sicot_jax.classifier.heads import Classifier
from sicot_jax.common.files import atomic_file, write_json
from sicot_jax.config import Config
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.parallel import distributed
from sicot_jax.parallel import mesh
from sicot_jax.training import device_batches
from sicot_jax.training.metrics import accuracy

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Per photo, in record order. Logits are of the embeddings rounded to `train.compute_dtype`,
    here as they were before.
    """

    image_id: np.ndarray  # str [N]
    label: np.ndarray  # int32 [N]
    top_classes: np.ndarray  # int32 [N, K], best first
    top_logits: np.ndarray  # float32 [N, K]
    label_log_prob: np.ndarray  # float32 [N]
    post_hoc: np.ndarray | None = (
        None  # int32 [N, V], best class by each of `post_hoc.VARIANTS`, likewise
    )
    embedding: np.ndarray | None = None  # float32 [N, D], where it was asked for


def make_recognize(
    config: Config, visual_graphdef: nnx.GraphDef, num_classes: int, *, with_post_hoc: bool = False
) -> Callable[..., dict[str, jax.Array]]:
    """Jitted (visual params, visual batch stats, classifier, uint8 photos, label) -> arrays of
    `Predictions` by name.

    The classifier is one of v alone (`plain_classifier`).
    By construction it takes no text: the semantic stream's parameters are not among its arguments.
    """
    preprocessing = config.preprocessing

    @jax.jit
    def recognize(params, batch_stats, classifier: Classifier, image, label):
        visual = nnx.merge(visual_graphdef, params, batch_stats, copy=True)
        embedding = visual.embed(
            preprocessing.normalise(preprocessing.centre_crop(image)), train=False
        )

        def best(kernel, bias, k):
            return class_sharded.log_prob_top_k(
                embedding,
                kernel,
                bias,
                label,
                k=k,
                num_classes=num_classes,
                chunk=config.eval.class_chunk,
                dtype=jnp.dtype(config.train.compute_dtype),
            )

        classes, logits, log_prob = best(
            classifier.kernel, classifier.bias, min(config.eval.top_k, num_classes)
        )
        arrays = {"top_classes": classes, "top_logits": logits, "label_log_prob": log_prob}
        if with_post_hoc:
            changed = [
                best(*change(classifier), k=1)[0][:, 0] for change in post_hoc.VARIANTS.values()
            ]
            arrays["post_hoc"] = jnp.stack(changed, -1)
        return {**arrays, "embedding": mesh.replicate(embedding)}

    return recognize


def make_embed(
    preprocessing: Preprocessing, visual_graphdef: nnx.GraphDef
) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """Jitted (visual params, visual batch stats, uint8 photos [B, H, W, 3]) -> v float32 [B, D],
    whole on every device.
    """

    @jax.jit
    def embed(params, batch_stats, image):
        visual = nnx.merge(visual_graphdef, params, batch_stats, copy=True)
        return mesh.replicate(
            visual.embed(preprocessing.normalise(preprocessing.centre_crop(image)), train=False)
        )

    return embed


def plain_classifier(state: Any) -> Classifier:
    """The classifier of v alone: where rows [w_c, t_c] share words its rows are w_c + A^T t_c, for
    the same logits.
    """
    kernel = state.classifier.kernel
    to_words = state.params["visual"].get("tag_head")
    if to_words is None or kernel.shape[1] == len(to_words["kernel"]):
        return state.classifier
    own = len(to_words["kernel"])

    @jax.jit
    def fold(kernel, scores):
        return kernel[:, :own] + jnp.matmul(kernel[:, own:], scores.T, precision="highest")

    return dataclasses.replace(state.classifier, kernel=fold(kernel, to_words["kernel"]))


def predict(
    recognize,
    state: Any,
    split: Split,
    config: Config,
    device_mesh,
    *,
    max_photos: int = 0,
    keep_embedding: bool = False,
) -> Predictions:
    """Run `recognize` over a split's photos with the visual stream and classifier of `state`."""
    batches = photo_batch_loader(
        split,
        config.preprocessing,
        batch_size=config.eval.batch_size,
        max_photos=max_photos,
        shard=device_batches.process_shard(),
    )
    visual = state.params["visual"], state.batch_stats["visual"], plain_classifier(state)

    def compute(image, label):
        arrays = recognize(*visual, image, label)
        return {name: x for name, x in arrays.items() if keep_embedding or name != "embedding"}

    return Predictions(**over_photos(compute, batches, config, device_mesh))


def over_photos(
    compute: Callable[[jax.Array, jax.Array], dict[str, jax.Array]],
    batches: PhotoBatchLoader,
    config: Config,
    device_mesh,
) -> dict[str, np.ndarray]:
    """`compute(image, label)`, arrays [B, ...] by name, over all photos: [N, ...] in their order,
    with label and image_id.
    """
    rows: list[tuple[Any, Any]] = []
    pending = None
    source = prefetch(
        batches, 0, len(batches), workers=config.data.workers, source=config.data.source
    )
    for batch in source:
        arrays = device_batches.to_device(batch, device_mesh)
        result = compute(arrays["image"], arrays["label"])
        if pending is not None:  # fetch one batch late, so that the device never waits
            rows.append(_fetch(*pending))
        pending = batch, result
    if pending is None:
        raise InputError(
            "no photo to evaluate: the split is empty; import with a test split (sicot import --help)"
        )
    rows.append(_fetch(*pending))
    own, whole = (
        {name: np.stack([row[name] for row in part]) for name in part[0]}
        for part in zip(*rows, strict=True)
    )
    own = {name: distributed.all_gather_columns(array) for name, array in own.items()}
    real = own["label"] >= 0  # [batches, B]
    return {name: array[real] for name, array in (own | whole).items()}


def _fetch(batch, result) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """-> what this process read, what all have computed."""
    own = {"label": batch["label"], "image_id": batch["image_id"].astype(str)}
    return own, {name: np.asarray(x) for name, x in result.items()}


def summarise(predictions: Predictions, catalog: Catalog, config: Config) -> dict[str, Any]:
    """Accuracy of predictions with the catalogue's (or the config's) head boundary."""
    boundary = head_boundary(catalog, config)
    return accuracy(
        predictions.label, predictions.top_classes, catalog.classes.counts["train"], boundary
    )


def post_hoc_accuracy(
    predictions: Predictions, catalog: Catalog, config: Config
) -> dict[str, dict[str, float | None]]:
    """Variant -> group -> top-1: on validation photos, what a variant is chosen by."""
    assert predictions.post_hoc is not None
    result = {}
    for name, classes in zip(post_hoc.VARIANTS, predictions.post_hoc.T, strict=True):
        groups = summarise(
            dataclasses.replace(predictions, top_classes=classes[:, None]), catalog, config
        )
        result[name] = {group: row["top1"] for group, row in groups.items()}
    return result


def head_boundary(catalog: Catalog, config: Config) -> int:
    return catalog.head_boundary if config.data.head_boundary < 0 else config.data.head_boundary


def class_table_hash(catalog: Catalog) -> str:
    digest = hashlib.sha256()
    for sku in catalog.classes.sku:
        digest.update(sku.encode() + b"\n")
    return digest.hexdigest()


def test_set_hash(predictions: Predictions) -> str:
    """Over the sorted (photo, label) pairs: equal for runs that were tested on the same photos."""
    pairs = sorted(
        f"{image}\t{label}"
        for image, label in zip(predictions.image_id, predictions.label, strict=True)
    )
    return hashlib.sha256("\n".join(pairs).encode()).hexdigest()


def write_results(
    workdir: Path,
    predictions: Predictions,
    catalog: Catalog,
    config: Config,
    *,
    split: str,
    info: dict[str, Any],
) -> dict[str, Any]:
    """`predictions.npz` and `results.json`, each written whole or not at all; returns the results."""
    hashes = {"class_table": class_table_hash(catalog), "test_set": test_set_hash(predictions)}
    results = {
        "format": FORMAT,
        "split": split,
        "accuracy": summarise(predictions, catalog, config),
        "head_boundary": head_boundary(catalog, config),
        "hashes": {"data": catalog.data_hash, **hashes},
        **info,
    }
    if distributed.is_primary():
        arrays = {name: value for name, value in vars(predictions).items() if value is not None}
        if predictions.post_hoc is not None:
            arrays["post_hoc_names"] = np.array(list(post_hoc.VARIANTS))
        with atomic_file(workdir / "predictions.npz") as temporary:
            np.savez_compressed(
                temporary,
                **arrays,
                train_counts=catalog.classes.counts["train"],
                hashes=json.dumps(hashes),
                format=FORMAT,
            )
        write_json(workdir / "results.json", results)
    return results


def accuracy_lines(results: dict[str, Any]) -> list[str]:
    """A small table for the terminal."""
    lines = [f"{'':<12}{'top-1':>8}{'top-3':>8}{'photos':>9}{'classes':>9}"]
    for name, row in results["accuracy"].items():
        figures = "".join(
            "       -" if row[k] is None else f"{row[k]:8.2f}" for k in ("top1", "top3")
        )
        lines.append(f"{name.replace('_', ' '):<12}{figures}{row['photos']:>9}{row['classes']:>9}")
    return lines
