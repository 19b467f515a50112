"""Writes the files of a new index version: records, embeddings, codes, lists, imprinter."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sqlite3
import sys
from pathlib import Path

import numpy as np

from sicot_jax._version import __version__
from sicot_jax.catalog.batches import evenly_spaced
from sicot_jax.classifier.class_weights import BIAS_NAME, KERNEL_NAME
from sicot_jax.classifier.imprint import (
    NUM_REFERENCE_PRODUCTS,
    first_photos,
    fit_imprint,
    mean_directions,
    save_imprint,
)
from sicot_jax.common.files import file_sha256, read_json, write_json
from sicot_jax.errors import InputError
from sicot_jax.export.from_run import ExportedRun, write_recognizer
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.binary_codes import (
    PCA,
    BinaryEncoder,
    fit_binary_encoder,
)
from sicot_jax.index.storage.inverted_lists import write_lists_if_large
from sicot_jax.index.storage.products import (
    ProductStore,
    delete_products,
    parse_quality,
    upsert_products,
)
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing.embed import IndexSource, KnownFeatures, PhotoReading, embed_photos
from sicot_jax.indexing.new_products import imprint_all_new_products, load_weight_imprinter
from sicot_jax.indexing.title_regression import (
    MAX_FIT_PRODUCTS,
    fit_title_regression,
    save_title_regression,
)
from sicot_jax.search.category import CategoryFusion, write_fusion
from sicot_jax.search.rejection import Calibration, write_calibration
from sicot_jax.training.provenance import utc_now
from sicot_jax.weights.bundle import WEIGHTS_FILE, write_bundle_manifest

_CHUNK = 1 << 16  # rows read at a time


@dataclasses.dataclass(frozen=True)
class CodeSettings:
    """How binary codes are made.

    Attributes:
      kind: one of `binary_codes.CODE_KINDS`.
      bits: bits of a code.
      learned: encoder of the run, for the kind "learned" alone.
    """

    kind: str = PCA
    bits: int = 256
    learned: BinaryEncoder | None = None


@dataclasses.dataclass(frozen=True)
class VersionInputs:
    """What a version is written from.

    Attributes:
      recognizer: the model.
      source: products and photos.
      reading: how photos are read.
      codes: how binary codes are made.
      run: name of the run folder.
      results_sha256: digest of the run's results; "" for none.
    """

    recognizer: ExportedRun
    source: IndexSource
    reading: PhotoReading
    codes: CodeSettings
    run: str
    results_sha256: str = ""


def write_version(folder: Path, index: Path, inputs: VersionInputs) -> layout.IndexManifest:
    """Writes a version without calibration and ONNX model, continuing a build that was stopped.

    Args:
      folder: the version being built.
      index: index folder, whose version in use has embeddings that need not be computed.
      inputs: what it is written from; call this under the mesh of its recogniser.

    Returns:
      The manifest that was written.
    """
    recognizer, source, codes = inputs.recognizer, inputs.source, inputs.codes
    model_sha256 = _begin(folder, inputs)
    width = _embedding_width(folder)
    vectors = VectorFiles(folder, width, codes.bits)
    store = ProductStore(folder / layout.PRODUCTS, writable=True)
    with contextlib.closing(store):
        with contextlib.closing(KnownFeatures(index, model_sha256)) as known:
            embed_photos(recognizer, source, inputs.reading, known, vectors, store)
        _write_codes(folder, vectors, len(source.photos), codes)
        write_lists_if_large(folder, vectors, source.category_ranges)
        _fit_weight_imprinter(folder, vectors, source, store)
        imprint_all_new_products(store, vectors, load_weight_imprinter(folder), source.num_classes)
        store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    manifest = layout.IndexManifest(
        model_sha256=model_sha256,
        run=inputs.run,
        results_sha256=inputs.results_sha256,
        data_hash=source.catalog.data_hash,
        width=width,
        bits=codes.bits,
        code_kind=codes.kind,
        num_photos=len(source.photos),
        num_products=int((~source.catalog.classes.discontinued).sum()),
        category_ranges=source.category_ranges,
        sha256=layout.file_digests(folder),
        created=utc_now(),
        version=__version__,
    )
    layout.write_index_manifest(folder, manifest)
    return manifest


def _begin(folder: Path, inputs: VersionInputs) -> str:
    """Writes recogniser and records, unless a build of the same inputs is there to be continued.

    Returns the digest of the recogniser's weights.
    """
    progress, model = folder / layout.PROGRESS, folder.with_name(f"{folder.name}.model")
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir(parents=True)
    write_recognizer(model, inputs.recognizer)
    write_bundle_manifest(model, [])
    model_sha256 = file_sha256(model / WEIGHTS_FILE)
    state = {
        "format": layout.FORMAT,
        "version": __version__,
        "model_sha256": model_sha256,
        "data_hash": inputs.source.catalog.data_hash,
        "code_kind": inputs.codes.kind,
        "bits": inputs.codes.bits,
    }
    if progress.exists():
        if read_json(progress, "the state of an unfinished build") == state:
            shutil.rmtree(model)
            return model_sha256
        print(
            f"{folder}: of another model, catalogue or version; built from scratch", file=sys.stderr
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model.rename(folder / layout.MODEL)
    with contextlib.closing(ProductStore.create(folder / layout.PRODUCTS)) as store:
        _write_products(inputs.source, store, _read_quality(folder.parent))
    write_json(progress, state)
    return model_sha256


def _read_quality(index: Path) -> dict[str, dict[str, float]]:
    """SKU -> prices and the like of the version in use, which no catalogue has."""
    try:
        path = layout.current_version(index) / layout.PRODUCTS
        with contextlib.closing(ProductStore(path)) as store:
            lines = store.connection.execute(
                "SELECT sku, quality FROM products WHERE quality <> '{}'"
            ).fetchall()
    except (InputError, sqlite3.Error):
        return {}  # there is none, or `KnownFeatures` reports it
    return {sku: parse_quality(stored) for sku, stored in lines}


def _write_products(
    source: IndexSource, store: ProductStore, quality: dict[str, dict[str, float]]
) -> None:
    """Writes records of all products; classes that are no longer sold are deleted products."""
    products, table = source.catalog.classes, source.class_table
    sold = np.flatnonzero(~products.discontinued).tolist()
    deleted = np.ones(source.num_classes, bool)
    deleted[[p for p in source.product_ids[sold] if p < source.num_classes]] = False
    deleted_ids = np.flatnonzero(deleted).tolist()
    with store.transaction() as connection:
        upsert_products(
            connection,
            ((c, table.sku[c], table.title[c], "", table.category[c], {}) for c in deleted_ids),
        )
        delete_products(connection, deleted_ids)
        upsert_products(
            connection,
            (
                (
                    int(source.product_ids[p]),
                    products.sku[p],
                    products.title[p],
                    "",
                    products.category[p],
                    quality.get(products.sku[p], {}),
                )
                for p in sold
            ),
        )


def _write_codes(folder: Path, vectors: VectorFiles, num_rows: int, codes: CodeSettings) -> None:
    features = vectors.memmap(layout.FEATURES, num_rows)
    encoder = codes.learned or fit_binary_encoder(features, codes.bits, codes.kind)
    encoder.save(folder / layout.BINARY_ENCODER)
    vectors.write_rows(layout.CODES, 0, np.zeros((0, codes.bits // 8), np.uint8))
    for first in range(0, num_rows, _CHUNK):
        chunk = features[first : first + _CHUNK]
        vectors.write_rows(layout.CODES, first, encoder.encode(chunk))


def _embedding_width(folder: Path) -> int:
    import safetensors

    with safetensors.safe_open(folder / layout.MODEL / WEIGHTS_FILE, framework="numpy") as file:
        return file.get_slice(KERNEL_NAME).get_shape()[1]


def _fit_weight_imprinter(
    folder: Path, vectors: VectorFiles, source: IndexSource, store: ProductStore
) -> None:
    """Fits, on products that the model has a class for, what makes class weights of new ones."""
    row_products = source.row_products
    features = vectors.memmap(layout.FEATURES, len(row_products))

    def directions_of(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = first_photos(row_products, products)
        return mean_directions(features[rows], row_products[rows])

    trained = np.unique(row_products)
    trained = trained[trained < source.num_classes]
    products, means = directions_of(trained[evenly_spaced(len(trained), NUM_REFERENCE_PRODUCTS)])
    kernel, mean_kernel, mean_bias = _read_class_weights(folder, products)
    fitted = fit_imprint(means, kernel, mean_kernel, mean_bias)
    save_imprint(folder / layout.IMPRINT, fitted)
    products, means = directions_of(trained[evenly_spaced(len(trained), MAX_FIT_PRODUCTS)])
    texts = [
        (record.title, record.category) if record else ("", "")
        for record in store.products(products.tolist())
    ]
    num_photos = np.bincount(row_products)[products]
    regression = fit_title_regression(texts, means - fitted.center, num_photos)
    save_title_regression(folder / layout.TITLE_REGRESSION, regression)


def _read_class_weights(folder: Path, products: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Class weights of some products, [K, D], and the means of all kernels, [D], and biases."""
    import safetensors

    with safetensors.safe_open(folder / layout.MODEL / WEIGHTS_FILE, framework="numpy") as file:
        kernel, bias = file.get_slice(KERNEL_NAME), file.get_slice(BIAS_NAME)
        num_classes, width = kernel.get_shape()
        chosen = np.array([kernel[int(c) : int(c) + 1][0] for c in products])
        mean_kernel, mean_bias = np.zeros(width), 0.0
        for first in range(0, num_classes, _CHUNK):
            chunk = slice(first, min(first + _CHUNK, num_classes))
            mean_kernel += kernel[chunk].sum(0, dtype=np.float64) / num_classes
            mean_bias += float(bias[chunk].sum(dtype=np.float64)) / num_classes
    return chosen.reshape(len(products), width), mean_kernel.astype(np.float32), mean_bias


def write_calibration_files(folder: Path, calibration: Calibration, fusion: CategoryFusion) -> None:
    """Writes calibration and category fusion of a version, and their digests into its manifest.

    Args:
      folder: the version being built.
      calibration: confidence and rejection threshold.
      fusion: category prediction.
    """
    write_calibration(folder / layout.REJECTION, calibration)
    write_fusion(folder / layout.CATEGORY_FUSION, fusion)
    manifest = layout.read_index_manifest(folder)
    layout.write_index_manifest(
        folder, dataclasses.replace(manifest, sha256=layout.file_digests(folder))
    )
