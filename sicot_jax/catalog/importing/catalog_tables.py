"""Builds and writes the tables of a catalogue: classes, labels, vocabulary, word vectors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sicot_jax.catalog.catalog import SPLITS, ClassTable, Tokenizer
from sicot_jax.catalog.importing.manifest_rows import ManifestRow
from sicot_jax.catalog.importing.settings import ImportSettings
from sicot_jax.catalog.importing.spool import PhotosBySplit
from sicot_jax.catalog.sources.tables import (
    CLASSES_FILE,
    SPLITS_FILE,
    VECTORS_FILE,
    write_class_table,
    write_split_table,
)
from sicot_jax.catalog.statistics import class_counts
from sicot_jax.catalog.tokenizer import build_tokenizer
from sicot_jax.catalog.word_vectors import train_word_vectors
from sicot_jax.common.image import JPEG_QUALITY


@dataclasses.dataclass(frozen=True)
class CatalogTables:
    """Tables of a catalogue.

    Attributes:
      classes: one row per class.
      labels: split -> class ids int32 [N], in the order of the records.
      tokenizer: vocabulary, from training text alone.
      train_token_ids: token ids int32 [number of known words] of every training record.
      word_vectors: float32 [V, E].
    """

    classes: ClassTable
    labels: Mapping[str, np.ndarray]
    tokenizer: Tokenizer
    train_token_ids: Sequence[np.ndarray]
    word_vectors: np.ndarray


def product_text(title: str, tags: str) -> str:
    """Returns the text of a photo: its title, then its tags.

    Args:
      title: product title.
      tags: further words.

    Returns:
      Both, separated by a space.
    """
    return f"{title} {tags}".strip()


def build_tables(
    by_split: PhotosBySplit, previous: ClassTable | None, settings: ImportSettings
) -> CatalogTables:
    """Returns the tables of a catalogue.

    Args:
      by_split: photos of each split, in the order of the records.
      previous: class table of the previous version; its class ids stay.
      settings: settings of the import.

    Returns:
      The tables; vocabulary and word vectors come from the training photos alone.
    """
    classes, labels = build_class_table(by_split, previous)
    train_text = [product_text(photo.row.title, photo.row.tags) for photo in by_split["train"]]
    tokenizer = build_tokenizer(
        train_text,
        kind=settings.tokenizer,
        drop_top_share=settings.drop_top_share,
        min_count=settings.min_count,
        max_vocabulary=settings.max_vocabulary,
        seed=settings.seed,
    )
    token_ids = [tokenizer.encode(text) for text in train_text]
    vectors = train_word_vectors(
        token_ids,
        vocabulary_size=len(tokenizer.vocabulary),
        width=settings.word_width,
        epochs=settings.word_epochs,
        seed=settings.seed,
    )
    return CatalogTables(classes, labels, tokenizer, token_ids, vectors)


def build_class_table(
    by_split: PhotosBySplit, previous: ClassTable | None
) -> tuple[ClassTable, dict[str, np.ndarray]]:
    """Returns the class table and the labels of all records.

    Title and category are those of the class's first training photo, `catalogue` before `query`
    (without one, of any photo).

    Args:
      by_split: photos of each split, in the order of the records.
      previous: class table of the previous version. Its ids stay, its SKUs without a photo are
        discontinued; new SKUs follow in sorted order.

    Returns:
      The class table, and split -> class ids int32 [N].
    """
    first_rows = _first_rows(by_split)
    old = list(previous.sku) if previous else []
    skus = old + sorted(set(first_rows) - set(old))
    ids = {sku: c for c, sku in enumerate(skus)}
    labels = {
        split: np.array([ids[photo.row.sku] for photo in by_split[split]], np.int32)
        for split in SPLITS
    }
    titles, categories = [], []
    for c, sku in enumerate(skus):
        if sku in first_rows:
            titles.append(first_rows[sku].title)
            categories.append(first_rows[sku].category)
        elif previous is not None:
            titles.append(previous.title[c])
            categories.append(previous.category[c])
    counts = {split: class_counts(labels[split], len(skus)) for split in SPLITS}
    discontinued = np.array([sku not in first_rows for sku in skus], dtype=bool)
    return ClassTable(skus, titles, categories, counts, discontinued), labels


def _first_rows(by_split: PhotosBySplit) -> dict[str, ManifestRow]:
    """Returns SKU -> the row that describes it."""
    first: dict[str, ManifestRow] = {}
    for role in ("catalogue", "query"):
        for row in (photo.row for photo in by_split["train"]):
            if row.role == role:
                first.setdefault(row.sku, row)
    for split in SPLITS:
        for photo in by_split[split]:
            first.setdefault(photo.row.sku, photo.row)
    return first


def write_tables(
    folder: Path,
    tables: CatalogTables,
    by_split: PhotosBySplit,
    previous_splits: Mapping[str, str],
) -> None:
    """Writes all tables of a catalogue.

    Args:
      folder: version folder.
      tables: the tables.
      by_split: photos of each split.
      previous_splits: image_id -> split of earlier versions; remembered for photos that may return.
    """
    write_class_table(folder / CLASSES_FILE, tables.classes)
    for split in SPLITS:
        np.save(folder / f"labels_{split}.npy", tables.labels[split])
    np.save(folder / VECTORS_FILE, tables.word_vectors)
    tables.tokenizer.save(folder)
    splits = {photo.image_id: split for split in SPLITS for photo in by_split[split]}
    write_split_table(folder / SPLITS_FILE, {**previous_splits, **splits})


# Settings that change words, their numbers or their vectors.
_WORD_SETTINGS = (
    "seed",
    "tokenizer",
    "drop_top_share",
    "min_count",
    "max_vocabulary",
    "word_width",
    "word_epochs",
)


def data_hash(
    folder: Path,
    by_split: PhotosBySplit,
    labels: Mapping[str, np.ndarray],
    settings: ImportSettings,
) -> str:
    """Computes the digest by which a run recognises the catalogue it was trained on.

    It covers image id, class, split, title, tags, category, box and role of every photo, the
    tables of classes and labels, and the settings that change stored pixels (`short_side` and the
    JPEG quality) or words. It does not cover what floating-point libraries make of these:
    vocabulary and word vectors depend on the processor and on the versions of sentencepiece and
    gensim. `provenance.vocabulary_hash` tells vocabularies apart where that matters. The order of
    the photos does not change it.

    Args:
      folder: version folder with its tables.
      by_split: photos of each split, in the order of the records.
      labels: split -> class ids int32 [N].
      settings: settings of the import.

    Returns:
      64 hexadecimal digits (sha256).
    """
    digest = hashlib.sha256()
    lines = sorted(
        json.dumps(
            [
                photo.image_id,
                int(label),
                split,
                photo.row.title,
                photo.row.tags,
                photo.row.category,
                photo.row.box,
                photo.row.role,
            ]
        )
        for split in SPLITS
        for photo, label in zip(by_split[split], labels[split], strict=True)
    )
    for line in lines:
        digest.update(line.encode() + b"\n")
    digest.update((folder / CLASSES_FILE).read_bytes())
    for split in SPLITS:
        digest.update(split.encode() + b"\n" + labels[split].astype("<i4").tobytes())
    words = [getattr(settings, name) for name in _WORD_SETTINGS]
    digest.update(json.dumps([settings.short_side, JPEG_QUALITY, *words]).encode())
    return digest.hexdigest()
