"""Statistics of a catalogue, confusions of tail with head classes, attention to words."""

import numpy as np

from sicot_jax.catalog.sources.generated import open_generated
from sicot_jax.config import GeneratedSpec
from sicot_jax.training.error_analysis import (
    catalog_statistics,
    tail_to_head_confusions,
    title_word_weights,
)


def test_tail_to_head_confusions_by_hand():
    """Classes 0 and 1 are head. Right answers, and confusions within head or tail, do not count."""
    counts = np.array([50, 40, 3, 2, 1])
    label = np.array([2, 2, 2, 3, 3, 4, 4, 0, 1, 2])
    predicted = np.array([0, 0, 1, 0, 3, 1, 2, 1, 1, 2])
    confusions = tail_to_head_confusions(label, predicted, counts, 10, ["a", "b", "c", "d", "e"])
    assert confusions == [
        {
            "class": "a",
            "photos": 3,
            "from": [
                {"class": "c", "photos": 2, "tested": 4},
                {"class": "d", "photos": 1, "tested": 2},
            ],
        },
        {
            "class": "b",
            "photos": 2,
            "from": [
                {"class": "c", "photos": 1, "tested": 4},
                {"class": "e", "photos": 1, "tested": 2},
            ],
        },
    ]


def test_weights_are_multiples_of_equal_ones():
    vocabulary = ["", "red", "shirt", "sale"]
    weights = title_word_weights(
        np.array([1, 2, 3, 0]), np.array([0.5, 0.25, 0.25, 0.0]), vocabulary
    )
    assert weights == [("red", 1.5), ("shirt", 0.75), ("sale", 0.75)]


def test_pieces_of_a_word_are_summed():
    """Sentencepiece marks where a word begins; the first piece of a cut title begins one too."""
    vocabulary = ["", "▁t", "shirt", "▁red", "s"]
    weights = title_word_weights(
        np.array([2, 1, 2, 4, 3]), np.array([0.1, 0.2, 0.3, 0.1, 0.3]), vocabulary
    )
    assert [word for word, _ in weights] == ["shirt", "tshirts", "red"]
    np.testing.assert_allclose([weight for _, weight in weights], [0.3, 1.8, 0.9])


def test_catalog_statistics():
    spec = GeneratedSpec(
        num_classes=6, train_photos=80, image_size=12, word_vectors="random", word_vector_width=8
    )
    catalog = open_generated(spec)
    statistics = catalog_statistics(catalog, 10)
    titles = [catalog.splits["train"][i]["token_ids"].tolist() for i in range(80)]
    head = catalog.classes.counts["train"] > 10
    by_head = [
        {
            w
            for ids, label in zip(titles, catalog.splits["train"].labels, strict=True)
            if head[label] == side
            for w in ids
        }
        for side in (True, False)
    ]
    assert statistics["words"]["both"] == len(by_head[0] & by_head[1])
    assert statistics["titles"] == 80
    assert statistics["words"]["share"] == len(by_head[0] & by_head[1]) / len(
        by_head[0] | by_head[1]
    )
    assert sum(times * words for times, words in statistics["word_counts"]) == sum(map(len, titles))
    assert sum(words for _, words in statistics["word_counts"]) == len(set().union(*titles))
    assert statistics["photos"] == {name: len(split) for name, split in catalog.splits.items()}
