"""Measures whether the title of a product added after training improves its classifier row.

Command:  python -m benchmarks.new_product_titles --out DIR --seeds S ...
          (DIR, its runs and indexes: benchmarks.open_set)

A row's direction is m - g, the mean of a product's unit embeddings less the mean over known
products (sicot_jax/classifier/imprint). A title predicts t of it
(sicot_jax/indexing/title_regression). From n photos and a title it is (n (m - g) + k t) / (n + k):
the title counts as k photos; sicot_jax/indexing/new_products uses k = 0.5.

A row can win more photos of new products by a higher bias, at the cost of old ones; so rows of
photos alone come with several biases, and a title helps where no bias achieves as much at the same
cost. Intervals: as benchmarks.open_set, paired for differences.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from pathlib import Path

import numpy as np

from benchmarks import timing
from benchmarks.open_set import (
    ADDED,
    EmbeddedPhotos,
    bootstrap_interval,
    embed_photos,
    iter_test_photos,
)
from sicot_jax.catalog.open import open_catalog
from sicot_jax.classifier import imprint
from sicot_jax.common.linalg import l2_normalize
from sicot_jax.config import DataConfig
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing.title_regression import fit_title_regression, load_title_regression

BIASES = (0.0, 0.1, 0.25)
TITLE_WEIGHTS = (0.5, 1.0, 2.0)  # in photos
FOLDS = 5
PHOTOS_ALONE = "photos"


def explained_variance(
    texts: list[tuple[str, str]], directions: np.ndarray, photos: np.ndarray
) -> float:
    """Returns the cross-validated share of the directions' variance that titles predict."""
    fold = np.random.default_rng(0).integers(0, FOLDS, len(texts))
    predictions = np.zeros_like(directions)
    for number in range(FOLDS):
        left_out_rows = fold == number
        train_texts = [
            text for text, is_left_out in zip(texts, left_out_rows, strict=True) if not is_left_out
        ]
        test_texts = [
            text for text, is_left_out in zip(texts, left_out_rows, strict=True) if is_left_out
        ]
        predictions[left_out_rows] = fit_title_regression(
            train_texts, directions[~left_out_rows], photos[~left_out_rows]
        ).predict(test_texts)
    weight = np.minimum(photos, 20)
    residual = np.average(np.square(directions - predictions).sum(1), weights=weight)
    return 1 - float(residual / np.average(np.square(directions).sum(1), weights=weight))


@dataclasses.dataclass(frozen=True)
class Correctness:
    """Whether the best product of each photo is correct.

    Attributes:
      new: bool, of photos of new products.
      old: bool, of photos of old products.
      before: bool, of the same before any was added.
    """

    new: np.ndarray
    old: np.ndarray
    before: np.ndarray


