"""Groups the photos of concurrent requests into batches for the engine."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures

import numpy as np

from sicot_jax.recognizer import Engine, EngineOutputs
from sicot_jax.serve import metrics

# Concurrent calls of the engine: the next batch is ready while the results of the last are
# distributed.
MAX_CONCURRENT_CALLS = 2


class Batcher:
    """Calls an engine with all photos that wait when it becomes free.

    A photo whose request was cancelled, by its client or by a timeout, is left out as long as it
    waits.

    Args:
      engine: maps photos uint8 [B, height, width, 3] to embeddings, logits and boxes.
      max_batch: B at most.
    """

    def __init__(self, engine: Engine, *, max_batch: int):
        self.engine, self.max_batch = engine, max_batch
        self._queue: collections.deque[tuple[np.ndarray, asyncio.Future[EngineOutputs]]] = (
            collections.deque()
        )
        self._threads = concurrent.futures.ThreadPoolExecutor(MAX_CONCURRENT_CALLS, "engine")
        # Strong references: the event loop alone does not keep a task alive.
        self._calls: set[asyncio.Task[None] | None] = set()

    def __len__(self) -> int:
        return len(self._queue)

    async def __call__(self, photo: np.ndarray) -> EngineOutputs:
        """Waits for the engine's result on one photo.

        Args:
          photo: uint8 [height, width, 3].

        Returns:
          embedding [D], logits [C], and box [4] or None.
        """
        future: asyncio.Future[EngineOutputs] = asyncio.get_running_loop().create_future()
        self._queue.append((photo, future))
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
                    photos = np.stack([photo for photo, _ in batch])
                    results = await loop.run_in_executor(self._threads, self.engine, photos)
                    for (_, future), result in zip(batch, list(results.per_photo()), strict=True):
                        if not future.done():
                            future.set_result(result)
                except Exception as error:
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(error)
        finally:
            self._calls.discard(asyncio.current_task())

    def _next_batch(self) -> list[tuple[np.ndarray, asyncio.Future[EngineOutputs]]]:
        batch: list[tuple[np.ndarray, asyncio.Future[EngineOutputs]]] = []
        while self._queue and len(batch) < self.max_batch:
            photo, future = self._queue.popleft()
            if not future.done():
                batch.append((photo, future))
        return batch
