"""Measures the recall of binary codes against exact search, with and without re-ranking.

Photos:   python -m benchmarks.binary_encoders --index INDEX --catalog CATALOG
          (queries: the catalogue's test photos)
Vectors:  python -m benchmarks.binary_encoders --index INDEX --made 1000000
          (as the "measured" ones of benchmarks/vector_search.py)
Needs:    faiss; an index of real photos, built with `--codes learned` for the row of the run's
          codes.

Recall@k: share of the k photos that are nearest to a query by float32 cosine among the k nearest by
code, or, "of c re-ranked", among the best k by cosine of the c nearest by code. Equal distances
come in the order of the index.
Kinds: sicot_jax/index/storage/binary_codes. "learned afterwards": the same layer and losses, fitted
to the index's features alone in `--steps` steps of 64 vectors by the optimizer of
configs/fashion_small.py, for any number of bits and without a run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from benchmarks.open_set import embed_photos
from benchmarks.vector_search import MeasuredVectors
from sicot_jax.catalog.open import open_catalog
from sicot_jax.common.linalg import l2_normalize
from sicot_jax.config import DataConfig, LossConfig
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.binary_codes import (
    ITQ,
    LEARNED,
    LSH,
    PCA,
    BinaryEncoder,
    encoder_from_layer,
    fit_binary_encoder,
)
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.training import auxiliary_losses as losses

LEARNED_AFTERWARDS = "learned afterwards"
NAMES = {
    PCA: "rotated PCA",
    ITQ: "ITQ",
    LSH: "random hyperplanes",
    LEARNED_AFTERWARDS: LEARNED_AFTERWARDS,
}
KS = (1, 10, 100)
_BATCH_SIZE, _MAX_SAMPLE = 64, 50_000


def fit_frozen_encoder(
    features: np.ndarray, bits: int, *, steps: int, seed: int = 0
) -> BinaryEncoder:
    """Fits the model's layer of codes by its losses to unit features [N, D] that are frozen.

    Returns:
      The encoder.
    """
    rng, weights, width = np.random.default_rng(seed), LossConfig(), features.shape[1]
    chosen = rng.choice(len(features), min(len(features), _MAX_SAMPLE), replace=False)
    rows = jnp.asarray(features[chosen], jnp.float32)
    optimizer = optax.chain(
        optax.add_decayed_weights(5e-4, mask={"kernel": True, "bias": False}),
        optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9, nesterov=True),
    )

    def loss(layer, unit):
        h = jax.nn.sigmoid(unit * width**0.5 @ layer["kernel"] + layer["bias"])
        likeness = losses.code_similarity_loss(h, unit, h, unit)
        balance, quantisation = losses.code_balance_loss(h), losses.code_quantisation_loss(h)
        return likeness + weights.code_balance * balance + weights.code_quantisation * quantisation

    @jax.jit
    def fit(layer, batches):
        def step(carry, batch):
            layer, state = carry
            updates, state = optimizer.update(jax.grad(loss)(layer, rows[batch]), state, layer)
            return (optax.apply_updates(layer, updates), state), None

        return jax.lax.scan(step, (layer, optimizer.init(layer)), batches)[0][0]

    kernel = rng.standard_normal((width, bits), np.float32) * width**-0.5
    batches = rng.integers(len(rows), size=(steps, min(_BATCH_SIZE, len(rows))))
    layer = jax.device_get(fit({"kernel": kernel, "bias": np.zeros(bits, np.float32)}, batches))
    return encoder_from_layer(layer["kernel"] * width**0.5, layer["bias"], bits=bits)


def recalls(
    features: np.ndarray,
    queries: np.ndarray,
    encoder: BinaryEncoder,
    wanted: np.ndarray,
    candidates: list[int],
):
    """Returns the recall of each query [Q] by (candidates, k), candidates 0 for codes alone.

    `features` are [N, D], `queries` [Q, D], and `wanted` the rows of the nearest, [Q, 100].
    """
    import faiss

    codes = np.concatenate(
        [
            encoder.encode(features[i : i + _MAX_SAMPLE])
            for i in range(0, len(features), _MAX_SAMPLE)
        ]
    )
    max_candidates = min(max(*candidates, KS[-1]), len(features))
    candidate_rows = faiss.knn_hamming(
        encoder.encode(queries), codes, max_candidates, variant="hc"
    )[1]
    recall = {0: candidate_rows}
    for count in candidates:
        batch = candidate_rows[:, :count]
        cosine = np.stack(
            [features[rows] @ query for rows, query in zip(batch, queries, strict=True)]
        )
        recall[count] = np.take_along_axis(batch, np.argsort(-cosine, 1, kind="stable"), 1)
    return {
        (count, k): np.array(
            [len(set(a[:k]) & set(b[:k])) / k for a, b in zip(rows, wanted, strict=True)]
        )
        for count, rows in recall.items()
        for k in KS
        if k <= wanted.shape[1]
    }


def index_and_test_features(
    version: Path, manifest: layout.IndexManifest, catalog_path: str, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns features of the index, and of the catalogue's test photos, all or `count` of them."""
    catalog = open_catalog(DataConfig(source="imported", path=catalog_path))
    assert manifest.data_hash == catalog.data_hash, "an index of this catalogue"
    features = VectorFiles(version, manifest.width, manifest.bits).memmap(
        layout.FEATURES, manifest.num_photos
    )
    split = catalog.splits["test"]
    chosen = np.linspace(0, len(split) - 1, min(count, len(split))).astype(int)
    embedded = embed_photos(
        version, ((split[i]["image"], split[i]["sku"]) for i in chosen.tolist())
    )
    return np.asarray(features, np.float32), l2_normalize(embedded.embeddings)


