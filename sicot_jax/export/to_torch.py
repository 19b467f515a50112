"""A finished run -> a folder that plain PyTorch recognises photos with."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.common import files
from sicot_jax.export.from_run import Exported, exported, write_recognizer
from sicot_jax.weights import bundle as folders
from sicot_jax.weights import parity as proof
from sicot_jax.weights import semantic as text
from sicot_jax.weights import visual as network
from sicot_jax.weights.parity import Outputs

_WHAT = "JAX against PyTorch"
_PIECE = 2**23  # weights of classes whose logits PyTorch makes at a time: 32 MiB


def to_torch(workdir: Path, out: Path, *, with_text: bool = False) -> dict[str, Any]:
    """Write the run's recogniser, and `with_text` its semantic stream, as the folder `out`; returns
    what was compared.

    The classifier goes from each device to the file, one device's rows at a time. InputError: no
    finished run, `out` exists, PyTorch and JAX do not agree.
    """
    network.torch_module()  # before anything else is done: no torch, no conversion
    with files.atomic_directory(out) as new, exported(workdir, with_text=with_text) as found:
        return write_torch(new, found)


def write_torch(new: Path, found: Exported) -> dict[str, Any]:
    """Fill the folder; returns what was compared. Of a divided classifier one device's rows are in
    memory beside it.
    """
    write_recognizer(new, found)
    shutil.copy(Path(network.torch_module().__file__), new / "model.py")
    photos = proof.fixed_photos()
    proofs = {_WHAT: proof.prove(found.outputs(photos), outputs_of(new, photos), what=_WHAT)}
    if found.semantic is not None:
        found.semantic.tokenizer.save(new)
        proofs[text.WHAT] = text.write_text(new, found.semantic.text, found.semantic.arrays)
    folders.write_manifest(new, proofs)
    return proofs


def outputs_of(folder: Path, photos: Sequence[np.ndarray]) -> Outputs:
    """Of the folder's own `model.py` and weights, the classifier read some rows at a time."""
    import safetensors
    import torch

    stored = folders.read_config(folder)
    recognizer = network.load_module(folder / "model.py").SicotRecognizer(
        {**dataclasses.asdict(stored.model), "classes": 0},
        dataclasses.asdict(stored.preprocessing),
        [],
    )
    with safetensors.safe_open(folder / folders.WEIGHTS, framework="pt") as file:
        own = set(recognizer.state_dict())
        network.load_into(
            recognizer, {name: file.get_tensor(name) for name in file.keys() if name in own}
        )  # noqa: SIM118
        found = network.outputs_in_torch(recognizer, photos)
        embedding = torch.from_numpy(found.embedding)
        rows, bias = file.get_slice("fc.weight"), file.get_tensor("fc.bias")
        step = max(1, _PIECE // embedding.shape[1])
        parts = [
            embedding @ rows[start : start + step].T + bias[start : start + step]
            for start in range(0, stored.model.classes, step)
        ]
    return dataclasses.replace(found, logits=torch.cat(parts, 1).numpy())
