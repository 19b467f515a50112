"""Writes and opens a catalogue as one array file, which numpy alone can read.

The file is an uncompressed .npz (numpy.load reads it too) with a member `catalog.json`. Photos and
texts are memory-mapped at their offset in the file, so that opening it costs the same for a
thousand photos and ten million.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import zipfile
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import IO

import numpy as np

from sicot_jax.catalog.catalog import SPLITS, Catalog, ClassTable, Record, Split, Tokenizer
from sicot_jax.catalog.sources.tables import (
    LazyStrings,
    checked_index,
    pack_strings,
    unpack_strings,
)
from sicot_jax.catalog.tokenizer import SentencePieceTokenizer, WordTokenizer
from sicot_jax.common.files import atomic_file
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError

ARRAY_FILE_FORMAT = 2
_METADATA_MEMBER = "catalog.json"
_ROLES = ("catalogue", "query")
_TEXT_COLUMNS = ("image_id", "title", "tags", "reference")


class _ArrayFileWriter:
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def array(self, name: str, array: np.ndarray) -> None:
        with self._archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)

    def strings(self, name: str, strings: Sequence[str]) -> None:
        flat, offsets = pack_strings(strings)
        self.array(f"{name}/utf8", flat)
        self.array(f"{name}/offsets", offsets)

    def split(self, name: str, catalog: Catalog, to_image: Callable[[Record], np.ndarray]) -> None:
        """Reads the records once: photos go straight to the file, the small rest follows."""
        split = catalog.splits[name]
        texts: dict[str, list[str]] = {key: [] for key in _TEXT_COLUMNS}
        categories: dict[str, int] = {}
        category_ids, roles, boxes = [], [], []
        token_ids: list[np.ndarray] = [np.zeros(0, np.int32)]
        shape = None
        with self._archive.open(f"{name}/images.npy", "w", force_zip64=True) as member:
            for index in range(len(split)):
                record = split[index]
                image = to_image(record)
                if shape is None:
                    shape = image.shape
                    _write_image_header(member, len(split), shape)
                if not (image.dtype == np.uint8 and image.shape == shape and shape[2:] == (3,)):
                    raise InputError(
                        f"{name} photo {index} ({record['image_id']}) is {image.dtype} "
                        f"{image.shape}, wanted uint8 {shape[:2]} x 3 for all; "
                        "resize all photos alike"
                    )
                member.write(image.tobytes())
                for key, column in texts.items():
                    column.append(record[key])  # type: ignore[literal-required]
                category_ids.append(categories.setdefault(record["category"], len(categories)))
                roles.append(_ROLES.index(record["role"]))
                boxes.append(record["box"])
                token_ids.append(record["token_ids"])
            if shape is None:
                _write_image_header(member, 0, (0, 0, 3))
        for key, column in texts.items():
            self.strings(f"{name}/{key}", column)
        self.strings(f"{name}/categories", list(categories))
        self.array(f"{name}/category_ids", np.array(category_ids, np.int32))
        self.array(f"{name}/roles", np.array(roles, np.uint8))
        self.array(f"{name}/boxes", np.array(boxes, np.float32).reshape(-1, 4))
        self.array(f"{name}/labels", np.asarray(split.labels, np.int32))
        self.array(f"{name}/token_ids", np.concatenate(token_ids).astype(np.int32))
        token_offsets = np.cumsum([len(ids) for ids in token_ids], dtype=np.int64)
        self.array(f"{name}/token_offsets", token_offsets)


def _write_image_header(member: IO[bytes], count: int, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(member, header)


def write_array_file(
    catalog: Catalog,
    out: str | Path,
    *,
    to_image: Callable[[Record], np.ndarray] = itemgetter("image"),
    splits: Sequence[str] = SPLITS,
) -> None:
    """Writes the catalogue as one file, which appears under its name only when complete.

    Args:
      catalog: what to write; `resize_catalog` gives it photos of one size.
      out: path of the file.
      to_image: record -> uint8 [H, W, 3], one shape for all.
      splits: names of the splits to write.

    Raises:
      InputError: a photo has another shape or type.
    """
    out = Path(out)
    tokenizer = catalog.tokenizer
    model = tokenizer.model if isinstance(tokenizer, SentencePieceTokenizer) else None
    meta = {
        "format": ARRAY_FILE_FORMAT,
        "name": catalog.name,
        "data_hash": catalog.data_hash,
        "resized_by": dict(catalog.resized_by),
        "head_boundary": int(catalog.head_boundary),
        "tokenizer": "sentencepiece" if model is not None else "words",
        "splits": list(splits),
        "count_splits": list(catalog.classes.counts),
    }
    with (
        atomic_file(out, durable=True) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
    ):
        archive.writestr(_METADATA_MEMBER, json.dumps(meta, indent=1))
        writer = _ArrayFileWriter(archive)
        classes = catalog.classes
        for key in ("sku", "title", "category"):
            writer.strings(f"classes/{key}", getattr(classes, key))
        for split, counts in classes.counts.items():
            writer.array(f"classes/counts/{split}", np.asarray(counts, np.int64))
        writer.array("classes/discontinued", np.asarray(classes.discontinued, bool))
        writer.strings("vocabulary", tokenizer.vocabulary)
        if model is not None:
            writer.array("sentencepiece", np.frombuffer(model, np.uint8))
        writer.array("word_vectors", np.asarray(catalog.word_vectors, np.float32))
        for split in splits:
            writer.split(split, catalog, to_image)


class _ArrayFileReader:
    """Members of an uncompressed .npz: small ones are read, uint8 ones are memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._starts = {info.filename: info.header_offset for info in archive.infolist()}
                meta = json.loads(archive.read(_METADATA_MEMBER))
        except FileNotFoundError:
            raise InputError(
                f"no array file {path}; write it with sicot export-arrays, or say where it is now: "
                "--catalog, of sicot train --config.data.path"
            ) from None
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise InputError(
                f"{path} is no array file ({error}); write it again with export-arrays"
            ) from error
        if meta.get("format") != ARRAY_FILE_FORMAT:
            raise InputError(
                f"{path} has format {meta.get('format')}, "
                f"wanted {ARRAY_FILE_FORMAT}; write it again with export-arrays"
            )
        self.meta = meta

    def array(self, name: str) -> np.ndarray:
        with open(self.path, "rb") as file:
            start = self._starts[f"{name}.npy"]
            file.seek(start)
            # Lengths of the local header: its extra field may differ from the central
            # directory's.
            name_length, extra_length = struct.unpack("<HH", file.read(30)[26:30])
            file.seek(start + 30 + name_length + extra_length)
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(file)
            count = int(np.prod(shape))
            if dtype == np.uint8 and count:
                return np.memmap(file, np.uint8, "r", file.tell(), shape)
            return np.fromfile(file, dtype, count).reshape(shape)

    def strings(self, name: str) -> LazyStrings:
        return unpack_strings(self.array(f"{name}/utf8"), self.array(f"{name}/offsets"))


