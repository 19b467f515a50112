"""Photos of several requests in one call of the engine: whatever waits when it is free."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures

import numpy as np

from sicot_jax.recognizer import Engine
from sicot_jax.serve import metrics


class Batcher:
    """Calls `engine` in one thread with at most `largest` photos.

    A photo whose request was cancelled, by its client or a timeout, is left out if its turn has not come.
    """

    def __init__(self, engine: Engine, *, largest: int):
        self.engine, self.largest = engine, largest
        self._queue: collections.deque[tuple[np.ndarray, asyncio.Future]] = collections.deque()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "engine")
        self._task: asyncio.Task | None = None

    def __len__(self) -> int:
        return len(self._queue)

    async def __call__(self, photo: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [height, width, 3] -> embedding float32 [D], logits float32 [C]."""
        future: asyncio.Future = asyncio.get_running_loop().create_future()
        self._queue.append((photo, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            batch: list[tuple[np.ndarray, asyncio.Future]] = []
            while self._queue and len(batch) < self.largest:
                photo, future = self._queue.popleft()
                if not future.done():
                    batch.append((photo, future))
            if not batch:
                continue
            metrics.BATCHES.observe(len(batch))
            try:
                photos = np.stack([photo for photo, _ in batch])
                embeddings, logits = await loop.run_in_executor(self._thread, self.engine, photos)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), embedding, logit in zip(batch, embeddings, logits, strict=True):
                if not future.done():
                    future.set_result((embedding, logit))
