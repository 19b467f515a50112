"""What a finished run says beyond its accuracy: its catalogue, who is mistaken for whom, which
words count.
"""

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
from sicot_jax.training.state import TrainState
from sicot_jax.training.setup import Setup

TITLES = 20_000  # read at most, evenly over the training photos
SHOWN_TITLES, SHOWN_WORDS, SHOWN_CLASSES = 12, 20, 12
LEAST_SEEN = 20  # titles that a word is judged by
_BATCH = 1024


def catalogue_facts(catalog: Catalog, head_boundary: int) -> dict[str, Any]:
    """Table 1 and Fig. 6 of SICoT: sizes, vocabulary, what head and tail share of it, photos of
    words.

    "word_counts": [[times a word occurs, words that occur so often], ...], of the titles that were
    read ("titles").
    """
    split = catalog.splits["train"]
    read = evenly_spaced(len(split), TITLES)
    titles = [np.asarray(split[i]["token_ids"], np.int64) for i in read.tolist()]
    head = head_mask(catalog.classes.counts["train"], head_boundary)
    counts = np.bincount(np.concatenate([*titles, np.zeros(0, np.int64)]), minlength=1)
    times, how_many = np.unique(counts[counts > 0], return_counts=True)
    return {
        "name": catalog.name,
        "classes": len(catalog.classes),
        "photos": {name: len(found) for name, found in catalog.splits.items()},
        "vocabulary": len(catalog.tokenizer.vocabulary) - 1,
        "titles": len(read),
        "words": dict(vocabulary_overlap(titles, split.labels[read], head)),
        "word_counts": np.stack([times, how_many], -1).tolist(),
    }


def swallowed(
    label: np.ndarray,
    predicted: np.ndarray,
    train_counts: np.ndarray,
    head_boundary: int,
    sku: Sequence[str],
) -> list[dict[str, Any]]:
    """Head classes by the tail photos that they take, most first, each with the classes that it
    takes most from.

    Args: label, predicted: int [N]; train_counts: int [C]; sku: names [C].
    """
    head = head_mask(train_counts, head_boundary)
    taken = ~head[label] & head[predicted]
    by_head = np.bincount(predicted[taken], minlength=len(train_counts))
    found = []
    for into in np.argsort(-by_head, kind="stable")[:SHOWN_CLASSES]:
        if not by_head[into]:
            break
        sources = np.bincount(label[taken & (predicted == into)], minlength=len(train_counts))
        most = [c for c in np.argsort(-sources, kind="stable")[:3] if sources[c]]
        of = [
            {"class": sku[c], "photos": int(sources[c]), "tested": int((label == c).sum())}
            for c in most
        ]
        found.append({"class": sku[into], "photos": int(by_head[into]), "from": of})
    return found


def attention(setup: Setup, state: TrainState, catalog: Catalog) -> dict[str, Any]:
    """Fig. 7 of SICoT: titles with the weight of each word, and the words of highest and lowest
    mean weight.

    A weight is told as a multiple of that of equal weights, 1 / words of the title; pieces of a
    word are summed. Titles are as training reads them.
    """
    read_title = TitleVariantReader(catalog, setup.config)
    split, vocabulary = catalog.splits["train"], catalog.tokenizer.vocabulary
    read = evenly_spaced(len(split), TITLES)

    @jax.jit
    def weigh(params, batch_stats, token_ids):
        net = nnx.merge(setup.graphdef, params, batch_stats, copy=True)
        return net.semantic(token_ids, train=False)[1]

    rows: list[list[tuple[str, float]]] = []
    labels, titles = [], []
    for first in range(0, len(read), _BATCH):
        records = [split[i] for i in read[first : first + _BATCH].tolist()]
        ids = np.stack(
            [read_title(record, int(i)) for record, i in zip(records, read[first:], strict=False)]
        )
        whole = np.pad(ids, ((0, _BATCH - len(ids)), (0, 0)))  # one shape compiles once
        weights = np.asarray(
            weigh(state.params, state.batch_stats, mesh.replicate_tree(jnp.asarray(whole), setup.mesh))
        )
        rows += [of_words(i, w, vocabulary) for i, w in zip(ids, weights, strict=False)]
        labels += [record["class_id"] for record in records]
        titles += [record["title"] for record in records]
    seen: dict[str, list[float]] = {}
    for row in rows:
        for word, weight in dict(row).items():  # a title counts a word once
            seen.setdefault(word, []).append(weight)
    means = sorted(
        ((float(np.mean(w)), word, len(w)) for word, w in seen.items() if len(w) >= LEAST_SEEN),
        reverse=True,
    )
    listed = [{"word": word, "weight": round(mean, 4), "titles": n} for mean, word, n in means]
    # Of classes spread from the most to the least frequent, those with a word at all.
    order = np.argsort(
        -catalog.classes.counts["train"][np.asarray(labels, np.int64)], kind="stable"
    )
    candidates = [i for i in order.tolist() if len(rows[i]) > 1]
    shown = [candidates[i] for i in evenly_spaced(len(candidates), SHOWN_TITLES).tolist()]
    return {
        "highest": listed[:SHOWN_WORDS],
        "lowest": listed[::-1][: min(SHOWN_WORDS, max(0, len(listed) - SHOWN_WORDS))],
        "titles": [
            {
                "title": titles[i],
                "class": catalog.classes.sku[labels[i]],
                "words": [[word, round(weight, 4)] for word, weight in rows[i]],
            }
            for i in shown
        ],
    }


def of_words(
    token_ids: np.ndarray, weights: np.ndarray, vocabulary: Sequence[str]
) -> list[tuple[str, float]]:
    """(word, weight as a multiple of equal weights) of one title: int [T], float [T] -> at most T
    words in their order.
    """
    found: list[tuple[str, float]] = []
    ids = token_ids[token_ids > 0]
    pieces = any(vocabulary[i].startswith(WORD_START) for i in ids.tolist())
    for i, weight in zip(ids.tolist(), weights.tolist(), strict=False):
        token = vocabulary[i]
        if pieces and found and not token.startswith(WORD_START):
            found[-1] = found[-1][0] + token, found[-1][1] + weight
        else:
            found.append((token.removeprefix(WORD_START), weight))
    return [(word, weight * len(found)) for word, weight in found if word]