class ArraySplit:
    """Records of one split of an array file; pickles as its path.

    Attributes:
      images: uint8 [N, H, W, 3], memory-mapped, for training with all photos on the device.
      labels: int32 [N], class ids.
    """

    def __init__(self, path: Path, name: str) -> None:
        reader = _ArrayFileReader(path)
        self._path, self._name = path, name
        self.images = reader.array(f"{name}/images")
        self.labels = reader.array(f"{name}/labels")
        self._sku = reader.strings("classes/sku")
        self._categories = list(reader.strings(f"{name}/categories"))
        self._texts = {key: reader.strings(f"{name}/{key}") for key in _TEXT_COLUMNS}
        self._category_ids = reader.array(f"{name}/category_ids")
        self._roles = reader.array(f"{name}/roles")
        self._boxes = reader.array(f"{name}/boxes")
        self._token_ids = reader.array(f"{name}/token_ids")
        self._token_offsets = reader.array(f"{name}/token_offsets")

    def __reduce__(self) -> tuple:
        return ArraySplit, (self._path, self._name)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        class_id = int(self.labels[index])
        start, end = self._token_offsets[index : index + 2]
        return Record(
            image_id=self._texts["image_id"][index],
            image=np.array(self.images[index]),
            sku=self._sku[class_id],
            class_id=class_id,
            title=self._texts["title"][index],
            tags=self._texts["tags"][index],
            token_ids=self._token_ids[start:end].copy(),
            category=self._categories[self._category_ids[index]],
            box=self._boxes[index].copy(),
            role=_ROLES[self._roles[index]],
            reference=self._texts["reference"][index],
        )


