"""Converts PyTorch weights of a ResNet to a weights bundle that training starts from."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from sicot_jax.catalog.tokenizer import load_tokenizer
from sicot_jax.classifier.class_weights import BIAS_NAME, KERNEL_NAME
from sicot_jax.common.files import atomic_directory, check_not_there, file_sha256, read_json
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.models.resnet import STEMS
from sicot_jax.training.provenance import vocabulary_hash
from sicot_jax.weights.bundle import (
    CLASS_TABLE_FILE,
    MANIFEST_FILE,
    TEXT_WEIGHTS_FILE,
    WEIGHTS_FILE,
    RecognizerSpec,
    TextEncoderSpec,
    WeightsBundle,
    check_trainable,
    read_bundle_classes,
    read_bundle_config,
    write_bundle_config,
    write_bundle_manifest,
)
from sicot_jax.weights.parity import ParityReport, check_parity, parity_photos
from sicot_jax.weights.safetensors_io import find_weights, read_weights, write_weights
from sicot_jax.weights.semantic import TOKENIZER_FILES, semantic_shapes, write_text_encoder
from sicot_jax.weights.torch_names import (
    describe_mismatches,
    infer_backbone,
    torchvision_names,
)
from sicot_jax.weights.visual import (
    init_visual_stream,
    load_torch_arrays,
    torch_template,
    visual_outputs_jax,
    visual_outputs_torch,
    visual_to_torch,
)

_CROP_SHARE = 0.875  # of a resized photo's side, the usual share for ImageNet


def read_foreign_preprocessing(folder: Path) -> Preprocessing:
    """Reads mean, standard deviation, side and crop share from the files next to some weights.

    Resizing is bilinear, whatever the files say.

    Args:
      folder: Folder with the weights, and maybe `config.json` and `preprocessor_config.json`.

    Returns:
      The preprocessing; what the files do not say is as for ImageNet.

    Raises:
      InputError: The files describe another network than torchvision's with the same arrays, or
        cannot be read.
    """
    stored: dict[str, Any] = {}
    try:
        for name in ("config.json", "preprocessor_config.json"):
            if (path := folder / name).exists():
                content = read_json(path, "the config of a model or of its photos, as JSON")
                stored |= content.get("pretrained_cfg") or content
        _check_network(stored)
        return Preprocessing(**_preprocessing_fields(stored))
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"{folder}: the photos' config has an unknown form ({error}); "
            "give the weights without it"
        ) from error


def _preprocessing_fields(stored: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for field, names in (("mean", ("image_mean", "mean")), ("std", ("image_std", "std"))):
        if name := next((name for name in names if stored.get(name) is not None), ""):
            fields[field] = tuple(float(x) for x in stored[name])
    if stored.get("do_normalize") is False:
        fields |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if side := _input_side(stored):
        resized = round(side / float(stored.get("crop_pct") or _CROP_SHARE))
        fields |= dict.fromkeys(("height", "width"), side)
        fields |= dict.fromkeys(("resize_height", "resize_width"), resized)
    return fields


def _input_side(stored: dict[str, Any]) -> int:
    """Returns the side of a square input in pixels, 0 where the files do not say it."""
    size = stored.get("crop_size") or stored.get("size") or stored.get("input_size") or 0
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height") or 0
    return int(size[-1] if isinstance(size, list) else size)


def _check_network(stored: dict[str, Any]) -> None:
    """Refuses options that change the network but not its arrays."""
    options = {
        name: stored[name]
        for name in ("downsample_in_bottleneck", "downsample_in_first_stage")
        if stored.get(name)
    }
    if stored.get("hidden_act", "relu") != "relu":
        options["hidden_act"] = stored["hidden_act"]
    if options:
        listed = ", ".join(f"{name}={value}" for name, value in options.items())
        raise InputError(
            f"another ResNet than torchvision's ({listed}); wanted one with none of these"
        )


_LABEL = "PyTorch against JAX"
_CLASSIFIER = (KERNEL_NAME, BIAS_NAME)


@dataclasses.dataclass(frozen=True)
class _Imported:
    """What was read: the bundle to write (its folder is where it was read), and its arrays."""

    bundle: WeightsBundle
    arrays: dict[str, np.ndarray]


def from_torch(
    path: Path,
    out: Path,
    *,
    stem: str = "",
    allow_missing: Sequence[str] = (),
    prefix: str = "",
) -> list[ParityReport]:
    """Converts PyTorch weights, or a folder of `to_torch`, to a weights bundle.

    The classifier of a foreign network is left out, because its classes are other products. That of
    a folder of `to_torch` is kept, with its class table.

    Args:
      path: File (.safetensors, .pth), folder of Hugging Face, timm or `to_torch`.
      out: Folder to write, which must not exist.
      stem: Kind of the first convolution, needed where its kernel is 3x3 and its stride unknown.
      allow_missing: Prefixes of names of arrays that need not be there and get initial values.
      prefix: What stands before the names of the ResNet to take, needed where there are several,
        or other arrays beside it.

    Returns:
      Parity checks of PyTorch and JAX.

    Raises:
      InputError: `path` holds no weights of a supported ResNet; arrays are missing, unexpected or
        of another shape (all are listed); PyTorch and JAX do not agree; `out` exists.
    """
    check_not_there(out)
    torch_template()  # fails here without PyTorch, before anything is read
    if is_ours := _is_our_bundle(path):
        path = path if path.is_dir() else path.parent
        check_trainable(path)
    file = find_weights(path)
    arrays = read_weights(file)
    try:
        arrays = _with_torchvision_names(arrays, prefix)
        if is_ours:
            imported = _check_our_bundle(path, arrays, stem, allow_missing)
        else:
            imported = _check_foreign_weights(file, arrays, stem, allow_missing)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    report = _check_visual_parity(imported)
    source = {"from": path.name, "sha256": file_sha256(file)}
    with atomic_directory(out) as new:
        return _write(new, imported, source, report)


def _is_our_bundle(path: Path) -> bool:
    folder = path if path.is_dir() else path.parent
    return (folder / MANIFEST_FILE).exists() and (path.is_dir() or path.name == WEIGHTS_FILE)


def _with_torchvision_names(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    renamed: dict[str, np.ndarray] = {}
    for name, torchvision_name in torchvision_names(arrays, prefix).items():
        if torchvision_name in renamed:
            raise InputError(
                f"two arrays for {torchvision_name}, one of them {name}; wanted one; "
                "remove the other"
            )
        renamed[torchvision_name] = arrays[name]
    return renamed


def _check_our_bundle(
    folder: Path, arrays: dict[str, np.ndarray], stem: str, allow_missing: Sequence[str]
) -> _Imported:
    if stem or allow_missing:
        raise InputError(
            "a folder of `sicot convert` is complete and says its stem; "
            "leave out --stem and --allow-missing"
        )
    bundle = read_bundle_config(folder)
    arrays = _complete_arrays(bundle.model, arrays, ())
    if bundle.model.num_classes:
        read_bundle_classes(bundle)
    return _Imported(bundle, arrays)


def _check_foreign_weights(
    file: Path, arrays: dict[str, np.ndarray], stem: str, allow_missing: Sequence[str]
) -> _Imported:
    arrays = {name: array for name, array in arrays.items() if name not in _CLASSIFIER}
    spec = _infer_spec(arrays, stem)
    preprocessing = read_foreign_preprocessing(file.parent)
    arrays = _complete_arrays(spec, arrays, allow_missing)
    return _Imported(WeightsBundle(file.parent, spec, preprocessing, {}), arrays)


def _infer_spec(arrays: dict[str, np.ndarray], stem: str) -> RecognizerSpec:
    backbone = infer_backbone({name: array.shape for name, array in arrays.items()})
    kernel = backbone.first_kernel
    stems = [name for name, (size, _) in STEMS.items() if size == kernel]
    if stem not in (stems if len(stems) > 1 else ("", *stems)):
        raise InputError(
            f"stem={stem!r}, and the first convolution is {kernel}x{kernel}: wanted "
            f"{' or '.join(stems) or 'weights with a 7x7 or 3x3 one'}; give --stem"
        )
    return RecognizerSpec(
        backbone.depth,
        backbone.width,
        stem or stems[0],
        last_stride=2,
        embedding_width=0,
        num_classes=0,
    )


def _complete_arrays(
    spec: RecognizerSpec, arrays: dict[str, np.ndarray], allow_missing: Sequence[str]
) -> dict[str, np.ndarray]:
    """Returns all arrays of the network; those that may be missing with initial values."""
    if "" in allow_missing:
        raise InputError("--allow-missing '' would let anything be missing; give prefixes of names")
    stream = init_visual_stream(spec)
    _, *trees = nnx.split(stream, nnx.Param, nnx.BatchStat)
    initial = visual_to_torch(*map(nnx.to_pure_dict, trees))
    expected: dict[str, tuple[int, ...]] = {name: a.shape for name, a in initial.items()}
    if spec.num_classes:
        expected[KERNEL_NAME] = (spec.num_classes, stream.embedding_width)
        expected[BIAS_NAME] = (spec.num_classes,)
    actual = {name: array.shape for name, array in arrays.items()}
    if faults := describe_mismatches(actual, expected, allow_missing=allow_missing):
        raise InputError(
            f"not the arrays of this ResNet-{spec.depth}: {faults}; "
            "name what may be missing with --allow-missing"
        )
    return initial | arrays


def _check_visual_parity(imported: _Imported) -> ParityReport:
    spec, preprocessing = imported.bundle.model, imported.bundle.preprocessing
    recognizer = torch_template().SicotRecognizer(
        dataclasses.asdict(spec), dataclasses.asdict(preprocessing), [""] * spec.num_classes
    )
    load_torch_arrays(recognizer, imported.arrays)
    photos = parity_photos()
    return check_parity(
        visual_outputs_torch(recognizer, photos),
        visual_outputs_jax(spec, preprocessing, imported.arrays, photos),
        label=_LABEL,
    )


def _write(
    new: Path, imported: _Imported, source: dict[str, str], report: ParityReport
) -> list[ParityReport]:
    bundle, reports = imported.bundle, [report]
    write_weights(new / WEIGHTS_FILE, imported.arrays)
    if bundle.model.num_classes:
        shutil.copy(bundle.folder / CLASS_TABLE_FILE, new / CLASS_TABLE_FILE)
    shutil.copy(str(torch_template().__file__), new / "model.py")
    text = _copy_vocabulary(bundle.folder, new, bundle.text) if bundle.text else None
    write_bundle_config(dataclasses.replace(bundle, folder=new, source=source, text=text))
    if text is not None:
        reports.append(_import_text_encoder(bundle.folder, new, text))
    write_bundle_manifest(new, reports)
    return reports


def _copy_vocabulary(folder: Path, new: Path, text: TextEncoderSpec) -> TextEncoderSpec:
    """Copies the vocabulary, and returns the specification with its hash: words may be edited."""
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            shutil.copy(folder / name, new / name)
    return dataclasses.replace(text, vocabulary=vocabulary_hash(load_tokenizer(folder)))


def _import_text_encoder(folder: Path, new: Path, text: TextEncoderSpec) -> ParityReport:
    arrays = read_weights(folder / TEXT_WEIGHTS_FILE)
    expected = semantic_shapes(text, load_tokenizer(new).vocabulary)
    actual = {name: array.shape for name, array in arrays.items()}
    if faults := describe_mismatches(actual, expected):
        raise InputError(
            f"{folder / TEXT_WEIGHTS_FILE}: not the arrays of its config.json: {faults}; "
            "export again"
        )
    return write_text_encoder(new, text, arrays)
