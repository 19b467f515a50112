"""Binary codes of photos: linear hashes from principal components, ITQ, random or learned weights.

PCA and the ITQ rotation are computed here, not by `faiss.PCAMatrix` and `faiss.ITQMatrix`: recall
is the same, but the rotation of `ITQMatrix` depends on the number of threads and takes two to four
times as long at 256 bits, and `PCAMatrix` does not handle fewer photos than dimensions.
"""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from pathlib import Path

import numpy as np

from sicot_jax.errors import InputError

PCA, ITQ, LSH, LEARNED = "pca", "itq", "lsh", "learned"
CODE_KINDS = (PCA, ITQ, LSH, LEARNED)
_MAX_FIT_ROWS = 50_000  # embeddings that an encoder is fitted to
_ITQ_ITERATIONS = 50
_TIE = 1e-5  # scores nearer to 0 may fall on either side, by the order of a sum


@dataclasses.dataclass(frozen=True)
class BinaryEncoder:
    """Linear hash: bit j of the code of x is whether x . projection[:, j] + offset[j] > 0.

    Attributes:
      projection: float32 [D, bits].
      offset: float32 [bits].
    """

    projection: np.ndarray
    offset: np.ndarray

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.projection.shape[1]

    @property
    def width(self) -> int:
        """D, numbers of an embedding."""
        return self.projection.shape[0]

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """Computes the numbers whose signs are the bits.

        Args:
          rows: embeddings, float [N, D].

        Returns:
          Scores, float32 [N, bits].
        """
        return np.asarray(rows, np.float32) @ self.projection + self.offset

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Computes codes.

        Args:
          rows: embeddings, float [N, D].

        Returns:
          Codes, uint8 [N, bits / 8], lowest bit first.
        """
        return np.packbits(self.scores(rows) > 0, axis=1, bitorder="little")

    def matches(self, rows: np.ndarray, codes: np.ndarray) -> bool:
        """Checks codes against embeddings, bits with a score within 1e-5 of 0 left out.

        Args:
          rows: embeddings, float [N, D].
          codes: uint8 [N, bits / 8].

        Returns:
          Whether `codes` are the codes of `rows`.
        """
        scores = self.scores(rows)
        differ = np.unpackbits(codes, axis=1, bitorder="little").astype(bool) != (scores > 0)
        return bool(np.all(np.abs(scores[differ]) < _TIE))

    def save(self, path: Path) -> None:
        """Writes the encoder.

        Args:
          path: file, .npz.
        """
        np.savez(path, projection=self.projection, offset=self.offset)

    @classmethod
    def load(cls, path: Path) -> BinaryEncoder:
        """Reads an encoder.

        Args:
          path: file that `save` wrote.

        Returns:
          The encoder.

        Raises:
          InputError: the file is missing or damaged.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return cls(stored["projection"], stored["offset"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(
                f"{path}: no binary encoder ({type(error).__name__}); build the index again"
            ) from error


def check_code_bits(bits: int) -> None:
    """Raises InputError unless `bits` is a multiple of 8 up to 4096.

    Args:
      bits: bits of a code.
    """
    if bits % 8 or not 0 < bits <= 4096:
        raise InputError(f"bits={bits}, wanted a multiple of 8 up to 4096")


def fit_binary_encoder(
    rows: np.ndarray, bits: int, kind: str = PCA, *, seed: int = 0
) -> BinaryEncoder:
    """Fits an encoder to at most 50,000 of the given embeddings.

    "pca": the principal directions, as many as there are bits and variance for, turned by a random
      rotation, so that each bit has its share of the variance.
    "itq": the same, turned so that embeddings are near their codes (`itq_rotation`).
      Bits beyond the principal directions come from further rotations of the same subspace.
    "lsh": random directions; two vectors at angle t differ in each bit with probability t / pi
      (Charikar 2002).

    Args:
      rows: unit embeddings, float [N, D].
      bits: bits of a code, a multiple of 8.
      kind: one of `CODE_KINDS` except "learned".
      seed: seed of sample, rotations and directions.

    Returns:
      The encoder.

    Raises:
      InputError: `bits` is no multiple of 8 up to 4096.
    """
    check_code_bits(bits)
    rng = np.random.default_rng(seed)
    if kind == LSH:
        directions = rng.standard_normal((rows.shape[1], bits), np.float32)
        return BinaryEncoder(
            directions / np.linalg.norm(directions, axis=0), np.zeros(bits, np.float32)
        )
    sample = (
        rows
        if len(rows) <= _MAX_FIT_ROWS
        else rows[np.sort(rng.choice(len(rows), _MAX_FIT_ROWS, replace=False))]
    )
    sample = np.asarray(sample, np.float32)
    mean = sample.mean(0)
    variances, directions = np.linalg.eigh((sample - mean).T @ (sample - mean))
    rank = max(int((variances > variances[-1] * 1e-6).sum()), 1)
    principal = directions[:, ::-1][:, : min(bits, rank)].astype(np.float32)
    projected = (sample - mean) @ principal if kind == ITQ else None

    def rotation() -> np.ndarray:
        random = np.linalg.qr(rng.standard_normal((principal.shape[1],) * 2))[0].astype(np.float32)
        return random if projected is None else itq_rotation(projected, random, _ITQ_ITERATIONS)

    rotations = [rotation() for _ in range(-(-bits // principal.shape[1]))]
    projection = np.concatenate([principal @ turn for turn in rotations], 1)[:, :bits]
    return BinaryEncoder(projection, -mean @ projection)


def itq_rotation(rows: np.ndarray, rotation: np.ndarray, iterations: int) -> np.ndarray:
    """Rotates centred vectors V towards their signs: minimises |sign(V R) - V R|.

    Alternates B = sign(V R) with R = U W^T, where V^T B = U S W^T is a singular value
    decomposition;
    that is the best rotation for this B. The error never rises (iterative quantisation, Gong and
    Lazebnik 2011, CVPR, eq. 2 and section 2.2).

    Args:
      rows: V, float32 [N, K].
      rotation: start, float32 [K, K].
      iterations: how many.

    Returns:
      R, float32 [K, K].
    """
    for _ in range(iterations):
        left, _, right = np.linalg.svd(
            rows.T @ np.where(rows @ rotation > 0, np.float32(1), np.float32(-1))
        )
        rotation = left @ right
    return rotation


def encoder_from_layer(kernel: np.ndarray, bias: np.ndarray, *, bits: int) -> BinaryEncoder:
    """Makes an encoder of a run's code layer, its directions scaled to length 1.

    Args:
      kernel: float [D, bits].
      bias: float [bits].
      bits: number of bits that was asked for.

    Returns:
      The encoder.

    Raises:
      InputError: the layer has another number of bits.
    """
    if kernel.shape[1] != bits:
        raise InputError(
            f"--bits {bits} with --codes learned, and the run learned {kernel.shape[1]}; "
            "ask for those"
        )
    lengths = np.maximum(np.linalg.norm(kernel, axis=0), np.finfo(np.float32).tiny)
    return BinaryEncoder(
        np.asarray(kernel / lengths, np.float32), np.asarray(bias / lengths, np.float32)
    )
