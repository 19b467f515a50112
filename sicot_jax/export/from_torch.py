"""PyTorch weights -> a folder that training starts from (`model.init_from`)."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from sicot_jax.catalog.tokenizer import load_tokenizer
from sicot_jax.common import files
from sicot_jax.common.files import read_json
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.models.resnet import STEMS
from sicot_jax.training import run as runs
from sicot_jax.weights import bundle as folders
from sicot_jax.weights import parity as proof
from sicot_jax.weights import safetensors_io as weights
from sicot_jax.weights import semantic as text
from sicot_jax.weights import torch_names as names
from sicot_jax.weights import visual as network
from sicot_jax.weights.bundle import Model

_WHAT = "PyTorch against JAX"
_CLASSIFIER = ("fc.weight", "fc.bias")


def from_torch(
    path: Path, out: Path, *, stem: str = "", may_be_missing: Sequence[str] = ()
) -> dict[str, Any]:
    """Write the folder `out` from a file of weights, or from a folder of our own `to_torch`;
    returns what was compared.

    A foreign classifier is left behind: its classes are other products. Of our own folder it comes
      along with its class table. `stem` is asked for where a 3x3 first convolution leaves its
      stride open. `may_be_missing`: beginnings of names that need not be there; those arrays have
      the values of a fresh network.
    InputError: no weights, no ResNet, anything missing, unexpected or of another shape, all of it
      listed; `out` exists.
    """
    files.check_not_there(out)
    folder = path if path.is_dir() else path.parent
    own = (folder / folders.MANIFEST).exists() and (path.is_dir() or path.name == folders.WEIGHTS)
    if own:
        folders.check_trainable(folder)
        path = folder
    file = (
        path / folders.WEIGHTS if path.is_dir() else path
    )  # a folder of Hugging Face calls it the same
    found = weights.read_weights(file)
    try:
        found = _renamed(found)
        if own:
            if stem or may_be_missing:
                raise InputError(
                    "a folder of ours is whole and tells its stem; leave --stem and --may-miss out"
                )
            stored = folders.read_config(path)
            model, preprocessing, read = stored.model, stored.preprocessing, stored.text
        else:
            found = {name: array for name, array in found.items() if name not in _CLASSIFIER}
            model, preprocessing, read = _model(found, stem), preprocessing_beside(file), None
        arrays = _checked(model, found, may_be_missing)
        if own and model.classes:
            folders.read_classes(path, model)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    photos = proof.fixed_photos()
    recognizer = network.torch_module().SicotRecognizer(
        dataclasses.asdict(model), dataclasses.asdict(preprocessing), [""] * model.classes
    )
    network.load_into(recognizer, arrays)
    proved = proof.prove(
        network.outputs_in_torch(recognizer, photos),
        network.outputs_here(model, preprocessing, arrays, photos),
        what=_WHAT,
    )
    with files.atomic_directory(out) as new:
        weights.write_weights(new / folders.WEIGHTS, arrays)
        if own and model.classes:
            shutil.copy(path / folders.CLASSES, new / folders.CLASSES)
        shutil.copy(Path(network.torch_module().__file__), new / "model.py")
        source = {"from": path.name, "sha256": files.file_sha256(file)}
        if read is not None:
            read = _with_vocabulary(path, new, read)
        folders.write_config(new, model, preprocessing, source, read)
        proofs = {_WHAT: proved}
        if read is not None:
            proofs[text.WHAT] = _with_text(path, new, read)
        folders.write_manifest(new, proofs)
    return proofs


def _with_vocabulary(path: Path, new: Path, read: folders.Text) -> folders.Text:
    """Copy the vocabulary; the text as it is then, for words may have changed."""
    tokenizer = load_tokenizer(path)
    for name in text.TOKENIZER_FILES:
        if (path / name).exists():
            shutil.copy(path / name, new / name)
    return dataclasses.replace(read, vocabulary=runs.vocabulary_hash(tokenizer))


def _with_text(path: Path, new: Path, read: folders.Text) -> dict[str, Any]:
    """Take our own semantic stream in again."""
    arrays, wanted = (
        weights.read_weights(path / folders.TEXT),
        text.shapes_of(read, load_tokenizer(new).vocabulary),
    )
    if faults := names.mismatches({name: array.shape for name, array in arrays.items()}, wanted):
        raise InputError(
            f"{path / folders.TEXT}: not the arrays of its config.json: {faults}; export again"
        )
    return text.write_text(new, read, arrays)


def _renamed(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed: dict[str, np.ndarray] = {}
    for name, to in names.torchvision_names(arrays).items():
        if to in renamed:
            raise InputError(
                f"two arrays for {to}, one of them {name}; wanted one; remove the other"
            )
        renamed[to] = arrays[name]
    return renamed


def _model(found: dict[str, np.ndarray], stem: str) -> Model:
    backbone = names.backbone_of({name: array.shape for name, array in found.items()})
    fitting = [name for name, (size, _) in STEMS.items() if size == backbone.kernel]
    if stem not in (fitting if len(fitting) > 1 else ("", *fitting)):
        raise InputError(
            f"stem={stem!r}, and the first convolution is {backbone.kernel}x{backbone.kernel}: wanted "
            f"{' or '.join(fitting) or 'weights with a 7x7 or 3x3 one'}; give --stem"
        )
    return Model(
        backbone.depth,
        backbone.width,
        stem or fitting[0],
        last_stride=2,
        embedding_width=0,
        classes=0,
    )


def _checked(
    model: Model, found: dict[str, np.ndarray], may_be_missing: Sequence[str]
) -> dict[str, np.ndarray]:
    """All arrays of the model, those that may be missing from a fresh one."""
    stream = network.fresh_stream(model)
    _, *trees = nnx.split(stream, nnx.Param, nnx.BatchStat)
    fresh = network.arrays_of(*map(nnx.to_pure_dict, trees))
    wanted: dict[str, tuple[int, ...]] = {name: array.shape for name, array in fresh.items()}
    if model.classes:
        wanted |= {"fc.weight": (model.classes, stream.embedding_width), "fc.bias": (model.classes,)}
    shapes = {name: array.shape for name, array in found.items()}
    if "" in may_be_missing:
        raise InputError("--may-miss '' would let anything be missing; name beginnings of names")
    if faults := names.mismatches(shapes, wanted, may_be_missing=may_be_missing):
        raise InputError(
            f"not the arrays of this ResNet-{model.depth}: {faults}; name what may be missing with --may-miss"
        )
    return fresh | found


_CROP = 0.875  # of a resized photo's side, the usual share


def preprocessing_beside(file: Path) -> Preprocessing:
    """How the weights' photos were prepared, as files beside them say (Hugging Face, timm); else as
    for ImageNet.

    Mean, deviation, side, and the share of the side that is cut out; resizing is bilinear here,
    whatever it was there.
    InputError: a network of another kind than torchvision's, of the same arrays; files that cannot
      be read.
    """
    stored: dict[str, Any] = {}
    try:
        for name in ("config.json", "preprocessor_config.json"):
            if (beside := file.parent / name).exists():
                found = read_json(beside, "the config of a model or of its photos, as JSON")
                stored |= found.get("pretrained_cfg") or found
        _check_kind(stored)
        fields: dict[str, Any] = {}
        for wanted, *theirs in (("mean", "image_mean", "mean"), ("std", "image_std", "std")):
            if name := next((name for name in theirs if stored.get(name) is not None), ""):
                fields[wanted] = tuple(float(x) for x in stored[name])
        if stored.get("do_normalize") is False:
            fields |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        if side := _side(stored):
            resized = round(side / float(stored.get("crop_pct") or _CROP))
            fields |= dict.fromkeys(("height", "width"), side) | dict.fromkeys(
                ("resize_height", "resize_width"), resized
            )
        return Preprocessing(**fields)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{file.parent}: its config of photos is not as usual ({error}); give the weights alone"
        ) from error


def _side(stored: dict[str, Any]) -> int:
    """Pixels a side of a square input; 0 where nothing tells it."""
    size = stored.get("crop_size") or stored.get("size") or stored.get("input_size") or 0
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height") or 0
    return int(size[-1] if isinstance(size, list) else size)


def _check_kind(stored: dict[str, Any]) -> None:
    """The same arrays may be another network's: what is known to differ is refused."""
    odd = {
        name: stored[name]
        for name in ("downsample_in_bottleneck", "downsample_in_first_stage")
        if stored.get(name)
    }
    if stored.get("hidden_act", "relu") != "relu":
        odd["hidden_act"] = stored["hidden_act"]
    if odd:
        told = ", ".join(f"{name}={value}" for name, value in odd.items())
        raise InputError(
            f"another ResNet than torchvision's ({told}); wanted one with none of these"
        )
