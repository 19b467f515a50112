"""Measures recognition of products added after training, and rejection of unknown photos.

Commands: python -m benchmarks.open_set prepare --catalog CATALOG --out DIR
          sicot train --config=CONFIG --config.data.path=DIR/catalog --config.seed=S
            --workdir=DIR/run-S             (for each seed S)
          python -m benchmarks.open_set measure --out DIR --seeds S ... [--another CATALOG]

Held out of training, by a fixed seed: every product of some categories, until they have a twentieth
of the products ("unseen categories"); then a tenth of the others, whose category and brand (what a
SKU "brand | article" begins with) remain ("new products"). `prepare` imports the rest, with every
photo in the split that it had; 5 training photos of each new product are added later, its test
photos are the queries.

`measure` builds an index of each run, queries it before any new product is there, and again after
1, 2 and 5 photos of each were added by `sicot index add`. Intervals: 95 %, products and seeds
resampled with replacement (2,000 times).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks import timing
from sicot_jax.catalog.catalog import SPLITS, Catalog
from sicot_jax.catalog.importing.run import import_catalog
from sicot_jax.catalog.importing.settings import ImportSettings
from sicot_jax.catalog.open import open_catalog
from sicot_jax.common.bootstrap import FixedDraws
from sicot_jax.config import DataConfig
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import layout
from sicot_jax.indexing.add import add_products
from sicot_jax.indexing.build import build_index
from sicot_jax.recognizer import jax_engine
from sicot_jax.search.answer import Query, Searcher
from sicot_jax.search.category import CategoryFusion, read_fusion
from sicot_jax.search.rejection import (
    NOVELTY_LEVEL,
    OPEN_SET_PRIOR,
    TARGET_PRECISION,
    Calibration,
    coverage_curve,
    read_calibration,
)
from sicot_jax.weights.bundle import read_bundle

ADDED = (1, 2, 5)  # photos of a new product
NEW_SHARE, CATEGORY_SHARE = 0.1, 0.05
NUM_RESAMPLES = 2000
_BATCH_SIZE = 32


def choose_new_products(
    sku: Sequence[str], category: Sequence[str], photos: np.ndarray
) -> tuple[set[str], set[str]]:
    """Returns new products, and products of unseen categories, to hold out of training.

    `photos` are the training photos of each product, int.
    """
    rng = np.random.default_rng(0)
    category_sizes, names = Counter(category), sorted(set(category))
    unseen: set[str] = set()
    for name in rng.permutation(names):
        if sum(category_sizes[n] for n in unseen) + category_sizes[name] <= CATEGORY_SHARE * len(
            sku
        ):
            unseen.add(str(name))
    remaining_classes = [c for c in range(len(sku)) if category[c] not in unseen]
    remaining = Counter(
        kind
        for c in remaining_classes
        for kind in (("category", category[c]), ("brand", _brand(sku[c])))
    )
    new: set[str] = set()
    for c in rng.permutation(remaining_classes):
        kinds = ("category", category[c]), ("brand", _brand(sku[c]))
        if (
            len(new) < NEW_SHARE * len(remaining_classes)
            and photos[c] >= max(ADDED)
            and all(remaining[kind] > 1 for kind in kinds)
        ):
            new.add(sku[c])
            remaining.subtract(kinds)
    return new, {sku[c] for c in range(len(sku)) if category[c] in unseen}


def _brand(sku: str) -> str:
    return sku.partition(" | ")[0]


def prepare(catalog: Catalog, out: Path) -> None:
    """Writes photos, manifests of known and added photos, `queries.json` and the catalogue."""
    table = catalog.classes
    new, unseen = choose_new_products(table.sku, table.category, table.counts["train"])
    photos = out / "photos"
    photos.mkdir(parents=True)
    known: list[dict[str, str]] = []
    added: dict[str, list[dict[str, str]]] = {}
    queries: dict[str, list[tuple[str, str]]] = {"new products": [], "unseen categories": []}
    for split in SPLITS:
        records = catalog.splits[split]
        for i in tqdm(range(len(records)), split, disable=None):
            record = records[i]
            name = f"{record['image_id']}-{i}-{split}.jpg"
            image = record["image"]
            assert isinstance(image, bytes), "photos as an import stores them"
            (photos / name).write_bytes(image)
            row = {key: record[key] for key in ("sku", "title", "tags", "category")} | {
                "image": f"photos/{name}"
            }  # type: ignore[literal-required]
            if record["sku"] in unseen:
                queries["unseen categories"].append((name, record["sku"]))
            elif record["sku"] not in new:
                known.append(row | {"split": split})
            elif split == "test":
                queries["new products"].append((name, record["sku"]))
            elif split == "train":
                added.setdefault(record["sku"], []).append(row)
    _write(out / "known.csv", known)
    for count in ADDED:
        _write(out / f"new-{count}.csv", [row for rows in added.values() for row in rows[:count]])
    (out / "queries.json").write_text(json.dumps(queries))
    settings = ImportSettings(short_side=10_000, min_photos=1)  # stored as they are
    import_catalog(out / "known.csv", out / "catalog", settings=settings, name="known")
    print(
        f"{len(new)} new products, {len(unseen)} of unseen categories; {len(known)} photos to "
        "train and test with"
    )


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@dataclasses.dataclass(frozen=True)
class EmbeddedPhotos:
    """Photos embedded by one model.

    Attributes:
      embeddings: [N, D].
      logits: [N, C].
      sku: [N], "" for photos of other things.
    """

    embeddings: np.ndarray
    logits: np.ndarray
    sku: np.ndarray


@dataclasses.dataclass(frozen=True)
class PhotoScores:
    """What an index answers for N photos.

    Attributes:
      confidence: [N].
      without_novelty: [N], confidence without the novelty score.
      correct: bool [N], whether the best product is correct.
      nearest: bool [N], whether the nearest photo is of the correct product.
      threshold: of the index.
    """

    confidence: np.ndarray
    without_novelty: np.ndarray
    correct: np.ndarray
    nearest: np.ndarray
    threshold: float


def embed_photos(version: Path, photos: Iterator[tuple[bytes, str]]) -> EmbeddedPhotos:
    """Embeds photos with the model of an index version."""
    converted = read_bundle(version / layout.MODEL)
    engine, pairs = jax_engine(converted), list(photos)
    batches = [
        engine(
            converted.preprocessing.batch([data for data, _ in pairs[first : first + _BATCH_SIZE]])
        )
        for first in range(0, len(pairs), _BATCH_SIZE)
    ]
    embeddings, logits = (
        np.concatenate([getattr(batch, name) for batch in batches])
        for name in ("embedding", "logits")
    )
    return EmbeddedPhotos(embeddings, logits, np.array([sku for _, sku in pairs]))


def score_photos(
    index: LocalIndex,
    calibration: Calibration,
    fusion: CategoryFusion | None,
    photos: EmbeddedPhotos,
) -> PhotoScores:
    """Queries the index with every photo."""
    searcher = Searcher(index, calibration, fusion)
    confidence, without_novelty, correct, nearest = [], [], [], []
    for embedding, logits, sku in zip(photos.embeddings, photos.logits, photos.sku, strict=True):
        answer = searcher.answer(Query(embedding, logits, k=1, num_similar=1))
        novelty_factor = min(1.0, calibration.p_value(embedding) / NOVELTY_LEVEL)
        confidence.append(answer.confidence)
        without_novelty.append((answer.confidence or 0.0) / novelty_factor)
        correct.append(answer.matches[0].product.sku == sku)
        nearest.append(answer.similar[0].product.sku == sku)
    return PhotoScores(
        np.array(confidence),
        np.array(without_novelty),
        np.array(correct),
        np.array(nearest),
        calibration.threshold,
    )


def bootstrap_interval(
    statistic: Callable[[list[np.ndarray], int], float], groups: Sequence[np.ndarray], seeds: int
) -> tuple[float, float, float]:
    """Returns the mean of a statistic over seeds, with its 95 % interval.

    Args:
      statistic: (weights of the photos of each set, seed) -> value.
      groups: of each set, [N]; photos of equal values are resampled together.
      seeds: number of seeds.
    """
    mean = float(
        np.mean([statistic([np.ones(len(g)) for g in groups], seed) for seed in range(seeds)])
    )
    draws, resampled = FixedDraws(0), []
    rows = [np.unique(g, return_inverse=True) for g in groups]
    for _ in range(NUM_RESAMPLES):
        counts = [
            draws.counts(len(names), np.full(len(names), 1 / len(names)), 1)[0] for names, _ in rows
        ]
        weights = [count[row].astype(float) for count, (_, row) in zip(counts, rows, strict=True)]
        resampled.append(
            np.mean([statistic(weights, seed) for seed in draws.integers(seeds, (seeds,))])
        )
    low, high = np.quantile(resampled, [0.025, 0.975])
    return mean, float(low), float(high)


def _cell(estimate: tuple[float, float, float], scale: float = 100, digits: int = 1) -> str:
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*(scale * x for x in estimate), d=digits)


def auroc(known: np.ndarray, unknown: np.ndarray, weights: Sequence[np.ndarray]) -> float:
    """Returns the probability that a photo of a product has the greater confidence."""
    scores, weight = np.concatenate([known, unknown]), np.concatenate(weights)
    values, rank = np.unique(scores, return_inverse=True)
    is_known = np.arange(len(scores)) < len(known)
    of_known = np.bincount(rank, weight * is_known, len(values))
    of_unknown = np.bincount(rank, weight * ~is_known, len(values))
    unknown_below = np.cumsum(of_unknown) - of_unknown
    return float(
        np.sum(of_known * (unknown_below + of_unknown / 2)) / (of_known.sum() * of_unknown.sum())
    )


def _mixed(
    known: PhotoScores, unknown: PhotoScores, weights: Sequence[np.ndarray]
) -> tuple[np.ndarray, ...]:
    """Returns (confidence, correct, of a product, weight) of both sets.

    Unknown photos have a share of `OPEN_SET_PRIOR`.
    """
    scaled = (
        (1 - OPEN_SET_PRIOR) * weights[0] / weights[0].sum(),
        OPEN_SET_PRIOR * weights[1] / weights[1].sum(),
    )
    correct = np.concatenate([known.correct, np.zeros(len(unknown.correct), bool)])
    confidence = np.concatenate([known.confidence, unknown.confidence])
    return confidence, correct, np.arange(len(correct)) < len(known.correct), np.concatenate(scaled)


def best_coverage(known: PhotoScores, unknown: PhotoScores, weights: Sequence[np.ndarray]) -> float:
    """Returns the greatest coverage of photos of products with `TARGET_PRECISION`.

    The threshold is chosen on these very photos: an upper bound.
    """
    confidence, correct, of_product, weight = _mixed(known, unknown, weights)
    has_weight = weight > 0
    points = coverage_curve(
        confidence[has_weight], correct[has_weight], of_product[has_weight], weight[has_weight]
    )
    return max((point[1] for point in points if point[2] >= TARGET_PRECISION), default=0.0)


def coverage_and_precision(
    known: PhotoScores, unknown: PhotoScores, weights: Sequence[np.ndarray]
) -> tuple[float, float]:
    """Returns coverage of photos of products and precision at the threshold of the index."""
    confidence, correct, of_product, weight = _mixed(known, unknown, weights)
    answered = weight * (confidence >= known.threshold)
    return (answered * of_product).sum() / (weight * of_product).sum(), (
        answered * correct
    ).sum() / max(answered.sum(), 1e-12)


def iter_test_photos(catalog: Catalog, sku: str | None = None) -> Iterator[tuple[bytes, str]]:
    """Yields the test photos of a catalogue with their SKUs."""
    records = catalog.splits["test"]
    for i in range(len(records)):
        record = records[i]
        assert isinstance(record["image"], bytes)
        yield record["image"], record["sku"] if sku is None else sku


def evaluate_seed(
    out: Path, seed: int, another: Catalog | None
) -> dict[tuple[str, int], PhotoScores]:
    """Returns scores by (set of photos, photos added of each new product)."""
    before = out / f"index-{seed}"
    if not (before / layout.CURRENT).exists():
        build_index(out / f"run-{seed}", before)
    version = layout.current_version(before)
    calibration, fusion = (
        read_calibration(version / layout.REJECTION),
        read_fusion(version / layout.CATEGORY_FUSION),
    )
    assert calibration is not None, "an index of so many validation photos has one"
    queries = json.loads((out / "queries.json").read_text())
    sets = {
        "products": embed_photos(
            version,
            iter_test_photos(
                open_catalog(DataConfig(source="imported", path=str(out / "catalog")))
            ),
        )
    }
    for name, photos in queries.items():
        sets[name] = embed_photos(
            version, (((out / "photos" / file).read_bytes(), sku) for file, sku in photos)
        )
    if another is not None:
        sets["another data set"] = embed_photos(version, iter_test_photos(another, ""))
    scores = {}
    for count in (0, *ADDED):
        folder = out / f"index-{seed}-{count}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        if count:
            add_products(folder, out / f"new-{count}.csv")
        index = LocalIndex(layout.current_version(folder))
        for name, photos in sets.items():
            if not count or name in ("products", "new products"):
                scores[name, count] = score_photos(index, calibration, fusion, photos)
        index.close()
        shutil.rmtree(folder)
    np.savez(out / f"skus-{seed}.npz", **{name: photos.sku for name, photos in sets.items()})
    return scores


def measure(out: Path, seeds: Sequence[int], another: Catalog | None) -> None:
    """Prints both tables."""
    timing.print_machine()
    scores = [evaluate_seed(out, seed, another) for seed in seeds]
    with np.load(out / f"skus-{seeds[0]}.npz") as stored:
        sku = {name: stored[name] for name in stored.files}
    print(", ".join(f"{len(sku[name])} photos of {name}" for name in sku))

    def share(name: str, count: int, field: str, baseline: int | None = None) -> str:
        def statistic(weights: list[np.ndarray], seed: int) -> float:
            values = getattr(scores[seed][name, count], field).astype(float)
            if baseline is not None:
                values = values - getattr(scores[seed][name, baseline], field)
            return float(np.average(values, weights=weights[0]))

        return _cell(bootstrap_interval(statistic, [sku[name]], len(seeds)))

    rows = [
        [
            str(count),
            share("new products", count, "correct"),
            share("new products", count, "nearest"),
            share("products", count, "correct"),
            share("products", count, "correct", 0) if count else "",
        ]
        for count in (0, *ADDED)
    ]
    header = [
        "photos of each new product",
        "new products, %",
        "by the nearest photo, %",
        "old products, %",
        "change",
    ]
    timing.print_table("Top-1 accuracy", header, rows)
    rows = []
    for name in (n for n in sku if n != "products"):

        def pair(seed: int, name: str = name) -> tuple[PhotoScores, PhotoScores]:
            return scores[seed]["products", 0], scores[seed][name, 0]

        # Photos of another data set have no product here: each is resampled alone.
        groups = [sku["products"], sku[name] if sku[name].any() else np.arange(len(sku[name]))]
        cells = (
            lambda weights, seed, pair=pair: auroc(*(s.confidence for s in pair(seed)), weights),
            lambda weights, seed, pair=pair: auroc(
                *(s.without_novelty for s in pair(seed)), weights
            ),
            lambda weights, seed, pair=pair: best_coverage(*pair(seed), weights),
            lambda weights, seed, pair=pair: coverage_and_precision(*pair(seed), weights)[0],
            lambda weights, seed, pair=pair: coverage_and_precision(*pair(seed), weights)[1],
        )
        rows.append(
            [name, *(_cell(bootstrap_interval(cell, groups, len(seeds))) for cell in cells)]
        )
    header = [
        "photos that are not in the catalogue", "AUROC, %", "without novelty detection",
        f"best coverage at {TARGET_PRECISION:.0%} precision, %",
        "coverage at the index's threshold, %", "precision there, %",
    ]  # fmt: skip
    timing.print_table("Not in the catalogue", header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=["prepare", "measure"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--catalog", help="catalogue to hold products out of")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--another", help="catalogue of other things")
    options = parser.parse_args(argv)
    if options.step == "prepare":
        prepare(open_catalog(DataConfig(source="imported", path=options.catalog)), options.out)
    else:
        other = (
            open_catalog(DataConfig(source="imported", path=options.another))
            if options.another
            else None
        )
        measure(options.out, options.seeds, other)


if __name__ == "__main__":
    main()
