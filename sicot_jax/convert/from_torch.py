"""PyTorch weights -> a folder that training starts from (`model.init_from`)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from sicot_jax.catalog.text import load_tokenizer
from sicot_jax.convert import folder as folders
from sicot_jax.convert import names, network, proof, text, weights
from sicot_jax.convert.folder import Model
from sicot_jax.errors import InputError
from sicot_jax.models.resnet import STEMS
from sicot_jax.preprocessing import Preprocessing

_CLASSIFIER = ("fc.weight", "fc.bias")


def from_torch(path: Path, out: Path, *, stem: str = "", may_be_missing: Sequence[str] = ()) -> dict[str, Any]:
    """Write the folder `out` from a file of weights, or from a folder of our own `to_torch`; returns what was compared.

    A foreign classifier is left behind: its classes are other products. Of our own folder it comes along with its class
    table. `stem` is asked for where a 3x3 first convolution leaves its stride open. `may_be_missing`: beginnings of names
    that need not be there; those arrays have the values of a fresh network.
    InputError: no weights, no ResNet, anything missing, unexpected or of another shape, all of it listed; `out` exists.
    """
    if out.exists():
        raise InputError(f"{out} exists; give another --out, or remove it")
    own = path.is_dir()
    file = path / folders.WEIGHTS if own else path
    found = _renamed(weights.read_weights(file))
    try:
        if own:
            stored = folders.read_config(path)
            model, preprocessing, read = stored.model, stored.preprocessing, stored.text
        else:
            found = {name: array for name, array in found.items() if name not in _CLASSIFIER}
            model, preprocessing, read = _model(found, stem), _preprocessing_beside(path), None
        arrays = _checked(model, found, may_be_missing)
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
        what="PyTorch against JAX",
    )
    with folders.new_folder(out) as new:
        with (new / folders.WEIGHTS).open("wb") as written:
            weights.write_safetensors(
                written, {name: weights.whole(a) for name, a in sorted(arrays.items())}, metadata={}
            )
        if own and model.classes:
            shutil.copy(path / folders.CLASSES, new / folders.CLASSES)
        source = {"from": path.name, "sha256": folders.file_sha256(file)}
        folders.write_config(new, model, preprocessing, source, read)
        proofs = {"PyTorch against JAX": proved}
        if read is not None:
            proofs[text.WHAT] = _with_text(path, new, read)
        folders.write_manifest(new, proofs)
    return proofs


def _with_text(path: Path, new: Path, read: folders.Text) -> dict[str, Any]:
    """Take our own semantic stream in again."""
    for name in text.TOKENIZER_FILES:
        if (path / name).exists():
            shutil.copy(path / name, new / name)
    arrays, wanted = weights.read_weights(path / folders.TEXT), text.shapes_of(read, load_tokenizer(new).vocabulary)
    if faults := names.mismatches({name: array.shape for name, array in arrays.items()}, wanted):
        raise InputError(f"{path / folders.TEXT}: not the arrays of its config.json: {faults}; export again")
    return text.write_text(new, read, arrays)


def _renamed(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = names.torchvision_names(arrays)
    return {renamed[name]: array for name, array in arrays.items() if name in renamed}


def _model(found: dict[str, np.ndarray], stem: str) -> Model:
    backbone = names.backbone_of({name: array.shape for name, array in found.items()})
    fitting = [name for name, (size, _) in STEMS.items() if size == backbone.kernel]
    if stem not in (fitting if len(fitting) > 1 else ("", *fitting)):
        raise InputError(
            f"stem={stem!r}, and the first convolution is {backbone.kernel}x{backbone.kernel}: wanted "
            f"{' or '.join(fitting) or 'weights with a 7x7 or 3x3 one'}; give --stem"
        )
    return Model(backbone.depth, backbone.width, stem or fitting[0], last_stride=2, embedding_width=0, classes=0)


def _checked(model: Model, found: dict[str, np.ndarray], may_be_missing: Sequence[str]) -> dict[str, np.ndarray]:
    """All arrays of the model, those that may be missing from a fresh one."""
    stream = network.fresh_stream(model)
    _, *trees = nnx.split(stream, nnx.Param, nnx.BatchStat)
    fresh = network.arrays_of(*map(nnx.to_pure_dict, trees))
    wanted: dict[str, tuple[int, ...]] = {name: array.shape for name, array in fresh.items()}
    if model.classes:
        wanted |= {"fc.weight": (model.classes, stream.features_width), "fc.bias": (model.classes,)}
    shapes = {name: array.shape for name, array in found.items()}
    if faults := names.mismatches(shapes, wanted, may_be_missing=may_be_missing):
        raise InputError(
            f"not the arrays of this ResNet-{model.depth}: {faults}; name what may be missing with --may-miss"
        )
    return fresh | found


def _preprocessing_beside(path: Path) -> Preprocessing:
    """How the weights' photos were prepared, as files beside them say (Hugging Face, timm); else as for ImageNet."""
    fields: dict[str, Any] = {}
    beside = {"preprocessor_config.json": ("image_mean", "image_std"), "config.json": ("mean", "std")}
    for name, (mean, std) in beside.items():
        if (path.parent / name).exists():
            stored = json.loads((path.parent / name).read_text())
            stored = stored.get("pretrained_cfg", stored)
            if mean in stored and std in stored:
                fields = {"mean": tuple(stored[mean]), "std": tuple(stored[std])}
                break
    return Preprocessing(**fields)
