"""Classifier rows for new products from their photos' embeddings, without training; numpy alone.

    w = mean row + r d,  d = unit(m - g),  m = mean of a product's unit embeddings,  g = mean of m
    over known products, r = mean over known products of (row - mean row) . d
    (at least 0), and their mean bias.

Weight imprinting (Qi et al. 2018, arXiv:1712.07136), centred and scaled: embeddings are >= 0, so
that the mean direction of any product is near that of all photos, and a row of it alone wins nearly
everywhere (docs/conversion.md).
"""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from pathlib import Path

import numpy as np

from sicot_jax.common.linalg import l2_normalize
from sicot_jax.errors import InputError

PHOTOS = 16  # of a product that its row is made of
KNOWN = 128  # products that new ones are set against


@dataclasses.dataclass(frozen=True)
class Imprint:
    """What rows are made with: centre g [D], mean row [D], scale r and bias."""

    centre: np.ndarray
    mean_row: np.ndarray
    scale: float
    bias: float

    def rows(self, means: np.ndarray) -> np.ndarray:
        """m of products [K, D] -> their rows, float32 [K, D]."""
        return (self.mean_row + self.scale * l2_normalize(means - self.centre)).astype(np.float32)


def fit(means: np.ndarray, rows: np.ndarray, mean_row: np.ndarray, bias: float) -> Imprint:
    """From known products: m [K, D] and their rows [K, D]; mean row [D] and mean bias are of all of
    them. K = 0: scale 0.
    """
    if not len(means):
        return Imprint(np.zeros_like(mean_row), mean_row, 0.0, bias)
    centre = means.mean(0)
    scale = np.mean(np.sum((rows - mean_row) * l2_normalize(means - centre), 1))
    return Imprint(centre, mean_row, float(np.maximum(scale, 0)), bias)


def mean_directions(embeddings: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Photos' embeddings [N, D] and whose they are, int [N] -> owners int [K] in order, m of each,
    float32 [K, D].
    """
    found, place = np.unique(owners, return_inverse=True)
    total = np.zeros((len(found), embeddings.shape[1]), np.float32)
    np.add.at(total, place, l2_normalize(np.asarray(embeddings, np.float32)))
    return found, total / np.bincount(place, minlength=len(found))[:, None]


def first_photos(owners: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Where the first `PHOTOS` photos of each of the chosen owners are, sorted."""
    order = np.argsort(owners, kind="stable")
    _, first, counts = np.unique(owners[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(first, counts)
    return np.sort(order[(rank < PHOTOS) & np.isin(owners[order], chosen)])


def save(path: Path, imprint: Imprint) -> None:
    np.savez(path, **dataclasses.asdict(imprint))


def load(path: Path) -> Imprint:
    """InputError where the file is none."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            scale, bias = float(stored["scale"]), float(stored["bias"])
            return Imprint(stored["centre"], stored["mean_row"], scale, bias)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path}: nothing to make rows with ({type(error).__name__}); build the index again"
        ) from error