def evaluate_seed(
    out: Path, seed: int
) -> tuple[dict[tuple[str, str], Correctness], list[np.ndarray], str]:
    """Returns correctness by (photos, row from), the SKUs of both sets, and a line on the fit."""
    version = layout.current_version(out / f"index-{seed}")
    manifest = layout.read_index_manifest(version)
    vectors = VectorFiles(version, manifest.width, manifest.bits)
    features = np.asarray(vectors.memmap(layout.FEATURES, manifest.num_photos), np.float32)
    owners = np.asarray(vectors.memmap(layout.ROW_PRODUCTS, manifest.num_photos))
    known, means = imprint.mean_directions(features, owners)
    store = ProductStore(version / layout.PRODUCTS)
    records = [record for record in store.products(known.tolist()) if record is not None]
    store.close()
    photos = np.bincount(owners)[known]
    fitted_imprint = imprint.load_imprint(version / layout.IMPRINT)
    centre = fitted_imprint.center
    texts = [(record.title, record.category) for record in records]
    r_squared = explained_variance(texts, means - centre, photos)

    with (out / f"new-{max(ADDED)}.csv").open(newline="") as file:
        rows_of_manifest = list(csv.DictReader(file))
    skus = sorted({row["sku"] for row in rows_of_manifest})
    added_photos = embed_photos(
        version, (((out / row["image"]).read_bytes(), row["sku"]) for row in rows_of_manifest)
    )
    first = {sku: next(row for row in rows_of_manifest if row["sku"] == sku) for sku in skus}
    title_directions = load_title_regression(version / layout.TITLE_REGRESSION).predict(
        [(first[s]["title"], first[s]["category"]) for s in skus]
    )
    unit_embeddings = l2_normalize(added_photos.embeddings)

    old = embed_photos(
        version,
        iter_test_photos(open_catalog(DataConfig(source="imported", path=str(out / "catalog")))),
    )
    files = json.loads((out / "queries.json").read_text())["new products"]
    new = embed_photos(
        version, (((out / "photos" / file).read_bytes(), sku) for file, sku in files)
    )
    names = np.array([*(record.sku for record in records), *skus])

    def is_correct(photos: EmbeddedPhotos, rows: np.ndarray, bias: float) -> np.ndarray:
        logits = np.concatenate([photos.logits[:, known], photos.embeddings @ rows.T + bias], 1)
        return names[logits.argmax(1)] == photos.sku

    before = names[old.logits[:, known].argmax(1)] == old.sku
    results = {}
    for count in (0, *ADDED):
        photo_directions = (
            np.array(
                [
                    unit_embeddings[added_photos.sku == sku][:count].mean(0) if count else centre
                    for sku in skus
                ]
            )
            - centre
        )
        variants = {
            f"photos, bias + {bias}" if bias else PHOTOS_ALONE: (0.0, bias) for bias in BIASES
        }
        variants |= {
            f"photos and title, weight {title_weight:g}": (title_weight, 0.0)
            for title_weight in TITLE_WEIGHTS
        }
        for name, (title_weight, bias) in variants.items() if count else [("title", (1.0, 0.0))]:
            rows = fitted_imprint.rows(
                (count * photo_directions + title_weight * title_directions)
                / (count + title_weight)
                + fitted_imprint.center
            )
            bias += fitted_imprint.bias
            results[str(count), name] = Correctness(
                is_correct(new, rows, bias), is_correct(old, rows, bias), before
            )
    return results, [new.sku, old.sku], f"seed {seed}: R^2 {r_squared:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    timing.print_machine()
    results, groups, descriptions = zip(
        *(evaluate_seed(options.out, seed) for seed in options.seeds), strict=True
    )
    print("; ".join(descriptions))

    def cell(key: tuple[str, str], old: bool, baseline: tuple[str, str] | None = None) -> str:
        def statistic(weights: list[np.ndarray], seed: int) -> float:
            result, base_result = results[seed][key], results[seed][baseline] if baseline else None
            before = result.before if old else np.zeros(len(result.new))
            gain = (result.old if old else result.new) - (
                before if base_result is None else base_result.old if old else base_result.new
            ) * 1.0
            return float(np.average(gain, weights=weights[0]))

        mean, low, high = (
            100 * x
            for x in bootstrap_interval(statistic, [groups[0][int(old)]], len(options.seeds))
        )
        return f"{mean:.1f} [{low:.1f}, {high:.1f}]"

    rows = []
    for key in results[0]:
        photos_alone = (key[0], PHOTOS_ALONE)
        pairs = (
            [cell(key, old, photos_alone) for old in (False, True)]
            if photos_alone in results[0] and key != photos_alone
            else ["", ""]
        )
        rows.append([*key, cell(key, False), cell(key, True), *pairs])
    header = [
        "photos of each",
        "row from",
        "new products",
        "old products, change",
        "new, less photos alone",
        "old, less photos alone",
    ]
    timing.print_table("Top-1 accuracy, %", header, rows)


if __name__ == "__main__":
    main()
