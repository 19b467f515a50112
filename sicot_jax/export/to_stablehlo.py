"""A finished run -> StableHLO (`jax.export`) for CPU, CUDA and TPU, any batch size, weights beside
it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sicot_jax.common import files
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.export.from_run import exported
from sicot_jax.weights import batch_norm_folding as folded
from sicot_jax.weights import bundle as folders
from sicot_jax.weights import parity as proof
from sicot_jax.weights import safetensors_io as weights
from sicot_jax.weights.bundle import Model
from sicot_jax.weights.parity import Outputs

PLATFORMS = ("cpu", "cuda", "tpu")
_WHAT = "JAX against StableHLO"


def to_stablehlo(workdir: Path, out: Path) -> dict[str, Any]:
    """Write the folder `out`: a program (weights, photos uint8 [batch, height, width, 3]) ->
    {"embedding" [batch, D], "logits" [batch, C]}, and "box" [batch, 4] where the model has a box
    branch; and its weights with batch norms folded, by name; returns what was compared.
    """
    photos = proof.fixed_photos()
    with files.atomic_directory(out) as new:
        with exported(workdir) as found:
            small = folded.fold(found.arrays)
            rows = found.rows()
            weights.write_weights(new / folders.WEIGHTS, small, rows)
            here = found.outputs(photos)
        sizes = {name: array.shape for name, array in small.items()} | {
            name: shape for name, (shape, _) in rows.items()
        }
        shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in sizes.items()}
        (new / folders.PROGRAM).write_bytes(program(found.model, found.preprocessing, shapes))
        folders.write_config(new, found.model, found.preprocessing, found.source)
        shutil.copy(found.class_table, new / folders.CLASSES)
        proofs = {_WHAT: proof.prove(here, program_outputs(new, photos), what=_WHAT)}
        folders.write_manifest(new, proofs)
    return proofs


def program(
    model: Model, preprocessing: Preprocessing, shapes: dict[str, jax.ShapeDtypeStruct]
) -> bytes:
    """The serialised program."""

    def recognize(weights, photos):
        embedding, box = folded.look(model, weights, preprocessing.normalise(photos))
        found = {
            "embedding": embedding,
            "logits": embedding @ weights["fc.weight"].T + weights["fc.bias"],
        }
        return found if box is None else found | {"box": box}

    size = f"batch, {preprocessing.height}, {preprocessing.width}, 3"
    photos = jax.ShapeDtypeStruct(jax.export.symbolic_shape(size), np.uint8)
    with jax.default_matmul_precision("highest"):
        return bytes(
            jax.export.export(jax.jit(recognize), platforms=PLATFORMS)(shapes, photos).serialize()
        )


def program_outputs(folder: Path, photos: Sequence[np.ndarray]) -> Outputs:
    """Of the folder's program and weights, on this machine's device."""
    import safetensors.numpy

    preprocessing = folders.read_config(folder).preprocessing
    batch = preprocessing.batch(photos)
    call = jax.export.deserialize(bytearray((folder / folders.PROGRAM).read_bytes())).call
    found = call(safetensors.numpy.load_file(folder / folders.WEIGHTS), batch)
    return Outputs(**jax.tree.map(np.asarray, found))
