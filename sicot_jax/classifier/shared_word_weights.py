"""Shared word weights: the part of a class weight that classes share through words of their titles.

Rows are factorised as [w_c, t_c] with t_c fixed, computed from training titles; a photo that is
recognised needs no title. `class_weights.fold_shared_word_weights` makes plain rows of them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sicot_jax.catalog.catalog import Catalog
from sicot_jax.catalog.title_variants import TitleVariantReader
from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.config import Config
from sicot_jax.parallel.array_types import Array, Float


def class_word_shares(
    catalog: Catalog, config: Config, num_tags: int
) -> Float[np.ndarray, "C {num_tags}"]:
    """Returns the share of each word in the training titles of each class.

    t_cw is the mean over the class's training titles of the share of word w + 1 among the title's
    words. Words beyond the tag vocabulary count in a title's length alone. Titles are read in the
    variant that the config trains with (masked, shuffled).

    Args:
      catalog: an opened catalogue.
      config: the run's config.
      num_tags: V, size of the tag vocabulary.

    Returns:
      float32 [C, V]; zeros for a class without a known word.
    """
    read_title, split = TitleVariantReader(catalog, config), catalog.splits["train"]
    total = np.zeros((len(catalog.classes), num_tags + 1), np.float32)
    num_titles = np.zeros(len(total), np.int64)
    for i in range(len(split)):
        ids = read_title(split[i], i)
        known = ids[ids > 0]
        if len(known):
            tags = np.where(known <= num_tags, known, 0)
            np.add.at(total[split.labels[i]], tags, 1 / len(known))
            num_titles[split.labels[i]] += 1
    total /= np.maximum(num_titles, 1)[:, None]
    return total[:, 1:]


def set_word_columns(weights: ClassWeights, word_shares: Float[np.ndarray, "C V"]) -> ClassWeights:
    """Returns class weights whose last columns are the word shares of their classes.

    Args:
      weights: kernel float32 [C padded, D + V], divided over devices by class.
      word_shares: float32 [C, V].

    Returns:
      The weights with the last V columns replaced; zeros in rows of padding.
    """
    kernel = weights.kernel
    num_rows, width = kernel.shape
    padded = np.zeros((num_rows, word_shares.shape[1]), np.float32)
    padded[: len(word_shares)] = word_shares
    sharded = jax.make_array_from_callback(
        padded.shape, kernel.sharding, lambda index: padded[index]
    )
    num_visual_columns = width - word_shares.shape[1]

    @jax.jit
    def concatenate(kernel: Array, columns: Array) -> Array:
        return jnp.concatenate([kernel[:, :num_visual_columns], columns], 1)

    return dataclasses.replace(weights, kernel=concatenate(kernel, sharded))
