"""Weight imprinting: class weights of new products from photos, without training.

    w = mean row + r d,  d = unit(m - g),  m = mean of a product's unit embeddings,  g = mean of m
    over known products, r = mean over known products of (row - mean row) . d
    (at least 0), and their mean bias.

Qi et al. 2018, arXiv:1712.07136, centered and scaled: embeddings are >= 0, so that the mean
direction of any product is near that of all photos, and a row of it alone wins nearly everywhere
(docs/results/conversion.md). NumPy alone.
"""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from pathlib import Path

import numpy as np

from sicot_jax.common.linalg import l2_normalize
from sicot_jax.errors import InputError
from sicot_jax.parallel.array_types import Float, Int

MAX_PHOTOS = 16  # photos of a product that its row is made of
NUM_REFERENCE_PRODUCTS = 128  # known products that the model is fitted to


@dataclasses.dataclass(frozen=True)
class ImprintModel:
    """Maps the mean direction of a product's photos to its class weights.

    Attributes:
      center: g, mean of the mean directions of known products, float32 [D].
      mean_row: mean row of known products, float32 [D].
      scale: r, length of a row's deviation from the mean row.
      bias: bias of every new class.
    """

    center: np.ndarray
    mean_row: np.ndarray
    scale: float
    bias: float

    def rows(self, mean_directions: Float[np.ndarray, "K D"]) -> Float[np.ndarray, "K D"]:
        """Returns the rows of products.

        Args:
          mean_directions: m of each product, float [K, D], see `mean_directions`.

        Returns:
          float32 [K, D].
        """
        directions = l2_normalize(mean_directions - self.center)
        return (self.mean_row + self.scale * directions).astype(np.float32)


def fit_imprint(
    means: Float[np.ndarray, "K D"],
    rows: Float[np.ndarray, "K D"],
    mean_row: Float[np.ndarray, " D"],
    bias: float,
) -> ImprintModel:
    """Fits the imprint model to known products.

    Args:
      means: m of known products, float [K, D], see `mean_directions`; with K = 0 the scale is 0.
      rows: their rows, float [K, D].
      mean_row: mean row of all known products, float [D].
      bias: their mean bias.

    Returns:
      The model.
    """
    if not len(means):
        return ImprintModel(np.zeros_like(mean_row), mean_row, 0.0, bias)
    center = means.mean(0)
    scale = np.mean(np.sum((rows - mean_row) * l2_normalize(means - center), 1))
    return ImprintModel(center, mean_row, float(np.maximum(scale, 0)), bias)


def mean_directions(
    embeddings: Float[np.ndarray, "N D"], products: Int[np.ndarray, " N"]
) -> tuple[Int[np.ndarray, " K"], Float[np.ndarray, "K D"]]:
    """Returns the mean of the unit embeddings of each product's photos.

    Args:
      embeddings: embeddings of photos, float [N, D].
      products: the product of each photo, int [N].

    Returns:
      The products in ascending order, int [K]; m of each, float32 [K, D].
    """
    unique, positions = np.unique(products, return_inverse=True)
    total = np.zeros((len(unique), embeddings.shape[1]), np.float32)
    np.add.at(total, positions, l2_normalize(np.asarray(embeddings, np.float32)))
    return unique, total / np.bincount(positions, minlength=len(unique))[:, None]


def first_photos(
    products: Int[np.ndarray, " N"], chosen: Int[np.ndarray, " K"]
) -> Int[np.ndarray, " M"]:
    """Returns the indices of up to `MAX_PHOTOS` photos, the first ones, of each chosen product.

    Args:
      products: the product of each photo, int [N].
      chosen: products, int [K].

    Returns:
      Indices of photos, ascending, int [M].
    """
    order = np.argsort(products, kind="stable")
    _, first, counts = np.unique(products[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(first, counts)
    return np.sort(order[(rank < MAX_PHOTOS) & np.isin(products[order], chosen)])


def save_imprint(path: Path, model: ImprintModel) -> None:
    """Writes an imprint model.

    Args:
      path: the file, .npz.
      model: the model.
    """
    np.savez(path, **dataclasses.asdict(model))


def load_imprint(path: Path) -> ImprintModel:
    """Reads an imprint model.

    Args:
      path: a file of `save_imprint`.

    Returns:
      The model.

    Raises:
      InputError: when there is no such file, or it is damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            scale, bias = float(stored["scale"]), float(stored["bias"])
            return ImprintModel(stored["center"], stored["mean_row"], scale, bias)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path}: no imprint model ({type(error).__name__}); build the index again"
        ) from error
