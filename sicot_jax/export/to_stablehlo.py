"""Converts a finished run to StableHLO (`jax.export`) for CPU, CUDA and TPU, any batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sicot_jax.classifier.class_weights import BIAS_NAME, KERNEL_NAME
from sicot_jax.common.files import atomic_directory
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.export.from_run import export_run, write_recognizer_config
from sicot_jax.weights.batch_norm_folding import fold_batch_norms, folded_forward
from sicot_jax.weights.bundle import (
    STABLEHLO_FILE,
    WEIGHTS_FILE,
    RecognizerSpec,
    read_bundle_config,
    write_bundle_manifest,
    written_with,
)
from sicot_jax.weights.parity import ModelOutputs, ParityReport, check_parity, parity_photos
from sicot_jax.weights.safetensors_io import write_weights

Program = Callable[[np.ndarray], dict[str, np.ndarray]]

PLATFORMS = ("cpu", "cuda", "tpu")
_LABEL = "JAX against StableHLO"


def to_stablehlo(workdir: Path, out: Path) -> list[ParityReport]:
    """Converts a finished run to a folder with a StableHLO program.

    The program takes (weights, photos), photos uint8 [batch, height, width, 3], and gives
    {"embedding" [batch, D], "logits" [batch, C]}, and "box" [batch, 4] where the model has a
    localisation branch. Its weights, with batch norms folded, are in the same folder.

    Args:
      workdir: Run folder.
      out: Folder to write, which must not exist.

    Returns:
      Parity check of JAX and the written program.

    Raises:
      InputError: No finished run, no flatbuffers, the two do not agree, or `out` exists.
    """
    _check_flatbuffers()
    photos = parity_photos()
    with atomic_directory(out) as new:
        with export_run(workdir) as exported:
            folded = fold_batch_norms(exported.arrays)
            rows = exported.class_weights.row_pieces(exported.model.num_classes)
            write_weights(new / WEIGHTS_FILE, folded, rows)
            expected = exported.outputs(photos)
        shapes = {name: array.shape for name, array in folded.items()}
        shapes |= {name: shape for name, (shape, _) in rows.items()}
        structs = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
        program = serialize_program(exported.model, exported.preprocessing, structs)
        (new / STABLEHLO_FILE).write_bytes(program)
        write_recognizer_config(new, exported)
        reports = [check_parity(expected, stablehlo_outputs(new, photos), label=_LABEL)]
        write_bundle_manifest(new, reports)
    return reports


def _check_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401 (jax.export needs it, and jax does not install it)
    except ImportError as error:
        raise InputError(
            "no flatbuffers here for StableHLO; install it: pip install flatbuffers"
        ) from error


def serialize_program(
    spec: RecognizerSpec, preprocessing: Preprocessing, weights: dict[str, jax.ShapeDtypeStruct]
) -> bytes:
    """Compiles and serialises the program of a recogniser.

    Args:
      spec: Its architecture.
      preprocessing: Size and normalisation of its input.
      weights: Shape and dtype of each weight.

    Returns:
      The program, for `jax.export.deserialize`.
    """

    def recognize(weights: dict[str, jax.Array], photos: jax.Array) -> dict[str, jax.Array]:
        embedding, box = folded_forward(spec, weights, preprocessing.normalize(photos))
        logits = embedding @ weights[KERNEL_NAME].T + weights[BIAS_NAME]
        outputs = {"embedding": embedding, "logits": logits}
        return outputs if box is None else outputs | {"box": box}

    size = f"batch, {preprocessing.height}, {preprocessing.width}, 3"
    photos = jax.ShapeDtypeStruct(jax.export.symbolic_shape(size), np.uint8)
    with jax.default_matmul_precision("highest"):
        program: Any = jax.export.export(jax.jit(recognize), platforms=PLATFORMS)
        return bytes(program(weights, photos).serialize())


def load_program(folder: Path) -> Program:
    """Loads the program of a folder with its weights.

    Args:
      folder: Folder of `to_stablehlo`.

    Returns:
      Photos, uint8 [batch, height, width, 3] -> outputs by name, see `to_stablehlo`.

    Raises:
      InputError: No flatbuffers, or an older jax than the one that wrote the program: it may fail
        at its first call only (0.10.2 does with programs of 0.12).
    """
    _check_flatbuffers()
    written = written_with(folder, "jax")
    if _release(written) > _release(jax.__version__):
        raise InputError(
            f"{folder}: a program of jax {written}, here is jax {jax.__version__}; wanted that "
            f"version or a newer one: pip install 'jax>={written}', or convert the run here"
        )
    return _read_program(folder)


def _read_program(folder: Path) -> Program:
    import safetensors.numpy

    program = jax.export.deserialize(bytearray((folder / STABLEHLO_FILE).read_bytes()))
    weights = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
    return lambda photos: jax.tree.map(np.asarray, program.call(weights, photos))


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])


def stablehlo_outputs(folder: Path, photos: Sequence[np.ndarray]) -> ModelOutputs:
    """Runs the program of a folder on this machine's device.

    Args:
      folder: Folder of `to_stablehlo`.
      photos: Uint8 photos [H, W, 3] of any size.

    Returns:
      Embeddings, logits and boxes.
    """
    batch = read_bundle_config(folder).preprocessing.batch(photos)
    return ModelOutputs(**_read_program(folder)(batch))
