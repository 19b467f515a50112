"""Records -> host batches -> global arrays. Training batches carry words; photo batches cannot."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

import jax
import numpy as np

from sicot_jax.catalog.catalog import Catalog, Record, Split
from sicot_jax.catalog.sampling import Sampler, permute
from sicot_jax.catalog.tokenizer import mask_words
from sicot_jax.catalog.triplets import Clicks, ClickSampler, open_clicks
from sicot_jax.config import Config
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError

Batch = dict[str, np.ndarray]
_PREFETCH = 4  # host batches made ahead


class TitleReader:
    """Token ids of a training record's title in the variant that the config asks for; shuffles are
    keyed by the seed.
    """

    def __init__(self, catalog: Catalog, config: Config):
        self.split = catalog.splits["train"]
        self.tokenizer = catalog.tokenizer
        self.config = config.data
        self.seed = config.seed
        if self.config.title == "shuffled_within_class":
            labels = self.split.labels
            self.order = np.argsort(labels, kind="stable")
            self.rank = np.empty_like(self.order)
            self.rank[self.order] = np.arange(len(labels))
            _, self.starts, self.counts = np.unique(
                labels[self.order], return_index=True, return_counts=True
            )
            self.row = np.searchsorted(np.unique(labels), labels)

    def _donor(self, index: int) -> int:
        """The record whose title `index` gets: a fixed derangement-like shuffle by the seed."""
        if self.config.title == "shuffled":
            return int(
                permute(
                    np.asarray([index]), size=len(self.split), seed=self.seed, epoch=-1 % 2**63
                )[0]
            )
        row = self.row[index]
        start, count = self.starts[row], self.counts[row]
        return int(
            self.order[
                start + (self.rank[index] - start + 1 + self.seed % max(count - 1, 1)) % count
            ]
        )

    def __call__(self, record: Record, index: int) -> np.ndarray:
        """int32 [max_tokens], padded with 0."""
        ids = self._ids(record, index)[: self.config.max_tokens]
        padded = np.zeros(self.config.max_tokens, np.int32)
        padded[: len(ids)] = ids
        return padded

    def _ids(self, record: Record, index: int) -> np.ndarray:
        """int32 [words], the whole title's."""
        if index >= len(self.split):  # a query (`clicks`)
            return np.zeros(0, np.int32)
        match self.config.title:
            case "none":
                ids = np.zeros(0, np.int32)
            case "raw":
                ids = record["token_ids"]
            case "masked":
                text = mask_words(
                    f"{record['title']} {record['tags']}", f"{record['sku']} {record['category']}"
                )
                ids = self.tokenizer.encode(text)
            case _:
                ids = self.split[self._donor(index)]["token_ids"]
        return np.asarray(ids, np.int32)


def _photo(preprocessing: Preprocessing, record: Record) -> np.ndarray:
    try:
        return preprocessing.load(record["image"])
    except InputError as error:
        raise InputError(
            f"photo {record['image_id']}: {error}; import the catalogue again"
        ) from error


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """step -> this process's part of the training batch: image uint8, label, token_ids where titles
    are read, and with `boxes` box float32 [4], all zero where unknown.

    `clicks` are what triplets are drawn from, where the batch has some; `split` is theirs then.
    With `known_titles` (token_ids of every record) the photos lie on the devices already: "index"
    stands in place of image, and no record is read.
    """

    split: Split
    sampler: Sampler | ClickSampler
    preprocessing: Preprocessing
    titles: TitleReader | None
    known_titles: Sequence[np.ndarray] | None = None
    process_index: int = 0
    process_count: int = 1
    boxes: bool = False
    clicks: Clicks | None = None

    def __call__(self, step: int) -> Batch:
        indices = self.sampler(step)
        share = len(indices) // self.process_count
        start = self.process_index * share
        mine = indices[start : start + share]
        return (
            self._read(mine) if self.known_titles is None else self._known(mine, self.known_titles)
        )

    def _known(self, indices: np.ndarray, known_titles: Sequence[np.ndarray]) -> Batch:
        batch = {
            "index": indices.astype(np.int32),
            "label": np.asarray(self.split.labels[indices], np.int32),
        }
        return batch | (
            {"token_ids": np.stack([known_titles[i] for i in indices])}
            if self.titles is not None
            else {}
        )

    def _read(self, indices: np.ndarray) -> Batch:
        images, labels, tokens, boxes = [], [], [], []
        for index in indices.tolist():
            record = self.split[index]
            images.append(_photo(self.preprocessing, record))
            labels.append(record["class_id"])
            if self.titles is not None:
                tokens.append(self.titles(record, index))
            if self.boxes:
                boxes.append(record["box"])
        batch = {"image": np.stack(images), "label": np.asarray(labels, np.int32)}
        batch |= {"box": np.stack(boxes).astype(np.float32)} if self.boxes else {}
        return batch | ({"token_ids": np.stack(tokens)} if self.titles is not None else {})


