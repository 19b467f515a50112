"""The part of a classifier row that classes share through the words of their titles.

It is made of training titles; a photo that is recognised needs none.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sicot_jax.catalog.catalog import Catalog
from sicot_jax.catalog.title_variants import TitleVariantReader
from sicot_jax.classifier.heads import Classifier
from sicot_jax.config import Config


def class_words(catalog: Catalog, config: Config, told: int) -> np.ndarray:
    """float32 [C, told]: t_cw = mean over the class's training titles of the share of word w + 1 in
    the title's words.

    Words beyond the first `told` of the vocabulary count in a title's length alone. Titles are read
    in the variant that the config trains with (masked, shuffled). A class without a known word has
    a row of zeros.
    """
    read_title, split = TitleVariantReader(catalog, config), catalog.splits["train"]
    total = np.zeros((len(catalog.classes), told + 1), np.float32)
    titles = np.zeros(len(total), np.int64)
    for i in range(len(split)):
        ids = read_title(split[i], i)
        known = ids[ids > 0]
        if len(known):
            np.add.at(total[split.labels[i]], np.where(known <= told, known, 0), 1 / len(known))
            titles[split.labels[i]] += 1
    total /= np.maximum(titles, 1)[:, None]
    return total[:, 1:]


def start_word_rows(classifier: Classifier, words: np.ndarray) -> Classifier:
    """A classifier whose rows end in the words [C, told] of their classes; padding rows end in
    zeros.
    """
    kernel = classifier.kernel
    rows, width = kernel.shape
    padded = np.zeros((rows, words.shape[1]), np.float32)
    padded[: len(words)] = words
    placed = jax.make_array_from_callback(
        padded.shape, kernel.sharding, lambda index: padded[index]
    )
    own = width - words.shape[1]
    joined = jax.jit(lambda kernel, ends: jnp.concatenate([kernel[:, :own], ends], 1))(
        kernel, placed
    )
    return dataclasses.replace(classifier, kernel=joined)
