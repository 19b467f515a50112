"""Makes host batches in background threads or processes while the device computes."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from multiprocessing import resource_tracker
from typing import Any

from sicot_jax.catalog.batches import HostBatch

_BUFFER_SIZE = 4  # host batches made in advance


def prefetch(
    make_batch: Callable[[int], HostBatch], start: int, stop: int, *, workers: int, source: str
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

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags
    options = grain.MultiprocessingOptions(num_workers=workers)
    iterator: Any = iter(
        batches.to_iter_dataset(grain.ReadOptions(num_threads=0)).mp_prefetch(
            options, _start_worker
        )
    )
    with contextlib.closing(iterator):
        with _signals_blocked():
            first = list(itertools.islice(iterator, 1))  # starts the workers
        yield from itertools.chain(first, iterator)


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
