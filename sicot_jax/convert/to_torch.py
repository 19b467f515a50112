"""A finished run -> a folder that plain PyTorch recognises photos with."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sicot_jax import evaluate, mesh, runs
from sicot_jax.convert import folder as folders
from sicot_jax.convert import network, proof, weights
from sicot_jax.convert.folder import Model
from sicot_jax.convert.proof import Outputs

_ROWS = 65536  # classes whose logits PyTorch makes at a time


def to_torch(workdir: Path, out: Path) -> dict[str, Any]:
    """Write the run's recogniser as the folder `out`; returns what was compared.

    The classifier goes from each device to the file, one device's rows at a time; rows that share words are folded into plain
    ones first. InputError: no finished run, `out` exists, PyTorch and JAX do not agree.
    """
    network.torch_module()  # before anything else is done: no torch, no conversion
    with folders.new_folder(out) as new:
        run = runs.read_run(workdir)
        table = runs.class_table_file(run)
        device_mesh = runs.start_mesh(run.config)
        with jax.set_mesh(device_mesh):
            setup, state = runs.restore_finished(runs.on_devices_here(run, device_mesh), device_mesh)
            classifier = evaluate.plain_classifier(state)
            classes = setup.shape.num_classes
            model, preprocessing = Model.of(run.config.model, classes), run.config.preprocessing
            arrays = network.arrays_of(state.params["visual"], state.batch_stats["visual"])
            width = classifier.kernel.shape[1]
            stored: dict[str, tuple[tuple[int, ...], weights.Pieces]] = {
                **{name: weights.whole(array) for name, array in sorted(arrays.items())},
                "fc.bias": ((classes,), functools.partial(mesh.rows_by_device, classifier.bias, classes)),
                "fc.weight": ((classes, width), functools.partial(mesh.rows_by_device, classifier.kernel, classes)),
            }
            with (new / folders.WEIGHTS).open("wb") as file:
                weights.write_safetensors(file, stored, metadata={"format": "pt"})
            photos = proof.fixed_photos()
            here = network.outputs_here(dataclasses.replace(model, classes=0), preprocessing, arrays, photos)
            with jax.default_matmul_precision("highest"):
                logits = jnp.asarray(here.embedding) @ classifier.kernel.T + classifier.bias
            here = Outputs(here.embedding, np.asarray(logits)[:, :classes])
        source = {"run": workdir.name, "data": run.data_hash, "class_table": run.class_table, "commit": run.commit}
        folders.write_config(new, model, preprocessing, source)
        shutil.copy(table, new / folders.CLASSES)
        shutil.copy(Path(network.torch_module().__file__), new / "model.py")
        proved = proof.prove(here, outputs_of(new, photos), what="JAX against PyTorch")
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
