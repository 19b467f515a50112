"""A TFDS data set from rows and photos: everything is written into one folder that appears when it
is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from sicot_jax._version import __version__
from sicot_jax.catalog.catalog import SPLITS, ClassTable, Tokenizer
from sicot_jax.catalog.importing.fingerprint import source_sha256
from sicot_jax.catalog.importing.manifest_rows import DroppedRow, ManifestError, ManifestRow
from sicot_jax.catalog.importing.photos import PhotoReader, prepare_all
from sicot_jax.catalog.importing.report import BorrowedTitles, ImportReport
from sicot_jax.catalog.importing.settings import CatalogImportError, ImportSettings
from sicot_jax.catalog.importing.splits import Assignment, Photo, assign_splits, order_key
from sicot_jax.catalog.importing.title_source import TitleLender
from sicot_jax.catalog.sources.tables import (
    CATALOG_FILE,
    CLASSES_FILE,
    FORMAT_VERSION,
    REPORT_FILES,
    SPLITS_FILE,
    VECTORS_FILE,
    write_class_table,
    write_split_table,
)
from sicot_jax.catalog.statistics import (
    class_counts,
    default_head_boundary,
    head_mask,
    vocabulary_overlap,
)
from sicot_jax.catalog.tokenizer import build_tokenizer
from sicot_jax.catalog.word_vectors import train_word_vectors
from sicot_jax.common.image import JPEG_QUALITY

_SPOOL_FILE = "spool.tmp"
# A shard is held in memory while it is written, and is the unit that machines share out among each
# other.
_SHARD_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class _Stored:
    """A decoded photo: its row and where its bytes lie in the spool file."""

    row: ManifestRow
    image_id: str
    offset: int
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Example:
    stored: _Stored
    class_id: int
    token_ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Spooled(Sequence[tuple[str, bytes]]):
    """(image_id, bytes) of photos in the spool file; each opens it anew, so that threads may read."""

    spool: Path
    items: Sequence[_Stored]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        with self.spool.open("rb") as file:
            file.seek(item.offset)
            return item.image_id, file.read(item.size)


class CatalogBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base of all catalogues on disk; a subclass yields rows and says where photos are read.

    ShardBasedBuilder and not GeneratorBasedBuilder: the latter's shuffle needs TensorFlow for a
      split above 1 GB. Records lie in the order of a hash of (seed, image_id), so order depends on
      neither rows nor workers.
    """

    name = "catalogue"
    VERSION = tfds.core.Version("1.0.0")
    MIN_PHOTOS = 1
    OFFICIAL_TEST = (
        False  # the rows name all test photos: of the others, validation alone is held out
    )
    # nothing is downloaded; TFDS would look for checksums with a package it does not depend on
    url_infos = None

    def __init__(
        self,
        *,
        source: Path,
        data_dir: Path,
        settings: ImportSettings,
        workers: int = 1,
        name: str | None = None,
        version: str = "1.0.0",
        previous: ClassTable | None = None,
        previous_splits: Mapping[str, str] | None = None,
        titles: TitleLender | None = None,
    ):
        """Rows of `source` become `data_dir/name/version`.

        `previous` is the class table whose ids are kept, `previous_splits` the split of photos
        (image_id) that were there. `titles` lends training photos without a title one.
        """
        self.source, self.settings, self.workers = Path(source), settings, workers
        self.previous, self.previous_splits = previous, previous_splits or {}
        self.titles = titles
        self.unused_columns: list[str] = []  # `rows` may name some
        self.name = name or self.name
        self.VERSION = tfds.core.Version(version)
        self.report: ImportReport | None = None
        super().__init__(data_dir=data_dir)

    def rows(self) -> Iterable[ManifestRow | DroppedRow]:
        """All rows of the source, dropped ones named."""
        raise NotImplementedError

    def photos(self) -> PhotoReader:
        """Reader of the photos that `ManifestRow.image` names."""
        raise NotImplementedError

    def needed(self, *names: str) -> Path:
        """The first of these files or folders that is in the source folder. Raises ManifestError
        where none is.
        """
        for name in names:
            if (self.source / name).exists():
                return self.source / name
        raise ManifestError(
            f"no {' or '.join(names)} in {self.source}; place the data set there, see data/{type(self).name}"
        )

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict(
            {
                "image_id": text,
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "sku": text,
                "class_id": np.int32,
                "title": text,
                "tags": text,
                "token_ids": tfds.features.Sequence(np.int32),
                "category": text,
                "box": tfds.features.Tensor(shape=(4,), dtype=np.float32),
                "role": text,
                "reference": text,
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _shard_iterators_per_split(self, dl_manager: object) -> Mapping[str, Sequence[Any]]:
        if self.OFFICIAL_TEST and (self.settings.test_per_class or self.settings.test_share):
            raise CatalogImportError(
                f"--test-per-class or --test-share with {type(self).name}, whose test split is its owners'; leave them out"
            )
        folder = Path(self.data_path)  # the incomplete folder: TFDS renames it when all is whole
        self._spool = folder / _SPOOL_FILE
        self._source_sha256 = source_sha256(
            self.source
        )  # before the rows: a source changed meanwhile is then noticed
        rows, dropped = self._read_rows()
        stored, broken = self._store_photos(
            rows, total=len(rows) + sum(drop.bad for drop in dropped), bad=dropped
        )
        dropped += broken
        if not stored:
            raise CatalogImportError(
                f"no photo of {self.source} can be used, wanted at least 1; {_named(dropped)}"
            )
        assignment = assign_splits(
            [Photo(item.image_id, item.row.sku, item.row.image, item.row.split) for item in stored],
            seed=self.settings.seed,
            test_per_class=self.settings.test_per_class,
            test_share=self.settings.test_share,
            tail_cut=self.settings.tail_cut,
            official_test=self.OFFICIAL_TEST,
            previous=self.previous_splits,
        )
        by_split = self._ordered(stored, assignment.split)
        if not by_split["train"]:
            raise CatalogImportError(
                f"no photo of {self.source} is in the train split, wanted at least 1; check column split"
            )
        borrowed = None
        if self.titles is not None:
            by_split["train"], borrowed = self._borrow_titles(by_split["train"], self.titles)
        table, tokenizer = self._write_tables(
            folder, by_split, dropped, assignment, stored, borrowed
        )
        class_ids = {sku: c for c, sku in enumerate(table.sku)}
        return {
            split: [
                partial(self._examples, shard, class_ids, tokenizer) for shard in _shards(items)
            ]
            for split, items in by_split.items()
            if items
        }

    def _examples(
        self, items: Sequence[_Stored], class_ids: Mapping[str, int], tokenizer: Tokenizer
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        progress = tqdm(
            items,
            unit="photos",
            desc="write",
            file=sys.stderr,
            mininterval=0.5,
            leave=False,
            disable=None,
        )
        with self._spool.open("rb") as spool, progress:
            for key, item in enumerate(progress):
                spool.seek(item.offset)
                row = item.row
                yield (
                    key,
                    {
                        "image_id": item.image_id,
                        "image": spool.read(item.size),
                        "sku": row.sku,
                        "class_id": class_ids[row.sku],
                        "title": row.title,
                        "tags": row.tags,
                        "token_ids": tokenizer.encode(product_text(row.title, row.tags)),
                        "category": row.category,
                        "box": np.array(row.box, np.float32),
                        "role": row.role,
                        "reference": row.image,
                    },
                )

    def _download_and_prepare(self, dl_manager: object, download_config: object = None) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        self._spool.unlink()

    def _read_rows(self) -> tuple[list[ManifestRow], list[DroppedRow]]:
        settings = self.settings
        rows: list[ManifestRow] = []
        dropped: list[DroppedRow] = []
        for row in self.rows():
            if isinstance(row, DroppedRow):
                dropped.append(row)
            else:
                rows.append(row)
            if settings.max_rows is not None and len(rows) >= settings.max_rows:
                break
        least = self.MIN_PHOTOS if settings.min_photos is None else settings.min_photos
        counts = Counter(row.sku for row in rows)
        reason = f"class under {least} photos (min_photos)"
        dropped += [
            DroppedRow(row.image, reason, row.sku, bad=False)
            for row in rows
            if counts[row.sku] < least
        ]
        rows = [row for row in rows if counts[row.sku] >= least]
        return rows, dropped

    def _store_photos(
        self, rows: Sequence[ManifestRow], *, total: int, bad: Iterable[DroppedRow]
    ) -> tuple[list[_Stored], list[DroppedRow]]:
        """Decode all photos into the spool file; stop as soon as more rows are bad than the limit
        allows.
        """
        named = [drop for drop in bad if drop.bad]
        before = len(named)
        stored: list[_Stored] = []
        self._check_bad_share(named, total, seen=total - len(rows))
        prepared = prepare_all(
            self.photos(),
            [row.image for row in rows],
            short_side=self.settings.short_side,
            workers=self.workers,
        )
        progress = tqdm(
            prepared,
            total=len(rows),
            unit="photos",
            desc="import",
            file=sys.stderr,
            mininterval=0.5,
            disable=None,
        )
        with self._spool.open("wb") as spool, progress:
            for row, photo in zip(rows, progress, strict=True):
                if photo.error:
                    reason, _, detail = photo.error.partition(": ")
                    named.append(DroppedRow(row.image, reason, detail))
                    self._check_bad_share(named, total, seen=len(stored) + len(named))
                    continue
                stored.append(_Stored(row, photo.image_id, spool.tell(), len(photo.image)))
                spool.write(photo.image)
        return stored, named[before:]

    def _check_bad_share(self, bad: Sequence[DroppedRow], total: int, *, seen: int) -> None:
        limit = self.settings.max_bad_share
        # One bad row of a dozen is dropped and named like one of a million, unless the limit is
        # zero.
        if len(bad) > max(limit * total, 1 if limit else 0):
            raise CatalogImportError(
                f"{len(bad)} of the first {seen} rows of {self.source} are bad, at most {limit:g} of {total} may be; "
                f"{_named(bad)}; correct them or raise --max-bad-share"
            )

    def _ordered(self, stored: Sequence[_Stored], split: Sequence[str]) -> dict[str, list[_Stored]]:
        """Records of each split in stored order: by hash of (seed, image_id), then SKU where a
        photo has several.
        """
        seed = self.settings.seed
        order = sorted(
            (i for i, name in enumerate(split) if name),
            # Another salt than in assign_splits: else each class's train photos would all come
            # after its test photos.
            key=lambda i: (order_key(seed, stored[i].image_id, "record"), stored[i].row.sku),
        )
        return {name: [stored[i] for i in order if split[i] == name] for name in SPLITS}

    def _borrow_titles(
        self, train: Sequence[_Stored], lender: TitleLender
    ) -> tuple[list[_Stored], BorrowedTitles]:
        """Training records, those without a title with a lent one. Others keep theirs: nobody reads
        the title of a test.
        """
        without = [i for i, item in enumerate(train) if not item.row.title.strip()]
        lent = lender(_Spooled(self._spool, [train[i] for i in without])) if without else []
        least = self.settings.titles_min_similarity
        taken = {
            i: one
            for i, one in zip(without, lent, strict=True)
            if one is not None and one.similarity >= least
        }
        filled = list(train)
        for i, one in taken.items():
            filled[i] = dataclasses.replace(
                train[i], row=dataclasses.replace(train[i].row, title=one.title)
            )
        named = [(train[i].row.image, one) for i, one in taken.items()]
        return filled, BorrowedTitles.of(
            lender.about, without=len(without), min_similarity=least, taken=named
        )

    def _write_tables(
        self,
        folder: Path,
        by_split: Mapping[str, Sequence[_Stored]],
        dropped: Sequence[DroppedRow],
        assignment: Assignment,
        stored: Sequence[_Stored],
        borrowed: BorrowedTitles | None,
    ) -> tuple[ClassTable, Tokenizer]:
        settings = self.settings
        table, labels = build_class_table(by_split, self.previous)
        train_text = [product_text(item.row.title, item.row.tags) for item in by_split["train"]]
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
        write_class_table(folder / CLASSES_FILE, table)
        for split in SPLITS:
            np.save(folder / f"labels_{split}.npy", labels[split])
        np.save(folder / VECTORS_FILE, vectors)
        tokenizer.save(folder)  # type: ignore[attr-defined]
        splits = {item.image_id: split for split in SPLITS for item in by_split[split]}
        write_split_table(folder / SPLITS_FILE, {**self.previous_splits, **splits})

        counts = table.counts["train"]
        boundary = default_head_boundary(counts)
        head = head_mask(counts, boundary)
        self.report = ImportReport.of(
            name=self.name,
            version=str(self.version),
            source=self.source.name,
            unused_columns=self.unused_columns,
            dropped=dropped,
            assignment=assignment,
            references=[item.row.image for item in stored],
            skus=[item.row.sku for item in stored],
            table=table,
            previous=self.previous,
            head_boundary=boundary,
            head=head,
            vocabulary=len(tokenizer.vocabulary) - 1,
            shared_words=vocabulary_overlap(token_ids, labels["train"], head),
            without_words=sum(len(ids) == 0 for ids in token_ids),
            borrowed_titles=borrowed,
        )
        description = {
            "format_version": FORMAT_VERSION,
            "package_version": __version__,
            "name": self.name,
            "version": str(self.version),
            "source": self.source.name,
            "source_sha256": self._source_sha256,
            "data_hash": self._data_hash(folder, by_split, labels),
            "num_classes": len(table),
            "num_photos": {split: len(items) for split, items in by_split.items()},
            "vocabulary_size": len(tokenizer.vocabulary),
            "head_boundary": boundary,
            "settings": dataclasses.asdict(settings),
            **({"titles_from": dict(self.titles.about)} if self.titles is not None else {}),
        }
        (folder / CATALOG_FILE).write_text(
            json.dumps(description, indent=1) + "\n", encoding="utf-8"
        )
        self.report.write(folder)
        return table, tokenizer

    def _data_hash(
        self,
        folder: Path,
        by_split: Mapping[str, Sequence[_Stored]],
        labels: Mapping[str, np.ndarray],
    ) -> str:
        """sha256 over the sorted records, then the tables, then what the stored pixels depend on."""
        digest = hashlib.sha256()
        lines = sorted(
            json.dumps(
                [
                    item.image_id,
                    int(label),
                    split,
                    row.title,
                    row.tags,
                    row.category,
                    row.box,
                    row.role,
                ]
            )
            for split in SPLITS
            for item, label in zip(by_split[split], labels[split], strict=True)
            for row in [item.row]
        )
        for line in lines:
            digest.update(line.encode() + b"\n")
        # The table of splits remembers photos that are gone.
        others = (_SPOOL_FILE, CATALOG_FILE, SPLITS_FILE, *REPORT_FILES)
        tables = [file for file in folder.iterdir() if file.name not in others]
        for file in sorted(tables):
            digest.update(file.name.encode() + b"\n" + file.read_bytes())
        digest.update(json.dumps([self.settings.short_side, JPEG_QUALITY]).encode())
        return digest.hexdigest()


def product_text(title: str, tags: str) -> str:
    """The text of a photo: its title, then its tags."""
    return f"{title} {tags}".strip()


def build_class_table(
    by_split: Mapping[str, Sequence[_Stored]], previous: ClassTable | None
) -> tuple[ClassTable, dict[str, np.ndarray]]:
    """The class table and int32 labels per split.

    Ids of `previous` stay; its SKUs without a photo are withdrawn; new SKUs follow in sorted order.
    Title and category are those of the class's first training photo, `catalogue` before `query`
    (without one, of any photo).
    """
    first: dict[str, ManifestRow] = {}
    everything = [item.row for split in SPLITS for item in by_split[split]]
    for role in ("catalogue", "query"):
        for row in (item.row for item in by_split["train"]):
            if row.role == role:
                first.setdefault(row.sku, row)
    for row in everything:
        first.setdefault(row.sku, row)

    old = list(previous.sku) if previous else []
    skus = old + sorted(set(first) - set(old))
    ids = {sku: c for c, sku in enumerate(skus)}
    labels = {
        split: np.array([ids[item.row.sku] for item in by_split[split]], np.int32)
        for split in SPLITS
    }
    titles, categories = [], []
    for c, sku in enumerate(skus):
        if sku in first:
            titles.append(first[sku].title)
            categories.append(first[sku].category)
        elif previous is not None:
            titles.append(previous.title[c])
            categories.append(previous.category[c])
    counts = {split: class_counts(labels[split], len(skus)) for split in SPLITS}
    withdrawn = np.array([sku not in first for sku in skus], dtype=bool)
    return ClassTable(skus, titles, categories, counts, withdrawn), labels


def _shards(items: Sequence[_Stored]) -> Iterator[Sequence[_Stored]]:
    start, size = 0, 0
    for end, item in enumerate(items):
        if size + item.size > _SHARD_BYTES and end > start:
            yield items[start:end]
            start, size = end, 0
        size += item.size
    yield items[start:]


def _named(bad: Iterable[DroppedRow]) -> str:
    first = [str(drop) for drop in bad if drop.bad][:3]
    return f"first: {'; '.join(first)}" if first else "all rows were left out on purpose"
