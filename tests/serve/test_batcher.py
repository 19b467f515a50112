"""Batching of concurrent requests."""

import asyncio
import threading
import time

import numpy as np
import pytest

from sicot_jax.recognizer import EngineOutputs
from sicot_jax.serve.admission import PhotoClock
from sicot_jax.serve.batcher import MAX_CONCURRENT_CALLS, Batcher


class Engine:
    """Embedding: the photo's first number; its calls wait for `go`."""

    def __init__(self):
        self.sizes, self.go = [], threading.Event()
        self.go.set()

    def __call__(self, photos):
        self.go.wait(10)
        self.sizes.append(len(photos))
        if photos[0, 0, 0, 0] == 255:
            raise RuntimeError("the engine failed")
        return EngineOutputs(
            photos[:, 0, 0, :1].astype(np.float32), photos[:, 0, 0].astype(np.float32)
        )


def photo(number):
    return np.full((2, 2, 3), number, np.uint8)


def test_waiting_photos_are_batched():
    """Two calls at once; what comes while they run in fours."""

    async def scenario():
        engine = Engine()
        batcher = Batcher(engine, max_batch=4)
        engine.go.clear()
        waiting = []
        for number in range(10):
            waiting.append(asyncio.create_task(batcher(photo(number), PhotoClock(60))))
            await asyncio.sleep(0.02)
        assert len(batcher) == 10 - MAX_CONCURRENT_CALLS
        engine.go.set()
        answers = await asyncio.gather(*waiting)
        assert [int(result.embedding[0]) for result in answers] == list(range(10))
        assert sorted(engine.sizes) == [1, 1, 4, 4]
        assert MAX_CONCURRENT_CALLS == 2

    asyncio.run(scenario())


def test_a_cancelled_request_is_left_out():
    async def scenario():
        engine = Engine()
        batcher = Batcher(engine, max_batch=4)
        engine.go.clear()
        first = []
        for number in (1, 2, 4):  # the third waits
            first.append(asyncio.create_task(batcher(photo(number), PhotoClock(60))))
            await asyncio.sleep(0.02)
        cancelled, stays = (
            asyncio.create_task(batcher(photo(9), PhotoClock(60))),
            asyncio.create_task(batcher(photo(3), PhotoClock(60))),
        )
        await asyncio.sleep(0.02)
        cancelled.cancel()
        engine.go.set()
        assert [int((await task)[0][0]) for task in (*first, stays)] == [1, 2, 4, 3]
        assert sorted(engine.sizes) == [1, 1, 2]
        assert len(batcher) == 0

    asyncio.run(scenario())


def test_a_failing_engine_fails_a_single_batch():
    async def scenario():
        batcher = Batcher(Engine(), max_batch=4)
        with pytest.raises(RuntimeError, match="the engine failed"):
            await batcher(photo(255), PhotoClock(60))
        assert int((await batcher(photo(7), PhotoClock(60)))[0][0]) == 7

    asyncio.run(scenario())


def test_a_photo_that_arrives_as_both_calls_end_is_answered():
    """Both answers and the photo reach the event loop in the same of its steps."""

    async def scenario():
        engine, loop = Engine(), asyncio.get_running_loop()
        batcher = Batcher(engine, max_batch=1)
        engine.go.clear()
        first = [asyncio.create_task(batcher(photo(number), PhotoClock(60))) for number in range(2)]

        async def third():
            await loop.run_in_executor(None, lambda: (engine.go.wait(10), time.sleep(0.02)))
            return await batcher(photo(2), PhotoClock(60))

        late = asyncio.create_task(third())
        await asyncio.sleep(0.02)
        engine.go.set()
        time.sleep(0.2)  # the loop sees nothing of it until all three are there
        await asyncio.gather(*first)
        assert int((await asyncio.wait_for(late, 5))[0][0]) == 2

    asyncio.run(scenario())


def test_an_engine_with_too_few_results_is_an_error():
    """Is an error of its photos, not a wait."""

    async def scenario():
        batcher = Batcher(
            lambda photos: EngineOutputs(np.zeros((1, 2)), np.zeros((2, 3))), max_batch=4
        )
        with pytest.raises(ValueError, match="zip"):
            await asyncio.wait_for(batcher(photo(1), PhotoClock(60)), 5)

    asyncio.run(scenario())


def test_boxes_come_with_their_photos():
    """Or None from an engine that has none."""
    box = np.array([[0.1, 0.2, 0.3, 0.4]])

    async def scenario(engine):
        return await asyncio.gather(
            *(Batcher(engine, max_batch=4)(photo(number), PhotoClock(60)) for number in (1, 2))
        )

    def boxed(photos):
        return EngineOutputs(photos[:, 0, 0, :1], photos[:, 0, 0], photos[:, 0, 0, :1] * box)

    one, other = asyncio.run(scenario(boxed))
    assert one.box.tolist() == [0.1, 0.2, 0.3, 0.4]
    assert other.box.tolist() == [0.2, 0.4, 0.6, 0.8]
    assert [result.box for result in asyncio.run(scenario(Engine()))] == [None, None]
