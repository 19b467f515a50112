"""Defines the interface of a catalogue: records, splits, class table and tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np

SPLITS = ("train", "validation", "test")


class Record(TypedDict):
    """One photo with its product.

    Attributes:
      image_id: hash of the photo's pixels, or another unique name.
      image: an encoded photo (bytes, as stored by an import) or a decoded one (uint8 [H, W, 3]).
      sku: SKU of the product.
      class_id: 0..C-1.
      title: title of the product.
      tags: further text of the product.
      token_ids: int32 [number of known words of the title], without padding.
      category: category of the product.
      box: float32 [4], (x_min, y_min, x_max, y_max) as fractions of width and height, all zero
        where unknown.
      role: "catalogue" or "query".
      reference: source of the photo, such as a path or URL.
    """

    image_id: str
    image: bytes | np.ndarray
    sku: str
    class_id: int
    title: str
    tags: str
    token_ids: np.ndarray
    category: str
    box: np.ndarray
    role: str
    reference: str


class Split(Protocol):
    """Records of one split by index.

    Attributes:
      labels: int32 [N], class ids, known without reading a photo.
    """

    labels: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class Tokenizer(Protocol):
    """Maps text to ids of the catalogue's vocabulary; id 0 is padding and never returned.

    Attributes:
      vocabulary: [V] words or pieces by id; entry 0 is "".
    """

    vocabulary: Sequence[str]

    def encode(self, text: str) -> np.ndarray:
        """Returns ids in text order.

        Args:
          text: a title.

        Returns:
          int32 [number of known words]; unknown words are left out.
        """
        ...

    def save(self, folder: Path) -> None:
        """Writes the files that `tokenizer.load_tokenizer` reads.

        Args:
          folder: an existing folder.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """Describes the C classes; row c is class id c.

    Rows are only ever appended; a discontinued SKU keeps its row.

    Attributes:
      sku: [C].
      title: [C], of the SKU's first training photo.
      category: [C].
      counts: split -> int64 [C], photos per class.
      discontinued: bool [C], SKUs that the newest import no longer has.
    """

    sku: Sequence[str]
    title: Sequence[str]
    category: Sequence[str]
    counts: Mapping[str, np.ndarray]
    discontinued: np.ndarray

    def __len__(self) -> int:
        return len(self.sku)


@dataclasses.dataclass(frozen=True)
class Catalog:
    """A catalogue that can be trained on.

    Attributes:
      name: name of the data set.
      data_hash: hex digest over records, splits and tables; equal hashes mean equal data.
      classes: the class table.
      head_boundary: a class is head when it has more training photos than this, otherwise tail.
      tokenizer: tokenizer of the training titles.
      word_vectors: float32 [V, E], initial word vectors, row 0 (padding) zero.
      splits: name -> records.
      resized_by: the fields of Preprocessing that the photos were resized with, empty where they
        are as imported.
    """

    name: str
    data_hash: str
    classes: ClassTable
    head_boundary: int
    tokenizer: Tokenizer
    word_vectors: np.ndarray
    splits: Mapping[str, Split]
    resized_by: Mapping[str, Any] = dataclasses.field(default_factory=dict)