def iter_encoders(
    features: np.ndarray, version: Path, manifest: layout.IndexManifest, options
) -> Iterator[tuple[str, BinaryEncoder]]:
    """Yields encoders by name and number of bits."""
    for bits in options.bits:
        for kind, name in NAMES.items():
            if kind in options.kinds:
                if kind == LEARNED_AFTERWARDS:
                    yield name, fit_frozen_encoder(features, bits, steps=options.steps)
                else:
                    yield name, fit_binary_encoder(features, bits, kind)
        if bits == manifest.bits and manifest.code_kind == LEARNED:
            yield "learned in the run", BinaryEncoder.load(version / layout.BINARY_ENCODER)


def main() -> None:
    import faiss

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", type=Path, required=True, help="index of real photos")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--catalog", help="of the index; its test photos are the queries")
    source.add_argument(
        "--made", type=int, help="that many vectors like those of the index, and queries like them"
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--candidates", type=int, nargs="+", default=[100, 400, 1000])
    parser.add_argument("--kinds", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=4632, help="of what is learned afterwards")
    options = parser.parse_args()
    timing.print_machine()
    version = layout.current_version(options.index)
    manifest = layout.read_index_manifest(version)
    if options.catalog:
        features, queries = index_and_test_features(
            version, manifest, options.catalog, options.queries
        )
    else:
        vectors = MeasuredVectors(options.index)
        features = vectors(options.made, np.random.default_rng(0))
        queries = vectors(options.queries, np.random.default_rng([0, 1]))
    faiss.omp_set_num_threads(1)
    wanted = faiss.knn(
        queries, features, min(KS[-1], len(features)), metric=faiss.METRIC_INNER_PRODUCT
    )[1]
    candidates = [count for count in options.candidates if count < len(features)]
    columns = [(count, k) for count in (0, *candidates) for k in KS]
    rows, errors = [], []
    for name, encoder in iter_encoders(features, version, manifest, options):
        recall = recalls(features, queries, encoder, wanted, candidates)
        cells = [
            " / ".join(f"{recall[count, k].mean():.3f}" for k in KS) for count in (0, *candidates)
        ]
        errors += [recall[column].std() / len(queries) ** 0.5 for column in columns]
        rows.append([name, str(encoder.bits), *cells])
        print(name, encoder.bits, *cells, flush=True)
    header = [
        "codes",
        "bits",
        "codes alone, recall@1 / 10 / 100",
        *(f"of {count:,} re-ranked" for count in candidates),
    ]
    title = f"{len(features):,} vectors of {features.shape[1]} numbers, {len(queries):,} queries"
    timing.print_table(f"{title}; standard errors up to {max(errors):.3f}", header, rows)


if __name__ == "__main__":
    main()