def train_batches(catalog: Catalog, config: Config) -> TrainBatches:
    """InputError where `data.triplets` cannot be learned from."""
    split: Split = catalog.splits["train"]
    plan = config.train.batch_plan(len(split))
    plain = Sampler(
        split.labels, plan.batch_size, config.seed, config.data.sampling, plan.doubled_at
    )
    sampler: Sampler | ClickSampler = plain
    clicks = open_clicks(config.data, catalog) if config.data.triplets else None
    if clicks is not None:
        micro_batch = config.train.batch_size // config.train.micro_batches
        sampler = ClickSampler.make(
            clicks, plain, micro_batch=micro_batch, share=config.data.triplet_share
        )
        split = clicks.split
    titles = TitleReader(catalog, config) if config.loss.with_text else None
    known: list[np.ndarray] | None = None
    if config.data.on_device:
        known = [titles(split[i], i) for i in range(len(split))] if titles else []
    hosts = jax.process_index(), jax.process_count()
    boxes = bool(config.loss.box_known)
    return TrainBatches(
        split, sampler, config.preprocessing, titles, known, *hosts, boxes=boxes, clicks=clicks
    )


@dataclasses.dataclass(frozen=True)
class PhotoBatches:
    """number -> this process's part of a batch of photos in record order: image, label, image_id.

    No text, whatever the record holds. The last batch is filled up with black photos of label -1.
    """

    split: Split
    preprocessing: Preprocessing
    batch_size: int
    indices: np.ndarray
    process_index: int = 0
    process_count: int = 1

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __call__(self, number: int) -> Batch:
        share = self.batch_size // self.process_count
        first = number * self.batch_size + self.process_index * share
        records = [self.split[int(i)] for i in self.indices[first : first + share]]
        height, width = self.preprocessing.resize_height, self.preprocessing.resize_width
        image = np.zeros((share, height, width, 3), np.uint8)
        label = np.full(share, -1, np.int32)
        image_id = np.full(share, "", object)
        for row, record in enumerate(records):
            image[row] = _photo(self.preprocessing, record)
            label[row] = record["class_id"]
            image_id[row] = record["image_id"]
        return {"image": image, "label": label, "image_id": image_id}


def evenly(size: int, most: int) -> np.ndarray:
    """At most that many of `size` indices, evenly spread."""
    count = min(size, most)
    return np.arange(count) * size // max(count, 1)


def photo_batches(
    split: Split, preprocessing: Preprocessing, *, batch_size: int, max_photos: int = 0
) -> PhotoBatches:
    """All photos of a split, or `max_photos` of them spread evenly over it."""
    indices = evenly(len(split), max_photos or len(split))
    return PhotoBatches(
        split, preprocessing, batch_size, indices, jax.process_index(), jax.process_count()
    )


def ahead(
    make: Callable[[int], Batch], start: int, stop: int, *, workers: int, source: str
) -> Generator[Batch]:
    """make(start), make(start + 1) ... in order, prepared ahead by grain's threads (workers=0) or
    processes.
    """
    if source == "arrays":
        # Nothing to decode; the device runs asynchronously, so the next batch is copied while it
        # computes. And a bare accelerator image has no grain.
        yield from map(make, range(start, stop))
        return
    import grain

    data = grain.MapDataset.range(start, stop).map(make)
    if not workers:
        yield from data.to_iter_dataset(
            grain.ReadOptions(num_threads=2, prefetch_buffer_size=_PREFETCH)
        )
        return
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags
    options = grain.MultiprocessingOptions(num_workers=workers)
    iterator: Any = iter(
        data.to_iter_dataset(grain.ReadOptions(num_threads=0)).mp_prefetch(options, _start_worker)
    )
    with contextlib.closing(iterator):
        with _signals_blocked():
            first = list(itertools.islice(iterator, 1))  # starts the workers
        yield from itertools.chain(first, iterator)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started here never see SIGINT and SIGTERM, which a terminal or a cluster sends to
    the whole group.

    They are for this process, which wants its batches until it has saved, and then ends its
    workers. A worker could ignore them itself only seconds after its start.
    """
    resource_tracker.ensure_running()  # its own start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(index: int, count: int) -> None:
    from sicot_jax.catalog.importing.photos import end_with_parent

    threading.Thread(target=end_with_parent, daemon=True).start()
