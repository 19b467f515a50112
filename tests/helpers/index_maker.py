"""A small index without training: products are colours, the network has starting values."""

from __future__ import annotations

import colorsys
import csv
import io
from pathlib import Path

import numpy as np
from flax import nnx
from PIL import Image

from sicot_jax.catalog.catalog import ClassTable
from sicot_jax.catalog.sources.tables import write_class_table
from sicot_jax.classifier import imprint
from sicot_jax.common.files import file_sha256
from sicot_jax.common.linalg import l2_normalize
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.events.store import Event, Events
from sicot_jax.index.storage import layout
from sicot_jax.index.storage import products as cards_of
from sicot_jax.index.storage.binary_codes import fit_binary_encoder
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing import title_regression as titles
from sicot_jax.indexing import update as change
from sicot_jax.recognizer import jax_engine
from sicot_jax.search.category import CategoryFusion, write_fusion
from sicot_jax.search.rejection import Calibration, write_calibration
from sicot_jax.serve.query_store import QueryStore
from sicot_jax.weights import bundle as folders
from sicot_jax.weights import safetensors_io as weights
from sicot_jax.weights import visual as network
from sicot_jax.weights.bundle import Model

PRODUCTS, PHOTOS, WIDTH, BITS = 6, 4, 64, 128
PREPROCESSING = Preprocessing(height=24, width=24, resize_height=24, resize_width=24)


