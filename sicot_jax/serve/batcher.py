"""Photos of several requests in one call of the engine: whatever waits when it is free."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures

import numpy as np

from sicot_jax.recognizer import Engine, Found
from sicot_jax.serve import metrics

IN_FLIGHT = (
    2  # calls at once: the engine has its next one while the answers of the last are handed on
)


class Batcher:
    """Calls `engine` with at most `largest` photos, from at most `IN_FLIGHT` threads.

    A photo whose request was cancelled, by its client or a timeout, is left out if its turn has not
    come.
    """

    def __init__(self, engine: Engine, *, largest: int):
        self.engine, self.largest = engine, largest
        self._queue: collections.deque[tuple[np.ndarray, asyncio.Future]] = collections.deque()
        self._threads = concurrent.futures.ThreadPoolExecutor(IN_FLIGHT, "engine")
        self._calls: set[asyncio.Task | None] = set()  # a task lives as long as somebody holds it

    def __len__(self) -> int:
        return len(self._queue)

    async def __call__(self, photo: np.ndarray) -> Found:
        """uint8 [height, width, 3] -> what the engine finds in it: embedding [D], logits [C], box
        [4] or None.
        """
        future: asyncio.Future = asyncio.get_running_loop().create_future()
        self._queue.append((photo, future))
        if len(self._calls) < IN_FLIGHT:
            self._calls.add(asyncio.create_task(self._work()))
        return await future

    async def _work(self) -> None:
        """Until nothing waits. It is no call any more in the very step that finds nothing: a photo
        that comes after that step must not count on it.
        """
        loop = asyncio.get_running_loop()
        try:
            while batch := self._next():
                metrics.BATCHES.observe(len(batch))
                try:
                    photos = np.stack([photo for photo, _ in batch])
                    found = await loop.run_in_executor(self._threads, self.engine, photos)
                    answers = list(found.each())
                    for (_, future), answer in zip(batch, answers, strict=True):
                        if not future.done():
                            future.set_result(answer)
                except Exception as error:
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(error)
        finally:
            self._calls.discard(asyncio.current_task())

    def _next(self) -> list[tuple[np.ndarray, asyncio.Future]]:
        batch: list[tuple[np.ndarray, asyncio.Future]] = []
        while self._queue and len(batch) < self.largest:
            photo, future = self._queue.popleft()
            if not future.done():
                batch.append((photo, future))
        return batch
