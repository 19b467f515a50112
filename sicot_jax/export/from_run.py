"""A finished run's recogniser, as every conversion starts from it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sicot_jax.catalog.catalog import Tokenizer
from sicot_jax.catalog.open import open_catalog
from sicot_jax.classifier.heads import Classifier
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.parallel import mesh
from sicot_jax.training import evaluate
from sicot_jax.training import run as runs
from sicot_jax.training.state import TrainState
from sicot_jax.weights import bundle as folders
from sicot_jax.weights import safetensors_io as weights
from sicot_jax.weights import semantic as text
from sicot_jax.weights import visual as network
from sicot_jax.weights.bundle import Model, Text
from sicot_jax.weights.parity import Outputs


@dataclasses.dataclass(frozen=True)
class Semantic:
    """The stream that reads titles; arrays in torch's names, on the host."""

    text: Text
    arrays: dict[str, np.ndarray]
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Exported:
    """arrays: the visual stream in torch's names, on the host. classifier: of v alone, divided over
    the devices.
    codes: W [D, bits] and c [bits] of a run that learned some: bit j of an embedding x of length 1
      is x . W_j + c_j > 0.
    """

    model: Model
    preprocessing: Preprocessing
    arrays: dict[str, np.ndarray]
    classifier: Classifier
    class_table: Path
    source: dict[str, Any]
    semantic: Semantic | None = None
    codes: tuple[np.ndarray, np.ndarray] | None = None

    def rows(self) -> dict[str, tuple[tuple[int, ...], weights.Pieces]]:
        """The classifier for `weights.write_safetensors`, one device's rows at a time."""
        count, kernel, bias = self.model.classes, self.classifier.kernel, self.classifier.bias
        return {
            "fc.bias": ((count,), functools.partial(mesh.rows_by_device, bias, count)),
            "fc.weight": (
                (count, kernel.shape[1]),
                functools.partial(mesh.rows_by_device, kernel, count),
            ),
        }

    def outputs(self, photos: Sequence[np.ndarray]) -> Outputs:
        """By our own code, in float32; under `jax.set_mesh`."""
        alone = dataclasses.replace(self.model, classes=0)
        found = network.outputs_here(alone, self.preprocessing, self.arrays, photos)
        with jax.default_matmul_precision("highest"):
            logits = _logits(found.embedding, self.classifier.kernel, self.classifier.bias)
        return dataclasses.replace(found, logits=np.asarray(logits)[:, : self.model.classes])


@jax.jit
def _logits(embedding, kernel, bias):
    # In one program: a transposed kernel would be a copy of it.
    return jnp.einsum("bd,cd->bc", embedding, kernel) + bias


@contextlib.contextmanager
def exported(workdir: Path, *, with_text: bool = False) -> Iterator[Exported]:
    """The recogniser of a finished run, on its mesh, rows that share words folded into plain ones.
    InputError for others.

    `with_text` wants the semantic stream too, and for its vocabulary the run's catalogue.
    """
    run = runs.read_run(workdir)
    if with_text and not run.config.loss.with_semantic:
        raise InputError(
            f"{workdir}: trained without a semantic stream (loss.mixed=0); convert it without --with-text"
        )
    table = runs.class_table_file(run)
    device_mesh = runs.start_mesh(run.config)
    with jax.set_mesh(device_mesh):
        setup, state = runs.restore_finished(runs.on_devices_here(run, device_mesh), device_mesh)
        yield Exported(
            model=Model.of(run.config.model, setup.shape.num_classes),
            preprocessing=run.config.preprocessing,
            arrays=network.arrays_of(state.params["visual"], state.batch_stats["visual"]),
            classifier=evaluate.plain_classifier(state),
            class_table=table,
            semantic=_semantic(run, state) if with_text else None,
            codes=_codes(state.params["visual"]),
            source={
                "run": workdir.name,
                "data": run.data_hash,
                "class_table": run.class_table,
                "commit": run.commit,
            },
        )


def _codes(params: Any) -> tuple[np.ndarray, np.ndarray] | None:
    if "code_head" not in params:
        return None
    kernel, bias = (np.asarray(params["code_head"][name]) for name in ("kernel", "bias"))
    return kernel * len(kernel) ** 0.5, bias  # as `VisualStream.binary_code` has it


def _semantic(run: runs.Run, state: TrainState) -> Semantic:
    catalog = open_catalog(run.config.data)
    runs.check_data(
        run, catalog, "give the catalogue back its place: --with-text needs its vocabulary"
    )
    arrays = text.arrays_of(state.params["semantic"], state.batch_stats["semantic"])
    fields = {
        **dataclasses.asdict(run.config.model.text),
        "word_width": arrays["words.weight"].shape[1],
        "embedding_width": len(arrays["projection.weight"]),
        "max_tokens": run.config.data.max_tokens,
        "vocabulary": runs.vocabulary_hash(catalog.tokenizer),
    }
    return Semantic(Text(**fields), arrays, catalog.tokenizer)


def write_recognizer(folder: Path, found: Exported) -> None:
    """Its weights, config and class table."""
    weights.write_weights(folder / folders.WEIGHTS, found.arrays, found.rows())
    read = found.semantic.text if found.semantic is not None else None
    folders.write_config(folder, found.model, found.preprocessing, found.source, read)
    shutil.copy(found.class_table, folder / folders.CLASSES)
