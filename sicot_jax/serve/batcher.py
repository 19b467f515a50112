"""Groups the photos of concurrent requests into batches for the engine."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import time
from typing import NamedTuple

import numpy as np

from sicot_jax.recognizer import Engine, EngineOutputs
from sicot_jax.serve import metrics
from sicot_jax.serve.admission import BusyError, PhotoClock

# Concurrent calls of the engine: the next batch is ready while the results of the last are
# distributed.
MAX_CONCURRENT_CALLS = 2


class _WaitingPhoto(NamedTuple):
    photo: np.ndarray
    clock: PhotoClock
    future: asyncio.Future[EngineOutputs]


class Batcher:
    """Calls an engine with all photos that wait when it becomes free.

    A photo whose request was cancelled, by its client or by a timeout, is left out as long as it
    waits, as is one that has waited too long.

    Args:
      engine: maps photos uint8 [B, height, width, 3] to embeddings, logits and boxes.
      max_batch: B at most.
    """

    def __init__(self, engine: Engine, *, max_batch: int):
        self.engine, self.max_batch = engine, max_batch
        self._queue: collections.deque[_WaitingPhoto] = collections.deque()
        self._threads = concurrent.futures.ThreadPoolExecutor(MAX_CONCURRENT_CALLS, "engine")
        # Strong references: the event loop alone does not keep a task alive.
        self._calls: set[asyncio.Task[None] | None] = set()

    def __len__(self) -> int:
        return len(self._queue)

    async def __call__(self, photo: np.ndarray, clock: PhotoClock) -> EngineOutputs:
        """Waits for the engine's result on one photo.

        Args:
          photo: uint8 [height, width, 3].
          clock: the photo's clock.

        Returns:
          embedding [D], logits [C], and box [4] or None.

        Raises:
          BusyError: the photo has waited too long.
        """
        future: asyncio.Future[EngineOutputs] = asyncio.get_running_loop().create_future()
        self._queue.append(_WaitingPhoto(photo, clock, future))
        if len(self._calls) < MAX_CONCURRENT_CALLS:
            self._calls.add(asyncio.create_task(self._work()))
        return await future

    async def _work(self) -> None:
        # Ends its call in the very step that finds the queue empty: a photo that comes after that
        # step starts a new call.
        loop = asyncio.get_running_loop()
        try:
            while batch := self._next_batch():
                metrics.BATCH_PHOTOS.observe(len(batch))
                try:
                    photos = np.stack([waiting.photo for waiting in batch])
                    results, seconds = await loop.run_in_executor(self._threads, self._call, photos)
                    for waiting, result in zip(batch, list(results.per_photo()), strict=True):
                        waiting.clock.add_work(seconds)
                        if not waiting.future.done():
                            waiting.future.set_result(result)
                except Exception as error:
                    for waiting in batch:
                        if not waiting.future.done():
                            waiting.future.set_exception(error)
        finally:
            self._calls.discard(asyncio.current_task())

    def _call(self, photos: np.ndarray) -> tuple[EngineOutputs, float]:
        """Returns the engine's results, and the seconds that it took."""
        start = time.perf_counter()
        return self.engine(photos), time.perf_counter() - start

    def _next_batch(self) -> list[_WaitingPhoto]:
        batch: list[_WaitingPhoto] = []
        while self._queue and len(batch) < self.max_batch:
            waiting = self._queue.popleft()
            if waiting.future.done():
                continue
            if waiting.clock.expired:
                waiting.future.set_exception(BusyError())
            else:
                batch.append(waiting)
        return batch
