"""Measures whether a box helps a shop photo to find its product's iconic photo, on Grocery Store.

Command:  python -m benchmarks.iconic_photos --from DIR RUN...
          (DIR: the Grocery Store Dataset, a folder or its zip file)

Test photos of the run's catalogue are compared with the iconic photo of each product by the cosine
of their embeddings; no run has trained on iconic photos. A run with a localization branch is
measured twice, with the same weights: with the contents of its boxes (in shop photo and iconic
photo), and with uncropped photos. Intervals: 95 %, over test photos; differences are paired.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from benchmarks.finished_runs import open_run_catalog
from benchmarks.localization import RunPredictor
from benchmarks.timing import print_machine, print_table
from sicot_jax.catalog.importing.photos import FolderPhotos, PhotoReader, ZipPhotos
from sicot_jax.common.bootstrap import paired_interval
from sicot_jax.common.linalg import l2_normalize
from sicot_jax.training.provenance import code_commit

_BATCH = 100
FIRST = (1, 5)


def read_iconic_photos(source: Path) -> dict[str, bytes]:
    """Returns SKU -> its iconic photo."""
    zips = sorted(source.glob("*.zip")) if source.is_dir() else [source]
    reader: PhotoReader = ZipPhotos(zips[0]) if zips else FolderPhotos(source)
    rows = csv.DictReader(io.StringIO(reader.read("dataset/classes.csv").decode("utf-8-sig")))
    return {
        row["Class Name (str)"]: reader.read(f"dataset{row['Iconic Image Path (str)'].strip()}")
        for row in rows
    }


def embed_photos(
    predictor: RunPredictor, photos: Sequence[bytes], *, uncropped: bool
) -> np.ndarray:
    """Returns unit embeddings [N, D]; `uncropped`: without the localization branch."""
    preprocessing = predictor.run.config.preprocessing

    @jax.jit
    def embed(parts, image):
        visual = nnx.merge(*parts, copy=True)
        if uncropped:
            visual.box = None
        return visual.embed(preprocessing.normalize(image), train=False)

    with jax.set_mesh(predictor.mesh):
        batches = [photos[first : first + _BATCH] for first in range(0, len(photos), _BATCH)]
        return l2_normalize(
            np.concatenate(
                [
                    np.asarray(embed(predictor.parts, preprocessing.batch(batch)))
                    for batch in batches
                ]
            )
        )


def nearer_counts(
    queries: np.ndarray, iconic_embeddings: np.ndarray, product_rows: np.ndarray
) -> np.ndarray:
    """Returns how many iconic photos are nearer to each query than its product's, int [N]."""
    cosine = queries @ iconic_embeddings.T
    return (cosine > np.take_along_axis(cosine, product_rows[:, None], 1)).sum(1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--from", dest="source", required=True, type=Path, metavar="DIR")
    args = parser.parse_args(argv)
    iconic_embeddings = read_iconic_photos(args.source)
    skus, rows, photos = sorted(iconic_embeddings), [], 0
    for workdir in args.runs:
        predictor = RunPredictor(workdir)
        split = open_run_catalog(predictor.run).splits["test"]
        records = [split[i] for i in range(len(split))]
        product_rows, photos = (
            np.array([skus.index(record["sku"]) for record in records]),
            len(records),
        )
        before = None
        for uncropped in (True, False) if predictor.has_box else (True,):
            queries = embed_photos(
                predictor, [record["image"] for record in records], uncropped=uncropped
            )
            sku_rows = embed_photos(
                predictor, [iconic_embeddings[sku] for sku in skus], uncropped=uncropped
            )
            hits = [
                (nearer_counts(queries, sku_rows, product_rows) < k).astype(float) for k in FIRST
            ]
            cells = [f"{100 * hit.mean():.2f} {_interval(hit)}" for hit in hits]
            difference = (
                ""
                if before is None
                else f"{100 * (hits[0] - before).mean():+.2f} {_interval(hits[0] - before)}"
            )
            rows.append(
                [workdir.name, "whole photo" if uncropped else "in the box", *cells, difference]
            )
            before = hits[0]
    print_machine()
    print_table(
        f"{photos} shop photos -> {len(skus)} iconic pictures, commit {code_commit()[:7]}",
        [
            "run",
            "embedding of",
            *(f"right in the first {k}, %" for k in FIRST),
            "in the box, less whole photo",
        ],
        rows,
    )


def _interval(values: np.ndarray) -> str:
    low, high = (100 * x for x in paired_interval(values))
    return f"[{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
