"""Binary codes of photos, and the ways to make them: directions of the data, random ones, a layer
that a run learned.
"""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from pathlib import Path

import numpy as np

from sicot_jax.errors import InputError

PCA, ITQ, LSH, LEARNED = "pca", "itq", "lsh", "learned"
KINDS = (PCA, ITQ, LSH, LEARNED)
_FIT = 50_000  # vectors that a codebook is made from
_ITERATIONS = 50  # of ITQ


@dataclasses.dataclass(frozen=True)
class Codebook:
    """Bit j of x's code: whether x . projection[:, j] + offset[j] > 0. projection [D, bits], offset
    [bits], float32.
    """

    projection: np.ndarray
    offset: np.ndarray

    @property
    def bits(self) -> int:
        return self.projection.shape[1]

    @property
    def width(self) -> int:
        return self.projection.shape[0]

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """[N, D] -> float32 [N, bits]."""
        return np.asarray(rows, np.float32) @ self.projection + self.offset

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """[N, D] -> uint8 [N, bits / 8], lowest bit first."""
        return np.packbits(self.scores(rows) > 0, axis=1, bitorder="little")

    def agrees(self, rows: np.ndarray, codes: np.ndarray) -> bool:
        """Whether these are the codes of the rows, but for bits so near to the edge that the order
        of a sum decides them.
        """
        scores = self.scores(rows)
        differ = np.unpackbits(codes, axis=1, bitorder="little").astype(bool) != (scores > 0)
        return bool(np.all(np.abs(scores[differ]) < 1e-5))

    def save(self, path: Path) -> None:
        np.savez(path, projection=self.projection, offset=self.offset)

    @classmethod
    def load(cls, path: Path) -> Codebook:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return cls(stored["projection"], stored["offset"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(
                f"{path}: no codebook ({type(error).__name__}); build the index again"
            ) from error


def check_bits(bits: int) -> None:
    if bits % 8 or not 0 < bits <= 4096:
        raise InputError(f"bits={bits}, wanted a multiple of 8 up to 4096")


def fit_codebook(rows: np.ndarray, bits: int, kind: str = PCA, *, seed: int = 0) -> Codebook:
    """A codebook for unit vectors like `rows` [N, D], from at most 50,000 of them; `kind` is one of
    `KINDS` but "learned".

    "pca": the principal directions, as many as there are bits and variance for, turned by a random
    rotation, so that each
      bit has its share of the variance.
    "itq": the same, turned so that vectors lie near their codes (`itq_rotation`).
      Both beyond those directions: further rotations of the same, each from a start of its own.
    "lsh": directions at random, whatever the rows are: two vectors at angle t differ in each bit
    with probability t / pi
      (Charikar 2002).
    """
    check_bits(bits)
    rng = np.random.default_rng(seed)
    if kind == LSH:
        directions = rng.standard_normal((rows.shape[1], bits), np.float32)
        return Codebook(directions / np.linalg.norm(directions, axis=0), np.zeros(bits, np.float32))
    sample = (
        rows if len(rows) <= _FIT else rows[np.sort(rng.choice(len(rows), _FIT, replace=False))]
    )
    sample = np.asarray(sample, np.float32)
    mean = sample.mean(0)
    values, vectors = np.linalg.eigh((sample - mean).T @ (sample - mean))
    held = max(int((values > values[-1] * 1e-6).sum()), 1)
    principal = vectors[:, ::-1][:, : min(bits, held)].astype(np.float32)
    inside = (sample - mean) @ principal if kind == ITQ else None

    def turn() -> np.ndarray:
        rotation = np.linalg.qr(rng.standard_normal((principal.shape[1],) * 2))[0].astype(
            np.float32
        )
        return rotation if inside is None else itq_rotation(inside, rotation, _ITERATIONS)

    turns = [turn() for _ in range(-(-bits // principal.shape[1]))]
    projection = np.concatenate([principal @ turn for turn in turns], 1)[:, :bits]
    return Codebook(projection, -mean @ projection)


def itq_rotation(rows: np.ndarray, rotation: np.ndarray, iterations: int) -> np.ndarray:
    """Iterative quantisation: a rotation R [K, K] that brings centred rows V [N, K] near to signs,
    min |sign(V R) - V R|.

    From `rotation`, in turn: B = sign(V R); R = U W^T of the singular vectors V^T B = U S W^T,
    which is the nearest rotation for these B. The error never rises (Gong and Lazebnik 2011, CVPR,
    eq. 2 and section 2.2).
    """
    for _ in range(iterations):
        left, _, right = np.linalg.svd(
            rows.T @ np.where(rows @ rotation > 0, np.float32(1), np.float32(-1))
        )
        rotation = left @ right
    return rotation


def learned_codebook(kernel: np.ndarray, bias: np.ndarray, *, bits: int) -> Codebook:
    """The codebook of a run's layer (`models/sicot.VisualStream.codes`), its directions brought to
    length 1.

    Args:
      kernel: [D, bits]. bias: [bits].
      bits: that are asked for; InputError where the layer has another number.
    """
    if kernel.shape[1] != bits:
        raise InputError(
            f"--bits {bits} with --codes learned, and the run learned {kernel.shape[1]}; ask for those"
        )
    lengths = np.maximum(np.linalg.norm(kernel, axis=0), np.finfo(np.float32).tiny)
    return Codebook(
        np.asarray(kernel / lengths, np.float32), np.asarray(bias / lengths, np.float32)
    )
