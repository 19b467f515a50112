"""A folder of converted weights: what lies in it, written whole or not at all.

model.safetensors   arrays by torchvision's names, float32 config.json         {"format", "version",
"model": see `Model`, "preprocessing", "source"}, with titles "text": see `Text` classes.csv
the product of each class, where there is a classifier (as in an imported catalogue)
text.safetensors    the semantic stream, text.py and the vocabulary, where they were asked for
(`text`) manifest.json       what was compared with what, versions, and the sha256 of every other
file
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

from sicot_jax._version import __version__
from sicot_jax.catalog.catalog import ClassTable
from sicot_jax.catalog.sources.tables import CLASSES_FILE, read_class_table
from sicot_jax.common.files import file_sha256, read_json, write_json
from sicot_jax.config import ModelConfig, TextConfig
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError

FORMAT = 1
_WANTED = "a folder of `sicot convert`"
WEIGHTS, CONFIG, CLASSES, MANIFEST = (
    "model.safetensors",
    "config.json",
    CLASSES_FILE,
    "manifest.json",
)
TEXT = "text.safetensors"
GRAPH, PROGRAM = (
    "model.onnx",
    "model.stablehlo",
)  # in place of the weights; beside weights with batch norms folded


@dataclasses.dataclass(frozen=True)
class Model:
    """The network behind the arrays; `classes` is 0 without a classifier, `stem`, strides and `box`
    as in `ModelConfig`.
    """

    depth: int
    width: int
    stem: str
    last_stride: int
    embedding_width: int
    classes: int
    box: str = "none"

    @classmethod
    def of(cls, config: ModelConfig, classes: int) -> Model:
        return cls(
            config.depth,
            config.width,
            config.stem,
            config.last_stride,
            config.embedding_width,
            classes,
            config.localization,
        )


@dataclasses.dataclass(frozen=True)
class Text:
    """The semantic stream: fields of `TextConfig`, widths, words of a title that are read, and the
    sha256 that a run knows its vocabulary by.
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
        return TextConfig(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(TextConfig)}
        )


@dataclasses.dataclass(frozen=True)
class Converted:
    """`config.json` of such a folder."""

    folder: Path
    model: Model
    preprocessing: Preprocessing
    source: dict[str, Any]
    text: Text | None = None


def is_converted(folder: Path) -> bool:
    """Whether it is one of ours, whatever it is for."""
    return (folder / MANIFEST).exists() and any(
        (folder / name).exists() for name in (WEIGHTS, GRAPH)
    )


def check_trainable(folder: Path) -> None:
    """InputError for a folder whose weights nothing can be trained from."""
    for name, what in ((GRAPH, "an ONNX graph"), (PROGRAM, "StableHLO, its batch norms folded")):
        if (folder / name).exists():
            raise InputError(
                f"{folder}: {what}; give the run, or a folder of to-torch or from-torch"
            )


def read_converted(folder: Path) -> Converted:
    """InputError where the folder is none, was written by a newer version, or has a file that is
    not as it was written.
    """
    converted, manifest = read_config(folder), read_json(folder / MANIFEST, _WANTED)
    if not isinstance(manifest.get("sha256"), dict):
        raise InputError(f"{folder / MANIFEST}: no sha256 of the files in it; convert again")
    for name, digest in manifest["sha256"].items():
        if name.endswith(".py"):
            continue  # to be changed as one likes
        if not (folder / name).exists() or file_sha256(folder / name) != digest:
            raise InputError(
                f"{folder / name}: not as it was written (another sha256, or gone); `sicot convert from-torch {folder}` takes "
                "changed weights in"
            )
    return converted


def read_config(folder: Path) -> Converted:
    """`config.json` alone, the other files unseen. InputError where it is none of ours."""
    stored = read_json(folder / CONFIG, _WANTED)
    if stored.get("format") != FORMAT or "model" not in stored:
        raise InputError(
            f"{folder / CONFIG}: format {stored.get('format')}, this version reads {FORMAT}; convert again"
        )
    try:
        preprocessing: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v
            for name, v in stored["preprocessing"].items()
        }
        text = Text(**stored["text"]) if "text" in stored else None
        return Converted(
            folder, Model(**stored["model"]), Preprocessing(**preprocessing), stored["source"], text
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / CONFIG}: not as it was written ({error}); convert again"
        ) from error


def read_classes(folder: Path, model: Model) -> ClassTable:
    """The products of a folder's classes. InputError where there are more or fewer than the model
    has.
    """
    table = read_class_table(folder / CLASSES)
    if len(table) != model.classes:
        raise InputError(
            f"{folder / CLASSES}: {len(table)} classes, and the model has {model.classes}; give it its own table"
        )
    return table


def write_config(
    folder: Path,
    model: Model,
    preprocessing: Preprocessing,
    source: dict[str, Any],
    text: Text | None = None,
) -> None:
    fields = {
        "model": dataclasses.asdict(model),
        "preprocessing": dataclasses.asdict(preprocessing),
        "source": source,
    }
    if text is not None:
        fields["text"] = dataclasses.asdict(text)
    write_json(folder / CONFIG, {"format": FORMAT, "version": __version__, **fields})


def write_manifest(folder: Path, proof: dict[str, Any]) -> None:
    """The last file: with the sha256 of all others, and the versions of what made and compared
    them.
    """
    digests = {
        path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST
    }
    versions = {"sicot_jax": __version__}
    for name in ("jax", "numpy", "torch", "onnxruntime"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    write_json(
        folder / MANIFEST,
        {"format": FORMAT, "proof": proof, "versions": versions, "sha256": digests},
    )
