"""An index in which one photo in five is the same: "no picture yet" under many products."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import numpy as np

from benchmarks import vector_search
from sicot_jax.common.linalg import l2_normalize
from sicot_jax.index.storage import layout
from sicot_jax.index.storage import products as store_module
from sicot_jax.index.storage.binary_codes import PCA, BinaryEncoder
from sicot_jax.index.storage.products import ProductStore

SIZE, WIDTH, BITS, K, QUERIES, CANDIDATES = 12_000, 32, 128, 10, 60, 1000


class VectorsWithPlaceholders:
    """Draws vectors without structure; of them `share` is the same."""

    shares = np.ones(1)

    def __init__(self, share: float):
        self.share, self.vectors = share, vector_search.GaussianVectors(WIDTH)
        self.placeholder = self.vectors(1, np.random.default_rng(9))[0]

    def __call__(
        self, count: int, rng: np.random.Generator, category: int | None = None
    ) -> np.ndarray:
        rows = self.vectors(count, rng)
        rows[rng.random(count) < self.share] = self.placeholder
        return rows


def write_index(index: Path, share: float = 0.2) -> Path:
    """Writes an index with inverted lists, every vector a product; returns its version folder.

    Args:
      index: index folder.
      share: of the vectors that are the placeholder.
    """
    manifest = layout.IndexManifest(
        "", "", "", "", WIDTH, BITS, PCA, 0, 0, {}, {}, created=str(share), version=""
    )
    index.mkdir()
    version = index / "v000001"
    vector_search.write_version(version, VectorsWithPlaceholders(share), SIZE, BITS, manifest)
    (index / layout.CURRENT).write_text(f"{version.name}\n")
    with (
        contextlib.closing(ProductStore(version / layout.PRODUCTS, writable=True)) as store,
        store.transaction() as connection,
    ):
        store_module.upsert_products(
            connection, ((n, f"sku-{n}", "", "", "", {}) for n in range(SIZE))
        )
        store_module.insert_photos(connection, ((n, n, f"{n:032x}", None) for n in range(SIZE)))
    return version


def use_lists(version: Path) -> None:
    """Makes a version's inverted lists those that a search reads."""
    manifest = layout.read_index_manifest(version)
    layout.write_index_manifest(
        version, dataclasses.replace(manifest, sha256={layout.POSTING_LISTS: ""})
    )


def near_placeholder(version: Path) -> np.ndarray:
    """Returns queries whose nearest products are others, but the placeholder is among the
    candidates; unit float32 [QUERIES, D].
    """
    vectors, features = VectorsWithPlaceholders(0), _features(version)
    drawn = vectors(40 * QUERIES, np.random.default_rng(5)) + 0.65 * vectors.placeholder
    queries = l2_normalize(drawn)
    nearest = np.partition(queries @ features.T, -K, axis=1)[:, -K]
    return queries[nearest > queries @ vectors.placeholder + 0.01][:QUERIES]


def recall(version: Path, queries: np.ndarray, similarities: list[list[float]]) -> float:
    """Returns the share of the K nearest products that were found, by exact search.

    Args:
      version: version folder.
      queries: unit float32 [Q, D].
      similarities: of the products found, for each query.
    """
    features = _features(version)
    least = np.partition(queries @ features.T, -K, axis=1)[:, -K]
    return float(
        np.mean([np.sum(np.array(found) >= one - 1e-4) / K
                 for found, one in zip(similarities, least, strict=True)])
    )  # fmt: skip


def recall_without(version: Path, queries: np.ndarray) -> float:
    """Returns the recall of an exact search by code without the placeholders, then by feature.

    Args:
      version: version folder.
      queries: unit float32 [Q, D].
    """
    features = _features(version)
    ordinary = features[features @ VectorsWithPlaceholders(0).placeholder < 0.999]
    encoder = BinaryEncoder.load(version / layout.BINARY_ENCODER)
    codes, found = encoder.encode(ordinary), []
    for query, code in zip(queries, encoder.encode(queries), strict=True):
        distances = np.bitwise_count(codes ^ code).sum(1)
        candidates = np.argsort(distances, kind="stable")[:CANDIDATES]
        found.append(np.sort(ordinary[candidates] @ query)[-K:].tolist())
    return recall(version, queries, found)


def _features(version: Path) -> np.ndarray:
    stored = np.fromfile(version / layout.FEATURES, np.float16).reshape(-1, WIDTH)
    return stored.astype(np.float32)
