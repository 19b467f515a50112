"""Converts the visual stream between our parameter trees and torch arrays, and runs both sides."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sicot_jax.classifier.class_weights import BIAS_NAME, KERNEL_NAME
from sicot_jax.common.trees import path_name
from sicot_jax.config import ModelConfig
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.models.localization import clip_box
from sicot_jax.models.visual_stream import VisualStream
from sicot_jax.parallel import mesh
from sicot_jax.weights import torch_names
from sicot_jax.weights.bundle import RecognizerSpec
from sicot_jax.weights.parity import ModelOutputs, concatenate_outputs
from sicot_jax.weights.safetensors_io import import_torch

TorchArrays = Mapping[str, np.ndarray]  # by torch's names, in torch's layout


def visual_array_name(path: str) -> str | None:
    """Returns the torch name of an array of the visual stream.

    Args:
      path: Path below "visual", such as "resnet/conv1/kernel".

    Returns:
      The name, such as "conv1.weight"; None for tag and code heads, which are used in training
      alone.
    """
    module, _, rest = path.partition("/")
    if module == "resnet":
        return torch_names.backbone_array_name(rest)
    if module == "projection":
        return "projection.weight"
    if module == "localization":
        return torch_names.localization_array_name(rest)
    if module == "projection_norm":
        return f"projection_norm.{torch_names.BATCH_NORM_PARTS[rest]}"
    return None


def visual_to_torch(params: Any, batch_stats: Any) -> dict[str, np.ndarray]:
    """Returns the visual stream's arrays by torch's names and in torch's layout.

    Args:
      params: Tree of its parameters.
      batch_stats: Tree of its batch norm statistics.

    Returns:
      Name -> array on the host, float32.
    """
    return {
        name: torch_names.to_torch_layout(np.asarray(leaf))
        for tree in (params, batch_stats)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if (name := visual_array_name(path_name(path))) is not None
    }


def visual_from_torch(tree: Any, arrays: TorchArrays) -> Any:
    """Replaces leaves of a tree by torch arrays; shapes are not checked.

    Args:
      tree: Parameters or batch norm statistics of a visual stream.
      arrays: Arrays by torch's names.

    Returns:
      The tree; leaves that `arrays` does not have are kept.
    """

    def replace(path: Any, leaf: Any) -> Any:
        name = visual_array_name(path_name(path))
        if name is None or name not in arrays:
            return leaf
        return jnp.asarray(torch_names.from_torch_layout(arrays[name]))

    return jax.tree_util.tree_map_with_path(replace, tree)


def visual_shapes(params: Any, batch_stats: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the visual stream's arrays in torch's layout.

    Args:
      params: Tree of its parameters, or of their shapes.
      batch_stats: Tree of its batch norm statistics, or of their shapes.

    Returns:
      Torch's name -> shape.
    """
    empty = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), (params, batch_stats)
    )
    return {name: array.shape for name, array in visual_to_torch(*empty).items()}


def init_visual_stream(spec: RecognizerSpec, *, seed: int = 0) -> VisualStream:
    """Builds a visual stream with initial values.

    Args:
      spec: Its architecture.
      seed: Seed of the initial values.

    Returns:
      The stream, float32.
    """
    names = [f.name for f in dataclasses.fields(RecognizerSpec) if f.name != "num_classes"]
    config = ModelConfig(**{name: getattr(spec, name) for name in names})
    return VisualStream(config, dtype=jnp.float32, rng=np.random.default_rng(seed))


def visual_outputs_jax(
    spec: RecognizerSpec,
    preprocessing: Preprocessing,
    arrays: TorchArrays,
    photos: Sequence[np.ndarray],
) -> ModelOutputs:
    """Runs the visual stream in JAX with float32 matrix products.

    Args:
      spec: Architecture.
      preprocessing: How a photo becomes input.
      arrays: Weights by torch's names, the classifier as "fc.weight" and "fc.bias".
      photos: Uint8 photos [H, W, 3] of any size.

    Returns:
      Embeddings, logits and boxes.
    """
    graphdef, *trees = nnx.split(
        nnx.eval_shape(lambda: init_visual_stream(spec)), nnx.Param, nnx.BatchStat
    )

    # The weights are arguments: a program would hold arrays that it closes over as constants.
    @jax.jit
    def forward(trees: Any, image: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        stream = nnx.merge(graphdef, *trees, copy=True)
        embedding, box = stream.embed_and_localize(preprocessing.normalize(image), train=False)
        return embedding, clip_box(box)

    batch = preprocessing.batch(photos)
    # On several devices each would hold a copy of everything.
    single_device = mesh.make_mesh(devices=jax.local_devices()[:1])
    with jax.default_matmul_precision("highest"), jax.set_mesh(single_device):
        filled = [visual_from_torch(nnx.to_pure_dict(tree), arrays) for tree in trees]
        embedding, box = jax.tree.map(np.asarray, forward(filled, batch))
    logits = embedding @ arrays[KERNEL_NAME].T + arrays[BIAS_NAME] if spec.num_classes else None
    return ModelOutputs(embedding, logits, box)


def torch_template() -> ModuleType:
    """Imports the stand-alone PyTorch module that is copied into bundles as `model.py`.

    Returns:
      The module `weights.templates.torch_model`.

    Raises:
      InputError: PyTorch is not installed.
    """
    import_torch("convert")
    from sicot_jax.weights.templates import torch_model

    return torch_model


def visual_outputs_torch(recognizer: Any, photos: Sequence[np.ndarray]) -> ModelOutputs:
    """Runs a PyTorch recogniser with its preprocessing.

    Args:
      recognizer: A `SicotRecognizer` with weights.
      photos: Uint8 photos [H, W, 3] of any size.

    Returns:
      Embeddings, logits and boxes.
    """
    import torch

    outputs = []
    with torch.inference_mode():
        for photo in photos:
            image = recognizer.preprocess(photo)[None]
            embedding, box = recognizer.embed_and_localize(image)
            logits = recognizer.fc(embedding).numpy() if recognizer.fc is not None else None
            box = None if box is None else box.numpy()
            outputs.append(ModelOutputs(embedding.numpy(), logits, box))
    return concatenate_outputs(outputs)


def load_module(path: Path) -> ModuleType:
    """Imports a Python file as a separate module.

    Args:
      path: The file.

    Returns:
      The module.
    """
    spec = importlib.util.spec_from_file_location(f"exported_{abs(hash(path))}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_torch_arrays(recognizer: Any, arrays: Mapping[str, Any]) -> None:
    """Loads all weights into a PyTorch recogniser and switches it to evaluation.

    Args:
      recognizer: A `SicotRecognizer`.
      arrays: Its arrays or tensors by name; all but the batch counters.
    """
    import torch

    counters = {
        name: tensor
        for name, tensor in recognizer.state_dict().items()
        if name.endswith(".num_batches_tracked")
    }
    tensors = {
        name: array if isinstance(array, torch.Tensor) else torch.from_numpy(np.array(array))
        for name, array in arrays.items()
    }
    recognizer.load_state_dict(tensors | counters)
    recognizer.eval()
