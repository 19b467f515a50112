"""Reads triplets (query photo, clicked product, product not clicked) and samples batches of them.

The losses compare the photos of a batch by their labels. So a query photo becomes a training
record with the label of the product that was clicked, and a photo of the product that was not
clicked is in the same batch: the triplet loss, the background suppression loss and the
classifier see it like any other photo. Triplets are drawn in proportion to their weights, so no
loss needs to know these.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sicot_jax.catalog.catalog import Catalog, Record, Split
from sicot_jax.catalog.sampling import TRIPLET_STREAM, RecordSampler, random_stream
from sicot_jax.config import DataConfig
from sicot_jax.config.batch_plan import BatchPlan, num_triplets
from sicot_jax.errors import InputError
from sicot_jax.events.store import query_photos


@dataclasses.dataclass
class SplitWithQueryPhotos:
    """The N records of the training split, followed by M records of query photos.

    A query record has the label of a product that was clicked, no title and no known box.

    Attributes:
      split: the training split.
      folder: holds the files of query photos.
      sources: [M], the name of a file in `folder`, or the index of the training record whose photo
        it is.
      sku: [M], the products clicked.
      labels: int32 [N + M].
    """

    split: Split
    folder: Path
    sources: Sequence[str | int]
    sku: Sequence[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        """Returns a record. Raises InputError where a query photo is missing or broken."""
        number = index - len(self.split)
        if number < 0:
            return self.split[index]
        source = self.sources[number]
        if isinstance(source, str):
            image_id, image = source, self._read_photo(source)
        else:
            record = self.split[source]
            image_id, image = record["image_id"], record["image"]  # type: ignore[assignment]
        return Record(
            image_id=image_id,
            image=image,
            sku=self.sku[number],
            class_id=int(self.labels[index]),
            title="",
            tags="",
            token_ids=np.zeros(0, np.int32),
            category="",
            box=np.zeros(4, np.float32),
            role="query",
            reference=str(source),
        )

    def _read_photo(self, name: str) -> np.ndarray:
        from sicot_jax.catalog.importing.photos import FolderPhotos
        from sicot_jax.common import image

        try:
            return image.decode_photo(FolderPhotos(self.folder).read(name))
        except (OSError, InputError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(
                f"query photo {self.folder / name}: {reason}; photos have to stay until the run "
                "has ended: train on a copy of the folder without broken ones"
            ) from error


TEXT_COLUMNS = ("request_id", "query_image_id", "clicked", "not_clicked")
_REMEDY = "wanted the Parquet file of `sicot events triplets`"


@dataclasses.dataclass(frozen=True)
class TripletTable:
    """The triplets that can be drawn.

    Attributes:
      split: the training records and the query photos behind them.
      query: int64 [T], records of `split`.
      clicked: int32 [T], classes.
      not_clicked: int32 [T], classes.
      weight: float64 [T], positive.
      num_file_rows: rows of the file, the skipped ones included.
      skipped: reason -> rows that were left out.
    """

    split: SplitWithQueryPhotos
    query: np.ndarray
    clicked: np.ndarray
    not_clicked: np.ndarray
    weight: np.ndarray
    num_file_rows: int
    skipped: dict[str, int]

    def summary(self) -> str:
        """Returns one line: how many triplets and photos, and how many rows were left out."""
        first = len(self.split.split)
        photos = {
            query if query < first else self.split.sources[query - first]
            for query in np.unique(self.query).tolist()
        }
        return (
            f"{len(self.query):,} of {self.num_file_rows:,} triplets, "
            f"query photos: {len(photos):,}{_skipped_text(self.skipped)}"
        )

    @property
    def digest(self) -> str:
        """SHA-256, equal where the same triplets and photos can be drawn (of one catalogue)."""
        digest = hashlib.sha256("\n".join(map(str, self.split.sources)).encode())
        for array in (self.query, self.clicked, self.not_clicked, self.weight):
            digest.update(array.tobytes())
        return digest.hexdigest()


def open_triplets(data: DataConfig, catalog: Catalog) -> TripletTable:
    """Reads `data.triplets` and keeps the triplets that can be used with this catalogue.

    A triplet is kept where both products have training photos and its query photo is there: a file
    in `data.queries`, or else the training photo of that image_id.

    Args:
      data: `triplets` and `queries` are read.
      catalog: the training data.

    Returns:
      The triplets.

    Raises:
      InputError: no such file, a file of another kind, or no triplet that can be used.
    """
    path, split = Path(data.triplets), catalog.splits["train"]
    table = _read_parquet(path)
    weight = table.weight
    if not np.all(np.isfinite(weight) & (weight >= 0)):
        raise InputError(f"data.triplets={path}: a weight that is negative or no number; {_REMEDY}")
    class_of = {sku: c for c, sku in enumerate(catalog.classes.sku)}
    clicked = _class_ids(table.text["clicked"], class_of)
    not_clicked = _class_ids(table.text["not_clicked"], class_of)
    source_number, sources = _query_sources(
        table, Path(data.queries) if data.queries else None, split
    )

    photos = np.bincount(split.labels, minlength=len(class_of))
    source_labels = [split.labels[s] if isinstance(s, int) else -1 for s in sources]
    query_label = np.array([*source_labels, -1], np.int32)[source_number]
    usable = np.ones(len(weight), bool)
    skipped = {}
    for reason, excluded in (
        ("of a product that is not in the catalogue", (clicked < 0) | (not_clicked < 0)),
        (
            "of a product without a training photo",
            (photos[clicked] == 0) | (photos[not_clicked] == 0),
        ),
        ("whose query photo is missing", source_number < 0),
        (
            "whose query photo is the only photo of the clicked product",
            (query_label == clicked) & (photos[clicked] == 1),
        ),
        ("whose query photo shows the product not clicked", query_label == not_clicked),
        ("of one product twice", clicked == not_clicked),
        ("of weight 0", weight == 0),
    ):
        if count := int(np.sum(usable & excluded)):
            skipped[reason] = count
        usable &= ~excluded
    if not usable.any():
        raise InputError(
            f"data.triplets={path}: no triplet to learn from"
            f"{_skipped_text(skipped) or ', no row'}; {_REMEDY}, "
            "made of this catalogue's events, and data.queries with their photos"
        )
    query, with_queries = _add_query_records(
        split,
        Path(data.queries),
        sources,
        catalog.classes.sku,
        source_number[usable],
        clicked[usable],
    )
    return TripletTable(
        with_queries,
        query,
        clicked[usable],
        not_clicked[usable],
        weight[usable],
        num_file_rows=len(usable),
        skipped=skipped,
    )


def _skipped_text(skipped: dict[str, int]) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
    return f"; left out: {reasons}" if reasons else ""


class _TextColumn(NamedTuple):
    """A dictionary-encoded column: its distinct values, and int64 [T] which of them a row has."""

    values: list[str]
    codes: np.ndarray


class _ParquetTable(NamedTuple):
    text: dict[str, _TextColumn]  # by `TEXT_COLUMNS`
    weight: np.ndarray  # float64 [T]


def _read_parquet(path: Path) -> _ParquetTable:
    import pyarrow as pa
    from pyarrow import parquet

    columns = [*TEXT_COLUMNS, "weight"]
    try:
        with parquet.ParquetFile(path) as file:
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise InputError(
                    f"data.triplets={path}: no column {' and '.join(missing)}; "
                    f"{_REMEDY}, made by this version"
                )
            table = file.read(columns=columns)
        text = {}
        for name in TEXT_COLUMNS:
            encoded = (
                table[name]
                .cast(pa.large_string())
                .fill_null("")
                .combine_chunks()
                .dictionary_encode()
            )
            codes = encoded.indices.to_numpy().astype(np.int64)
            text[name] = _TextColumn(encoded.dictionary.to_pylist(), codes)
        return _ParquetTable(text, table["weight"].cast(pa.float64()).to_numpy())
    except (OSError, pa.ArrowException) as error:
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else str(error).split("\n")[0][:120]
        )
        raise InputError(f"data.triplets={path}: {reason}; {_REMEDY}") from error


def _class_ids(column: _TextColumn, class_of: dict[str, int]) -> np.ndarray:
    """Returns class ids, int32 [T], -1 where the catalogue has no such SKU."""
    return np.array([class_of.get(sku, -1) for sku in column.values], np.int32)[column.codes]


def _query_sources(
    table: _ParquetTable, folder: Path | None, split: Split
) -> tuple[np.ndarray, list[str | int]]:
    """Returns each row's source number, int64 [T], -1 where there is no photo, and the sources.

    A source is the name of a file in `folder`, or a record of the split.
    """
    requests, images = table.text["request_id"], table.text["query_image_id"]
    pairs, pair_of_row = np.unique(
        requests.codes * len(images.values) + images.codes, return_inverse=True
    )
    names = [
        (requests.values[pair // len(images.values)], images.values[pair % len(images.values)])
        for pair in pairs.tolist()
    ]
    find_file = query_photos(folder) if folder is not None else lambda *_: None
    sources: list[str | int | None] = [
        file.name if (file := find_file(*name)) else None for name in names
    ]
    if None in sources:  # only then: it reads every record
        record_of = {split[i]["image_id"]: i for i in reversed(range(len(split)))}
        sources = [
            record_of.get(image) if source is None else source
            for (_, image), source in zip(names, sources, strict=True)
        ]
    number_of: dict[str | int, int] = {}
    numbers = [
        -1 if source is None else number_of.setdefault(source, len(number_of)) for source in sources
    ]
    return np.array(numbers, np.int64)[pair_of_row], list(number_of)


def _add_query_records(
    split: Split,
    folder: Path,
    sources: Sequence[str | int],
    sku: Sequence[str],
    source_number: np.ndarray,
    clicked: np.ndarray,
) -> tuple[np.ndarray, SplitWithQueryPhotos]:
    """Returns each triplet's query record, int64 [T], and the split with those records.

    There is one record for each source and class clicked with it. A training record that has that
    class already is used itself.
    """
    pairs, pair_of_row = np.unique(source_number * len(sku) + clicked, return_inverse=True)
    record_of_pair = np.zeros(len(pairs), np.int64)
    added: list[str | int] = []
    labels: list[int] = []
    for i, pair in enumerate(pairs.tolist()):
        source, label = sources[pair // len(sku)], pair % len(sku)
        if isinstance(source, int) and split.labels[source] == label:
            record_of_pair[i] = source
            continue
        record_of_pair[i] = len(split) + len(added)
        added.append(source)
        labels.append(label)
    all_labels = np.concatenate([split.labels, np.array(labels, np.int32)]).astype(np.int32)
    with_queries = SplitWithQueryPhotos(
        split, folder, added, [sku[label] for label in labels], all_labels
    )
    return record_of_pair[pair_of_row], with_queries


@dataclasses.dataclass(frozen=True)
class TripletSampler:
    """Chooses the records of a batch, a pure function of (seed, step) as `RecordSampler` is.

    Each micro-batch holds `num_triplets(micro_batch, share)` triplets (query, clicked, not clicked;
    one after the other), drawn with probability proportional to weight, then ordinary records.
    Micro-batch p of P has the rows p, p + P, ... of the batch: a triplet is never cut.

    Attributes:
      table: the triplets.
      records: draws the ordinary records.
      plan: records of each step, triplets included.
      micro_batch: records of a micro-batch.
      share: share of a micro-batch's records that come in triplets, in [0, 1].
    """

    table: TripletTable
    records: RecordSampler
    plan: BatchPlan
    micro_batch: int
    share: float

    @classmethod
    def with_record_sampler(
        cls, table: TripletTable, records: RecordSampler, *, micro_batch: int, share: float
    ) -> TripletSampler:
        """Builds a sampler that replaces a share of another sampler's records by triplets.

        Args:
          table: the triplets.
          records: would draw the entire batch from the same split.
          micro_batch: records of a micro-batch.
          share: share of a micro-batch's records that come in triplets, in [0, 1].

        Returns:
          The sampler, for batches of the same sizes.
        """
        remaining = micro_batch - 3 * num_triplets(micro_batch, share)
        ordinary = dataclasses.replace(
            records, batch_size=records.batch_size // micro_batch * remaining
        )
        return cls(table, ordinary, records.plan, micro_batch, share)

    def __call__(self, step: int) -> np.ndarray:
        """Returns the record indices of the global batch of that step, int64 [plan.size(step)]."""
        parts = self.plan.size(step) // self.micro_batch
        triplets = self._draw_triplets(step, parts * num_triplets(self.micro_batch, self.share))
        both = [triplets.reshape(parts, -1), self.records(step).reshape(parts, -1)]
        return np.concatenate(both, 1).T.ravel()

    def _draw_triplets(self, step: int, count: int) -> np.ndarray:
        """Returns record indices (query, clicked, not clicked), int64 [count, 3]."""
        table, cumulative = self.table, self._cumulative_weights
        draws = random_stream(TRIPLET_STREAM, self.records.seed, step).random((3, count))
        row = np.searchsorted(cumulative, draws[0] * cumulative[-1], side="right")
        row = np.minimum(row, len(cumulative) - 1)
        query = table.query[row]
        clicked = self._draw_photo(table.clicked[row], draws[1], query)
        not_clicked = self._draw_photo(table.not_clicked[row], draws[2], query)
        return np.stack([query, clicked, not_clicked], 1)

    def _draw_photo(self, label: np.ndarray, draws: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Returns a training photo of each class, uniform over its photos without the query."""
        order, rank, starts, counts = self._by_class
        start, count = starts[label], counts[label]
        query_rank = rank[np.minimum(query, len(rank) - 1)] - start
        in_class = (query < len(rank)) & (query_rank >= 0) & (query_rank < count)
        chosen = (draws * (count - in_class)).astype(np.int64)
        return order[start + chosen + (in_class & (chosen >= query_rank))]

    @functools.cached_property
    def _cumulative_weights(self) -> np.ndarray:
        return np.cumsum(self.table.weight)

    @functools.cached_property
    def _by_class(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns records sorted by class, each record's rank there, class starts and counts."""
        labels = self.records.labels
        order = np.argsort(labels, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        counts = np.bincount(labels)
        return order, rank, np.cumsum(counts) - counts, counts
