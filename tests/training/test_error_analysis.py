"""What a run says beyond its accuracy: catalogue, confusions, attention, and remedies on the
finished classifier.
"""

import numpy as np

from sicot_jax.catalog.sources.generated import open_generated
from sicot_jax.classifier import posthoc as post_hoc
from sicot_jax.classifier.heads import Classifier
from sicot_jax.config import GeneratedSpec
from sicot_jax.training import error_analysis as findings


def test_who_swallows_whom_by_hand():
    """Class 0 and 1 are head. Right answers, and mistakes among the head or the tail, are no
    swallowing.
    """
    counts = np.array([50, 40, 3, 2, 1])
    label = np.array([2, 2, 2, 3, 3, 4, 4, 0, 1, 2])
    predicted = np.array([0, 0, 1, 0, 3, 1, 2, 1, 1, 2])
    found = findings.swallowed(label, predicted, counts, 10, ["a", "b", "c", "d", "e"])
    assert found == [
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
    got = findings.of_words(np.array([1, 2, 3, 0]), np.array([0.5, 0.25, 0.25, 0.0]), vocabulary)
    assert got == [("red", 1.5), ("shirt", 0.75), ("sale", 0.75)]


def test_pieces_of_a_word_are_summed():
    """Sentencepiece marks where a word begins; a piece at the front of a cut title begins one too."""
    vocabulary = ["", "▁t", "shirt", "▁red", "s"]
    got = findings.of_words(
        np.array([2, 1, 2, 4, 3]), np.array([0.1, 0.2, 0.3, 0.1, 0.3]), vocabulary
    )
    assert [word for word, _ in got] == ["shirt", "tshirts", "red"]
    np.testing.assert_allclose([weight for _, weight in got], [0.3, 1.8, 0.9])


def test_catalogue_facts_count_what_is_there():
    spec = GeneratedSpec(
        num_classes=6, train_photos=80, image_size=12, word_vectors="random", word_vector_width=8
    )
    catalog = open_generated(spec)
    facts = findings.catalogue_facts(catalog, 10)
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
    assert facts["words"]["both"] == len(by_head[0] & by_head[1])
    assert facts["titles"] == 80
    assert facts["words"]["share"] == len(by_head[0] & by_head[1]) / len(by_head[0] | by_head[1])
    assert sum(times * words for times, words in facts["word_counts"]) == sum(map(len, titles))
    assert sum(words for _, words in facts["word_counts"]) == len(set().union(*titles))
    assert facts["photos"] == {name: len(split) for name, split in catalog.splits.items()}


def test_remedies_by_hand():
    """Prior 1/2 and 1/8: taking it away whole adds log 2 and log 8. Rows of length 5 and 1; a
    padding row stays zero.
    """
    kernel = np.array([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]], np.float32)
    prior = np.log(np.array([0.5, 0.125, 1.0], np.float32))
    classifier = Classifier(kernel, np.ones(3, np.float32), prior, (), {})
    same, bias = post_hoc.adjusted(classifier, 1.0)
    assert same is kernel
    np.testing.assert_allclose(bias, [1 + np.log(2), 1 + np.log(8), 1], rtol=1e-6)
    half, bias = post_hoc.normalised(classifier, 0.5)
    np.testing.assert_allclose(half, kernel / np.sqrt([[5.0], [1.0], [1.0]]), rtol=1e-6)
    assert not bias.any()
    np.testing.assert_allclose(post_hoc.normalised(classifier, 1.0)[0][0], [0.6, 0.8], rtol=1e-6)
