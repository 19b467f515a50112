"""Whether the title of a product that came after training makes its row of the classifier better.

Command:  python -m benchmarks.new_product_titles --out DIR --seeds S ...        (DIR, its runs and
  indexes: benchmarks.open_set)

A row's direction is m - g, the mean of a product's unit embeddings less the mean over known
products (sicot_jax/imprint). A title foretells t of it (sicot_jax/index/titles). Of n photos and a
title it is (n (m - g) + k t) / (n + k), a title that is worth k photos; `sicot_jax/index/rows`
takes k = 0.5.

A row can win more photos of new products by a higher bias, at the cost of old ones; so rows of
photos alone come with several biases, and a title is worth something where no bias gets as much at
the same cost. Intervals: as benchmarks.open_set, those of differences in pairs.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from pathlib import Path

import numpy as np

from benchmarks import timing
from benchmarks.open_set import ADDED, Asked, asked, interval, photos_of
from sicot_jax.catalog.open import open_catalog
from sicot_jax.classifier import imprint
from sicot_jax.common.linalg import l2_normalize
from sicot_jax.config import DataConfig
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing import title_regression as titles

BIASES = (0.0, 0.1, 0.25)
WORTH = (0.5, 1.0, 2.0)  # photos
FOLDS = 5
PHOTOS = "photos"


def explained(texts: list[tuple[str, str]], directions: np.ndarray, photos: np.ndarray) -> float:
    """Share of the directions' variance that titles foretell of products they were not learned
    from.
    """
    fold = np.random.default_rng(0).integers(0, FOLDS, len(texts))
    foretold = np.zeros_like(directions)
    for number in range(FOLDS):
        out = fold == number
        kept = [text for text, left_out in zip(texts, out, strict=True) if not left_out]
        asked_for = [text for text, left_out in zip(texts, out, strict=True) if left_out]
        foretold[out] = titles.fit(kept, directions[~out], photos[~out]).directions(asked_for)
    weight = np.minimum(photos, 20)
    left = np.average(np.square(directions - foretold).sum(1), weights=weight)
    return 1 - float(left / np.average(np.square(directions).sum(1), weights=weight))


@dataclasses.dataclass(frozen=True)
class Right:
    """Photos whose best product is the right one: of new products, of old ones, and of old ones
    before.
    """

    new: np.ndarray
    old: np.ndarray
    before: np.ndarray


def of_seed(out: Path, seed: int) -> tuple[dict[tuple[str, str], Right], list[np.ndarray], str]:
    version = layout.current_version(out / f"index-{seed}")
    manifest = layout.read_index_manifest(version)
    vectors = VectorFiles(version, manifest.width, manifest.bits)
    features = np.asarray(vectors.memmap(layout.FEATURES, manifest.num_photos), np.float32)
    owners = np.asarray(vectors.memmap(layout.ROW_PRODUCTS, manifest.num_photos))
    known, means = imprint.mean_directions(features, owners)
    cards = ProductStore(version / layout.PRODUCTS)
    named = [card for card in cards.products(known.tolist()) if card is not None]
    cards.close()
    photos = np.bincount(owners)[known]
    made_with = imprint.load(version / layout.IMPRINT)
    centre = made_with.centre
    texts = [(card.title, card.category) for card in named]
    told = explained(texts, means - centre, photos)

    with (out / f"new-{max(ADDED)}.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    skus = sorted({row["sku"] for row in listed})
    shown = asked(version, (((out / row["image"]).read_bytes(), row["sku"]) for row in listed))
    first = {sku: next(row for row in listed if row["sku"] == sku) for sku in skus}
    foretold = titles.load(version / layout.TITLE_REGRESSION).directions(
        [(first[s]["title"], first[s]["category"]) for s in skus]
    )
    seen = l2_normalize(shown.embeddings)

    old = asked(
        version, photos_of(open_catalog(DataConfig(source="imported", path=str(out / "catalog"))))
    )
    files = json.loads((out / "asked.json").read_text())["unseen SKUs"]
    new = asked(version, (((out / "photos" / file).read_bytes(), sku) for file, sku in files))
    names = np.array([*(card.sku for card in named), *skus])

    def right(photos: Asked, rows: np.ndarray, bias: float) -> np.ndarray:
        logits = np.concatenate([photos.logits[:, known], photos.embeddings @ rows.T + bias], 1)
        return names[logits.argmax(1)] == photos.sku

    before = names[old.logits[:, known].argmax(1)] == old.sku
    found = {}
    for count in (0, *ADDED):
        apart = (
            np.array([seen[shown.sku == sku][:count].mean(0) if count else centre for sku in skus])
            - centre
        )
        ways = {f"photos, bias + {bias}" if bias else PHOTOS: (0.0, bias) for bias in BIASES}
        ways |= {f"photos and title, worth {worth:g}": (worth, 0.0) for worth in WORTH}
        for name, (worth, bias) in ways.items() if count else [("title", (1.0, 0.0))]:
            rows = made_with.rows(
                (count * apart + worth * foretold) / (count + worth) + made_with.centre
            )
            bias += made_with.bias
            found[str(count), name] = Right(right(new, rows, bias), right(old, rows, bias), before)
    return found, [new.sku, old.sku], f"seed {seed}: R^2 {told:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    timing.print_machine()
    found, groups, told = zip(*(of_seed(options.out, seed) for seed in options.seeds), strict=True)
    print("; ".join(told))

    def cell(key: tuple[str, str], old: bool, less: tuple[str, str] | None = None) -> str:
        def statistic(weights: list[np.ndarray], seed: int) -> float:
            one, other = found[seed][key], found[seed][less] if less else None
            before = one.before if old else np.zeros(len(one.new))
            right = (one.old if old else one.new) - (
                before if other is None else other.old if old else other.new
            ) * 1.0
            return float(np.average(right, weights=weights[0]))

        middle, low, high = (
            100 * x for x in interval(statistic, [groups[0][int(old)]], len(options.seeds))
        )
        return f"{middle:.1f} [{low:.1f}, {high:.1f}]"

    rows = []
    for key in found[0]:
        photos = (key[0], PHOTOS)
        pairs = (
            [cell(key, old, photos) for old in (False, True)]
            if photos in found[0] and key != photos
            else ["", ""]
        )
        rows.append([*key, cell(key, False), cell(key, True), *pairs])
    header = [
        "photos of each",
        "row from",
        "new products",
        "old products, change",
        "new, less photos",
        "old, less photos",
    ]
    timing.print_table("Top-1 accuracy, %", header, rows)


if __name__ == "__main__":
    main()
