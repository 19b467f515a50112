"""Converts a finished run to an ONNX graph that takes uint8 photos of the right size."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.catalog.sources.tables import read_class_table
from sicot_jax.common.files import atomic_directory
from sicot_jax.errors import InputError
from sicot_jax.export.from_run import ExportedRun, export_run, write_recognizer_config
from sicot_jax.weights.bundle import ONNX_FILE, read_bundle_config, write_bundle_manifest
from sicot_jax.weights.parity import ModelOutputs, ParityReport, check_parity, parity_photos
from sicot_jax.weights.visual import load_torch_arrays, torch_template

_LABEL = "JAX against ONNX Runtime"
_MAX_GRAPH_BYTES = 1_500_000_000  # weights inside the file; protobuf ends at 2 GiB


def to_onnx(workdir: Path, out: Path, *, top_k: int = 0) -> list[ParityReport]:
    """Converts a finished run to a folder with an ONNX graph.

    The graph takes "photos", uint8 [batch, height, width, 3], resized and cropped by
    `Preprocessing`, and normalises them. It gives "embedding" [batch, D] and "logits" [batch, C],
    or with `top_k` "probability" and "class" [batch, top_k] of products that are not discontinued;
    and "box" [batch, 4] where the model has a localisation branch. Needs the extras torch and onnx.

    Args:
      workdir: Run folder.
      out: Folder to write, which must not exist.
      top_k: Number of best classes that the graph gives; 0 for logits.

    Returns:
      Parity check of JAX and the written graph.

    Raises:
      InputError: No finished run, a missing package, a wrong `top_k`, JAX and ONNX Runtime do not
        agree, or `out` exists.
    """
    torch_template()
    _check_onnx_installed()
    with atomic_directory(out) as new, export_run(workdir) as exported:
        return write_onnx(new, exported, top_k=top_k)


def write_onnx(folder: Path, exported: ExportedRun, *, top_k: int = 0) -> list[ParityReport]:
    """Writes a recogniser as a folder with an ONNX graph.

    Args:
      folder: Empty folder.
      exported: The recogniser; its mesh is set.
      top_k: Number of best classes that the graph gives; 0 for logits.

    Returns:
      Parity check of JAX and the written graph.

    Raises:
      InputError: `top_k` is out of range, or JAX and ONNX Runtime do not agree.
    """
    discontinued = read_class_table(exported.class_table).discontinued
    num_active = int((~discontinued).sum())
    if not 0 <= top_k <= num_active:
        raise InputError(
            f"--top-k {top_k}, wanted 1 to {num_active}, the run's products, or 0 for logits"
        )
    write_graph(folder / ONNX_FILE, exported, top_k=top_k, discontinued=discontinued)
    write_recognizer_config(folder, exported)
    photos = parity_photos()
    expected, actual = exported.outputs(photos), onnx_outputs(folder, photos)
    if top_k:  # the graph gives no logits
        assert expected.logits is not None
        probability = top_k_probabilities(expected.logits, top_k, discontinued)
        expected = dataclasses.replace(expected, logits=probability)
    report = check_parity(expected, actual, label=_LABEL)
    if top_k:
        names = {"logits": "probability"}
        differences = {names.get(name, name): d for name, d in report.differences.items()}
        report = dataclasses.replace(report, differences=differences)
    write_bundle_manifest(folder, [report])
    return [report]


def _check_onnx_installed() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"no {error.name} here to write ONNX; install it: pip install 'sicot_jax[torch,onnx]'"
        ) from error


def write_graph(path: Path, exported: ExportedRun, *, top_k: int, discontinued: np.ndarray) -> None:
    """Writes the ONNX graph of a recogniser with torch's exporter.

    Args:
      path: File to write.
      exported: The recogniser.
      top_k: Number of best classes that the graph gives; 0 for logits.
      discontinued: Classes that are never among them, bool [C].
    """
    import torch

    spec, preprocessing = exported.model, exported.preprocessing
    recognizer = torch_template().SicotRecognizer(
        dataclasses.asdict(spec), dataclasses.asdict(preprocessing), [""] * spec.num_classes
    )
    arrays = {**exported.arrays, **exported.host_class_arrays()}
    load_torch_arrays(recognizer, arrays)
    photos = torch.zeros((2, preprocessing.height, preprocessing.width, 3), dtype=torch.uint8)
    output_names = ["embedding", *(["probability", "class"] if top_k else ["logits"])]
    if spec.localization != "none":
        output_names.append("box")
    num_bytes = sum(array.nbytes for array in arrays.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about itself
        torch.onnx.export(
            _graph_module(recognizer, preprocessing.mean, preprocessing.std, top_k, discontinued),
            (photos,),
            str(path),
            dynamo=True,
            verbose=False,
            input_names=["photos"],
            output_names=output_names,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            external_data=num_bytes > _MAX_GRAPH_BYTES,
        )


def _graph_module(
    recognizer: Any,
    mean: Sequence[float],
    std: Sequence[float],
    top_k: int,
    discontinued: np.ndarray,
) -> Any:
    """Returns a torch module from uint8 photos to the outputs of the graph."""
    import torch

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recognizer = recognizer
            self.discontinued = torch.tensor(discontinued)
            self.mean, self.std = (torch.tensor(x).reshape(3, 1, 1) for x in (mean, std))

        def forward(self, photos: torch.Tensor) -> tuple[torch.Tensor, ...]:
            images = (photos.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
            embedding, box = recognizer.embed_and_localize(images)
            boxes = [] if box is None else [box]
            logits = recognizer.fc(embedding)
            if not top_k:
                return embedding, logits, *boxes
            logits = logits.masked_fill(self.discontinued, -torch.inf)
            probability, classes = logits.softmax(-1).topk(top_k)
            return embedding, probability, classes, *boxes

    return Graph().eval()


def onnx_outputs(folder: Path, photos: Sequence[np.ndarray]) -> ModelOutputs:
    """Runs the graph of a folder with ONNX Runtime, once for one photo and once for all.

    Args:
      folder: Folder of `write_onnx`.
      photos: Uint8 photos [H, W, 3] of any size.

    Returns:
      Embeddings, logits and boxes. Of a graph with `top_k`, in place of logits the probabilities
      of the best classes, 0 for the others.
    """
    import onnxruntime

    bundle = read_bundle_config(folder)
    session = onnxruntime.InferenceSession(
        str(folder / ONNX_FILE), providers=["CPUExecutionProvider"]
    )
    batch = bundle.preprocessing.batch(photos)
    names = [output.name for output in session.get_outputs()]
    all_photos, first_photo = (session.run(names, {"photos": x}) for x in (batch, batch[:1]))
    outputs = {
        name: np.concatenate([first, every[1:]])
        for name, first, every in zip(names, first_photo, all_photos, strict=True)
    }
    if "logits" in outputs:
        return ModelOutputs(**outputs)
    dense = np.zeros((len(batch), bundle.model.num_classes), np.float32)
    np.put_along_axis(dense, outputs["class"], outputs["probability"], 1)
    return ModelOutputs(outputs["embedding"], dense, outputs.get("box"))


def top_k_probabilities(logits: np.ndarray, k: int, discontinued: np.ndarray) -> np.ndarray:
    """Returns the probabilities of the k best classes, 0 for all others.

    Args:
      logits: Float32 [N, C].
      k: Number of classes.
      discontinued: Classes that have no probability, bool [C].

    Returns:
      Softmax over the classes that are not discontinued, float32 [N, C].
    """
    logits = np.where(discontinued, -np.inf, logits)
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    return np.where(probability >= np.sort(probability, 1)[:, -k, None], probability, 0)
