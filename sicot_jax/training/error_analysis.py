"""What a finished run reports beyond accuracy: its catalogue, confusions, attention to words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sicot_jax.catalog.batches import evenly_spaced
from sicot_jax.catalog.catalog import Catalog
from sicot_jax.catalog.statistics import head_mask, vocabulary_overlap
from sicot_jax.catalog.title_variants import TitleVariantReader
from sicot_jax.catalog.tokenizer import WORD_START
from sicot_jax.parallel import mesh
from sicot_jax.parallel.array_types import Float, Int
from sicot_jax.training.restore import RestoredModel

MAX_TITLES = 20_000  # read at most, evenly over the training photos
_SHOWN_TITLES, _SHOWN_WORDS, _SHOWN_CLASSES, _SHOWN_SOURCES = 12, 20, 12, 3
_MIN_TITLES = 20  # with a word, for its mean weight to count
_BATCH = 1024

WordWeights = list[tuple[str, float]]  # (word, multiple of equal weights)


def catalog_statistics(catalog: Catalog, head_boundary: int) -> dict[str, Any]:
    """Returns sizes and vocabulary statistics of a catalogue (Table 1 and Fig. 6 of SICoT).

    Args:
      catalog: an opened catalogue.
      head_boundary: head = classes with more training photos than this.

    Returns:
      "name", "classes", "photos" by split, "vocabulary", "titles" (number of titles that were
      read), "words" (words of head, tail and both) and "word_counts": [[times a word occurs, number
      of words that occur so often], ...].
    """
    split = catalog.splits["train"]
    indices = evenly_spaced(len(split), MAX_TITLES)
    titles = [np.asarray(split[i]["token_ids"], np.int64) for i in indices.tolist()]
    head = head_mask(catalog.classes.counts["train"], head_boundary)
    counts = np.bincount(np.concatenate([*titles, np.zeros(0, np.int64)]), minlength=1)
    occurrences, num_words = np.unique(counts[counts > 0], return_counts=True)
    return {
        "name": catalog.name,
        "classes": len(catalog.classes),
        "photos": {name: len(records) for name, records in catalog.splits.items()},
        "vocabulary": len(catalog.tokenizer.vocabulary) - 1,
        "titles": len(indices),
        "words": dict(vocabulary_overlap(titles, split.labels[indices], head)),
        "word_counts": np.stack([occurrences, num_words], -1).tolist(),
    }


def tail_to_head_confusions(
    label: Int[np.ndarray, " N"],
    predicted: Int[np.ndarray, " N"],
    train_counts: Int[np.ndarray, " C"],
    head_boundary: int,
    sku: Sequence[str],
) -> list[dict[str, Any]]:
    """Returns the head classes that most tail photos are mistaken for.

    Args:
      label: class of each test photo, int [N].
      predicted: predicted class, int [N].
      train_counts: training photos per class, int [C].
      head_boundary: head = classes with more training photos than this.
      sku: names of the classes, [C].

    Returns:
      Most photos first: {"class": SKU of the head class, "photos": tail photos mistaken for it,
      "from": [{"class", "photos", "tested": test photos of that class}, ...]}.
    """
    head = head_mask(train_counts, head_boundary)
    confused = ~head[label] & head[predicted]
    photos_by_class = np.bincount(predicted[confused], minlength=len(train_counts))
    rows = []
    for target in np.argsort(-photos_by_class, kind="stable")[:_SHOWN_CLASSES]:
        if not photos_by_class[target]:
            break
        from_target = label[confused & (predicted == target)]
        sources = np.bincount(from_target, minlength=len(train_counts))
        most = [c for c in np.argsort(-sources, kind="stable")[:_SHOWN_SOURCES] if sources[c]]
        shown = [
            {"class": sku[c], "photos": int(sources[c]), "tested": int((label == c).sum())}
            for c in most
        ]
        rows.append({"class": sku[target], "photos": int(photos_by_class[target]), "from": shown})
    return rows


def title_attention(model: RestoredModel, catalog: Catalog) -> dict[str, Any]:
    """Returns the attention weights of words in training titles (Fig. 7 of SICoT).

    A weight is a multiple of that of equal weights, 1 / words of the title; pieces of a word are
    summed. Titles are in the variant that training reads (masked, shuffled).

    Args:
      model: a restored run with a semantic stream, under its mesh.
      catalog: catalogue that it was trained on.

    Returns:
      "highest" and "lowest": [{"word", "weight" (mean over titles), "titles"}, ...]; "titles":
      [{"title", "class", "words": [[word, weight], ...]}, ...] of classes spread from the most to
      the least frequent.
    """
    split = catalog.splits["train"]
    indices = evenly_spaced(len(split), MAX_TITLES)
    rows, records = _attention_rows(model, catalog, indices)
    means = _mean_weights(rows)
    labels = np.asarray([record["class_id"] for record in records], np.int64)
    order = np.argsort(-catalog.classes.counts["train"][labels], kind="stable")
    candidates = [i for i in order.tolist() if len(rows[i]) > 1]
    shown = [candidates[i] for i in evenly_spaced(len(candidates), _SHOWN_TITLES).tolist()]
    return {
        "highest": means[:_SHOWN_WORDS],
        "lowest": means[::-1][: min(_SHOWN_WORDS, max(0, len(means) - _SHOWN_WORDS))],
        "titles": [
            {
                "title": records[i]["title"],
                "class": catalog.classes.sku[labels[i]],
                "words": [[word, round(weight, 4)] for word, weight in rows[i]],
            }
            for i in shown
        ],
    }


def title_word_weights(
    token_ids: Int[np.ndarray, " T"],
    weights: Float[np.ndarray, " T"],
    vocabulary: Sequence[str],
) -> WordWeights:
    """Returns the words of a title with their weights as multiples of equal weights.

    Args:
      token_ids: int [T], 0 = padding.
      weights: attention weight of each token, float [T], sum 1.
      vocabulary: words or sentencepiece pieces by id, [V].

    Returns:
      At most T pairs (word, weight) in the order of the title.
    """
    words: WordWeights = []
    ids = token_ids[token_ids > 0]
    has_pieces = any(vocabulary[i].startswith(WORD_START) for i in ids.tolist())
    for i, weight in zip(ids.tolist(), weights.tolist(), strict=False):
        token = vocabulary[i]
        if has_pieces and words and not token.startswith(WORD_START):
            words[-1] = words[-1][0] + token, words[-1][1] + weight
        else:
            words.append((token.removeprefix(WORD_START), weight))
    return [(word, weight * len(words)) for word, weight in words if word]


def _attention_rows(
    model: RestoredModel, catalog: Catalog, indices: np.ndarray
) -> tuple[list[WordWeights], list[dict[str, Any]]]:
    """Weights of the words of each of these training titles, and what is shown of the records."""
    read_title = TitleVariantReader(catalog, model.run.config)
    split, vocabulary = catalog.splits["train"], catalog.tokenizer.vocabulary
    device_mesh = model.classifier.log_prior.sharding.mesh

    @jax.jit
    def attend(params: Any, batch_stats: Any, token_ids: jax.Array) -> jax.Array:
        net = nnx.merge(model.graphs.model, params, batch_stats, copy=True)
        return net.semantic(token_ids, train=False)[1]

    rows: list[WordWeights] = []
    shown: list[dict[str, Any]] = []
    for first in range(0, len(indices), _BATCH):
        batch = indices[first : first + _BATCH].tolist()
        records = [split[i] for i in batch]
        ids = np.stack([read_title(r, i) for r, i in zip(records, batch, strict=True)])
        padded = np.pad(ids, ((0, _BATCH - len(ids)), (0, 0)))  # one shape compiles once
        placed = mesh.replicate_tree(jnp.asarray(padded), device_mesh)
        weights = np.asarray(attend(model.params, model.batch_stats, placed))
        rows += [title_word_weights(i, w, vocabulary) for i, w in zip(ids, weights, strict=False)]
        shown += [{"title": r["title"], "class_id": r["class_id"]} for r in records]
    return rows, shown


def _mean_weights(rows: Sequence[WordWeights]) -> list[dict[str, Any]]:
    """Mean weight of every word that enough titles have, highest first."""
    weights_of: dict[str, list[float]] = {}
    for row in rows:
        for word, weight in dict(row).items():  # a title counts a word once
            weights_of.setdefault(word, []).append(weight)
    means = sorted(
        (
            (float(np.mean(weights)), word, len(weights))
            for word, weights in weights_of.items()
            if len(weights) >= _MIN_TITLES
        ),
        reverse=True,
    )
    return [{"word": word, "weight": round(mean, 4), "titles": n} for mean, word, n in means]