def open_array_file(path: str | Path) -> Catalog:
    """Opens the catalogue in a file of `write_array_file`.

    Args:
      path: path of the file.

    Returns:
      The catalogue; photos are memory-mapped.

    Raises:
      InputError: there is no such file, or one of another kind or format.
    """
    path = Path(path).absolute()  # splits reopen it in worker processes, which may start elsewhere
    reader = _ArrayFileReader(path)
    meta = reader.meta
    vocabulary = list(reader.strings("vocabulary"))
    tokenizer: Tokenizer
    if meta["tokenizer"] == "sentencepiece":
        tokenizer = SentencePieceTokenizer(reader.array("sentencepiece").tobytes(), vocabulary)
    else:
        tokenizer = WordTokenizer(vocabulary)
    classes = ClassTable(
        sku=reader.strings("classes/sku"),
        title=reader.strings("classes/title"),
        category=reader.strings("classes/category"),
        counts={split: reader.array(f"classes/counts/{split}") for split in meta["count_splits"]},
        discontinued=reader.array("classes/discontinued"),
    )
    return Catalog(
        name=meta["name"],
        data_hash=meta["data_hash"],
        classes=classes,
        head_boundary=meta["head_boundary"],
        tokenizer=tokenizer,
        word_vectors=reader.array("word_vectors"),
        splits={name: ArraySplit(path, name) for name in meta["splits"]},
        resized_by=meta["resized_by"],
    )


def resize_catalog(catalog: Catalog, preprocessing: Preprocessing) -> Catalog:
    """Returns the catalogue with decoded photos of one size, ready for `write_array_file`.

    Resizing changes the data, so the new data hash combines the catalogue's hash with the resize
    settings.

    Args:
      catalog: photos of any size, encoded or decoded.
      preprocessing: its resize_height, resize_width and fit are used.

    Returns:
      A catalogue whose records are resized when they are read; boxes follow their photos.
    """
    fields = {
        name: getattr(preprocessing, name) for name in ("resize_height", "resize_width", "fit")
    }
    return dataclasses.replace(
        catalog,
        data_hash=hashlib.sha256(json.dumps([catalog.data_hash, fields]).encode()).hexdigest(),
        splits={
            name: _ResizedSplit(split, preprocessing) for name, split in catalog.splits.items()
        },
        resized_by=fields,
    )


class _ResizedSplit:
    def __init__(self, split: Split, preprocessing: Preprocessing) -> None:
        self.labels, self._split, self._preprocessing = split.labels, split, preprocessing

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> Record:
        record = self._split[index]
        photo = record["image"]
        if not isinstance(photo, np.ndarray):
            from sicot_jax.common.image import decode_photo

            photo = decode_photo(photo)
        box = _resized_box(record["box"], photo.shape[0], photo.shape[1], self._preprocessing)
        return Record(**{**record, "image": self._preprocessing.load(photo), "box": box})  # type: ignore[typeddict-item]


def _resized_box(
    box: np.ndarray, height: int, width: int, preprocessing: Preprocessing
) -> np.ndarray:
    """Returns the box as fractions of the resized photo, float32 [4].

    All zero where it was unknown, or where the crop leaves nothing of it.
    """
    # New aspect ratio divided by the old one.
    wider = preprocessing.resize_width / preprocessing.resize_height * height / width
    match preprocessing.fit:
        case "crop":
            visible = np.minimum(1, [wider, 1 / wider])
        case "pad":
            visible = np.maximum(1, [wider, 1 / wider])
        case "stretch":
            visible = np.ones(2)
    corners = np.clip((np.reshape(box, (2, 2)) - 0.5) / visible + 0.5, 0, 1)
    empty = np.any(corners[1] <= corners[0])
    return np.zeros(4, np.float32) if empty else corners.reshape(4).astype(np.float32)