def photo(product: int, number: int = 0, *, size: int = 24) -> np.ndarray:
    """uint8 [size, size, 3]: stripes of the product's colour and width, with noise."""
    rng = np.random.default_rng([product, number])
    colour = 255 * np.array(colorsys.hsv_to_rgb(product / 6.5 % 1, 0.9, 0.8))
    stripes = (np.arange(size) * (product + 2) // 8 % 2)[:, None, None]
    noisy = colour * (0.5 + 0.5 * stripes) + rng.normal(0, 8, (size, size, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def sku(product: int) -> str:
    return f"sku-{product}"


def write_model(folder: Path, *, seed: int = 0, box: str = "none") -> None:
    """As `to-torch` does, its classifier made of the photos themselves so that it recognises them."""
    folder.mkdir(parents=True)
    model = Model(18, 8, "small", last_stride=1, embedding_width=0, classes=PRODUCTS, box=box)
    _, *trees = nnx.split(network.fresh_stream(model, seed=seed), nnx.Param, nnx.BatchStat)
    arrays = network.arrays_of(*map(nnx.to_pure_dict, trees))
    shown = [photo(product, number) for product in range(PRODUCTS) for number in range(PHOTOS)]
    embeddings = network.outputs_here(_without(model), PREPROCESSING, arrays, shown).embedding
    means = embeddings.reshape(PRODUCTS, PHOTOS, WIDTH).mean(1)
    # The nearest mean: |e - m|^2 but for what all classes share, sharp enough to be sure.
    sharp = np.float32(30 / np.mean((means - means.mean(0)) ** 2) / WIDTH)
    rows = {"fc.weight": sharp * means, "fc.bias": -sharp * (means**2).sum(1) / 2}
    pieces = {
        name: (array.shape, lambda array=array: iter([array])) for name, array in rows.items()
    }
    weights.write_weights(folder / folders.WEIGHTS, arrays, pieces)
    folders.write_config(folder, model, PREPROCESSING, {"run": "made"})
    named = [sku(product) for product in range(PRODUCTS)]
    counts = {split: np.full(PRODUCTS, PHOTOS) for split in ("train", "validation", "test")}
    category = [f"kind {product % 2}" for product in range(PRODUCTS)]
    table = ClassTable(
        named, [f"title {s}" for s in named], category, counts, np.zeros(PRODUCTS, bool)
    )
    write_class_table(folder / folders.CLASSES, table)
    folders.write_manifest(folder, {})


def _without(model: Model) -> Model:
    import dataclasses

    return dataclasses.replace(model, classes=0)


def write_version(folder: Path, model: Path) -> None:
    """All that `sicot index build` leaves, of products by category: 0, 2, 4, then 1, 3, 5."""
    import shutil

    shutil.copytree(model, folder / layout.MODEL)
    engine = jax_engine(folders.read_converted(folder / layout.MODEL))
    order = [*range(0, PRODUCTS, 2), *range(1, PRODUCTS, 2)]
    owners = np.repeat(order, PHOTOS).astype(np.int32)
    shown = [photo(product, number) for product in order for number in range(PHOTOS)]
    embeddings = engine(np.stack(shown)).embedding
    features = l2_normalize(embeddings).astype(np.float16)
    codebook = fit_binary_encoder(features, BITS)
    codebook.save(folder / layout.BINARY_ENCODER)
    vectors = VectorFiles(folder, WIDTH, BITS)
    vectors.write(layout.FEATURES, 0, features)
    vectors.write(layout.CODES, 0, codebook.encode(features))
    vectors.write(layout.ROW_PRODUCTS, 0, owners)
    numbers, means = imprint.mean_directions(np.asarray(features, np.float32), owners)
    import safetensors.numpy

    stored = safetensors.numpy.load_file(folder / layout.MODEL / folders.WEIGHTS)
    kernel = stored["fc.weight"]
    made_with = imprint.fit(means, kernel[numbers], kernel.mean(0), float(stored["fc.bias"].mean()))
    imprint.save(folder / layout.IMPRINT, made_with)
    texts = [(f"title {sku(p)}", f"kind {p % 2}") for p in numbers]
    titles.save(
        folder / layout.TITLE_REGRESSION,
        titles.fit(texts, means - made_with.centre, np.full(len(numbers), PHOTOS)),
    )
    cards = ProductStore.create(folder / layout.PRODUCTS)
    with cards.change() as connection:
        cards_of.upsert_products(
            connection,
            [(p, sku(p), f"title {sku(p)}", "a, b", f"kind {p % 2}", {}) for p in range(PRODUCTS)],
        )
        cards_of.insert_photos(
            connection,
            [(i, int(owners[i]), f"{i:032x}", jpeg(pixels)) for i, pixels in enumerate(shown)],
        )
        cards_of.set_num_rows(connection, len(shown))
    cards.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    cards.close()
    write_calibration(
        folder / layout.REJECTION,
        Calibration(
            [0.0, 2000.0, 0.0], -1994.0, 0.5, 0.95, 0.95, 0.2, 100, [[0.5, 1.0, 0.95]], None
        ),
    )
    write_fusion(
        folder / layout.CATEGORY_FUSION,
        CategoryFusion(("kind 0", "kind 1"), np.array([0.4, 0.6]), 0.5, 0.001, 0.5, 0.9, 100),
    )
    half = PRODUCTS // 2 * PHOTOS
    manifest = layout.IndexManifest(
        model=file_sha256(folder / layout.MODEL / folders.WEIGHTS), run="made", trained="", data="0", width=WIDTH, bits=BITS,
        codes="pca", photos=len(shown), products=PRODUCTS, categories={"kind 0": [0, half], "kind 1": [half, 2 * half]},
        sha256=layout.file_digests(folder), created="", version="",
    )  # fmt: skip
    layout.write_index_manifest(folder, manifest)


def write_index(index: Path, model: Path) -> Path:
    """Its version in use."""
    write_version(index / layout.BUILDING, model)
    with layout.write_lock(index):
        return layout.publish_version(index, index / layout.BUILDING)


def write_manifest_csv(folder: Path, rows: list[dict[str, str]], photos: dict[str, bytes]) -> Path:
    """A manifest with its photos beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in photos.items():
        (folder / name).write_bytes(data)
    path = folder / "products.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


LISTS = 500
GOOD = (1, 4)  # products with a rating of 5, which visitors want whatever they look for


def visit(index: Path, folder: Path) -> tuple[Path, Path]:
    """Prices and ratings, and what visitors did who looked at all of what was shown and clicked on
    the good ones: the service's events and the photos that it kept.
    """
    lines = [f"{sku(p)},{10 + p},{5 if p in GOOD else 2}" for p in range(PRODUCTS)]
    (folder / "prices.csv").write_text("\n".join(["sku,price,rating", *lines]))
    change.update(index, folder / "prices.csv")
    rng, events, photos = np.random.default_rng(0), [], QueryStore(folder / "photos", 30)
    for n in range(LISTS):
        asked = n % PRODUCTS
        shown = tuple(
            map(sku, [asked, *rng.permutation([p for p in range(PRODUCTS) if p != asked])])
        )
        who = {"request_id": f"r{n}", "visitor": f"v{n % 97}", "variant": "a"}
        events.append(Event(f"i{n}", time=1e9 + n, kind="impression", shown=shown, **who))
        chance = {p: 0.5 if p in GOOD else 0.05 for p in range(PRODUCTS)}
        clicked = [p for p in range(PRODUCTS) if rng.random() < chance[p]]
        events += [
            Event(f"c{n}-{p}", time=1e9 + n, kind="click", sku=sku(p), **who) for p in clicked
        ]
        photos.save(f"r{n}", jpeg(photo(asked, 1000 + n)))
    store = Events(folder / "events.sqlite")
    store.add(events)
    store.close()
    return folder / "events.sqlite", folder / "photos"
