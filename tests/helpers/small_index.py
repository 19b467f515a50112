"""A small index without training, written by the functions of `sicot index build`.

The network has starting values, and its classifier is imprinted from the products' photos.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from helpers.made_photos import jpeg, photo, sku
from sicot_jax.catalog.catalog import Catalog, ClassTable
from sicot_jax.catalog.sources.tables import write_class_table
from sicot_jax.catalog.tokenizer import WordTokenizer
from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.events.store import Event, EventStore
from sicot_jax.export.from_run import ExportedRun
from sicot_jax.index.storage import layout
from sicot_jax.indexing.build import finish_version
from sicot_jax.indexing.embed import PhotoReading, match_catalog
from sicot_jax.indexing.update import update_products
from sicot_jax.indexing.version_writer import (
    CodeSettings,
    VersionInputs,
    write_calibration_files,
    write_version,
)
from sicot_jax.search.category import CategoryFusion
from sicot_jax.search.rejection import Calibration
from sicot_jax.serve.state import QueryStore
from sicot_jax.weights.bundle import RecognizerSpec
from sicot_jax.weights.visual import init_visual_stream, visual_outputs_jax, visual_to_torch

PRODUCTS, PHOTOS, WIDTH, BITS = 6, 4, 64, 128
PREPROCESSING = Preprocessing(height=24, width=24, resize_height=24, resize_width=24)
# Products by category: rows of the index are 4 photos of 0, 2, 4, then of 1, 3, 5.
ROW_ORDER = (*range(0, PRODUCTS, 2), *range(1, PRODUCTS, 2))
CALIBRATION = Calibration(
    [0.0, 2000.0, 0.0], -1994.0, 0.5, 0.95, 0.95, 0.2, 100, [[0.5, 1.0, 0.95]], None
)
FUSION = CategoryFusion(("kind 0", "kind 1"), np.array([0.4, 0.6]), 0.5, 0.001, 0.5, 0.9, 100)
NUM_IMPRESSIONS = 500  # simulated by `record_visits`
GOOD = (1, 4)  # products with a rating of 5, which visitors click on whatever the query


class _TrainingPhotos:
    """Four photos of each product; the photo of row r of the index has image id r."""

    labels = np.repeat(np.arange(PRODUCTS), PHOTOS).astype(np.int32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        product, number = divmod(index, PHOTOS)
        row = ROW_ORDER.index(product) * PHOTOS + number
        return {
            "image_id": f"{row:032x}",
            "image": photo(product, number),
            "class_id": product,
            "tags": "a, b",
        }


def small_catalog() -> Catalog:
    """Returns the catalogue: products of two categories, and training photos alone."""
    skus = [sku(product) for product in range(PRODUCTS)]
    table = ClassTable(
        skus,
        [f"title {name}" for name in skus],
        [f"kind {product % 2}" for product in range(PRODUCTS)],
        {split: np.full(PRODUCTS, PHOTOS) for split in ("train", "validation", "test")},
        np.zeros(PRODUCTS, bool),
    )
    splits = {"train": _TrainingPhotos()}
    return Catalog("made", "0", table, 1, WordTokenizer([""]), np.zeros((1, 2)), splits)


def imprinted_recognizer(folder: Path, *, seed: int = 0, box: str = "none") -> ExportedRun:
    """Returns a network of starting values whose classifier recognises the products' photos.

    Args:
      folder: where its class table is written.
      seed: of the starting values.
      box: `model.localization`.
    """
    model = RecognizerSpec(
        18, 8, "small", last_stride=1, embedding_width=0, num_classes=PRODUCTS, localization=box
    )
    _, *trees = nnx.split(init_visual_stream(model, seed=seed), nnx.Param, nnx.BatchStat)
    arrays = visual_to_torch(*map(nnx.to_pure_dict, trees))
    shown = [photo(product, number) for product in range(PRODUCTS) for number in range(PHOTOS)]
    without_classes = dataclasses.replace(model, num_classes=0)
    outputs = visual_outputs_jax(without_classes, PREPROCESSING, arrays, shown)
    means = outputs.embedding.reshape(PRODUCTS, PHOTOS, WIDTH).mean(1)
    # The nearest mean: |e - m|^2 but for what all classes share, sharp enough to be confident.
    sharpness = np.float32(30 / np.mean((means - means.mean(0)) ** 2) / WIDTH)
    kernel, bias = sharpness * means, -sharpness * (means**2).sum(1) / 2
    folder.mkdir(parents=True, exist_ok=True)
    write_class_table(folder / "classes.csv", small_catalog().classes)
    return ExportedRun(
        model=model,
        preprocessing=PREPROCESSING,
        arrays=arrays,
        class_weights=ClassWeights(jnp.asarray(kernel), jnp.asarray(bias)),
        class_table=folder / "classes.csv",
        source={"run": "made"},
    )


def build_small_index(index: Path, *, seed: int = 0, box: str = "none") -> Path:
    """Builds an index of the small catalogue; returns the folder of its version in use.

    Args:
      index: index folder.
      seed: of the network's starting values.
      box: `model.localization`.
    """
    catalog = small_catalog()
    inputs = VersionInputs(
        imprinted_recognizer(index.with_name(f"{index.name}.recognizer"), seed=seed, box=box),
        match_catalog(catalog, catalog.classes),
        PhotoReading(batch_size=len(jax.devices()), workers=0, source="arrays"),
        CodeSettings(bits=BITS),
        run="made",
    )
    with layout.write_lock(index, create=True):
        folder = index / layout.BUILDING
        write_version(folder, index, inputs)
        write_calibration_files(folder, CALIBRATION, FUSION)
        return finish_version(index, folder)


def publish_copy(index: Path, version: Path) -> Path:
    """Makes a copy of a version the version in use of an index; returns its folder.

    Args:
      index: index folder; created where there is none.
      version: folder of the version.
    """
    with layout.write_lock(index, create=True):
        shutil.copytree(version, index / layout.BUILDING)
        return layout.publish_version(index, index / layout.BUILDING)


def record_visits(index: Path, folder: Path) -> tuple[Path, Path]:
    """Gives the products prices and ratings, and records visits.

    Visitors examine all products of a list and click on the good ones.

    Args:
      index: index folder.
      folder: where files are written.

    Returns:
      The service's events, and the folder of query photos that it kept.
    """
    rows = [f"{sku(p)},{10 + p},{5 if p in GOOD else 2}" for p in range(PRODUCTS)]
    (folder / "prices.csv").write_text("\n".join(["sku,price,rating", *rows]))
    update_products(index, folder / "prices.csv")
    rng, events, photos = np.random.default_rng(0), [], QueryStore(folder / "photos", 30)
    for n in range(NUM_IMPRESSIONS):
        queried = n % PRODUCTS
        others = rng.permutation([p for p in range(PRODUCTS) if p != queried])
        shown = tuple(map(sku, [queried, *others]))
        who = {"request_id": f"r{n}", "visitor": f"v{n % 97}", "variant": "a"}
        events.append(Event(f"i{n}", time=1e9 + n, kind="impression", shown=shown, **who))
        chance = {p: 0.5 if p in GOOD else 0.05 for p in range(PRODUCTS)}
        clicked = [p for p in range(PRODUCTS) if rng.random() < chance[p]]
        events += [
            Event(f"c{n}-{p}", time=1e9 + n, kind="click", sku=sku(p), **who) for p in clicked
        ]
        photos.save(f"r{n}", jpeg(photo(queried, 1000 + n)))
    store = EventStore(folder / "events.sqlite")
    store.add(events)
    store.close()
    return folder / "events.sqlite", folder / "photos"
