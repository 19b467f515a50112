"""The visual stream between our trees of arrays and torchvision's names, and run on both sides."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sicot_jax.common.trees import path_name
from sicot_jax.config import ModelConfig
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.models.localization import clip_box
from sicot_jax.models.visual_stream import VisualStream
from sicot_jax.parallel import mesh
from sicot_jax.weights import torch_names as names
from sicot_jax.weights.bundle import Model
from sicot_jax.weights.parity import Outputs, stacked
from sicot_jax.weights.safetensors_io import import_torch

Arrays = Mapping[str, np.ndarray]


def array_name(path: str) -> str | None:
    """ "resnet/conv1/kernel" (below "visual") -> "conv1.weight"; None for word scores and codes,
    which no recogniser has.
    """
    room, _, rest = path.partition("/")
    if room == "resnet":
        return names.torchvision_name(rest)
    if room == "projection":
        return "projection.weight"
    if room == "localization":
        return names.box_name(rest)
    return f"projection_norm.{names.PARTS[rest]}" if room == "projection_norm" else None


def arrays_of(params: Any, batch_stats: Any) -> dict[str, np.ndarray]:
    """The visual stream's arrays in torch's names and layout, on the host."""
    return {
        name: names.to_torch_layout(np.asarray(leaf))
        for tree in (params, batch_stats)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if (name := array_name(path_name(path))) is not None
    }


def shapes_of(params: Any, batch_stats: Any) -> dict[str, tuple[int, ...]]:
    """Torch's name -> shape, of trees of arrays or of their shapes."""
    empty = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), (params, batch_stats)
    )
    return {name: array.shape for name, array in arrays_of(*empty).items()}


def filled(tree: Any, arrays: Arrays) -> Any:
    """A tree of params or batch statistics with every array that `arrays` has; others stay. Shapes
    are not checked.
    """

    def fill(path, leaf):
        name = array_name(path_name(path))
        return (
            leaf
            if name is None or name not in arrays
            else jnp.asarray(names.from_torch_layout(arrays[name]))
        )

    return jax.tree_util.tree_map_with_path(fill, tree)


def fresh_stream(model: Model, *, seed: int = 0) -> VisualStream:
    """A visual stream of that kind with starting values."""
    fields = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(Model)
        if field.name != "classes"
    }
    return VisualStream(ModelConfig(**fields), dtype=jnp.float32, rng=np.random.default_rng(seed))


def outputs_here(
    model: Model, preprocessing: Preprocessing, arrays: Arrays, photos: Sequence[np.ndarray]
) -> Outputs:
    """What our own code finds in photos, in float32; `arrays` in torch's names, "fc." is the
    classifier.
    """
    graphdef, *trees = nnx.split(
        nnx.eval_shape(lambda: fresh_stream(model)), nnx.Param, nnx.BatchStat
    )

    @jax.jit
    def look(
        trees, image
    ):  # arrays that a program closes over become a part of it, and of what is compiled
        stream = nnx.merge(graphdef, *trees, copy=True)
        embedding, box = stream.embed_and_localize(preprocessing.normalise(image), train=False)
        return embedding, clip_box(box)

    batch = preprocessing.batch(photos)
    alone = mesh.make_mesh(
        devices=jax.local_devices()[:1]
    )  # on several each would have its copy of everything
    with jax.default_matmul_precision("highest"), jax.set_mesh(alone):
        found = look([filled(nnx.to_pure_dict(tree), arrays) for tree in trees], batch)
    embedding, box = jax.tree.map(np.asarray, found)
    logits = embedding @ arrays["fc.weight"].T + arrays["fc.bias"] if model.classes else None
    return Outputs(embedding, logits, box)


def torch_module() -> Any:
    """`torch_model.py`. InputError where there is no torch."""
    import_torch("convert")
    from sicot_jax.weights.templates import torch_model

    return torch_model


def outputs_in_torch(recognizer: Any, photos: Sequence[np.ndarray]) -> Outputs:
    """The same by a `SicotRecognizer`, which prepares the photos itself."""
    import torch

    rows = []
    with torch.inference_mode():
        for photo in photos:
            image = recognizer.preprocess(photo)[None]
            embedding, box = recognizer.look(image)
            logits = recognizer.fc(embedding).numpy() if recognizer.fc is not None else None
            rows.append(Outputs(embedding.numpy(), logits, None if box is None else box.numpy()))
    return stacked(rows)


def load_module(path: Path) -> Any:
    """A Python file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"exported_{abs(hash(path))}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_into(recognizer: Any, arrays: Arrays) -> None:
    """Give a `SicotRecognizer` its arrays, all of them, and make it ready to recognise."""
    import torch

    counters = {
        name: x
        for name, x in recognizer.state_dict().items()
        if name.endswith(".num_batches_tracked")
    }
    tensors = {
        name: a if isinstance(a, torch.Tensor) else torch.from_numpy(np.array(a))
        for name, a in arrays.items()
    }
    recognizer.load_state_dict(tensors | counters)
    recognizer.eval()
