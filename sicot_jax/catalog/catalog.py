"""The one shape in which training, evaluation and reports see a catalogue."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np

SPLITS = ("train", "validation", "test")


class Record(TypedDict):
    """One photo with its product.

    `image` is an encoded photo (bytes, as stored by an import) or a decoded one (uint8 [H, W, 3]).
    `box` is (x_min, y_min, x_max, y_max) as fractions of width and height, all zero where unknown.
    `role` is "catalogue" or "query"; `reference` is where the photo came from.
    """

    image_id: str
    image: bytes | np.ndarray
    sku: str
    class_id: int
    title: str
    tags: str
    token_ids: np.ndarray  # int32 [number of known words], no padding
    category: str
    box: np.ndarray  # float32 [4]
    role: str
    reference: str


class Split(Protocol):
    """Records of one split by index; `labels` are known without reading a photo."""

    labels: np.ndarray  # int32 [N]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class Tokenizer(Protocol):
    """Text to ids of the catalogue's own vocabulary; id 0 is padding and never returned."""

    vocabulary: Sequence[str]  # [V], vocabulary[0] == ""

    def encode(self, text: str) -> np.ndarray: ...  # int32, unknown units left out

    def save(self, folder: Path) -> None: ...  # for `text.load_tokenizer`


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """Row c describes class id c. Rows are only ever appended; a discontinued SKU keeps its row."""

    sku: Sequence[str]
    title: Sequence[str]  # of the SKU's first training photo
    category: Sequence[str]
    counts: Mapping[str, np.ndarray]  # split -> int64 [C], number of photos
    discontinued: np.ndarray  # bool [C]

    def __len__(self) -> int:
        return len(self.sku)


@dataclasses.dataclass(frozen=True)
class Catalog:
    """A catalogue that can be trained on.

    `head_boundary`: a class is head when it has more training photos than this, otherwise tail.
    `data_hash`: hex digest over records, splits and tables; equal hashes mean equal data.
    `resized_by`: the fields of Preprocessing that its photos were resized with, empty where they
    are as they came.
    """

    name: str
    data_hash: str
    classes: ClassTable
    head_boundary: int
    tokenizer: Tokenizer
    word_vectors: np.ndarray  # float32 [V, E], row 0 zero
    splits: Mapping[str, Split]
    resized_by: Mapping[str, Any] = dataclasses.field(default_factory=dict)
