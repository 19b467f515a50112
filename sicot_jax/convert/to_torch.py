"""A finished run -> a folder that plain PyTorch recognises photos with."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.convert import folder as folders
from sicot_jax.convert import network, proof
from sicot_jax.convert.exported import exported, write_recognizer
from sicot_jax.convert.proof import Outputs

_ROWS = 65536  # classes whose logits PyTorch makes at a time


def to_torch(workdir: Path, out: Path) -> dict[str, Any]:
    """Write the run's recogniser as the folder `out`; returns what was compared.

    The classifier goes from each device to the file, one device's rows at a time. InputError: no finished run, `out` exists,
    PyTorch and JAX do not agree.
    """
    module = network.torch_module()  # before anything else is done: no torch, no conversion
    with folders.new_folder(out) as new, exported(workdir) as found:
        write_recognizer(new, found)
        shutil.copy(Path(module.__file__), new / "model.py")
        photos = proof.fixed_photos()
        proved = proof.prove(found.outputs(photos), outputs_of(new, photos), what="JAX against PyTorch")
        folders.write_manifest(new, {"JAX against PyTorch": proved})
    return {"JAX against PyTorch": proved}


def outputs_of(folder: Path, photos: Sequence[np.ndarray]) -> Outputs:
    """Of the folder's own `model.py` and weights, the classifier read some rows at a time."""
    import safetensors
    import torch

    stored = folders.read_config(folder)
    recognizer = network.load_module(folder / "model.py").SicotRecognizer(
        {**dataclasses.asdict(stored.model), "classes": 0}, dataclasses.asdict(stored.preprocessing), []
    )
    with safetensors.safe_open(folder / folders.WEIGHTS, framework="pt") as file:
        own = set(recognizer.state_dict())
        network.load_into(recognizer, {name: file.get_tensor(name) for name in file.keys() if name in own})  # noqa: SIM118
        embedding = torch.from_numpy(network.outputs_in_torch(recognizer, photos).embedding)
        rows, bias = file.get_slice("fc.weight"), file.get_tensor("fc.bias")
        parts = [
            embedding @ rows[start : start + _ROWS].T + bias[start : start + _ROWS]
            for start in range(0, stored.model.classes, _ROWS)
        ]
    return Outputs(embedding.numpy(), torch.cat(parts, 1).numpy())
