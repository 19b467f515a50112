"""Loads the recogniser of a finished run, the starting point of every conversion."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sicot_jax.catalog.catalog import Tokenizer
from sicot_jax.catalog.sources.tables import read_class_table, write_class_table
from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.training.restore import RestoredModel, restore_params
from sicot_jax.training.run import mesh_of_config, read_run
from sicot_jax.weights.bundle import (
    CLASS_TABLE_FILE,
    WEIGHTS_FILE,
    RecognizerSpec,
    TextEncoderSpec,
    WeightsBundle,
    write_bundle_config,
)
from sicot_jax.weights.parity import ModelOutputs
from sicot_jax.weights.safetensors_io import write_weights
from sicot_jax.weights.semantic import semantic_to_torch
from sicot_jax.weights.visual import visual_outputs_jax, visual_to_torch


@dataclasses.dataclass(frozen=True)
class ExportedTextEncoder:
    """The semantic stream of a run.

    Attributes:
      spec: Its architecture.
      arrays: Its weights by torch's names, on the host.
      tokenizer: Its vocabulary.
    """

    spec: TextEncoderSpec
    arrays: dict[str, np.ndarray]
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class ExportedRun:
    """The recogniser of a finished run.

    Attributes:
      model: Its architecture.
      preprocessing: How a photo becomes input.
      arrays: Weights of the visual stream by torch's names, on the host.
      class_weights: Classifier of the visual embedding, rows divided over the devices and padded
        with rows of no class to a multiple of their number.
      class_table: File with the product of each class.
      source: Run, data and commit, for the bundle's configuration.
      text: The semantic stream, where it was asked for.
      code_layer: Kernel W [D, bits] and bias c [bits] of a run that learned binary codes: bit j
        of a unit embedding x is x . W_j + c_j > 0.
    """

    model: RecognizerSpec
    preprocessing: Preprocessing
    arrays: dict[str, np.ndarray]
    class_weights: ClassWeights
    class_table: Path
    source: dict[str, Any]
    text: ExportedTextEncoder | None = None
    code_layer: tuple[np.ndarray, np.ndarray] | None = None

    def host_class_arrays(self) -> dict[str, np.ndarray]:
        """Returns kernel and bias on the host.

        The rows that pad the number of classes to a multiple of the devices are left out.

        Returns:
          "fc.weight" float32 [C, D] and "fc.bias" float32 [C].
        """
        num_classes = self.model.num_classes
        arrays = self.class_weights.named_arrays()
        return {name: np.asarray(array)[:num_classes] for name, array in arrays.items()}

    def outputs(self, photos: Sequence[np.ndarray]) -> ModelOutputs:
        """Runs the recogniser in JAX with float32 matrix products; call under `jax.set_mesh`.

        Args:
          photos: Uint8 photos [H, W, 3] of any size.

        Returns:
          Embeddings, logits [N, C] and boxes.
        """
        headless = dataclasses.replace(self.model, num_classes=0)
        outputs = visual_outputs_jax(headless, self.preprocessing, self.arrays, photos)
        kernel, bias = self.class_weights.kernel, self.class_weights.bias
        with jax.default_matmul_precision("highest"):
            logits = _logits(outputs.embedding, kernel, bias)
        logits = np.asarray(logits)[:, : self.model.num_classes]
        return dataclasses.replace(outputs, logits=logits)


@jax.jit
def _logits(embedding: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    # Compiled: a transposed kernel would be a copy of it.
    return jnp.einsum("bd,cd->bc", embedding, kernel) + bias


@contextlib.contextmanager
def export_run(workdir: Path, *, with_text: bool = False) -> Iterator[ExportedRun]:
    """Loads the recogniser of a finished run onto its device mesh.

    Shared word weights are folded into plain rows.

    Args:
      workdir: Run folder.
      with_text: Load the semantic stream too.

    Yields:
      The recogniser; its mesh is set until the context ends.

    Raises:
      InputError: The folder is no finished run, or `with_text` is given and the run was trained
        without a semantic stream.
    """
    run = read_run(workdir)
    if with_text and not run.config.loss.with_semantic:
        raise InputError(
            f"{workdir}: trained without a semantic stream (loss.mixed=0); "
            "convert it without --with-text"
        )
    device_mesh = mesh_of_config(run.config)
    with jax.set_mesh(device_mesh):
        restored = restore_params(run, device_mesh)
        params, batch_stats = restored.params, restored.batch_stats
        yield ExportedRun(
            model=RecognizerSpec.from_config(run.config.model, restored.num_classes),
            preprocessing=restored.preprocessing,
            arrays=visual_to_torch(params["visual"], batch_stats["visual"]),
            class_weights=restored.class_weights,
            class_table=run.class_table_path,
            source={
                "run": workdir.name,
                "data": run.data_hash,
                "class_table": run.class_table_hash,
                "commit": run.commit,
            },
            text=_export_text_encoder(restored) if with_text else None,
            code_layer=_code_layer(params["visual"]),
        )


def _code_layer(params: Any) -> tuple[np.ndarray, np.ndarray] | None:
    if "code_head" not in params:
        return None
    kernel, bias = (np.asarray(params["code_head"][name]) for name in ("kernel", "bias"))
    return kernel * len(kernel) ** 0.5, bias  # scaled as in `VisualStream.binary_code`


def _export_text_encoder(restored: RestoredModel) -> ExportedTextEncoder:
    run = restored.run
    arrays = semantic_to_torch(restored.params["semantic"], restored.batch_stats["semantic"])
    spec = TextEncoderSpec(
        **dataclasses.asdict(run.config.model.text),
        word_width=arrays["words.weight"].shape[1],
        embedding_width=len(arrays["projection.weight"]),
        max_tokens=run.config.data.max_tokens,
        vocabulary=run.vocabulary_hash,
    )
    return ExportedTextEncoder(spec, arrays, run.tokenizer())


def write_recognizer(folder: Path, exported: ExportedRun) -> None:
    """Writes weights, configuration and class table of a recogniser.

    The classifier is written with the rows of one device in memory at a time.

    Args:
      folder: Empty folder.
      exported: The recogniser; its mesh is set.
    """
    rows = exported.class_weights.row_pieces(exported.model.num_classes)
    write_weights(folder / WEIGHTS_FILE, exported.arrays, rows)
    write_recognizer_config(folder, exported)


def write_recognizer_config(folder: Path, exported: ExportedRun) -> None:
    """Writes configuration and class table of a recogniser.

    Args:
      folder: Folder of the bundle.
      exported: The recogniser.
    """
    text = exported.text.spec if exported.text is not None else None
    write_bundle_config(
        WeightsBundle(folder, exported.model, exported.preprocessing, exported.source, text)
    )
    write_class_table(folder / CLASS_TABLE_FILE, read_class_table(exported.class_table))
