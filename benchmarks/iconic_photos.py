"""Whether a box helps a shop photo to find its product's iconic picture: Grocery, by runs with and
without a box branch.

Command:  python -m benchmarks.iconic_photos --from DIR RUN...      (DIR: the Grocery Store Dataset, a
  folder or its zip file)

Test photos of the run's catalogue are compared with the iconic picture of each product by the
cosine of their embeddings; no run has trained on these pictures. One with a box branch is asked
twice: with what is in its boxes (of both, shop photo and picture) and with whole photos, by the
same weights. Intervals: 95 %, over test photos; differences in pairs.
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

from benchmarks.localization import Looker
from benchmarks.finished_runs import catalog_of
from benchmarks.timing import print_machine, print_table
from sicot_jax.catalog.importing.photos import FolderPhotos, PhotoReader, ZipPhotos
from sicot_jax.common.bootstrap import paired_interval
from sicot_jax.common.linalg import l2_normalize
from sicot_jax.training import run as runs

_BATCH = 100
FIRST = (1, 5)


def iconic(source: Path) -> dict[str, bytes]:
    """SKU -> its iconic picture."""
    zips = sorted(source.glob("*.zip")) if source.is_dir() else [source]
    reader: PhotoReader = ZipPhotos(zips[0]) if zips else FolderPhotos(source)
    rows = csv.DictReader(io.StringIO(reader.read("dataset/classes.csv").decode("utf-8-sig")))
    return {
        row["Class Name (str)"]: reader.read(f"dataset{row['Iconic Image Path (str)'].strip()}")
        for row in rows
    }


def embeddings(looker: Looker, photos: Sequence[bytes], *, whole: bool) -> np.ndarray:
    """Of length 1, [N, D]; `whole`: as if there were no box branch."""
    preprocessing = looker.run.config.preprocessing

    @jax.jit
    def embed(parts, image):
        visual = nnx.merge(*parts, copy=True)
        if whole:
            visual.box = None
        return visual.embed(preprocessing.normalise(image), train=False)

    with jax.set_mesh(looker.mesh):
        pieces = [photos[first : first + _BATCH] for first in range(0, len(photos), _BATCH)]
        return l2_normalize(
            np.concatenate(
                [np.asarray(embed(looker.parts, preprocessing.batch(piece))) for piece in pieces]
            )
        )


def ranks(queries: np.ndarray, pictures: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How many pictures are nearer to each query than its own, `own` [N]."""
    cosine = queries @ pictures.T
    return (cosine > np.take_along_axis(cosine, own[:, None], 1)).sum(1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--from", dest="source", required=True, type=Path, metavar="DIR")
    args = parser.parse_args(argv)
    pictures = iconic(args.source)
    skus, rows, photos = sorted(pictures), [], 0
    for workdir in args.runs:
        looker = Looker(workdir)
        split = catalog_of(looker.run).splits["test"]
        records = [split[i] for i in range(len(split))]
        own, photos = np.array([skus.index(record["sku"]) for record in records]), len(records)
        before = None
        for whole in (True, False) if looker.has_box else (True,):
            asked = embeddings(looker, [record["image"] for record in records], whole=whole)
            known = embeddings(looker, [pictures[sku] for sku in skus], whole=whole)
            hits = [(ranks(asked, known, own) < k).astype(float) for k in FIRST]
            cells = [f"{100 * hit.mean():.2f} {_interval(hit)}" for hit in hits]
            gain = (
                ""
                if before is None
                else f"{100 * (hits[0] - before).mean():+.2f} {_interval(hits[0] - before)}"
            )
            rows.append([workdir.name, "whole photo" if whole else "in the box", *cells, gain])
            before = hits[0]
    print_machine()
    print_table(
        f"{photos} shop photos -> {len(skus)} iconic pictures, commit {runs.commit()[:7]}",
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
