"""What answers at the moment: an index, and the engine of its model. Exchanged whole while requests run."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import sqlite3
from pathlib import Path

from sicot_jax.errors import InputError
from sicot_jax.index import layout
from sicot_jax.index.embedded import EmbeddedIndex
from sicot_jax.index.unknown import Calibration, read_calibration
from sicot_jax.serve import engines
from sicot_jax.serve.batcher import Batcher
from sicot_jax.serve.engines import Chosen
from sicot_jax.serve.settings import Settings

_log = logging.getLogger("sicot")


@dataclasses.dataclass
class Live:
    """`users` requests hold it; once replaced it is closed when the last of them ends."""

    version: str
    index: EmbeddedIndex
    calibration: Calibration | None
    chosen: Chosen
    batcher: Batcher
    users: int = 0
    replaced: bool = False
    own_engine: bool = True  # not handed on to the version after it

    def close(self) -> None:
        self.index.close()
        if self.own_engine:
            self.batcher.close()


def load(settings: Settings, before: Live | None = None) -> Live:
    """The version in use; with the engine of `before` where its model is the same. InputError where it cannot be read."""

    def opened(folder: Path) -> Live:
        index = EmbeddedIndex(folder)
        try:
            calibration = read_calibration(folder / layout.UNKNOWN)
            if before is not None and before.index.manifest.model == index.manifest.model:
                return Live(folder.name, index, calibration, before.chosen, before.batcher)
            chosen = engines.choose(folder, settings.engine, largest=settings.largest_batch, threads=settings.threads)
        except BaseException:
            index.close()
            raise
        batcher = Batcher(chosen.run, largest=chosen.largest)
        return Live(folder.name, index, calibration, chosen, batcher)

    return layout.open_current(Path(settings.index), opened)


class Current:
    """The `Live` of now; only the event loop's thread touches it."""

    def __init__(self, live: Live):
        self.live = live

    @contextlib.contextmanager
    def held(self):
        """The one of now, which stays open inside the block."""
        live = self.live
        live.users += 1
        try:
            yield live
        finally:
            live.users -= 1
            if live.replaced and not live.users:
                live.close()

    def replace(self, new: Live) -> None:
        old, self.live = self.live, new
        old.own_engine = old.batcher is not new.batcher
        old.replaced = True
        if not old.users:
            old.close()


async def keep_current(current: Current, settings: Settings) -> None:
    """For ever: see changes of the index, and versions that replace it; where one cannot be read, the old one stays."""
    loop, failed = asyncio.get_running_loop(), ""
    while True:
        await asyncio.sleep(settings.reload_seconds)
        name = ""
        try:
            name = layout.current_version(Path(settings.index)).name
            if name == current.live.version:
                await loop.run_in_executor(None, current.live.index.refresh)
            elif name != failed:
                new = await loop.run_in_executor(None, load, settings, current.live)
                current.replace(new)
                _log.info("index %s in use, model %s", new.version, new.index.manifest.model[:12])
        except (InputError, OSError, sqlite3.Error) as error:
            if failed != (name or str(error)):
                _log.error("index not reloaded, %s stays: %s", current.live.version, error)
            failed = name or str(error)
