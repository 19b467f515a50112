"""Builds a TFDS data set from rows and photos, in a folder that appears when it is complete."""

from __future__ import annotations

import dataclasses
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
from sicot_jax.catalog.importing.catalog_tables import (
    CatalogTables,
    build_tables,
    data_hash,
    product_text,
    write_tables,
)
from sicot_jax.catalog.importing.manifest import read_source
from sicot_jax.catalog.importing.manifest_rows import (
    DroppedRow,
    ManifestError,
    ManifestRow,
    SourceNotes,
)
from sicot_jax.catalog.importing.near_copies import find_near_copies
from sicot_jax.catalog.importing.photos import (
    FolderPhotos,
    PhotoReader,
    prepare_photos,
    source_sha256,
)
from sicot_jax.catalog.importing.report import ImportReport, ReportInputs, TitleTransferReport
from sicot_jax.catalog.importing.settings import CatalogImportError, ImportSettings, TitleSource
from sicot_jax.catalog.importing.splits import (
    SplitAssignment,
    SplitPhoto,
    SplitRules,
    assign_splits,
    order_key,
)
from sicot_jax.catalog.importing.spool import (
    SPOOL_FILE,
    PhotosBySplit,
    SpooledPhotos,
    StoredPhoto,
    split_shards,
)
from sicot_jax.catalog.sources.tables import CATALOG_FILE, FORMAT_VERSION
from sicot_jax.catalog.statistics import default_head_boundary


@dataclasses.dataclass(frozen=True)
class ImportJob:
    """What one import reads and where it writes.

    Attributes:
      source: manifest file, or folder of the data set.
      data_dir: the catalogue is written to `data_dir/name/version`.
      settings: how photos, words and splits are made.
      workers: number of processes that decode photos.
      name: name of the catalogue; None takes the builder's.
      version: version of the catalogue, "MAJOR.MINOR.PATCH".
      previous: class table of the previous version; its class ids stay.
      previous_splits: image_id -> split of photos of the previous version.
      title_source: gives training photos without a title one.
    """

    source: Path
    data_dir: Path
    settings: ImportSettings
    workers: int = 1
    name: str | None = None
    version: str = "1.0.0"
    previous: ClassTable | None = None
    previous_splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    title_source: TitleSource | None = None


class CatalogBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base class of all catalogues on disk; a subclass yields rows and says how photos are read.

    ShardBasedBuilder and not GeneratorBasedBuilder: the latter's shuffle needs TensorFlow for a
    split above 1 GB. Records are in the order of a hash of (seed, image_id), so that the order
    depends on neither rows nor workers.
    """

    name = "catalogue"
    VERSION = tfds.core.Version("1.0.0")
    MIN_PHOTOS = 1
    # Whether the rows name all test photos; only validation is then held out of the others.
    OFFICIAL_TEST = False
    # Nothing is downloaded; TFDS would look for checksums with a package it does not depend on.
    url_infos = None

    def __init__(self, job: ImportJob):
        self.job = job
        self.source = Path(job.source)
        self.notes = SourceNotes()  # `rows` may add some
        self.name = job.name or self.name
        self.VERSION = tfds.core.Version(job.version)
        self.report: ImportReport | None = None
        super().__init__(data_dir=job.data_dir)

    def rows(self) -> Iterable[ManifestRow | DroppedRow]:
        """Returns all rows of the source, also dropped ones."""
        raise NotImplementedError

    def photos(self) -> PhotoReader:
        """Returns the reader of the photos that `ManifestRow.image` names."""
        raise NotImplementedError

    def require(self, *names: str) -> Path:
        """Returns the first of these files or folders that is in the source folder.

        Args:
          *names: alternatives, relative to the source folder.

        Returns:
          Its path.

        Raises:
          ManifestError: none is there.
        """
        for name in names:
            if (self.source / name).exists():
                return self.source / name
        raise ManifestError(
            f"no {' or '.join(names)} in {self.source}; place the data set there, "
            f"see data/{type(self).name}"
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
        settings = self.job.settings
        if self.OFFICIAL_TEST and (settings.test_per_class or settings.test_share):
            raise CatalogImportError(
                f"--test-per-class or --test-share with {type(self).name}, "
                "whose test split is its owners'; leave them out"
            )
        folder = Path(self.data_path)  # the incomplete folder, which TFDS renames at the end
        self._spool = folder / SPOOL_FILE
        # Before the rows: a source that changes meanwhile is then noticed.
        self._source_sha256 = source_sha256(self.source)
        rows, dropped = self._read_rows()
        total = len(rows) + sum(drop.bad for drop in dropped)
        stored, broken = self._store_photos(rows, total=total, bad=dropped)
        dropped += broken
        if not stored:
            raise CatalogImportError(
                f"no photo of {self.source} can be used, wanted at least 1; {_first_bad(dropped)}"
            )
        assignment = self._assign_splits(stored)
        by_split = self._ordered(stored, assignment.split)
        if not by_split["train"]:
            raise CatalogImportError(
                f"no photo of {self.source} is in the train split, wanted at least 1; "
                "check column split"
            )
        transfer = None
        if self.job.title_source is not None:
            by_split["train"], transfer = self._transfer_titles(
                by_split["train"], self.job.title_source
            )
        tables = build_tables(by_split, self.job.previous, settings)
        write_tables(folder, tables, by_split, self.job.previous_splits)
        self.report = self._make_report(tables, dropped, assignment, stored, transfer)
        self._write_description(folder, tables, by_split)
        self.report.write(folder)
        class_ids = {sku: c for c, sku in enumerate(tables.classes.sku)}
        return {
            split: [
                partial(self._examples, shard, class_ids, tables.tokenizer)
                for shard in split_shards(photos)
            ]
            for split, photos in by_split.items()
            if photos
        }

    def _examples(
        self, photos: Sequence[StoredPhoto], class_ids: Mapping[str, int], tokenizer: Tokenizer
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        progress = tqdm(
            photos,
            unit="photos",
            desc="write",
            file=sys.stderr,
            mininterval=0.5,
            leave=False,
            disable=None,
        )
        with self._spool.open("rb") as spool, progress:
            for key, photo in enumerate(progress):
                spool.seek(photo.offset)
                row = photo.row
                yield (
                    key,
                    {
                        "image_id": photo.image_id,
                        "image": spool.read(photo.size),
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
        settings = self.job.settings
        rows: list[ManifestRow] = []
        dropped: list[DroppedRow] = []
        for row in self.rows():
            if isinstance(row, DroppedRow):
                dropped.append(row)
            else:
                rows.append(row)
            if settings.max_rows is not None and len(rows) >= settings.max_rows:
                break
        minimum = self.MIN_PHOTOS if settings.min_photos is None else settings.min_photos
        counts = Counter(row.sku for row in rows)
        reason = f"class under {minimum} photos (min_photos)"
        dropped += [
            DroppedRow(row.image, reason, row.sku, bad=False)
            for row in rows
            if counts[row.sku] < minimum
        ]
        return [row for row in rows if counts[row.sku] >= minimum], dropped

    def _store_photos(
        self, rows: Sequence[ManifestRow], *, total: int, bad: Iterable[DroppedRow]
    ) -> tuple[list[StoredPhoto], list[DroppedRow]]:
        """Decodes all photos into the spool file; stops once too large a share of rows is bad."""
        bad_rows = [drop for drop in bad if drop.bad]
        before = len(bad_rows)
        stored: list[StoredPhoto] = []
        self._check_bad_share(bad_rows, total, seen=total - len(rows))
        prepared = prepare_photos(
            self.photos(),
            [row.image for row in rows],
            short_side=self.job.settings.short_side,
            workers=self.job.workers,
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
                    bad_rows.append(DroppedRow(row.image, reason, detail))
                    self._check_bad_share(bad_rows, total, seen=len(stored) + len(bad_rows))
                    continue
                stored.append(StoredPhoto(row, photo.image_id, spool.tell(), len(photo.image)))
                spool.write(photo.image + photo.fingerprint)
        return stored, bad_rows[before:]

    def _check_bad_share(self, bad: Sequence[DroppedRow], total: int, *, seen: int) -> None:
        limit = self.job.settings.max_bad_share
        # A single bad row, even of a dozen, never stops an import, unless the limit is zero.
        if len(bad) > max(limit * total, 1 if limit else 0):
            raise CatalogImportError(
                f"{len(bad)} of the first {seen} rows of {self.source} are bad, at most "
                f"{limit:g} of {total} may be; {_first_bad(bad)}; correct them or raise "
                "--max-bad-share"
            )

    def _assign_splits(self, stored: Sequence[StoredPhoto]) -> SplitAssignment:
        settings = self.job.settings
        rules = SplitRules(
            seed=settings.seed,
            test_per_class=settings.test_per_class,
            test_share=settings.test_share,
            tail_cut=settings.tail_cut,
            official_test=self.OFFICIAL_TEST,
        )
        photos = [
            SplitPhoto(photo.image_id, photo.row.sku, photo.row.image, photo.row.split, copies)
            for photo, copies in zip(stored, find_near_copies(self._spool, stored), strict=True)
        ]
        return assign_splits(photos, rules, self.job.previous_splits)

    def _ordered(
        self, stored: Sequence[StoredPhoto], split: Sequence[str]
    ) -> dict[str, list[StoredPhoto]]:
        """Orders the records of each split by hash of (seed, image_id), then by SKU."""
        seed = self.job.settings.seed
        order = sorted(
            (i for i, name in enumerate(split) if name),
            # Another salt than in assign_splits: else each class's train photos would all come
            # after its test photos.
            key=lambda i: (order_key(seed, stored[i].image_id, "record"), stored[i].row.sku),
        )
        return {name: [stored[i] for i in order if split[i] == name] for name in SPLITS}

    def _transfer_titles(
        self, train: Sequence[StoredPhoto], source: TitleSource
    ) -> tuple[list[StoredPhoto], TitleTransferReport]:
        """Fills in missing titles of training records alone: no test reads a title."""
        untitled = [i for i, photo in enumerate(train) if not photo.row.title.strip()]
        matches = (
            source.find_titles(SpooledPhotos(self._spool, [train[i] for i in untitled]))
            if untitled
            else []
        )
        minimum = self.job.settings.titles_min_similarity
        transferred = {
            i: match
            for i, match in zip(untitled, matches, strict=True)
            if match is not None and match.similarity >= minimum
        }
        titled = list(train)
        for i, match in transferred.items():
            row = dataclasses.replace(train[i].row, title=match.title)
            titled[i] = dataclasses.replace(train[i], row=row)
        return titled, TitleTransferReport.create(
            source.provenance,
            photos_without_title=len(untitled),
            min_similarity=minimum,
            transferred=[(train[i].row.image, match) for i, match in transferred.items()],
        )

    def _make_report(
        self,
        tables: CatalogTables,
        dropped: Sequence[DroppedRow],
        assignment: SplitAssignment,
        stored: Sequence[StoredPhoto],
        transfer: TitleTransferReport | None,
    ) -> ImportReport:
        return ImportReport.create(
            ReportInputs(
                name=self.name,
                version=str(self.version),
                source=self.source.name,
                notes=self.notes,
                dropped=dropped,
                assignment=assignment,
                photos=stored,
                tables=tables,
                previous=self.job.previous,
                title_transfer=transfer,
            )
        )

    def _write_description(
        self, folder: Path, tables: CatalogTables, by_split: PhotosBySplit
    ) -> None:
        settings, source = self.job.settings, self.job.title_source
        description = {
            "format_version": FORMAT_VERSION,
            "package_version": __version__,
            "name": self.name,
            "version": str(self.version),
            "source": self.source.name,
            "source_sha256": self._source_sha256,
            "data_hash": data_hash(folder, by_split, tables.labels, settings),
            "num_classes": len(tables.classes),
            "num_photos": {split: len(photos) for split, photos in by_split.items()},
            "vocabulary_size": len(tables.tokenizer.vocabulary),
            "head_boundary": default_head_boundary(tables.classes.counts["train"]),
            "settings": dataclasses.asdict(settings),
            **({"title_source": dict(source.provenance)} if source is not None else {}),
        }
        (folder / CATALOG_FILE).write_text(
            json.dumps(description, indent=1) + "\n", encoding="utf-8"
        )


def _first_bad(dropped: Iterable[DroppedRow]) -> str:
    """The first bad rows; where there are none, the first rows that were left out."""
    dropped = list(dropped)
    first = [drop for drop in dropped if drop.bad] or dropped
    return f"first: {'; '.join(map(str, first[:3]))}" if first else "it has no rows"


class ManifestBuilder(CatalogBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builds a catalogue from a manifest file, or from a folder with one folder per SKU."""

    def rows(self) -> Iterable[ManifestRow | DroppedRow]:
        """Returns the rows of the manifest or folder."""
        return read_source(self.source, self.notes)

    def photos(self) -> FolderPhotos:
        """Returns a reader of photos relative to the manifest or folder."""
        return FolderPhotos(self.source if self.source.is_dir() else self.source.parent)
