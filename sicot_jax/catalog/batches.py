"""Makes host batches, of photos with titles or photos alone, ahead of the device if asked to."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import shutil
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sicot_jax.catalog.catalog import Catalog, Record, Split
from sicot_jax.catalog.sampling import RecordSampler
from sicot_jax.catalog.title_variants import TitleVariantReader
from sicot_jax.catalog.triplets import TripletSampler, TripletTable, open_triplets
from sicot_jax.config import Config
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError

HostBatch = dict[str, np.ndarray]
SHARED_MEMORY = Path("/dev/shm")  # where there is one; containers often limit it to 64 MiB


class BatchLoader(Protocol):
    """Makes host batches by number."""

    def __call__(self, number: int, /) -> HostBatch:
        """Returns a batch.

        Args:
          number: number of the batch.

        Returns:
          The batch.
        """
        ...

    def photo_bytes(self, number: int, /) -> int:
        """Returns the bytes of a batch's photos, which are nearly all of it.

        Args:
          number: number of the batch.

        Returns:
          Bytes.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ProcessShard:
    """The part of every global batch that one process makes: part `index` of `count` equal ones."""

    index: int = 0
    count: int = 1

    def rows(self, batch_size: int) -> slice:
        """Returns this process's rows of a global batch.

        Args:
          batch_size: rows of the global batch, a multiple of `count`.

        Returns:
          A slice of batch_size / count rows.
        """
        size = batch_size // self.count
        return slice(self.index * size, (self.index + 1) * size)


ONE_PROCESS = ProcessShard()


@dataclasses.dataclass(frozen=True)
class TrainBatchLoader:
    """Makes this process's part of the training batch of a step.

    A batch holds image (uint8 [B, H, W, 3]) and label (int32 [B]); token_ids (int32
    [B, max_tokens]) where titles are read; box (float32 [B, 4], zero where unknown) where
    `with_boxes`. With `preloaded_token_ids` the photos are on the devices already: the batch holds
    index (int32 [B]) in place of image, and no record is read.

    Attributes:
      split: the training records, and query photos behind them where there are triplets.
      sampler: step -> record indices of the global batch.
      preprocessing: how photos are resized.
      titles: reads titles; None where no loss needs them.
      preloaded_token_ids: token ids of every record; empty where no titles are read.
      shard: the part of the global batch this process makes.
      with_boxes: whether batches hold boxes.
      triplets: what triplets are drawn from, where the batch has some.
    """

    split: Split
    sampler: RecordSampler | TripletSampler
    preprocessing: Preprocessing
    titles: TitleVariantReader | None
    preloaded_token_ids: Sequence[np.ndarray] | None = None
    shard: ProcessShard = ONE_PROCESS
    with_boxes: bool = False
    triplets: TripletTable | None = None

    def __call__(self, step: int) -> HostBatch:
        """Returns this process's part of the batch of that step."""
        indices = self.sampler(step)
        indices = indices[self.shard.rows(len(indices))]
        if self.preloaded_token_ids is None:
            return self._read_records(indices)
        batch = {
            "index": indices.astype(np.int32),
            "label": np.asarray(self.split.labels[indices], np.int32),
        }
        if self.titles is not None:
            batch["token_ids"] = np.stack([self.preloaded_token_ids[i] for i in indices])
        return batch

    def photo_bytes(self, step: int) -> int:
        """Returns the bytes of the photos in this process's part of a step's batch.

        Args:
          step: number of the batch.

        Returns:
          Bytes.
        """
        rows = self.shard.rows(len(self.sampler(step)))
        return (rows.stop - rows.start) * _resized_bytes(self.preprocessing)

    def _read_records(self, indices: np.ndarray) -> HostBatch:
        images, labels, tokens, boxes = [], [], [], []
        for index in indices.tolist():
            record = self.split[index]
            images.append(_resized_photo(self.preprocessing, record))
            labels.append(record["class_id"])
            if self.titles is not None:
                tokens.append(self.titles(record, index))
            if self.with_boxes:
                boxes.append(record["box"])
        batch = {"image": np.stack(images), "label": np.asarray(labels, np.int32)}
        if self.with_boxes:
            batch["box"] = np.stack(boxes).astype(np.float32)
        if self.titles is not None:
            batch["token_ids"] = np.stack(tokens)
        return batch


