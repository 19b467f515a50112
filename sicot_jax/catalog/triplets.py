"""Learning from clicks: batches made of triplets (query photo, photo of what was clicked, photo of
what was not).

The losses compare the photos of a batch by their labels. So a query photo is a training record with
the label of the product
that was clicked, and what was shown and not clicked lies in the same batch: `losses.triplet_loss`,
  `losses.told_outside` and the classifier see it as they see any photo. Triplets are drawn in
  proportion to their weights, so no loss needs to know these.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.catalog.catalog import Catalog, Record, Split
from sicot_jax.catalog.sampling import TRIPLETS, Sampler, generator
from sicot_jax.config import DataConfig
from sicot_jax.config.batch_plan import BatchPlan, triplets_in
from sicot_jax.errors import InputError
from sicot_jax.events.query_photos import query_photos

COLUMNS = ("request_id", "query_image_id", "clicked", "not_clicked", "weight")
_WANTED = "wanted the Parquet file of `sicot events triplets`"


@dataclasses.dataclass
class WithQueries:
    """The training split, and behind its N records those of queries: a photo with the label of a
    product that was clicked.

    sources: of record N + i: the name of a file in `folder`, or the record of the split whose photo
      it is. A query has no title and no known box.
    """

    split: Split
    folder: Path
    sources: Sequence[str | int]  # [M]
    sku: Sequence[str]  # [M]
    labels: np.ndarray  # int32 [N + M]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        """InputError for a query photo that is gone or broken."""
        number = index - len(self.split)
        if number < 0:
            return self.split[index]
        source = self.sources[number]
        return Record(
            image_id=str(source) if isinstance(source, str) else self.split[source]["image_id"],
            image=self._decoded(source) if isinstance(source, str) else self.split[source]["image"],
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

    def _decoded(self, name: str) -> np.ndarray:
        from sicot_jax.catalog.importing.photos import FolderPhotos
        from sicot_jax.common import image

        try:
            return image.decode(FolderPhotos(self.folder).read(name))
        except (OSError, InputError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise InputError(
                f"query photo {self.folder / name}: {why}; photos have to stay until the run has ended: train on a copy of "
                "the folder without broken ones"
            ) from error


@dataclasses.dataclass(frozen=True)
class Clicks:
    """Triplets that can be drawn. rows: of the file; left_out: reason -> rows."""

    split: WithQueries
    query: np.ndarray  # int64 [T], records of `split`
    clicked: np.ndarray  # int32 [T], classes, likewise
    not_clicked: np.ndarray
    weight: np.ndarray  # float64 [T], positive
    rows: int
    left_out: dict[str, int]

    def summary(self) -> str:
        """One line."""
        first = len(self.split.split)
        photos = {
            q if q < first else self.split.sources[q - first]
            for q in np.unique(self.query).tolist()
        }
        return f"{len(self.query):,} of {self.rows:,} triplets, query photos: {len(photos):,}{_told(self.left_out)}"

    @property
    def digest(self) -> str:
        """SHA-256, equal where the same triplets and photos can be drawn (of the same catalogue)."""
        found = hashlib.sha256("\n".join(map(str, self.split.sources)).encode())
        for array in (self.query, self.clicked, self.not_clicked, self.weight):
            found.update(array.tobytes())
        return found.hexdigest()


def open_clicks(data: DataConfig, catalog: Catalog) -> Clicks:
    """The triplets of `data.triplets` whose products have training photos and whose query photo is
    there: a file in `data.queries` (`events.photos`), else the training photo of that image_id.

    InputError: no such file, another one, or no triplet that can be used.
    """
    path, split = Path(data.triplets), catalog.splits["train"]
    table = _read(path)
    weight = table["weight"]
    if not np.all(np.isfinite(weight) & (weight >= 0)):
        raise InputError(f"data.triplets={path}: a weight that is negative or no number; {_WANTED}")
    class_of = {sku: c for c, sku in enumerate(catalog.classes.sku)}
    clicked, not_clicked = (_classes(table[name], class_of) for name in ("clicked", "not_clicked"))
    number, sources = _sources(table, Path(data.queries) if data.queries else None, split)

    photos = np.bincount(split.labels, minlength=len(class_of))
    own = np.array(
        [split.labels[s] if isinstance(s, int) else -1 for s in sources] + [-1], np.int32
    )[number]
    unknown = (clicked < 0) | (not_clicked < 0)
    left = np.ones(len(weight), bool)
    left_out = {}
    for reason, wrong in (
        ("of a product that the catalogue has not", unknown),
        (
            "of a product without a training photo",
            (photos[clicked] == 0) | (photos[not_clicked] == 0),
        ),
        ("whose query photo is gone", number < 0),
        (
            "whose query photo is all that the clicked product has",
            (own == clicked) & (photos[clicked] == 1),
        ),
        ("whose query photo shows what was not clicked", own == not_clicked),
        ("of one product twice", clicked == not_clicked),
        ("of weight 0", weight == 0),
    ):
        if count := int(np.sum(left & wrong)):
            left_out[reason] = count
        left &= ~wrong
    if not left.any():
        raise InputError(
            f"data.triplets={path}: no triplet to learn from{_told(left_out) or ', no row'}; {_WANTED}, made of this "
            "catalogue's events, and data.queries with their photos"
        )
    used = number[left], clicked[left], not_clicked[left], weight[left]
    return _joined(
        split, Path(data.queries), sources, catalog.classes.sku, used, len(left), left_out
    )


def _told(left_out: dict[str, int]) -> str:
    told = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
    return f"; left out: {told}" if told else ""


def _read(path: Path) -> dict[str, Any]:
    """Column -> (values, int64 [T] which of them), but weight: float64 [T]."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
                raise InputError(
                    f"data.triplets={path}: no column {' and '.join(missing)}; {_WANTED}, made by this version"
                )
            table = file.read(columns=list(COLUMNS))
        columns: dict[str, Any] = {"weight": table["weight"].cast(pa.float64()).to_numpy()}
        for name in COLUMNS[:-1]:
            texts = (
                table[name]
                .cast(pa.large_string())
                .fill_null("")
                .combine_chunks()
                .dictionary_encode()
            )
            columns[name] = texts.dictionary.to_pylist(), texts.indices.to_numpy().astype(np.int64)
        return columns
    except (OSError, pa.ArrowException) as error:
        why = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else str(error).split("\n")[0][:120]
        )
        raise InputError(f"data.triplets={path}: {why}; {_WANTED}") from error


