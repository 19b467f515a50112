"""Reads and writes a weights bundle: the folder of converted weights that `sicot convert` makes.

| file              | content                                                                     |
|-------------------|-----------------------------------------------------------------------------|
| model.safetensors | float32 arrays by torchvision's names                                       |
| model.onnx        | the same as an ONNX graph, in place of the weights                          |
| model.stablehlo   | a StableHLO program; the weights next to it have batch norms folded         |
| config.json       | format, version, `RecognizerSpec`, preprocessing, source, `TextEncoderSpec` |
| classes.csv       | the product of each class, where there is a classifier                      |
| text.safetensors  | the semantic stream, with text.py and its vocabulary (`semantic`), optional |
| manifest.json     | parity report, versions, and the SHA-256 of every other file                |

A folder is written completely or not at all (`common.files.atomic_directory`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sicot_jax._version import __version__
from sicot_jax.catalog.catalog import ClassTable
from sicot_jax.catalog.sources.tables import CLASSES_FILE, read_class_table
from sicot_jax.common.files import file_sha256, read_json, write_json
from sicot_jax.config import ModelConfig, TextConfig
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.weights.parity import ParityReport

FORMAT = 2
WEIGHTS_FILE = "model.safetensors"
TEXT_WEIGHTS_FILE = "text.safetensors"
ONNX_FILE = "model.onnx"
STABLEHLO_FILE = "model.stablehlo"
CONFIG_FILE = "config.json"
CLASS_TABLE_FILE = CLASSES_FILE
MANIFEST_FILE = "manifest.json"
# Packages that made a bundle, or that its graph or program asks a version of.
_VERSIONED = ("jax", "jaxlib", "numpy", "torch", "onnx", "onnxscript", "onnxruntime")
_EXPECTED = "a folder of `sicot convert`"


@dataclasses.dataclass(frozen=True)
class RecognizerSpec:
    """Architecture of a recogniser: the visual stream and its classifier.

    Attributes:
      depth: Layers of the ResNet: 10, 18, 34, 50, 101 or 152.
      width: Channels of its first stage.
      stem: First convolution, as `ModelConfig.stem`.
      last_stride: Stride of the last stage.
      embedding_width: D, width of the projection; 0 without a projection.
      num_classes: C; 0 without a classifier.
      localization: Kind of the localisation branch, as `ModelConfig.localization`.
    """

    depth: int
    width: int
    stem: str
    last_stride: int
    embedding_width: int
    num_classes: int
    localization: str = "none"

    @classmethod
    def from_config(cls, config: ModelConfig, num_classes: int) -> RecognizerSpec:
        """Builds the specification of a run's recogniser.

        Args:
          config: Model section of the run's configuration.
          num_classes: Classes of its classifier.

        Returns:
          The specification.
        """
        return cls(
            config.depth,
            config.width,
            config.stem,
            config.last_stride,
            config.embedding_width,
            num_classes,
            config.localization,
        )


@dataclasses.dataclass(frozen=True)
class TextEncoderSpec:
    """Architecture of the semantic stream.

    Attributes:
      encoder: Kind of word weighting, as `TextConfig.encoder`; also the next three.
      windows: See `TextConfig`.
      hidden: See `TextConfig`.
      weighting: See `TextConfig`.
      word_width: E, width of the word vectors.
      embedding_width: D, width of the embedding.
      max_tokens: Words of a title that are read.
      vocabulary: SHA-256 of the vocabulary, as a run records it.
    """

    encoder: str
    windows: int
    hidden: int
    weighting: str
    word_width: int
    embedding_width: int
    max_tokens: int
    vocabulary: str

    @property
    def config(self) -> TextConfig:
        """The text section of a model configuration with these fields."""
        names = [field.name for field in dataclasses.fields(TextConfig)]
        return TextConfig(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class WeightsBundle:
    """What the `config.json` of a weights bundle says.

    Attributes:
      folder: The folder.
      model: Architecture of the recogniser.
      preprocessing: How a photo becomes the network's input.
      source: Origin of the weights: run, data, commit, or file.
      text: Architecture of the semantic stream; None where the bundle has none.
    """

    folder: Path
    model: RecognizerSpec
    preprocessing: Preprocessing
    source: dict[str, Any]
    text: TextEncoderSpec | None = None


def is_bundle(folder: Path) -> bool:
    """Returns whether a folder is a weights bundle of any kind.

    Args:
      folder: Any path.

    Returns:
      True where it holds a manifest, and weights or a graph.
    """
    weights = (folder / WEIGHTS_FILE).exists() or (folder / ONNX_FILE).exists()
    return weights and (folder / MANIFEST_FILE).exists()


def check_trainable(folder: Path) -> None:
    """Raises an error for a bundle that training cannot start from.

    Args:
      folder: A weights bundle.

    Raises:
      InputError: It holds an ONNX graph or StableHLO, whose batch norms are folded.
    """
    for name, kind in ((ONNX_FILE, "an ONNX graph"), (STABLEHLO_FILE, "a StableHLO program")):
        if (folder / name).exists():
            raise InputError(
                f"{folder}: holds {kind}, its batch norms folded; "
                "give the run, or a folder of to-torch or from-torch"
            )


def read_bundle(folder: Path) -> WeightsBundle:
    """Reads a weights bundle's configuration and checks all its files.

    Args:
      folder: The folder.

    Returns:
      The bundle.

    Raises:
      InputError: The folder is no bundle, was written by a newer version, or a file does not
        match its SHA-256.
    """
    bundle, manifest = read_bundle_config(folder), read_json(folder / MANIFEST_FILE, _EXPECTED)
    if not isinstance(manifest.get("sha256"), dict):
        raise InputError(f"{folder / MANIFEST_FILE}: lists no sha256 of its files; convert again")
    for name, digest in manifest["sha256"].items():
        if name.endswith(".py"):
            continue  # users may edit them
        if not (folder / name).exists() or file_sha256(folder / name) != digest:
            raise InputError(
                f"{folder / name}: changed or missing, its sha256 does not match; "
                f"`sicot convert from-torch {folder}` imports changed weights"
            )
    return bundle


def read_bundle_config(folder: Path) -> WeightsBundle:
    """Reads the configuration of a weights bundle without checking its other files.

    Args:
      folder: The folder.

    Returns:
      The bundle.

    Raises:
      InputError: `config.json` is missing, of another format, or damaged.
    """
    stored = read_json(folder / CONFIG_FILE, _EXPECTED)
    if stored.get("format") != FORMAT or "model" not in stored:
        raise InputError(
            f"{folder / CONFIG_FILE}: format {stored.get('format')}, this version reads {FORMAT}; "
            "convert again"
        )
    try:
        preprocessing: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v
            for name, v in stored["preprocessing"].items()
        }
        text = TextEncoderSpec(**stored["text"]) if "text" in stored else None
        model = RecognizerSpec(**stored["model"])
        return WeightsBundle(folder, model, Preprocessing(**preprocessing), stored["source"], text)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / CONFIG_FILE}: damaged or incomplete ({error}); convert again"
        ) from error


def read_bundle_classes(bundle: WeightsBundle) -> ClassTable:
    """Reads the products of a bundle's classes.

    Args:
      bundle: The bundle.

    Returns:
      The class table.

    Raises:
      InputError: The table has another number of classes than the classifier.
    """
    path = bundle.folder / CLASS_TABLE_FILE
    table = read_class_table(path)
    if len(table) != bundle.model.num_classes:
        raise InputError(
            f"{path}: {len(table)} classes, and the model has {bundle.model.num_classes}; "
            "use the table of this model"
        )
    return table


def write_bundle_config(bundle: WeightsBundle) -> None:
    """Writes the `config.json` of a bundle.

    Args:
      bundle: The bundle; its folder exists.
    """
    fields: dict[str, Any] = {
        "model": dataclasses.asdict(bundle.model),
        "preprocessing": dataclasses.asdict(bundle.preprocessing),
        "source": bundle.source,
    }
    if bundle.text is not None:
        fields["text"] = dataclasses.asdict(bundle.text)
    write_json(bundle.folder / CONFIG_FILE, {"format": FORMAT, "version": __version__, **fields})


def written_with(folder: Path, package: str) -> str:
    """Returns the version of a package that a bundle was written with.

    Args:
      folder: The bundle.
      package: Name of the package, such as "jax".

    Returns:
      The version.

    Raises:
      InputError: The manifest is damaged or does not name the package.
    """
    versions = read_json(folder / MANIFEST_FILE, _EXPECTED).get("versions")
    if not isinstance(versions, dict) or package not in versions:
        raise InputError(f"{folder / MANIFEST_FILE}: names no version of {package}; convert again")
    return str(versions[package])


def write_bundle_manifest(folder: Path, reports: Sequence[ParityReport]) -> None:
    """Writes the manifest, the last file of a bundle: digests of all others, versions, parity.

    Args:
      folder: The folder, its other files written.
      reports: Results of the parity checks.
    """
    files = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST_FILE]
    versions = {"sicot_jax": __version__}
    for name in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    manifest = {
        "format": FORMAT,
        "parity": [report.to_json() for report in reports],
        "versions": versions,
        "sha256": {path.name: file_sha256(path) for path in files},
    }
    write_json(folder / MANIFEST_FILE, manifest)
