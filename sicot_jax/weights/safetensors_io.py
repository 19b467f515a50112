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

import ml_dtypes
import numpy as np

from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError

FLOAT32 = np.dtype("<f4")
SAFETENSORS_SUFFIXES = (".safetensors",)
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
_MAGIC_BYTES = (b"PK", b"\x80")  # zip archives, and the pickles of older versions of torch
_STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict")  # in training checkpoints
# Types of numbers that numpy has not, by their names in safetensors.
_EXTENSION_DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_NUMPY_DTYPES = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
# Hugging Face's names, those of a folder of `sicot convert` among them.
_FILES_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")

RowChunks = Callable[[], Iterable[np.ndarray]]  # gives consecutive rows of one array
ShapedRows = tuple[tuple[int, ...], RowChunks]  # shape of the array, and its rows


def find_weights(path: Path) -> Path:
    """Returns the file of weights that a path means.

    Args:
      path: A file, or a folder as Hugging Face, timm or `sicot convert` make it.

    Returns:
      The file: `path` itself, or model.safetensors or pytorch_model.bin in the folder.

    Raises:
      InputError: A folder with neither, such as one whose weights are in several files.
    """
    if not path.is_dir():
        return path
    for name in _FILES_IN_FOLDERS:
        if (path / name).exists():
            return path / name
    names = sorted(entry.name for entry in path.iterdir())
    wanted = f"wanted {' or '.join(_FILES_IN_FOLDERS)}"
    if parts := [name for name in names if name.endswith(".index.json")]:
        raise InputError(
            f"{path}: weights in several files ({parts[0]}), {wanted}; write them as one: "
            "save_pretrained(folder, max_shard_size='100GB')"
        )
    raise InputError(
        f"{path}: {wanted}, it holds {', '.join(names[:5]) or 'nothing'}; give the file itself"
    )


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Reads a .safetensors file, or a file of `torch.save` with `weights_only`.

    A pickle that holds anything but tensors is refused, and nothing of it runs.

    Args:
      path: The file.

    Returns:
      Name -> float32 array; numbers of 8 and 16 bits have the same values in it.

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
            dtypes = {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
            _check_dtypes(path, dtypes)
            if _EXTENSION_DTYPES.keys().isdisjoint(dtypes.values()):
                return {name: np.asarray(file.get_tensor(name), FLOAT32) for name in dtypes}
            return {
                name: _extension_array(array)
                for name, array in safetensors.deserialize(path.read_bytes())
            }
    except (safetensors.SafetensorError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: no safetensors file, or a damaged one ({one_line_error(error, 160)}); "
            "download it again"
        ) from error


def _check_dtypes(path: Path, dtypes: Mapping[str, str]) -> None:
    known = (*_EXTENSION_DTYPES, *_NUMPY_DTYPES)
    if others := sorted(name for name, dtype in dtypes.items() if dtype not in known):
        raise InputError(
            f"{path}: {others[0]} is {dtypes[others[0]]}, wanted float32, bfloat16, float16 or "
            "float8; save it as float32: tensor.float()"
        )


def _extension_array(stored: Mapping[str, Any]) -> np.ndarray:
    """Returns the float32 array of an entry of `safetensors.deserialize`."""
    name = stored["dtype"]
    # safetensors' name is a letter for the kind and the number of bits.
    dtype = _EXTENSION_DTYPES.get(name) or np.dtype(
        "?" if name == "BOOL" else f"<{name[0].lower()}{int(name[1:]) // 8}"
    )
    return np.frombuffer(stored["data"], dtype).reshape(stored["shape"]).astype(FLOAT32)


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    torch = import_torch("read a file of torch.save")
    tensors = _find_state_dict(path, _load_tensors(path, torch), torch)
    return {str(name): value.detach().float().numpy() for name, value in tensors.items()}


def _find_state_dict(path: Path, content: Any, torch: ModuleType) -> dict[Any, Any]:
    """Returns the one dictionary of tensors in what a file holds, whatever its key is."""

    def is_state_dict(value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(x, torch.Tensor) for x in value.values())

    for key in _STATE_DICT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if is_state_dict(content):
        return content
    wanted = "wanted a state_dict: names of tensors"
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {type(content).__name__}, {wanted}")
    inside = {key: value for key, value in content.items() if value and is_state_dict(value)}
    if len(inside) != 1:
        keys = ", ".join(repr(key) for key in list(inside or content)[:6])
        content = "several under the keys" if inside else "a dictionary with the keys"
        raise InputError(f"{path}: holds {content} {keys}; {wanted}; save that one alone")
    return next(iter(inside.values()))


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