def _classes(column: tuple[list[str], np.ndarray], class_of: dict[str, int]) -> np.ndarray:
    """int32 [T], -1 where the catalogue has no such SKU."""
    skus, which = column
    return np.array([class_of.get(sku, -1) for sku in skus], np.int32)[which]


def _sources(
    table: dict[str, Any], folder: Path | None, split: Split
) -> tuple[np.ndarray, list[str | int]]:
    """(int64 [T], -1 where there is no photo; what it counts: names of files, and records of the
    split).
    """
    (requests, request), (images, image) = table["request_id"], table["query_image_id"]
    pairs, which = np.unique(request * len(images) + image, return_inverse=True)
    find = query_photos(folder) if folder is not None else lambda *_: None
    names = [(requests[pair // len(images)], images[pair % len(images)]) for pair in pairs.tolist()]
    found: list[str | int | None] = [path.name if (path := find(*name)) else None for name in names]
    if None in found:  # only then: it reads every record
        record_of = {split[i]["image_id"]: i for i in reversed(range(len(split)))}
        found = [
            record_of.get(name[1]) if at is None else at
            for name, at in zip(names, found, strict=True)
        ]
    number_of: dict[str | int, int] = {}
    numbers = [-1 if at is None else number_of.setdefault(at, len(number_of)) for at in found]
    return np.array(numbers, np.int64)[which], list(number_of)


def _joined(
    split: Split,
    folder: Path,
    sources: Sequence[str | int],
    sku: Sequence[str],
    used: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    rows: int,
    left_out: dict[str, int],
) -> Clicks:
    """A record for each source and class clicked with it; a record of the split that has that class
    stands for itself.
    """
    number, clicked, not_clicked, weight = used
    pairs, which = np.unique(number * len(sku) + clicked, return_inverse=True)
    records = np.zeros(len(pairs), np.int64)
    added: list[str | int] = []
    labels: list[int] = []
    for i, pair in enumerate(pairs.tolist()):
        source, label = sources[pair // len(sku)], pair % len(sku)
        if isinstance(source, int) and split.labels[source] == label:
            records[i] = source
            continue
        records[i] = len(split) + len(added)
        added.append(source)
        labels.append(label)
    every = np.concatenate([split.labels, np.array(labels, np.int32)]).astype(np.int32)
    queries = WithQueries(split, folder, added, [sku[label] for label in labels], every)
    return Clicks(queries, records[which], clicked, not_clicked, weight, rows, left_out)


@dataclasses.dataclass(frozen=True)
class ClickSampler:
    """Which records make the batch of a step, a pure function of (seed, step) as
    `sampling.Sampler`.

    Each micro-batch holds `triplets_in(micro_batch, share)` triplets (query, clicked, not clicked;
    one after the other), drawn with probability proportional to weight, then what `ordinary` draws.
    Micro-batch p of P has the rows p, p + P, ... of the batch (`step.make_train_step`): a triplet
    is never cut.
    """

    clicks: Clicks
    ordinary: Sampler
    plan: BatchPlan
    micro_batch: int
    share: float

    @classmethod
    def make(
        cls, clicks: Clicks, sampler: Sampler, *, micro_batch: int, share: float
    ) -> ClickSampler:
        """sampler: what would draw the whole batch from the same split."""
        rest = micro_batch - 3 * triplets_in(micro_batch, share)
        ordinary = dataclasses.replace(sampler, batch_size=sampler.batch_size // micro_batch * rest)
        return cls(clicks, ordinary, sampler.plan, micro_batch, share)

    def __call__(self, step: int) -> np.ndarray:
        """Record indices of the global batch of that step, int64 [plan.size(step)]."""
        parts = self.plan.size(step) // self.micro_batch
        triplets = self._triplets(step, parts * triplets_in(self.micro_batch, self.share))
        both = [triplets.reshape(parts, -1), self.ordinary(step).reshape(parts, -1)]
        return np.concatenate(both, 1).T.ravel()

    def _triplets(self, step: int, count: int) -> np.ndarray:
        """int64 [count, 3]."""
        clicks, cumulative = self.clicks, self._cumulative
        chance = generator(TRIPLETS, self.ordinary.seed, step).random((3, count))
        row = np.searchsorted(cumulative, chance[0] * cumulative[-1], side="right")
        row = np.minimum(row, len(cumulative) - 1)
        query = clicks.query[row]
        clicked = self._photo(clicks.clicked[row], chance[1], query)
        return np.stack([query, clicked, self._photo(clicks.not_clicked[row], chance[2], query)], 1)

    def _photo(self, label: np.ndarray, chance: np.ndarray, query: np.ndarray) -> np.ndarray:
        """A training photo of each class, any with the same chance, but not the query itself."""
        order, place, starts, counts = self._by_class
        start, count = starts[label], counts[label]
        own = place[np.minimum(query, len(place) - 1)] - start
        among = (query < len(place)) & (own >= 0) & (own < count)
        chosen = (chance * (count - among)).astype(np.int64)
        return order[start + chosen + (among & (chosen >= own))]

    @functools.cached_property
    def _cumulative(self) -> np.ndarray:
        return np.cumsum(self.clicks.weight)

    @functools.cached_property
    def _by_class(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Training records sorted by class, the place of each there, where each class starts, how
        many it has.
        """
        labels = self.ordinary.labels
        order = np.argsort(labels, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        counts = np.bincount(labels)
        return order, place, np.cumsum(counts) - counts, counts
