"""Weights that a training starts from (`model.init_from`): those of a run or a converted folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.catalog.catalog import Catalog
from sicot_jax.classifier.class_weights import BIAS_NAME, KERNEL_NAME, ClassWeights
from sicot_jax.config import Config, ConfigError
from sicot_jax.parallel import distributed, mesh
from sicot_jax.training.checkpoint import CheckpointError
from sicot_jax.training.provenance import class_table_hash
from sicot_jax.training.restore import restore_params
from sicot_jax.training.run import read_run
from sicot_jax.training.setup import Setup
from sicot_jax.training.state import TrainState
from sicot_jax.weights.bundle import (
    TEXT_WEIGHTS_FILE,
    WEIGHTS_FILE,
    WeightsBundle,
    check_trainable,
    is_bundle,
    read_bundle,
    read_bundle_classes,
    read_bundle_config,
)
from sicot_jax.weights.safetensors_io import SAFETENSORS_SUFFIXES, TORCH_SUFFIXES
from sicot_jax.weights.semantic import semantic_from_torch, semantic_to_torch
from sicot_jax.weights.torch_names import describe_mismatches
from sicot_jax.weights.visual import visual_from_torch, visual_shapes

_WEIGHTS_SUFFIXES = SAFETENSORS_SUFFIXES + TORCH_SUFFIXES
_MAX_MESSAGE = 600  # characters of a list of differences


@dataclasses.dataclass(frozen=True)
class PretrainedWeights:
    """What a training can start from.

    Attributes:
      source: name of the weights in messages, "model.init_from=PATH".
      params: parameters by stream, on the devices.
      batch_stats: batch statistics by stream, likewise.
      class_weights: rows divided over devices; None without a classifier.
      skus: product of each row; empty without a classifier.
      vocabulary_hash: hash of its token ids, see `provenance.vocabulary_hash`; "" without words.
      shares_word_weights: whether the rows end in shares of words.
    """

    source: str
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    class_weights: ClassWeights | None
    skus: Sequence[str]
    vocabulary_hash: str
    shares_word_weights: bool


def check_source(config: Config) -> None:
    """Checks `model.init_from` before anything is compiled.

    Strides and stem may differ (a last stride of 1 is often put on weights of 2); that is printed.

    Args:
      config: the run's config.

    Raises:
      InputError: nothing to start from.
      ConfigError: its photos were normalized otherwise.
    """
    path = Path(config.model.init_from)
    source = f"model.init_from={path}"
    _check_converted(path, source)
    if is_bundle(path):
        check_trainable(path)
        before: Any = read_bundle_config(path)
    else:
        before = read_run(path).config
    for name in ("mean", "std"):
        old, new = getattr(before.preprocessing, name), getattr(config.preprocessing, name)
        if not np.allclose(old, new, atol=1e-6):
            raise ConfigError(
                f"{source}: its photos had preprocessing.{name}={old}, the config has {new}; set "
                f"--config.preprocessing.{name}={','.join(map(str, old))}"
            )
    for name in ("stem", "last_stride"):
        old, new = getattr(before.model, name), getattr(config.model, name)
        if old != new:
            distributed.print_primary(
                f"{source}: trained with model.{name}={old}, goes on with {new}"
            )


def _check_converted(path: Path, source: str) -> None:
    """Refuses weights of other programs, as a file or a folder of Hugging Face or timm."""
    if is_bundle(path):
        return
    entries = path.iterdir() if path.is_dir() else [path]  # a run has no weights at its top
    if any(entry.is_file() and entry.suffix in _WEIGHTS_SUFFIXES for entry in entries):
        raise ConfigError(
            f"{source}: weights of PyTorch, wanted a run or converted weights; convert them: "
            f"`sicot convert from-torch {path} --out=DIR`, then --config.model.init_from=DIR"
        )


def read_pretrained(state: TrainState, setup: Setup, catalog: Catalog) -> PretrainedWeights:
    """Reads the weights of `model.init_from`.

    Args:
      state: initial state of the new run; parts that converted weights lack are taken from it.
      setup: setup of the new run.
      catalog: catalogue of the new run.

    Returns:
      The weights, on the setup's devices.

    Raises:
      CheckpointError: converted weights of another network, or no readable checkpoint.
    """
    path = Path(setup.config.model.init_from)
    source = f"model.init_from={path}"
    if is_bundle(path):
        return _read_bundle(path, source, state, setup)
    return _read_run(path, source, setup, catalog)


def _read_run(path: Path, source: str, setup: Setup, catalog: Catalog) -> PretrainedWeights:
    run = read_run(path)
    model = restore_params(run, setup.mesh, allow_unfinished=True)
    if model.trained_steps < run.total_steps():
        distributed.print_primary(
            f"{source}: a run trained for {model.trained_steps} of {run.total_steps()} steps"
        )
    is_same_table = run.class_table_hash == class_table_hash(catalog)
    return PretrainedWeights(
        source=source,
        params=model.params,
        batch_stats=model.batch_stats,
        class_weights=model.classifier.weights,
        skus=catalog.classes.sku if is_same_table else run.class_table().sku,
        vocabulary_hash=run.vocabulary_hash,
        shares_word_weights=run.config.model.shared_word_weights,
    )


def _read_bundle(path: Path, source: str, state: TrainState, setup: Setup) -> PretrainedWeights:
    bundle = read_bundle(path)
    visual, class_weights = _read_visual(bundle, source, state, setup)
    streams, vocabulary_hash = {"visual": visual}, ""
    if bundle.text is not None and "semantic" in state.params:
        streams["semantic"] = _read_semantic(path, source, state, setup)
        vocabulary_hash = bundle.text.vocabulary
    return PretrainedWeights(
        source=source,
        params={name: params for name, (params, _) in streams.items()},
        batch_stats={name: stats for name, (_, stats) in streams.items()},
        class_weights=class_weights,
        skus=read_bundle_classes(bundle).sku if class_weights is not None else [],
        vocabulary_hash=vocabulary_hash,
        shares_word_weights=False,
    )


def _read_visual(
    bundle: WeightsBundle, source: str, state: TrainState, setup: Setup
) -> tuple[Any, ClassWeights | None]:
    """(parameters, batch statistics) of the visual stream, and the class weights.

    A projection or localization branch that the weights lack stays as it is; a localization branch
    that the model lacks is left out.
    """
    import safetensors

    model, config = bundle.model, setup.config.model
    trees = state.params["visual"], state.batch_stats["visual"]
    with safetensors.safe_open(bundle.folder / WEIGHTS_FILE, framework="numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        class_shapes = {
            name: shapes.pop(name) for name in (KERNEL_NAME, BIAS_NAME) if name in shapes
        }
        wanted = visual_shapes(*trees)
        if not model.embedding_width:
            wanted = _without(wanted, "projection")
        if "none" in (model.localization, config.localization):
            shapes, wanted = (_without(names, "localization.") for names in (shapes, wanted))
        if faults := describe_mismatches(shapes, wanted):
            raise CheckpointError(
                f"{source}: a ResNet-{model.depth} of width {model.width}, and "
                f"model.depth={config.depth}, model.width={config.width} want other arrays: "
                f"{faults[:_MAX_MESSAGE]}"
            )
        arrays = {name: file.get_tensor(name) for name in shapes}
        visual = mesh.replicate_tree(
            [visual_from_torch(tree, arrays) for tree in trees], setup.mesh
        )
        if not class_shapes:
            return visual, None
        rows = {
            name: mesh.shard_rows(shape, file.get_slice(name), setup.mesh)
            for name, shape in class_shapes.items()
        }
    return visual, ClassWeights.from_named_arrays(rows)


def _without(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}


def _read_semantic(path: Path, source: str, state: TrainState, setup: Setup) -> Any:
    """(parameters, batch statistics) of the semantic stream; words may be another vocabulary's."""
    import safetensors.numpy

    arrays = safetensors.numpy.load_file(path / TEXT_WEIGHTS_FILE)
    trees = state.params["semantic"], state.batch_stats["semantic"]
    shapes, wanted = (
        {name: array.shape for name, array in named.items() if name != "words.weight"}
        for named in (arrays, semantic_to_torch(*trees))
    )
    if faults := describe_mismatches(shapes, wanted):
        raise CheckpointError(
            f"{source}: another semantic stream than model.text asks for: {faults[:_MAX_MESSAGE]}"
        )
    return mesh.replicate_tree([semantic_from_torch(tree, arrays) for tree in trees], setup.mesh)
