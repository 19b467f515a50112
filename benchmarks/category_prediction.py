"""Measures how often the category of a photo is predicted correctly, by four methods.

Command:  python -m benchmarks.category_prediction --catalog CATALOG --index INDEX...
          (indexes of runs of several seeds)

Methods: the classifier, a vote of the nearest photos, their fusion (sicot_jax/search/category), and
"category head": logistic regression from the unit features of the index's photos to their
categories. Fusion and temperature are fitted on the validation photos, the table is of the test
photos. Class mean: of the categories that have test photos. Neighbours are exact, by cosine.
Intervals: 95 %, products and seeds resampled with replacement (2,000 times); paired for the
differences.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.special import softmax

from benchmarks import timing
from benchmarks.open_set import bootstrap_interval, embed_photos
from sicot_jax.catalog.open import open_catalog
from sicot_jax.common.linalg import l2_normalize
from sicot_jax.config import DataConfig
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.search import category
from sicot_jax.search.category import CategoryFitData, fit_category_fusion

CATEGORY_HEAD, CLASSIFIER, NEIGHBOURS, FUSED = (
    "category head",
    "classifier",
    "30 nearest photos",
    "classifier and neighbours",
)
_BATCH_SIZE = 500


def nearest_photos(features: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cosines [N, K] of each query's nearest features [M, D], and their rows."""
    cosines, rows = [], []
    for first in range(0, len(queries), _BATCH_SIZE):
        cosine = queries[first : first + _BATCH_SIZE] @ features.T
        nearest_rows = np.argpartition(-cosine, category.NUM_NEIGHBOURS, 1)[
            :, : category.NUM_NEIGHBOURS
        ]
        cosines.append(np.take_along_axis(cosine, nearest_rows, 1))
        rows.append(nearest_rows)
    return np.concatenate(cosines), np.concatenate(rows)


def evaluate_index(
    index: Path, catalog_path: str
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, str]:
    """Returns predictions of one index and a description of the fit.

    Returns:
      method -> category of each test photo, the true categories, the SKUs, and the description.
    """
    from sklearn.linear_model import LogisticRegression

    catalog = open_catalog(DataConfig(source="imported", path=catalog_path))
    version = layout.current_version(index)
    manifest = layout.read_index_manifest(version)
    assert manifest.data_hash == catalog.data_hash, "an index of this catalogue"
    names, of_class = np.unique(np.asarray(catalog.classes.category, str), return_inverse=True)
    products = ProductStore(version / layout.PRODUCTS)
    numbers = np.array(products.product_ids(list(catalog.classes.sku)))
    products.close()
    of_product = np.full(numbers.max() + 1, len(names))
    of_product[numbers] = of_class
    vectors = VectorFiles(version, manifest.width, manifest.bits)
    features = np.asarray(vectors.memmap(layout.FEATURES, manifest.num_photos), np.float32)
    photo_categories = of_product[vectors.memmap(layout.ROW_PRODUCTS, manifest.num_photos)]
    branches = {}
    for name in ("validation", "test"):
        split = catalog.splits[name]
        photos = embed_photos(
            version, ((split[i]["image"], split[i]["sku"]) for i in range(len(split)))
        )
        cosines, rows = nearest_photos(features, l2_normalize(photos.embeddings))
        of_logits, shares = (
            of_product[: photos.logits.shape[1]],
            softmax(photos.logits.astype(np.float64), 1),
        )
        by_classifier = np.array(
            [category.sum_by_category(row, of_logits, len(names)) for row in shares]
        )
        labels = np.asarray(split.labels)
        branches[name] = (
            by_classifier,
            cosines,
            photo_categories[rows],
            of_class[labels],
            labels,
            photos,
        )
    fusion = fit_category_fusion(CategoryFitData(*branches["validation"][:5], names.tolist()))
    by_classifier, cosines, neighbour_categories, truth, _, photos = branches["test"]
    votes = category.neighbour_vote(cosines, neighbour_categories, len(names), fusion.temperature)
    head = LogisticRegression(C=10, max_iter=300).fit(features, photo_categories)
    predictions = {
        CATEGORY_HEAD: head.classes_[head.predict_proba(l2_normalize(photos.embeddings)).argmax(1)],
        CLASSIFIER: by_classifier.argmax(1),
        NEIGHBOURS: votes.argmax(1),
        FUSED: fusion(by_classifier, votes).argmax(1),
    }
    weights = np.quantile(fusion.classifier_weights, [0, 0.5, 1])
    text = (
        f"T = {fusion.temperature}, weights of the classifier {weights[0]:.2f} to "
        f"{weights[2]:.2f}, median {weights[1]:.2f}, "
        f"sure from {fusion.confident_from}"
    )
    return (
        predictions,
        truth,
        photos.sku,
        f"{len(names)} categories, {len(truth)} test photos; {text}",
    )


def class_mean(right: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    """Returns the mean over categories of the weighted accuracy."""
    weight_of_category = np.bincount(truth, weights)
    present = weight_of_category > 0
    return float(
        np.mean(np.bincount(truth, weights * right)[present] / weight_of_category[present])
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--catalog", required=True)
    parser.add_argument("--index", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    timing.print_machine()
    predictions, truths, skus, texts = zip(
        *(evaluate_index(index, options.catalog) for index in options.index), strict=True
    )
    print("\n".join(texts))
    truth, groups = truths[0], [skus[0]]

    def cell(name: str, baseline: str, mean: bool) -> str:
        """Returns a mean with its interval; with `baseline`, the difference to another method."""

        def statistic(weights: list[np.ndarray], seed: int) -> float:
            right = (predictions[seed][name] == truth).astype(float)
            if baseline:
                right -= predictions[seed][baseline] == truth
            return (
                class_mean(right, truth, weights[0])
                if mean
                else float(np.average(right, weights=weights[0]))
            )

        estimate, low, high = (
            100 * x for x in bootstrap_interval(statistic, groups, len(predictions))
        )
        return (
            f"{estimate:+.2f} [{low:+.2f}, {high:+.2f}]"
            if baseline
            else f"{estimate:.2f} [{low:.2f}, {high:.2f}]"
        )

    rows = [
        [name, cell(name, "", False), cell(name, "", True)]
        for name in (CATEGORY_HEAD, CLASSIFIER, NEIGHBOURS, FUSED)
    ]
    rows += [
        [f"{FUSED} less {n}", cell(FUSED, n, False), cell(FUSED, n, True)]
        for n in (CLASSIFIER, NEIGHBOURS)
    ]
    timing.print_table("Category of a photo", ["by", "top-1, %", "class mean, %"], rows)


if __name__ == "__main__":
    main()
