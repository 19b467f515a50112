"""Features and codes of photos: files with a line for each, appended to and mapped into memory."""

from __future__ import annotations

import dataclasses
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from sicot_jax.errors import InputError
from sicot_jax.index import layout

_FIT = 50_000  # vectors that a codebook is made from
_HALF = np.array(0x8FFFE000, np.uint32).view(np.int32)[()]  # a half's bits in a float, 13 places up


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; those of zeros stay."""
    rows = np.asarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), np.finfo(np.float32).tiny)


def widened(rows: np.ndarray) -> np.ndarray:
    """Finite float16 as float32, bit by bit: eight times as fast as numpy's astype, and most of the time of a search.

    Shifting a half's exponent and fraction into a float's place divides by 2^112, also where it is subnormal; the sign stays.
    """
    bits = np.asarray(rows).view(np.int16).astype(np.int32)  # the sign fills the upper half
    bits <<= 13
    bits &= _HALF
    found = bits.view(np.float32)
    found *= np.float32(2.0**112)
    return found


@dataclasses.dataclass(frozen=True)
class Codebook:
    """Bit j of x's code: whether (x - mean) . rotation[:, j] > 0. mean [D], rotation [D, bits], float32."""

    mean: np.ndarray
    rotation: np.ndarray

    @property
    def bits(self) -> int:
        return self.rotation.shape[1]

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """[N, D] -> uint8 [N, bits / 8]."""
        centred = np.asarray(rows, np.float32) - self.mean
        return np.packbits(centred @ self.rotation > 0, axis=1, bitorder="little")

    def agrees(self, rows: np.ndarray, codes: np.ndarray) -> bool:
        """Whether these are the codes of the rows, but for bits so near to the edge that the order of a sum decides them."""
        scores = (np.asarray(rows, np.float32) - self.mean) @ self.rotation
        differ = np.unpackbits(codes, axis=1, bitorder="little").astype(bool) != (scores > 0)
        return bool(np.all(np.abs(scores[differ]) < 1e-5))

    def save(self, path: Path) -> None:
        np.savez(path, mean=self.mean, rotation=self.rotation)

    @classmethod
    def load(cls, path: Path) -> Codebook:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return cls(stored["mean"], stored["rotation"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{path}: no codebook ({type(error).__name__}); build the index again") from error


def fit_codebook(rows: np.ndarray, bits: int, *, seed: int = 0) -> Codebook:
    """A codebook for unit vectors like `rows` [N, D], from at most 50,000 of them.

    The principal directions, as many as there are bits and variance for, turned by a random rotation, so that each bit has
    its share of the variance (where ITQ starts: Gong and Lazebnik 2011); beyond them further rotations of the same.
    """
    if bits % 8 or bits <= 0:
        raise InputError(f"bits={bits}, wanted a multiple of 8")
    rng = np.random.default_rng(seed)
    sample = rows if len(rows) <= _FIT else rows[np.sort(rng.choice(len(rows), _FIT, replace=False))]
    sample = np.asarray(sample, np.float32)
    mean = sample.mean(0)
    values, vectors = np.linalg.eigh((sample - mean).T @ (sample - mean))
    held = max(int((values > values[-1] * 1e-6).sum()), 1)
    principal = vectors[:, ::-1][:, : min(bits, held)].astype(np.float32)
    count = principal.shape[1]
    turns = [np.linalg.qr(rng.standard_normal((count, count)))[0].astype(np.float32) for _ in range(-(-bits // count))]
    return Codebook(mean, np.concatenate([principal @ turn for turn in turns], 1)[:, :bits])


class Vectors:
    """The three files of a version folder: features [N, D] float16 of length 1, codes [N, bits / 8], owners [N] int32.

    `places` lines count; there may be more, of a change that did not come to its end.
    """

    def __init__(self, folder: Path, width: int, bits: int):
        self.folder, self.width, self.bits = folder, width, bits
        self._kinds: dict[str, tuple[type, tuple[int, ...]]] = {
            layout.FEATURES: (np.float16, (width,)),
            layout.CODES: (np.uint8, (bits // 8,)),
            layout.OWNERS: (np.int32, ()),
        }

    def line_bytes(self, name: str) -> int:
        dtype, shape = self._kinds[name]
        return int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))

    def mapped(self, name: str, places: int) -> np.ndarray:
        """The first lines of one file, read only. InputError where it has fewer."""
        dtype, shape = self._kinds[name]
        path = self.folder / name
        have = path.stat().st_size // self.line_bytes(name) if path.exists() else 0
        if have < places:
            raise InputError(f"{path}: {have} lines, wanted {places}; the index is damaged, build it again")
        return np.memmap(path, dtype, "r", shape=(places, *shape)) if places else np.zeros((0, *shape), dtype)

    def write(self, name: str, at: int, lines: np.ndarray) -> None:
        """Put lines after the first `at`, whatever lies there, onto the disk."""
        dtype, shape = self._kinds[name]
        assert lines.shape[1:] == shape, (name, lines.shape)
        with (self.folder / name).open("r+b" if (self.folder / name).exists() else "wb") as file:
            file.truncate(at * self.line_bytes(name))
            file.seek(0, os.SEEK_END)
            file.write(np.ascontiguousarray(lines, dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