def train_batch_loader(
    catalog: Catalog, config: Config, shard: ProcessShard = ONE_PROCESS
) -> TrainBatchLoader:
    """Builds the loader of a run's training batches.

    Args:
      catalog: the training data.
      config: config of the run.
      shard: the part of the global batch this process makes.

    Returns:
      A loader: step -> host batch.

    Raises:
      InputError: the file of `data.triplets` has no triplet that can be used.
    """
    split: Split = catalog.splits["train"]
    plan = config.train.batch_plan(len(split))
    sampler: RecordSampler | TripletSampler
    sampler = records = RecordSampler(
        split.labels, plan.batch_size, config.seed, config.data.sampling, plan.doubled_at
    )
    triplets = open_triplets(config.data, catalog) if config.data.triplets else None
    if triplets is not None:
        sampler = TripletSampler.with_record_sampler(
            triplets,
            records,
            micro_batch=config.train.batch_size // config.train.micro_batches,
            share=config.data.triplet_share,
        )
        split = triplets.split
    titles = TitleVariantReader(catalog, config) if config.loss.with_text else None
    preloaded: list[np.ndarray] | None = None
    if config.data.on_device:
        preloaded = [titles(split[i], i) for i in range(len(split))] if titles else []
    return TrainBatchLoader(
        split,
        sampler,
        config.preprocessing,
        titles,
        preloaded,
        shard,
        with_boxes=bool(config.loss.box_regression),
        triplets=triplets,
    )


