"""Training that starts from pretrained weights (`model.init_from`): streams and class weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sicot_jax.catalog.batches import PhotoBatchLoader, evenly_spaced
from sicot_jax.catalog.catalog import Catalog
from sicot_jax.classifier import imprint
from sicot_jax.classifier.class_weights import ClassWeights, gather_rows
from sicot_jax.common.text import pluralize
from sicot_jax.parallel import distributed, mesh
from sicot_jax.parallel.array_types import Array, Bool, Float, Int
from sicot_jax.training import device_batches
from sicot_jax.training.checkpoint import CheckpointError, describe_differences, leaf_shapes
from sicot_jax.training.model import num_word_columns, plain_class_weights
from sicot_jax.training.predict import make_embed_step, map_photos
from sicot_jax.training.pretrained import PretrainedWeights, read_pretrained
from sicot_jax.training.provenance import vocabulary_hash
from sicot_jax.training.setup import Setup
from sicot_jax.training.state import TrainState


def imprint_new_rows(
    state: TrainState,
    new_classes: Int[np.ndarray, " K"],
    source_rows: Int[np.ndarray, " P"],
    setup: Setup,
    catalog: Catalog,
) -> TrainState:
    """Replaces the class weights of new products by weights made from their training photos.

    As `classifier.imprint` makes them, from at most `imprint.MAX_PHOTOS` photos each and fitted to
    `imprint.NUM_REFERENCE_PRODUCTS` known products. A product without a photo keeps its row.

    Args:
      state: state with the streams and the known products' rows of a warm start.
      new_classes: class ids, int [K].
      source_rows: row that each class was taken from, -1 for one that is not known, int32
        [C padded].
      setup: the run's setup.
      catalog: training photos.

    Returns:
      The state with other class weights.
    """
    known = np.flatnonzero(source_rows >= 0)
    if not len(known):
        distributed.print_primary("no product in common: all rows keep their initial values")
        return state
    reference = known[evenly_spaced(len(known), imprint.NUM_REFERENCE_PRODUCTS)]
    chosen = np.concatenate([new_classes, reference])
    classes, means = _mean_directions(state, chosen, setup, catalog)
    weights = state.classifier.weights
    num_visual_columns = weights.width - num_word_columns(setup.config, setup.shape)
    is_new = np.isin(classes, new_classes)
    mean_row, mean_bias = _mean_of_known(weights, source_rows, num_visual_columns, setup)
    rows = _rows_of(weights, classes[~is_new], setup)[:, :num_visual_columns]
    model = imprint.fit_imprint(means[~is_new], rows, mean_row, mean_bias)
    count = int(is_new.sum())
    position = np.full(source_rows.shape, -1, np.int32)
    position[classes[is_new]] = np.arange(count)
    new_rows = mesh.shard_rows((count, num_visual_columns), model.rows(means[is_new]), setup.mesh)
    weights = replace_rows(
        weights,
        ClassWeights(new_rows, mesh.shard_rows((count,), np.full(count, mean_bias), setup.mesh)),
        mesh.shard_class_vector(position, setup.mesh),
        num_visual_columns,
    )
    missing = len(new_classes) - count
    distributed.print_primary(
        f"{pluralize(len(new_classes), 'product')} new: rows of {count} from their photos"
        + (f", {missing} without a photo keep their initial values" if missing else "")
    )
    classifier = dataclasses.replace(state.classifier, weights=weights)
    return dataclasses.replace(state, classifier=classifier)


def replace_rows(
    weights: ClassWeights,
    other: ClassWeights,
    position: Int[Array, " C"],
    num_visual_columns: int,
) -> ClassWeights:
    """Replaces some rows of class weights by rows of others.

    Args:
      weights: kernel float32 [C padded, D + V], bias [C padded], divided over devices.
      other: kernel float32 [N padded, D or more], bias [N padded], likewise.
      position: row of `other` for each class, -1 to keep the row, int32 [C padded], likewise.
      num_visual_columns: D; further columns stay as they are.

    Returns:
      Weights of the shapes of `weights`.
    """

    @jax.jit
    def replace(old: Array, new: Array, position: Array) -> Array:
        columns = jnp.where(
            position[:, None] >= 0, new[:, :num_visual_columns], old[:, :num_visual_columns]
        )
        return jnp.concatenate([columns, old[:, num_visual_columns:]], 1)

    kernel = replace(weights.kernel, gather_rows(other.kernel, position), position)
    bias = gather_rows(other.bias[:, None], position)
    return ClassWeights(kernel, replace(weights.bias[:, None], bias, position)[:, 0])


def _mean_of_known(
    weights: ClassWeights, source_rows: np.ndarray, num_visual_columns: int, setup: Setup
) -> tuple[Float[np.ndarray, " D"], float]:
    """Mean row and mean bias of the known classes."""

    @jax.jit
    def mean(kernel: Array, bias: Array, rows: Array) -> tuple[Array, Array]:
        share = (rows >= 0) / jnp.maximum(jnp.sum(rows >= 0), 1)
        mean_row = jnp.sum(share[:, None] * kernel[:, :num_visual_columns], 0)
        return mean_row, jnp.sum(bias * share)

    rows = mesh.shard_class_vector(source_rows, setup.mesh)
    mean_row, mean_bias = mean(weights.kernel, weights.bias, rows)
    return np.asarray(mean_row), float(mean_bias)


def _rows_of(
    weights: ClassWeights, classes: Int[np.ndarray, " K"], setup: Setup
) -> Float[np.ndarray, "K D"]:
    """Rows of some classes, on the host."""
    padded = np.full(mesh.pad_classes(len(classes), setup.mesh), -1, np.int32)
    padded[: len(classes)] = classes
    rows = gather_rows(weights.kernel, mesh.shard_class_vector(padded, setup.mesh))
    return np.asarray(mesh.replicate(rows))[: len(classes)]


def _mean_directions(
    state: TrainState, classes: Int[np.ndarray, " K"], setup: Setup, catalog: Catalog
) -> tuple[Int[np.ndarray, " M"], Float[np.ndarray, "M D"]]:
    """Those of the classes that have training photos, and the means of their unit embeddings."""
    labels = catalog.splits["train"].labels
    indices = imprint.first_photos(labels, classes)
    if not len(indices):
        return np.zeros(0, np.int64), np.zeros((0, 1), np.float32)
    return imprint.mean_directions(_embed_records(state, indices, setup, catalog), labels[indices])


def _embed_records(
    state: TrainState, indices: Int[np.ndarray, " N"], setup: Setup, catalog: Catalog
) -> Float[np.ndarray, "N D"]:
    """Visual embeddings of training photos."""
    config, devices = setup.config, setup.mesh.size
    embed_step = make_embed_step(config.preprocessing, setup.visual_graphdef)
    visual = state.params["visual"], state.batch_stats["visual"]
    loader = PhotoBatchLoader(
        catalog.splits["train"],
        config.preprocessing,
        -(-config.eval.batch_size // devices) * devices,
        indices,
        device_batches.process_shard(),
    )

    def compute(image: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
        return {"embedding": embed_step(*visual, image)}

    return map_photos(compute, loader, config, setup.mesh)["embedding"]


def warm_start(state: TrainState, setup: Setup, catalog: Catalog) -> TrainState:
    """Replaces the weights of a new run by those of `model.init_from`, where both have them.

    - Streams: all parameters and batch statistics. Word vectors and tag head only with the same
      vocabulary, since ids of another one mean other words; the code head with as many bits; the
      localization branch where both have one.
    - Class weights: rows of the products that both have, by SKU; shares of words stay the
      catalogue's. Where the tag head is not taken, rows are folded into plain ones first. Products
      that are new get rows from their photos (`imprint_rows`).

    Args:
      state: state before the first update.
      setup: the run's setup.
      catalog: catalogue to train on.

    Returns:
      The state with other weights.

    Raises:
      CheckpointError: names parameters of another shape.
    """
    pretrained = read_pretrained(state, setup, catalog)
    same_vocabulary = pretrained.vocabulary_hash == vocabulary_hash(catalog.tokenizer)
    kept_parts = _kept_parts(state, pretrained, same_vocabulary)
    state = _with_streams(state, pretrained, same_vocabulary, kept_parts)
    if pretrained.class_weights is None:
        return state
    keeps_factors = (
        setup.config.model.shared_word_weights
        and pretrained.shares_word_weights
        and "tag_head" not in kept_parts
    )
    weights = (
        pretrained.class_weights
        if keeps_factors
        else plain_class_weights(pretrained.params, pretrained.class_weights)
    )
    return _with_rows(state, weights, pretrained, setup, catalog)


def _kept_parts(
    state: TrainState, pretrained: PretrainedWeights, same_vocabulary: bool
) -> set[str]:
    """Parts of the visual stream that keep the initial values of the new run."""
    initial, loaded = state.params["visual"], pretrained.params["visual"]

    def in_both(part: str) -> bool:
        return part in initial and part in loaded

    taken = {
        "tag_head": same_vocabulary and in_both("tag_head"),
        "code_head": in_both("code_head")
        and initial["code_head"]["bias"].shape == loaded["code_head"]["bias"].shape,
        "localization": in_both("localization"),
    }
    return {part for part, is_taken in taken.items() if not is_taken}


def _with_streams(
    state: TrainState, pretrained: PretrainedWeights, same_vocabulary: bool, kept_parts: set[str]
) -> TrainState:
    params, batch_stats = {**state.params}, {**state.batch_stats}
    for stream in state.params.keys() & pretrained.params.keys():
        params[stream] = pretrained.params[stream]
        batch_stats[stream] = pretrained.batch_stats[stream]
    if "semantic" in state.params and "semantic" in pretrained.params and not same_vocabulary:
        distributed.print_primary(
            f"{pretrained.source}: another vocabulary; word vectors are those of the catalogue"
        )
        word_vectors = state.params["semantic"]["word_vectors"]
        params["semantic"] = {**params["semantic"], "word_vectors": word_vectors}
    params["visual"] = _merge_parts(state.params["visual"], params["visual"], kept_parts)
    batch_stats["visual"] = _merge_parts(
        state.batch_stats["visual"], batch_stats["visual"], kept_parts
    )
    if faults := describe_differences(leaf_shapes(params), leaf_shapes(state.params)):
        raise CheckpointError(f"{pretrained.source}: another model: {faults}")
    return dataclasses.replace(state, params=params, batch_stats=batch_stats)


def _merge_parts(
    initial: dict[str, Any], loaded: dict[str, Any], kept_parts: set[str]
) -> dict[str, Any]:
    """Loaded parts, except `kept_parts`, which are the initial ones."""
    taken = {part: tree for part, tree in loaded.items() if part not in kept_parts}
    return taken | {part: tree for part, tree in initial.items() if part in kept_parts}


def _with_rows(
    state: TrainState,
    weights: ClassWeights,
    pretrained: PretrainedWeights,
    setup: Setup,
    catalog: Catalog,
) -> TrainState:
    skus, initial = list(catalog.classes.sku), state.classifier.weights
    # Discontinued products keep their class ids, and nothing else.
    is_sold = ~np.asarray(catalog.classes.discontinued, bool)
    source_rows = _source_rows(skus, is_sold, pretrained, len(initial.bias))
    num_taken = int((source_rows >= 0).sum())
    distributed.print_primary(
        f"{pretrained.source}: {pluralize(num_taken, 'row')} of products that both have, "
        f"{pluralize(len(pretrained.skus) - num_taken, 'row')} left behind"
    )
    merged = replace_rows(
        initial,
        weights,
        mesh.shard_class_vector(source_rows, setup.mesh),
        initial.width - num_word_columns(setup.config, setup.shape),
    )
    classifier = dataclasses.replace(state.classifier, weights=merged)
    state = dataclasses.replace(state, classifier=classifier)
    new_classes = np.flatnonzero((source_rows[: len(skus)] < 0) & is_sold)
    if not len(new_classes):
        return state
    return imprint_new_rows(state, new_classes, source_rows, setup, catalog)


def _source_rows(
    skus: list[str],
    is_sold: Bool[np.ndarray, " C"],
    pretrained: PretrainedWeights,
    num_rows: int,
) -> Int[np.ndarray, " P"]:
    """Row of the pretrained class weights for each class, -1 for none; int32 [C padded]."""
    row_of = {sku: row for row, sku in enumerate(pretrained.skus)}
    rows = np.full(num_rows, -1, np.int32)
    rows[: len(skus)] = [
        row_of.get(sku, -1) if sold else -1 for sku, sold in zip(skus, is_sold, strict=True)
    ]
    return rows
