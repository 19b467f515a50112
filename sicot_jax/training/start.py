"""The start of a run: what the catalogue must have, and the state before the first update."""

from __future__ import annotations

import dataclasses

import numpy as np

from sicot_jax.catalog.catalog import Catalog
from sicot_jax.classifier.class_weights import class_word_shares, set_word_columns
from sicot_jax.config import Config
from sicot_jax.errors import InputError
from sicot_jax.models.semantic_stream import set_word_vectors
from sicot_jax.parallel import distributed, mesh
from sicot_jax.training.model import num_word_columns
from sicot_jax.training.setup import Setup
from sicot_jax.training.state import TrainState, class_log_prior, initial_state
from sicot_jax.training.warm_start import warm_start


def check_catalog(catalog: Catalog, config: Config) -> None:
    """Raises InputError for what a run would otherwise miss only after its last step.

    Args:
      catalog: catalogue to train on.
      config: the run's config.

    Raises:
      InputError: no test photos, or an array file with photos of another size or preprocessing.
    """
    if config.data.source == "arrays":
        _check_array_file(catalog, config)
    if not len(catalog.splits["test"]):
        raise InputError(
            f"{catalog.name} has no test photos (classes of under 4 photos give none); add photos, "
            "or a split column to the manifest"
        )
    if not len(catalog.splits["validation"]):
        distributed.print_primary(
            f"{catalog.name} has no validation photos: the last state is tested, not the best"
        )


def _check_array_file(catalog: Catalog, config: Config) -> None:
    """Photos of an array file were resized at export; resizing them again would differ."""
    path, preprocessing = config.data.path, config.preprocessing
    stored = np.asarray(catalog.splits["train"][0]["image"]).shape[:2]
    wanted = preprocessing.resize_height, preprocessing.resize_width
    if stored != wanted:
        raise InputError(
            f"{path} holds photos of {stored[0]}x{stored[1]}, the config wants "
            f"{wanted[0]}x{wanted[1]}; export again with this config"
        )
    for name, value in catalog.resized_by.items():
        if value != getattr(preprocessing, name):
            raise InputError(
                f"{path} holds photos made with preprocessing.{name}={value}, the config wants "
                f"{getattr(preprocessing, name)}; export again with this config"
            )


def starting_state(setup: Setup, catalog: Catalog) -> TrainState:
    """Returns the state before the first update, with what comes from catalogue and earlier runs.

    To be called under `jax.set_mesh(setup.mesh)`.

    Args:
      setup: the run's setup.
      catalog: class frequencies, word vectors and words of titles.

    Returns:
      `state.initial_state` with the catalogue's word vectors and word shares, and the weights of
      `model.init_from`.
    """
    config = setup.config
    prior = class_log_prior(catalog.classes.counts["train"], setup.mesh)
    state = initial_state(setup, mesh.shard_class_vector(prior, setup.mesh))
    if config.loss.with_semantic:
        state = set_word_vectors(state, catalog.word_vectors)
    if word_columns := num_word_columns(config, setup.shape):
        shares = class_word_shares(catalog, config, word_columns)
        weights = set_word_columns(state.classifier.weights, shares)
        classifier = dataclasses.replace(state.classifier, weights=weights)
        state = dataclasses.replace(state, classifier=classifier)
    return warm_start(state, setup, catalog) if config.model.init_from else state
