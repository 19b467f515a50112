"""How often the category of a photo is told rightly: by the classifier, by a vote of the nearest
photos, and by both.

Command:  python -m benchmarks.category_prediction --catalog CATALOG --index INDEX...      (indexes of runs
  of several seeds)

Branches and their fusion: sicot_jax/search/category. "A head": logistic regression from the unit
  features of the index's photos to their categories, what a branch of its own would be. Fusion and
  temperature are fitted on the validation photos, the table is of the test photos. Class mean: of
  the categories that have test photos. Neighbours are exact, by cosine.
Intervals: 95 %, products and seeds resampled with replacement (2,000 times); for the differences in
  pairs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.special import softmax

from benchmarks import timing
from benchmarks.open_set import asked, interval
from sicot_jax.catalog.open import open_catalog
from sicot_jax.common.linalg import l2_normalize
from sicot_jax.config import DataConfig
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.search import category
from sicot_jax.search.category_fit import CategoryFitData, fit_category_fusion

HEAD, CLASSIFIER, NEIGHBOURS, FUSED = (
    "a head",
    "classifier",
    "30 nearest photos",
    "classifier and neighbours",
)
_PIECE = 500


def nearest(features: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of the `NUM_NEIGHBOURS` lines of features [M, D] to each of queries [N, D], and the lines."""
    cosines, lines = [], []
    for first in range(0, len(queries), _PIECE):
        cosine = queries[first : first + _PIECE] @ features.T
        near = np.argpartition(-cosine, category.NUM_NEIGHBOURS, 1)[:, : category.NUM_NEIGHBOURS]
        cosines.append(np.take_along_axis(cosine, near, 1))
        lines.append(near)
    return np.concatenate(cosines), np.concatenate(lines)


def of_index(
    index: Path, catalog_path: str
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, str]:
    """(branch -> category told of each test photo, their categories, their SKUs, what the fit
    found).
    """
    from sklearn.linear_model import LogisticRegression

    catalog = open_catalog(DataConfig(source="imported", path=catalog_path))
    version = layout.current_version(index)
    manifest = layout.read_index_manifest(version)
    assert manifest.data_hash == catalog.data_hash, "an index of this catalogue"
    names, of_class = np.unique(np.asarray(catalog.classes.category, str), return_inverse=True)
    cards = ProductStore(version / layout.PRODUCTS)
    numbers = np.array(cards.numbers(list(catalog.classes.sku)))
    cards.close()
    of_product = np.full(numbers.max() + 1, len(names))
    of_product[numbers] = of_class
    vectors = VectorFiles(version, manifest.width, manifest.bits)
    features = np.asarray(vectors.memmap(layout.FEATURES, manifest.num_photos), np.float32)
    owners = of_product[vectors.memmap(layout.ROW_PRODUCTS, manifest.num_photos)]
    branches = {}
    for name in ("validation", "test"):
        split = catalog.splits[name]
        photos = asked(version, ((split[i]["image"], split[i]["sku"]) for i in range(len(split))))
        cosines, lines = nearest(features, l2_normalize(photos.embeddings))
        of_logits, shares = (
            of_product[: photos.logits.shape[1]],
            softmax(photos.logits.astype(np.float64), 1),
        )
        told = np.array([category.sum_by_category(row, of_logits, len(names)) for row in shares])
        labels = np.asarray(split.labels)
        branches[name] = told, cosines, owners[lines], of_class[labels], labels, photos
    fusion = fit_category_fusion(CategoryFitData(*branches["validation"][:5], names.tolist()))
    told, cosines, voting, truth, _, photos = branches["test"]
    votes = category.neighbour_vote(cosines, voting, len(names), fusion.temperature)
    head = LogisticRegression(C=10, max_iter=300).fit(features, owners)
    found = {
        HEAD: head.classes_[head.predict_proba(l2_normalize(photos.embeddings)).argmax(1)],
        CLASSIFIER: told.argmax(1),
        NEIGHBOURS: votes.argmax(1),
        FUSED: fusion(told, votes).argmax(1),
    }
    weights = np.quantile(fusion.classifier_weights, [0, 0.5, 1])
    text = (
        f"T = {fusion.temperature}, weights of the classifier {weights[0]:.2f} to {weights[2]:.2f}, median {weights[1]:.2f}, "
        f"sure from {fusion.confident_from}"
    )
    return found, truth, photos.sku, f"{len(names)} categories, {len(truth)} test photos; {text}"


def class_mean(right: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    of_class = np.bincount(truth, weights)
    there = of_class > 0
    return float(np.mean(np.bincount(truth, weights * right)[there] / of_class[there]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--catalog", required=True)
    parser.add_argument("--index", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    timing.print_machine()
    told, truths, skus, texts = zip(
        *(of_index(index, options.catalog) for index in options.index), strict=True
    )
    print("\n".join(texts))
    truth, groups = truths[0], [skus[0]]

    def cell(name: str, less: str, mean: bool) -> str:
        def statistic(weights: list[np.ndarray], seed: int) -> float:
            right = (told[seed][name] == truth).astype(float)
            if less:
                right -= told[seed][less] == truth
            return (
                class_mean(right, truth, weights[0])
                if mean
                else float(np.average(right, weights=weights[0]))
            )

        middle, low, high = (100 * x for x in interval(statistic, groups, len(told)))
        return (
            f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]"
            if less
            else f"{middle:.2f} [{low:.2f}, {high:.2f}]"
        )

    rows = [
        [name, cell(name, "", False), cell(name, "", True)]
        for name in (HEAD, CLASSIFIER, NEIGHBOURS, FUSED)
    ]
    rows += [
        [f"{FUSED}, less {n}", cell(FUSED, n, False), cell(FUSED, n, True)]
        for n in (CLASSIFIER, NEIGHBOURS)
    ]
    timing.print_table("Category of a photo", ["by", "top-1, %", "class mean, %"], rows)


if __name__ == "__main__":
    main()
