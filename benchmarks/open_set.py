"""What the service says of products that came after training, and of photos of things that the
catalogue does not have.

Commands: python -m benchmarks.open_set prepare --catalog CATALOG --out DIR
          sicot train --config=CONFIG --config.data.path=DIR/catalog --config.seed=S
          --workdir=DIR/run-S     for each seed S python -m benchmarks.open_set measure --out DIR
          --seeds S ... [--another CATALOG]

Held out of training, by a fixed seed: every product of some categories, until they have a twentieth
  of the products ("unseen categories"); then a tenth of the others, whose category and brand (what
  a SKU "brand | article" begins with) are still there ("new products"). `prepare` imports the rest,
  with every photo in the split that it had; 5 training photos of each new product wait for their
  turn, its test photos are what is asked for.

`measure` builds an index of each run, asks before any new product is there, and again after 1, 2
and 5 photos of each were added by `sicot index add`. Intervals: 95 %, products and seeds resampled
with replacement (2,000 times).
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
from sicot_jax.config import DataConfig
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import layout
from sicot_jax.indexing import update as change
from sicot_jax.indexing.build import build
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
from sicot_jax.weights import bundle as folders

ADDED = (1, 2, 5)  # photos of a new product
NEW_SHARE, CATEGORY_SHARE = 0.1, 0.05
RESAMPLES = 2000
_BATCH = 32


def held_out(
    sku: Sequence[str], category: Sequence[str], photos: np.ndarray
) -> tuple[set[str], set[str]]:
    """(new products, products of unseen categories). photos: in training, of each."""
    rng = np.random.default_rng(0)
    size, names = Counter(category), sorted(set(category))
    unseen: set[str] = set()
    for name in rng.permutation(names):
        if sum(size[n] for n in unseen) + size[name] <= CATEGORY_SHARE * len(sku):
            unseen.add(str(name))
    rest = [c for c in range(len(sku)) if category[c] not in unseen]
    left = Counter(
        kind for c in rest for kind in (("category", category[c]), ("brand", _brand(sku[c])))
    )
    new: set[str] = set()
    for c in rng.permutation(rest):
        kinds = ("category", category[c]), ("brand", _brand(sku[c]))
        if (
            len(new) < NEW_SHARE * len(rest)
            and photos[c] >= max(ADDED)
            and all(left[kind] > 1 for kind in kinds)
        ):
            new.add(sku[c])
            left.subtract(kinds)
    return new, {sku[c] for c in range(len(sku)) if category[c] in unseen}


def _brand(sku: str) -> str:
    return sku.partition(" | ")[0]


def prepare(catalog: Catalog, out: Path) -> None:
    """`out`/photos, manifests of what is known and of what is added, `asked.json`, and
    `out`/catalog.
    """
    table = catalog.classes
    new, unseen = held_out(table.sku, table.category, table.counts["train"])
    photos = out / "photos"
    photos.mkdir(parents=True)
    known: list[dict[str, str]] = []
    added: dict[str, list[dict[str, str]]] = {}
    asked: dict[str, list[tuple[str, str]]] = {"unseen SKUs": [], "unseen categories": []}
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
                asked["unseen categories"].append((name, record["sku"]))
            elif record["sku"] not in new:
                known.append(row | {"split": split})
            elif split == "test":
                asked["unseen SKUs"].append((name, record["sku"]))
            elif split == "train":
                added.setdefault(record["sku"], []).append(row)
    _write(out / "known.csv", known)
    for count in ADDED:
        _write(out / f"new-{count}.csv", [row for rows in added.values() for row in rows[:count]])
    (out / "asked.json").write_text(json.dumps(asked))
    settings = ImportSettings(short_side=10_000, min_photos=1)  # stored as they are
    import_catalog(out / "known.csv", out / "catalog", settings=settings, name="known")
    print(
        f"{len(new)} new products, {len(unseen)} of unseen categories; {len(known)} photos to train and test with"
    )


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@dataclasses.dataclass(frozen=True)
class Asked:
    """Photos' embeddings [N, D] and logits [N, C] of one model, and the SKU of each ("" for none of
    the catalogue's kind).
    """

    embeddings: np.ndarray
    logits: np.ndarray
    sku: np.ndarray


@dataclasses.dataclass(frozen=True)
class Said:
    """Of each photo: confidence (also without what search/novelty says), whether the product is
    right, and whether the nearest photo is of the right product.
    """

    confidence: np.ndarray
    bare: np.ndarray
    right: np.ndarray
    nearest: np.ndarray
    threshold: float


def asked(version: Path, photos: Iterator[tuple[bytes, str]]) -> Asked:
    converted = folders.read_converted(version / layout.MODEL)
    engine, listed = jax_engine(converted), list(photos)
    pieces = []
    for first in range(0, len(listed), _BATCH):
        pieces.append(
            engine(
                converted.preprocessing.batch([data for data, _ in listed[first : first + _BATCH]])
            )
        )
    embeddings, logits = (
        np.concatenate([getattr(p, name) for p in pieces]) for name in ("embedding", "logits")
    )
    return Asked(embeddings, logits, np.array([sku for _, sku in listed]))


def said(
    index: LocalIndex, calibration: Calibration, fusion: CategoryFusion | None, photos: Asked
) -> Said:
    searcher = Searcher(index, calibration, fusion)
    confidence, bare, right, nearest = [], [], [], []
    for embedding, logits, sku in zip(photos.embeddings, photos.logits, photos.sku, strict=True):
        found = searcher.answer(Query(embedding, logits, k=1, num_similar=1))
        usual = min(1.0, calibration.p_value(embedding) / NOVELTY_LEVEL)
        confidence.append(found.confidence)
        bare.append((found.confidence or 0.0) / usual)
        right.append(found.matches[0].product.sku == sku)
        nearest.append(found.similar[0].product.sku == sku)
    return Said(
        np.array(confidence),
        np.array(bare),
        np.array(right),
        np.array(nearest),
        calibration.threshold,
    )


def interval(
    statistic: Callable[[list[np.ndarray], int], float], groups: Sequence[np.ndarray], seeds: int
) -> tuple[float, float, float]:
    """statistic(weights of the photos of each set, seed): its mean over seeds, and the interval.
    groups: of each set, [N] whose equal values are drawn together.
    """
    whole = float(
        np.mean([statistic([np.ones(len(g)) for g in groups], seed) for seed in range(seeds)])
    )
    rng, drawn = np.random.default_rng(0), []
    rows = [np.unique(g, return_inverse=True) for g in groups]
    for _ in range(RESAMPLES):
        counts = [
            rng.multinomial(len(names), np.full(len(names), 1 / len(names))) for names, _ in rows
        ]
        weights = [count[row].astype(float) for count, (_, row) in zip(counts, rows, strict=True)]
        drawn.append(
            np.mean([statistic(weights, seed) for seed in rng.integers(seeds, size=seeds)])
        )
    low, high = np.quantile(drawn, [0.025, 0.975])
    return whole, float(low), float(high)


def _cell(found: tuple[float, float, float], scale: float = 100, digits: int = 1) -> str:
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*(scale * x for x in found), d=digits)


def auroc(known: np.ndarray, unknown: np.ndarray, weights: Sequence[np.ndarray]) -> float:
    """The probability that a photo of a product has the greater confidence; ties count half."""
    scores, weight = np.concatenate([known, unknown]), np.concatenate(weights)
    values, place = np.unique(scores, return_inverse=True)
    inside = np.arange(len(scores)) < len(known)
    of_known = np.bincount(place, weight * inside, len(values))
    of_unknown = np.bincount(place, weight * ~inside, len(values))
    below = np.cumsum(of_unknown) - of_unknown
    return float(np.sum(of_known * (below + of_unknown / 2)) / (of_known.sum() * of_unknown.sum()))


def _mixed(known: Said, unknown: Said, weights: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """(confidence, right, of a product, weight) of both, the unknown ones with a share of
    `OPEN_SET_PRIOR`.
    """
    scaled = (
        (1 - OPEN_SET_PRIOR) * weights[0] / weights[0].sum(),
        OPEN_SET_PRIOR * weights[1] / weights[1].sum(),
    )
    right = np.concatenate([known.right, np.zeros(len(unknown.right), bool)])
    confidence = np.concatenate([known.confidence, unknown.confidence])
    return confidence, right, np.arange(len(right)) < len(known.right), np.concatenate(scaled)


def best_coverage(known: Said, unknown: Said, weights: Sequence[np.ndarray]) -> float:
    """Coverage of photos of products at the threshold of most coverage with `TARGET_PRECISION`, chosen on
    these very photos: the best that could be had.
    """
    confidence, right, of_product, weight = _mixed(known, unknown, weights)
    drawn = weight > 0
    points = coverage_curve(confidence[drawn], right[drawn], of_product[drawn], weight[drawn])
    return max((point[1] for point in points if point[2] >= TARGET_PRECISION), default=0.0)


def as_shipped(known: Said, unknown: Said, weights: Sequence[np.ndarray]) -> tuple[float, float]:
    """(coverage of photos of products, precision) at the threshold that the index came with."""
    confidence, right, of_product, weight = _mixed(known, unknown, weights)
    answered = weight * (confidence >= known.threshold)
    return (answered * of_product).sum() / (weight * of_product).sum(), (
        answered * right
    ).sum() / max(answered.sum(), 1e-12)


def photos_of(catalog: Catalog, sku: str | None = None) -> Iterator[tuple[bytes, str]]:
    records = catalog.splits["test"]
    for i in range(len(records)):
        record = records[i]
        assert isinstance(record["image"], bytes)
        yield record["image"], record["sku"] if sku is None else sku


def of_seed(out: Path, seed: int, another: Catalog | None) -> dict[tuple[str, int], Said]:
    """(set of photos, photos added of each new product) -> what was said."""
    before = out / f"index-{seed}"
    if not (before / layout.CURRENT).exists():
        build(out / f"run-{seed}", before)
    version = layout.current_version(before)
    calibration, fusion = (
        read_calibration(version / layout.REJECTION),
        read_fusion(version / layout.CATEGORY_FUSION),
    )
    assert calibration is not None, "an index of so many validation photos has one"
    listed = json.loads((out / "asked.json").read_text())
    sets = {
        "products": asked(
            version,
            photos_of(open_catalog(DataConfig(source="imported", path=str(out / "catalog")))),
        )
    }
    for name, photos in listed.items():
        sets[name] = asked(
            version, (((out / "photos" / file).read_bytes(), sku) for file, sku in photos)
        )
    if another is not None:
        sets["another data set"] = asked(version, photos_of(another, ""))
    found = {}
    for count in (0, *ADDED):
        folder = out / f"index-{seed}-{count}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        if count:
            change.add(folder, out / f"new-{count}.csv")
        index = LocalIndex(layout.current_version(folder))
        for name, photos in sets.items():
            if not count or name in ("products", "unseen SKUs"):
                found[name, count] = said(index, calibration, fusion, photos)
        index.close()
        shutil.rmtree(folder)
    np.savez(out / f"skus-{seed}.npz", **{name: photos.sku for name, photos in sets.items()})
    return found


def measure(out: Path, seeds: Sequence[int], another: Catalog | None) -> None:
    timing.print_machine()
    found = [of_seed(out, seed, another) for seed in seeds]
    with np.load(out / f"skus-{seeds[0]}.npz") as stored:
        sku = {name: stored[name] for name in stored.files}
    print(", ".join(f"{len(sku[name])} photos of {name}" for name in sku))

    def share(name: str, count: int, what: str, less: int | None = None) -> str:
        def statistic(weights: list[np.ndarray], seed: int) -> float:
            values = getattr(found[seed][name, count], what).astype(float)
            if less is not None:
                values = values - getattr(found[seed][name, less], what)
            return float(np.average(values, weights=weights[0]))

        return _cell(interval(statistic, [sku[name]], len(seeds)))

    rows = [
        [
            str(count), share("unseen SKUs", count, "right"), share("unseen SKUs", count, "nearest"),
            share("products", count, "right"), share("products", count, "right", 0) if count else "",
        ]
        for count in (0, *ADDED)
    ]  # fmt: skip
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

        def pair(seed: int, name: str = name) -> tuple[Said, Said]:
            return found[seed]["products", 0], found[seed][name, 0]

        # Photos of another data set have no product here: each is drawn by itself.
        groups = [sku["products"], sku[name] if sku[name].any() else np.arange(len(sku[name]))]
        cells = (
            lambda weights, seed, pair=pair: auroc(*(s.confidence for s in pair(seed)), weights),
            lambda weights, seed, pair=pair: auroc(*(s.bare for s in pair(seed)), weights),
            lambda weights, seed, pair=pair: best_coverage(*pair(seed), weights),
            lambda weights, seed, pair=pair: as_shipped(*pair(seed), weights)[0],
            lambda weights, seed, pair=pair: as_shipped(*pair(seed), weights)[1],
        )
        rows.append([name, *(_cell(interval(cell, groups, len(seeds))) for cell in cells)])
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
    parser.add_argument("--catalog", help="to hold products out of")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--another", help="a catalogue of other things")
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
