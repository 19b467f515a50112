"""A finished run -> an ONNX graph that takes photos of the right size as bytes."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.catalog.sources.tables import read_class_table
from sicot_jax.common import files
from sicot_jax.errors import InputError
from sicot_jax.export.from_run import Exported, exported
from sicot_jax.weights import bundle as folders
from sicot_jax.weights import parity as proof
from sicot_jax.weights import visual as network
from sicot_jax.weights.parity import Outputs

_WHAT = "JAX against ONNX Runtime"
_LARGEST_GRAPH = 1_500_000_000  # bytes of weights inside the file; protobuf ends at 2 GiB


def to_onnx(workdir: Path, out: Path, *, top_k: int = 0) -> dict[str, Any]:
    """Write the folder `out` with a graph: "photos" uint8 [batch, height, width, 3] -> "embedding"
    [batch, D] and "logits" [batch, C], or with `top_k` "probability" and "class" [batch, top_k] of
    products that are not discontinued; and "box" [batch, 4] where the model has a box branch. Returns
    what was compared.

    Photos are resized and cropped before (`Preprocessing`), and normalised in the graph. Needs the
    extras torch and onnx.
    """
    network.torch_module()
    _import_onnx()
    with files.atomic_directory(out) as new, exported(workdir) as found:
        return write_onnx(new, found, top_k=top_k)


def write_onnx(new: Path, found: Exported, *, top_k: int = 0) -> dict[str, Any]:
    """All of such a folder into the empty one `new`; under the mesh of `exported`."""
    discontinued = read_class_table(found.class_table).discontinued
    offered = int((~discontinued).sum())
    if not 0 <= top_k <= offered:
        raise InputError(
            f"--top-k {top_k}, wanted 1 to {offered}, the run's products, or 0 for logits"
        )
    _export(network.torch_module(), found, new / folders.GRAPH, top_k, discontinued)
    folders.write_config(new, found.model, found.preprocessing, found.source)
    shutil.copy(found.class_table, new / folders.CLASSES)
    photos = proof.fixed_photos()
    here, there = found.outputs(photos), graph_outputs(new, photos)
    if top_k:  # the graph keeps its logits to itself
        here = dataclasses.replace(here, logits=best_probabilities(here.logits, top_k, discontinued))
    proofs = {_WHAT: proof.prove(here, there, what=_WHAT)}
    if top_k:
        proofs[_WHAT]["probability"] = proofs[_WHAT].pop("logits")
    folders.write_manifest(new, proofs)
    return proofs


def _import_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"no {error.name} here to write ONNX; install it: pip install 'sicot_jax[torch,onnx]'"
        ) from error


def _export(module: Any, found: Exported, path: Path, top_k: int, discontinued: np.ndarray) -> None:
    import torch

    model, preprocessing = dataclasses.asdict(found.model), found.preprocessing
    recognizer = module.SicotRecognizer(
        model, dataclasses.asdict(preprocessing), [""] * found.model.classes
    )
    kernel, bias = (
        np.asarray(x)[: found.model.classes]
        for x in (found.classifier.kernel, found.classifier.bias)
    )
    network.load_into(recognizer, {**found.arrays, "fc.weight": kernel, "fc.bias": bias})

    class Graph(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.recognizer = recognizer
            self.discontinued = torch.tensor(discontinued)
            self.mean, self.std = (
                torch.tensor(x).reshape(3, 1, 1) for x in (preprocessing.mean, preprocessing.std)
            )

        def forward(self, photos):
            images = (photos.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
            embedding, box = recognizer.look(images)
            found = [] if box is None else [box]
            logits = recognizer.fc(embedding)
            if not top_k:
                return embedding, logits, *found
            probability, classes = (
                logits.masked_fill(self.discontinued, -torch.inf).softmax(-1).topk(top_k)
            )
            return embedding, probability, classes, *found

    boxes = [] if found.model.box == "none" else ["box"]
    photos = torch.zeros((2, preprocessing.height, preprocessing.width, 3), dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter about itself
        torch.onnx.export(
            Graph().eval(),
            (photos,),
            str(path),
            dynamo=True,
            verbose=False,
            input_names=["photos"],
            output_names=[
                "embedding",
                *(["probability", "class"] if top_k else ["logits"]),
                *boxes,
            ],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            external_data=kernel.nbytes + sum(array.nbytes for array in found.arrays.values())
            > _LARGEST_GRAPH,
        )


def graph_outputs(folder: Path, photos: Sequence[np.ndarray]) -> Outputs:
    """By ONNX Runtime, one photo alone and all at once; in place of logits the probabilities of a
    graph's best classes, 0 for the others, where it gives those.
    """
    import onnxruntime

    stored = folders.read_config(folder)
    preprocessing = stored.preprocessing
    session = onnxruntime.InferenceSession(
        str(folder / folders.GRAPH), providers=["CPUExecutionProvider"]
    )
    batch = preprocessing.batch(photos)
    names = [output.name for output in session.get_outputs()]
    whole, first = (session.run(names, {"photos": photos}) for photos in (batch, batch[:1]))
    found = {
        name: np.concatenate([b, a[1:]]) for name, a, b in zip(names, whole, first, strict=True)
    }
    if "logits" in found:
        return Outputs(**found)
    dense = np.zeros((len(batch), stored.model.classes), np.float32)
    np.put_along_axis(dense, found["class"], found["probability"], 1)
    return Outputs(found["embedding"], dense, found.get("box"))


def best_probabilities(logits: np.ndarray | None, k: int, discontinued: np.ndarray) -> np.ndarray:
    """Softmax of logits [N, C] over the classes that are not discontinued (bool [C]), where among a
    row's k largest, else 0.
    """
    assert logits is not None
    logits = np.where(discontinued, -np.inf, logits)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    return np.where(shares >= np.sort(shares, 1)[:, -k, None], shares, 0)
