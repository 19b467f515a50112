"""Class-title prototypes: what the titles of a class say, as one vector, where a part of its classifier row starts.

They are made of training titles; a photo that is recognised needs none.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sicot_jax.catalog.catalog import Catalog
from sicot_jax.config import Config
from sicot_jax.pipeline import TitleReader
from sicot_jax.step import TrainState


def class_titles(catalog: Catalog, config: Config) -> np.ndarray:
    """float32 [C, E], rows of length 1: t_c = mean over the class's training titles of the mean of their word vectors, less
    the mean over classes.

    Titles are read in the variant that the config trains with (masked, shuffled), nothing dropped. A class without a known
    word has a row of zeros.
    """
    read_title, split = TitleReader(catalog, config), catalog.splits["train"]
    total = np.zeros((len(catalog.classes), catalog.word_vectors.shape[1]), np.float64)
    titles = np.zeros(len(total), np.int64)
    for i in range(len(split)):
        ids = read_title.undropped(split[i], i)
        if (ids > 0).any():
            total[split.labels[i]] += catalog.word_vectors[ids[ids > 0]].mean(0)
            titles[split.labels[i]] += 1
    return centred_directions(total, titles)


def centred_directions(total: np.ndarray, titles: np.ndarray) -> np.ndarray:
    """Sums [C, E] of a class's `titles` [C] vectors -> their means less the mean of means, each of length 1, or zero."""
    known = titles > 0
    if not known.any():
        return np.zeros(total.shape, np.float32)
    means = total / np.maximum(titles, 1)[:, None]
    centred = np.where(known[:, None], means - means[known].mean(0), 0.0)
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    return (centred / np.where(length > 1e-9, length, 1.0)).astype(np.float32)


def start_prototypes(state: TrainState, prototypes: np.ndarray) -> TrainState:
    """A TrainState whose classifier rows end in the prototypes [C, E]; padding rows end in zeros."""
    kernel = state.classifier.kernel
    rows, width = kernel.shape
    padded = np.zeros((rows, prototypes.shape[1]), np.float32)
    padded[: len(prototypes)] = prototypes
    placed = jax.make_array_from_callback(padded.shape, kernel.sharding, lambda index: padded[index])
    own = width - prototypes.shape[1]
    joined = jax.jit(lambda kernel, ends: jnp.concatenate([kernel[:, :own], ends], 1))(kernel, placed)
    return dataclasses.replace(state, classifier=dataclasses.replace(state.classifier, kernel=joined))
