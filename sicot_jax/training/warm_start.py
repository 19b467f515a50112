"""Training that starts from pretrained weights (`model.init_from`): streams and class weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sicot_jax.catalog.catalog import Catalog
from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.common.text import pluralize
from sicot_jax.parallel import distributed, mesh
from sicot_jax.parallel.array_types import Bool, Int
from sicot_jax.training.checkpoint import CheckpointError, describe_differences, leaf_shapes
from sicot_jax.training.imprint_rows import imprint_new_rows, replace_rows
from sicot_jax.training.model import num_word_columns, plain_class_weights
from sicot_jax.training.pretrained import PretrainedWeights, read_pretrained
from sicot_jax.training.provenance import vocabulary_hash
from sicot_jax.training.setup import Setup
from sicot_jax.training.state import TrainState


def warm_start(state: TrainState, setup: Setup, catalog: Catalog) -> TrainState:
    """Replaces the weights of a new run by those of `model.init_from`, where both have them.

    - Streams: all parameters and batch statistics. Word vectors and tag head only with the same
      vocabulary, since ids of another one mean other words; the code head with as many bits; the
      localization branch where both have one.
    - Class weights: rows of the products that both have, by SKU; shares of words stay the
      catalogue's. Where the tag head is not taken, rows are folded into plain ones first. Products
      that are new get rows from their photos (`imprint_rows`).

    Args:
      state: before the first update.
      setup: the run's setup.
      catalog: to be trained on.

    Returns:
      The state with other weights.

    Raises:
      CheckpointError: names parameters of another shape.
    """
    pretrained = read_pretrained(state, setup, catalog)
    same_vocabulary = pretrained.vocabulary_hash == vocabulary_hash(catalog.tokenizer)
    fresh = _fresh_parts(state, pretrained, same_vocabulary)
    state = _with_streams(state, pretrained, same_vocabulary, fresh)
    if pretrained.class_weights is None:
        return state
    keeps_factors = (
        setup.config.model.shared_word_weights
        and pretrained.shares_word_weights
        and "tag_head" not in fresh
    )
    weights = (
        pretrained.class_weights
        if keeps_factors
        else plain_class_weights(pretrained.params, pretrained.class_weights)
    )
    return _with_rows(state, weights, pretrained, setup, catalog)


def _fresh_parts(
    state: TrainState, pretrained: PretrainedWeights, same_vocabulary: bool
) -> set[str]:
    """Parts of the visual stream that stay as they are in the new run."""
    here, there = state.params["visual"], pretrained.params["visual"]

    def in_both(part: str) -> bool:
        return part in here and part in there

    taken = {
        "tag_head": same_vocabulary and in_both("tag_head"),
        "code_head": in_both("code_head")
        and here["code_head"]["bias"].shape == there["code_head"]["bias"].shape,
        "localization": in_both("localization"),
    }
    return {part for part, is_taken in taken.items() if not is_taken}


def _with_streams(
    state: TrainState, pretrained: PretrainedWeights, same_vocabulary: bool, fresh: set[str]
) -> TrainState:
    params, batch_stats = {**state.params}, {**state.batch_stats}
    for stream in state.params.keys() & pretrained.params.keys():
        params[stream] = pretrained.params[stream]
        batch_stats[stream] = pretrained.batch_stats[stream]
    if "semantic" in state.params and "semantic" in pretrained.params and not same_vocabulary:
        distributed.print_primary(
            f"{pretrained.source}: another vocabulary; word vectors are the catalogue's own"
        )
        word_vectors = state.params["semantic"]["word_vectors"]
        params["semantic"] = {**params["semantic"], "word_vectors": word_vectors}
    params["visual"] = _merge(state.params["visual"], params["visual"], fresh)
    batch_stats["visual"] = _merge(state.batch_stats["visual"], batch_stats["visual"], fresh)
    if faults := describe_differences(leaf_shapes(params), leaf_shapes(state.params)):
        raise CheckpointError(f"{pretrained.source}: another model: {faults}")
    return dataclasses.replace(state, params=params, batch_stats=batch_stats)


def _merge(here: dict[str, Any], there: dict[str, Any], fresh: set[str]) -> dict[str, Any]:
    """Parts from `there`, except the `fresh` ones, which are from `here`."""
    taken = {part: tree for part, tree in there.items() if part not in fresh}
    return taken | {part: tree for part, tree in here.items() if part in fresh}


def _with_rows(
    state: TrainState,
    weights: ClassWeights,
    pretrained: PretrainedWeights,
    setup: Setup,
    catalog: Catalog,
) -> TrainState:
    skus, here = list(catalog.classes.sku), state.classifier.weights
    # Discontinued products keep their class ids, and nothing else.
    is_sold = ~np.asarray(catalog.classes.discontinued, bool)
    source_rows = _source_rows(skus, is_sold, pretrained, len(here.bias))
    num_taken = int((source_rows >= 0).sum())
    distributed.print_primary(
        f"{pretrained.source}: {pluralize(num_taken, 'row')} of products that both have, "
        f"{pluralize(len(pretrained.skus) - num_taken, 'row')} left behind"
    )
    merged = replace_rows(
        here,
        weights,
        mesh.shard_class_vector(source_rows, setup.mesh),
        here.width - num_word_columns(setup.config, setup.shape),
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
