"""Reads weight files without running code that they bring, and writes them row by row."""

from __future__ import annotations

import json
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError

FLOAT32 = np.dtype("<f4")
SAFETENSORS_SUFFIXES = (".safetensors",)
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
_MAGIC_BYTES = (b"PK", b"\x80")  # zip archives, and the pickles of older versions of torch
_STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict")  # in training checkpoints

RowChunks = Callable[[], Iterable[np.ndarray]]  # gives consecutive rows of one array
ShapedRows = tuple[tuple[int, ...], RowChunks]  # shape of the array, and its rows


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Reads a .safetensors file, or a file of `torch.save` with `weights_only`.

    A pickle that holds anything but tensors is refused, and nothing of it runs.

    Args:
      path: The file.

    Returns:
      Name -> float32 array.

    Raises:
      InputError: The file is missing, of another kind, damaged, or holds NaN or infinity.
    """
    supported = ", ".join(SAFETENSORS_SUFFIXES + TORCH_SUFFIXES)
    if not path.is_file():
        raise InputError(f"{path}: no such file; wanted weights, {supported}")
    if path.suffix in SAFETENSORS_SUFFIXES:
        arrays = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        arrays = _read_torch(path)
    else:
        raise InputError(f"{path}: wanted weights, {supported}; rename it if it is one of them")
    if not arrays:
        raise InputError(f"{path}: holds no array; wanted the weights of a ResNet")
    if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise InputError(
            f"{path}: NaN or infinity in {', '.join(sorted(broken)[:5])}; "
            "wanted finite weights, use another file"
        )
    return arrays


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    import safetensors

    try:
        with (
            np.errstate(over="ignore"),  # `read_weights` refuses the infinity that this makes
            safetensors.safe_open(path, framework="numpy") as file,
        ):
            names = file.keys()
            return {name: np.asarray(file.get_tensor(name), FLOAT32) for name in names}
    # AttributeError: an eight-bit number, which numpy has no type for.
    except (safetensors.SafetensorError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: no safetensors file, or a damaged one ({one_line_error(error, 160)}); "
            "download it again"
        ) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    torch = import_torch("read a file of torch.save")
    content = _load_tensors(path, torch)
    for key in _STATE_DICT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise InputError(
            f"{path}: holds {type(content).__name__}, wanted a state_dict: names of tensors"
        )
    return {str(name): value.detach().float().numpy() for name, value in content.items()}


def _load_tensors(path: Path, torch: ModuleType) -> Any:
    damaged = (
        f"{path}: no file of torch.save, or damaged, or holds more than tensors; download it again"
    )
    with path.open("rb") as file:
        if not file.read(2).startswith(_MAGIC_BYTES):
            raise InputError(damaged)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are refused next
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise InputError(
            f"{path}: holds more than tensors, and reading that would run code that it brings"
            f"{f' ({forbidden[1]})' if forbidden else ''}; save its state_dict() alone, or as "
            "safetensors"
        ) from error
    except Exception as error:  # damaged files make the reader fail in many ways
        raise InputError(damaged) from error


def import_torch(purpose: str) -> ModuleType:
    """Imports PyTorch.

    Args:
      purpose: What it is needed for, for the error.

    Returns:
      The torch package.

    Raises:
      InputError: It is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"no PyTorch here to {purpose}; install it: pip install 'sicot_jax[torch]'"
        ) from error
    return torch


def write_safetensors(
    file: BinaryIO, arrays: Mapping[str, ShapedRows], *, metadata: Mapping[str, str]
) -> None:
    """Writes float32 arrays in the safetensors format, with one chunk in memory at a time.

    The library's writer needs every array in memory. Format: 8 bytes, the length of the
    header; the header as JSON, padded with spaces to a multiple of 8; the bytes of the arrays
    (https://github.com/huggingface/safetensors, 2023).

    Args:
      file: File open for writing, at its beginning.
      arrays: Name -> shape and rows in order.
      metadata: Strings to store in the header.

    Raises:
      ValueError: The chunks of an array do not have its shape.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, (shape, _) in arrays.items():
        end = start + FLOAT32.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name, (shape, chunks) in arrays.items():
        num_rows = 0
        for chunk in chunks():
            if chunk.shape[1:] != tuple(shape[1:]):
                raise ValueError(f"{name}: a chunk is {chunk.shape}, wanted rows of {shape}")
            num_rows += len(chunk)
            file.write(np.ascontiguousarray(chunk, FLOAT32).data)
        if num_rows != shape[0]:
            raise ValueError(f"{name}: {num_rows} rows, wanted {shape[0]}")


def write_weights(
    path: Path, arrays: Mapping[str, np.ndarray], rows: Mapping[str, ShapedRows] | None = None
) -> None:
    """Writes a .safetensors file.

    Args:
      path: File to write.
      arrays: Arrays in memory, by name.
      rows: Arrays that are made chunk by chunk, by name.
    """
    stored = {name: as_rows(array) for name, array in sorted(arrays.items())} | dict(rows or {})
    with path.open("wb") as file:
        write_safetensors(file, stored, metadata={"format": "pt"})


def as_rows(array: np.ndarray) -> ShapedRows:
    """Wraps an array in memory for `write_safetensors`.

    Args:
      array: The array, [rows, ...].

    Returns:
      Its shape and one chunk.
    """
    return array.shape, lambda: [array]
