"""Files of weights: read without running what is in them, written an array at a time."""

from __future__ import annotations

import json
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError

FLOAT = np.dtype("<f4")
SAFETENSORS = (".safetensors",)
TORCH = (".pth", ".pt", ".bin")
_BEGINNINGS = (b"PK", b"\x80")  # of a zip archive, and of the pickles that torch wrote before
_HOLDERS = (
    "state_dict",
    "model",
    "model_state_dict",
)  # what training scripts put beside an optimizer's state


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Name -> float32 array of a .safetensors file or of one that `torch.save` wrote.

    The latter is read with `weights_only`: a pickle that wants anything but tensors is refused and
    nothing of it runs.
    InputError: no such file, another kind of file, damaged, NaN or infinity in it.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; wanted weights, {', '.join(SAFETENSORS + TORCH)}")
    if path.suffix in SAFETENSORS:
        arrays = _read_safetensors(path)
    elif path.suffix in TORCH:
        arrays = _read_torch(path)
    else:
        raise InputError(
            f"{path}: wanted weights, {', '.join(SAFETENSORS + TORCH)}; rename it if it is one of them"
        )
    if not arrays:
        raise InputError(f"{path}: holds no array; wanted the weights of a ResNet")
    if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise InputError(
            f"{path}: NaN or infinity in {', '.join(sorted(broken)[:5])}; wanted finite weights, use another file"
        )
    return arrays


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: np.asarray(file.get_tensor(name), FLOAT) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: no safetensors file, or a damaged one ({_short(error)}); fetch it again"
        ) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    import pickle

    torch = import_torch("read a file of torch.save")
    with path.open("rb") as file:
        known = file.read(2).startswith(_BEGINNINGS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle that is refused next
            found = torch.load(path, map_location="cpu", weights_only=True) if known else None
    except Exception as error:  # a damaged file can fail in any of the reader's ways
        if isinstance(error, pickle.UnpicklingError):
            wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise InputError(
                f"{path}: holds more than tensors, and reading that would run code that it brings"
                f"{f' ({wanted[1]})' if wanted else ''}; save its state_dict() alone, or as safetensors"
            ) from error
        known = False
    if not known:
        raise InputError(
            f"{path}: no file of torch.save, or a damaged one, or of more than tensors; fetch it again"
        )
    for name in _HOLDERS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not all(
        isinstance(value, torch.Tensor) for value in found.values()
    ):
        raise InputError(
            f"{path}: holds {type(found).__name__}, wanted a state_dict: names of tensors"
        )
    return {str(name): value.detach().float().numpy() for name, value in found.items()}


def import_torch(what: str) -> Any:
    """The torch package. InputError where it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"no PyTorch here to {what}; install it: pip install 'sicot_jax[torch]'"
        ) from error
    return torch


def _short(error: Exception) -> str:
    return one_line_error(error, 160)


Pieces = Callable[
    [], Iterable[np.ndarray]
]  # consecutive rows of one array, made when they are wanted


def write_safetensors(
    file: BinaryIO,
    arrays: Mapping[str, tuple[tuple[int, ...], Pieces]],
    *,
    metadata: Mapping[str, str],
) -> None:
    """Write float32 arrays in safetensors' format, piece by piece: of an array no more than a piece
    is in memory.

    Args:
      file: open for writing, at its beginning.
      arrays: name -> (shape, its rows in order).
      metadata: strings beside them.

    The library's own writer wants every array whole. Format: 8 bytes, the header's length; the
    header as JSON, padded with spaces to a multiple of 8; the arrays' bytes
    (https://github.com/huggingface/safetensors, 2023). ValueError where the pieces of an array are
    not of its shape.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, (shape, _) in arrays.items():
        end = start + FLOAT.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name, (shape, pieces) in arrays.items():
        rows = 0
        for piece in pieces():
            if piece.shape[1:] != tuple(shape[1:]):
                raise ValueError(f"{name}: a piece is {piece.shape}, wanted rows of {shape}")
            rows += len(piece)
            file.write(np.ascontiguousarray(piece, FLOAT).data)
        if rows != shape[0]:
            raise ValueError(f"{name}: {rows} rows, wanted {shape[0]}")


def write_weights(
    path: Path, arrays: Mapping[str, np.ndarray], rows: Mapping[str, Any] | None = None
) -> None:
    """A .safetensors file of arrays in memory, and of `rows` that are made piece by piece, see
    `write_safetensors`.
    """
    stored = {name: whole(array) for name, array in sorted(arrays.items())} | dict(rows or {})
    with path.open("wb") as file:
        write_safetensors(file, stored, metadata={"format": "pt"})


def whole(array: np.ndarray) -> tuple[tuple[int, ...], Pieces]:
    """An array that is in memory, for `write_safetensors`."""
    return array.shape, lambda: [array]
