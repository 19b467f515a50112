"""Refuses photos that would wait too long, by the wait that is measured in the whole service.

A photo waits whenever nothing is done for it: for a thread, for its share of the pixels, for the
engine, or for the event loop. Which of these limits the service depends on the network, the size of
the photos and the other processes of the machine, so none of them is modelled. The waits of the
latest photos, divided by the photos that were there before them, say how long a new one would wait:

    expected wait = pending photos * max(mean wait / mean number ahead, engine's time for a photo)

A photo that would wait longer than the limit is refused when it comes. One that was admitted and
has waited that long all the same, as in the first burst after a quiet hour, is refused before its
next stage begins. So a photo that is answered has waited no longer than the limit before its last
stage.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

from starlette.exceptions import HTTPException

from sicot_jax.serve import metrics

BUSY = "busy; try again"
_SMOOTHING = 0.1  # weight of the latest photo in the means
# Of the limit: photos that wait as long as that are admitted. The rest is for the scatter of the
# waits: a photo that is refused late has cost work.
_SHARE = 0.6
# One stall, of a disk or another process, is not an overload: it takes several.
_STEPS_BEFORE, _LAG_INTERVAL, _SMOOTHING_LAG = 3, 0.02, 0.2
_ALWAYS_ADMITTED = 4  # pending photos: with fewer, nothing can be learnt of the wait


class BusyError(HTTPException):
    """A photo that is refused because it would wait, or has waited, too long."""

    def __init__(self) -> None:
        super().__init__(503, BUSY)


class PhotoClock:
    """Tells the time that a photo waits from the time of the work on it.

    Args:
      max_wait_seconds: the longest time that it may wait.
      ahead: photos that were pending when it came.
      waited: seconds that it has waited before.
    """

    def __init__(self, max_wait_seconds: float, ahead: int = 0, waited: float = 0.0):
        self.max_wait_seconds, self.ahead = max_wait_seconds, ahead
        self._start, self._worked = time.perf_counter() - waited, 0.0

    @property
    def waited(self) -> float:
        """Seconds since the photo came in which nothing was done for it."""
        return time.perf_counter() - self._start - self._worked

    @property
    def expired(self) -> bool:
        """Whether the photo has waited too long."""
        return self.waited > self.max_wait_seconds

    def add_work(self, seconds: float) -> None:
        """Counts time as work on the photo.

        Args:
          seconds: duration of the work, which has just ended.
        """
        self._worked += seconds

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Counts the time while the context lasts as work on the photo.

        Yields:
          None.

        Raises:
          BusyError: the photo has waited too long; the work does not begin.
        """
        if self.expired:
            raise BusyError
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_work(time.perf_counter() - start)


class Admission:
    """Admits photos of one process; used by its event loop alone.

    Args:
      max_wait_seconds: the longest time that a photo may wait.

    Attributes:
      pending: photos that are being processed.
      lag: seconds that a request waits before the service sees it (`watch_lag`).
    """

    def __init__(self, max_wait_seconds: float):
        self.max_wait_seconds, self.pending, self.lag = max_wait_seconds, 0, 0.0
        self._mean_wait = self._mean_ahead = 0.0

    def is_busy(self, photo_seconds: float) -> bool:
        """Estimates how long a photo that comes now would wait.

        Args:
          photo_seconds: time of the engine for a photo, in full batches.

        Returns:
          Whether it would wait too long.
        """
        wait_per_photo = max(self._mean_wait / max(self._mean_ahead, 1.0), photo_seconds)
        expected = self.lag + self.pending * wait_per_photo
        return self.pending >= _ALWAYS_ADMITTED and expected > _SHARE * self.max_wait_seconds

    @contextlib.contextmanager
    def photo(self, photo_seconds: float) -> Iterator[PhotoClock]:
        """Counts a photo as pending while the context lasts.

        Args:
          photo_seconds: time of the engine for a photo, in full batches.

        Yields:
          The photo's clock.

        Raises:
          BusyError: the photo would wait too long.
        """
        if self.is_busy(photo_seconds):
            raise BusyError
        clock = PhotoClock(self.max_wait_seconds, self.pending, self.lag)
        self.pending += 1
        try:
            with metrics.IN_FLIGHT.track_inprogress():
                yield clock
        finally:
            self.pending -= 1
            self._mean_wait += _SMOOTHING * (clock.waited - self._mean_wait)
            self._mean_ahead += _SMOOTHING * (clock.ahead - self._mean_ahead)

    async def watch_lag(self) -> None:
        """Measures until cancelled how late the event loop does what is due.

        A request goes through the loop `_STEPS_BEFORE` times, to be accepted, read and given to
        the app, before any clock of the service runs.
        """
        while True:
            start = time.perf_counter()
            await asyncio.sleep(_LAG_INTERVAL)
            late = max(time.perf_counter() - start - _LAG_INTERVAL, 0.0)
            self.lag += _SMOOTHING_LAG * (_STEPS_BEFORE * late - self.lag)