@dataclasses.dataclass(frozen=True)
class PhotoBatchLoader:
    """Makes this process's part of a batch of photos, in record order and without any text.

    A batch holds image (uint8 [B, H, W, 3]), label (int32 [B]) and image_id (object [B]). The last
    batch is filled up with black photos of label -1 and image_id "".

    Attributes:
      split: the records.
      preprocessing: how photos are resized.
      batch_size: photos of a global batch.
      indices: int [N], the records to read.
      shard: the part of the global batch this process makes.
    """

    split: Split
    preprocessing: Preprocessing
    batch_size: int
    indices: np.ndarray
    shard: ProcessShard = ONE_PROCESS

    def __len__(self) -> int:
        """Returns the number of batches."""
        return -(-len(self.indices) // self.batch_size)

    def photo_bytes(self, number: int) -> int:
        """Returns the bytes of the photos in this process's part of any batch.

        Args:
          number: number of the batch.

        Returns:
          Bytes.
        """
        rows = self.shard.rows(self.batch_size)
        return (rows.stop - rows.start) * _resized_bytes(self.preprocessing)

    def __call__(self, number: int) -> HostBatch:
        """Returns this process's part of batch `number`."""
        rows = self.shard.rows(self.batch_size)
        first, size = number * self.batch_size + rows.start, rows.stop - rows.start
        records = [self.split[int(i)] for i in self.indices[first : first + size]]
        height, width = self.preprocessing.resize_height, self.preprocessing.resize_width
        image = np.zeros((size, height, width, 3), np.uint8)
        label = np.full(size, -1, np.int32)
        image_id = np.full(size, "", object)
        for row, record in enumerate(records):
            image[row] = _resized_photo(self.preprocessing, record)
            label[row] = record["class_id"]
            image_id[row] = record["image_id"]
        return {"image": image, "label": label, "image_id": image_id}


def photo_batch_loader(
    split: Split,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    max_photos: int = 0,
    shard: ProcessShard = ONE_PROCESS,
) -> PhotoBatchLoader:
    """Builds the loader of a split's photos.

    Args:
      split: the records.
      preprocessing: how photos are resized.
      batch_size: photos of a global batch.
      max_photos: read at most so many, spread evenly over the split; 0: all.
      shard: the part of the global batch this process makes.

    Returns:
      A loader: batch number -> host batch.
    """
    indices = evenly_spaced(len(split), max_photos or len(split))
    return PhotoBatchLoader(split, preprocessing, batch_size, indices, shard)


def evenly_spaced(size: int, max_count: int) -> np.ndarray:
    """Returns at most `max_count` of the indices 0..size-1, evenly spaced.

    Args:
      size: number of indices to choose from.
      max_count: number of indices returned at most.

    Returns:
      int64 [min(size, max_count)], ascending.
    """
    count = min(size, max_count)
    return np.arange(count) * size // max(count, 1)


def _resized_photo(preprocessing: Preprocessing, record: Record) -> np.ndarray:
    try:
        return preprocessing.load(record["image"])
    except InputError as error:
        raise InputError(
            f"photo {record['image_id']}: {error}; import the catalogue again"
        ) from error


def _resized_bytes(preprocessing: Preprocessing) -> int:
    return preprocessing.resize_height * preprocessing.resize_width * 3


_BUFFER_SIZE = 4  # host batches made in advance


def prefetch(
    make_batch: BatchLoader, start: int, stop: int, *, workers: int, source: str
) -> Generator[HostBatch]:
    """Yields make_batch(start), ..., make_batch(stop - 1) in order, prepared in advance by grain.

    Args:
      make_batch: number -> host batch; picklable where `workers` > 0.
      start: first number.
      stop: one past the last number.
      workers: processes of grain; 0: two threads.
      source: `data.source`; an array file has nothing to decode, and is read without grain.

    Yields:
      Host batches.

    Raises:
      InputError: the batches of all workers do not fit in shared memory, or a worker was killed.
    """
    if source == "arrays":
        # The device runs asynchronously, so the next batch is copied while it computes. And a bare
        # accelerator image has no grain.
        yield from map(make_batch, range(start, stop))
        return
    import grain

    batches = grain.MapDataset.range(start, stop).map(make_batch)
    if not workers:
        yield from batches.to_iter_dataset(
            grain.ReadOptions(num_threads=2, prefetch_buffer_size=_BUFFER_SIZE)
        )
        return
    from absl import flags

    if stop > start:
        _check_shared_memory(make_batch.photo_bytes(stop - 1), workers)  # the largest is the last
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags
    options = grain.MultiprocessingOptions(num_workers=workers)
    iterator: Any = iter(
        batches.to_iter_dataset(grain.ReadOptions(num_threads=0)).mp_prefetch(
            options, _start_worker
        )
    )
    with contextlib.closing(iterator), _killed_worker_as_one_line():
        with _signals_blocked():
            first = list(itertools.islice(iterator, 1))  # starts the workers
        yield from itertools.chain(first, iterator)


def _check_shared_memory(batch_bytes: int, workers: int) -> None:
    """Raises InputError where workers would be killed (SIGBUS) for want of shared memory.

    Four batches of every worker and four more were seen in it at once (grain 0.2.18).
    """
    if not SHARED_MEMORY.is_dir():
        return
    needed, free = (4 * workers + 4) * batch_bytes, shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        fitting = max(0, (free // max(batch_bytes, 1) - 4) // 4)
        raise InputError(
            f"data.workers={workers} needs {needed >> 20} MiB of shared memory, {SHARED_MEMORY} "
            f"has {free >> 20} MiB free; give the container more (docker run --shm-size), or set "
            f"data.workers={fitting}"
        )


@contextlib.contextmanager
def _killed_worker_as_one_line() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        killed = re.search(r"terminated unexpectedly with exit code -(\d+)", str(error))
        if killed is None:
            raise
        number = int(killed[1])
        reason = {
            signal.SIGKILL: "the system was out of memory, most likely; lower data.workers",
            signal.SIGBUS: f"{SHARED_MEMORY} is full; enlarge it, or lower data.workers",
        }.get(signal.Signals(number), "data.workers=0 decodes without such processes")
        raise InputError(
            f"a process of data.workers was killed by {signal.Signals(number).name}: {reason}"
        ) from error


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM in processes that are started inside this context.

    A terminal or a cluster sends them to all processes of the group. They are meant for this
    process, which needs its batches until it has saved, and then ends its workers. A worker could
    ignore them itself only seconds after its start.
    """
    resource_tracker.ensure_running()  # started later, it would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(index: int, count: int) -> None:
    from sicot_jax.catalog.importing.photos import exit_with_parent

    threading.Thread(target=exit_with_parent, daemon=True).start()
