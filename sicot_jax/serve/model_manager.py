"""What answers at the moment: an index, and the engine of its model. Exchanged whole while requests
run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from pathlib import Path

import threadpoolctl

from sicot_jax.errors import InputError
from sicot_jax.index.backends.base import ProductIndex
from sicot_jax.index.backends.open import open_index
from sicot_jax.index.storage import layout
from sicot_jax.search.category import Fusion, read_fusion
from sicot_jax.search.ranker import Ranker, read_ranker
from sicot_jax.search.rejection import Calibration, read_calibration
from sicot_jax.serve import engines
from sicot_jax.serve.batcher import Batcher
from sicot_jax.serve.engines import Chosen
from sicot_jax.serve.settings import Settings

_log = logging.getLogger("sicot")
_RETRY_SECONDS = 60.0
_Seen = tuple[int, int] | None  # time and size of a file


@dataclasses.dataclass(frozen=True)
class Live:
    """ranker: of the file that `ranker_file` says, None where there is none or it cannot be used.

    Never closed by hand: a request, or a thread that works for one, may hold it longer than anyone
      knows. Files and threads end with the last reference.
    """

    version: str
    index: ProductIndex
    calibration: Calibration | None
    fusion: Fusion | None
    chosen: Chosen
    batcher: Batcher
    ranker: Ranker | None
    ranker_file: _Seen


def load(settings: Settings, before: Live | None = None) -> Live:
    """The version in use; with the engine of `before` where its model is the same. InputError where
    it cannot be read.
    """

    def opened(folder: Path) -> Live:
        index = open_index(folder, settings.database)
        calibration, fusion = (
            read_calibration(folder / layout.REJECTION),
            read_fusion(folder / layout.CATEGORY_FUSION),
        )
        ranker = _ranker(folder, index)
        if before is not None and before.index.manifest.model_sha256 == index.manifest.model_sha256:
            return Live(
                folder.name, index, calibration, fusion, before.chosen, before.batcher, *ranker
            )
        _hold_blas()
        chosen = engines.choose(
            folder, settings.engine, largest=settings.largest_batch, threads=settings.threads
        )
        return Live(
            folder.name,
            index,
            calibration,
            fusion,
            chosen,
            Batcher(chosen.run, largest=chosen.largest),
            *ranker,
        )

    return layout.open_current(Path(settings.index), opened)


def _seen(folder: Path) -> _Seen:
    path = folder / layout.RANKER
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None


def _ranker(folder: Path, index: ProductIndex) -> tuple[Ranker | None, _Seen]:
    """One that cannot be used is logged, and similar products are as they are near."""
    seen = _seen(folder)
    try:
        ranker = read_ranker(folder / layout.RANKER)
        if ranker is not None and ranker.recogniser != index.manifest.model_sha256:
            raise InputError(
                f"{folder / layout.RANKER}: of another model; give `sicot index rank` again"
            )
        return ranker, seen
    except InputError as error:
        _log.error("similar products are not ranked: %s", error)
        return None, seen


def refresh(live: Live, folder: Path) -> Live:
    """The same version with what was changed in it since."""
    live.index.refresh()
    if _seen(folder) == live.ranker_file:
        return live
    ranker, seen = _ranker(folder, live.index)
    return dataclasses.replace(live, ranker=ranker, ranker_file=seen)


def _hold_blas() -> None:
    """numpy's matrix products stay in the thread that asks for them. A query's are small, and
    OpenBLAS's threads go on spinning
    for some milliseconds after each, on the cores that the engine needs: photos took twice as long.
    """
    threadpoolctl.threadpool_limits(1, user_api="blas")


@dataclasses.dataclass
class Current:
    """The `Live` of now."""

    live: Live


async def keep_current(current: Current, settings: Settings) -> None:
    """For ever: see changes of the index, and versions that replace it. Where that fails the old
    one stays, it is logged, and tried again after a minute.
    """
    loop, not_before = asyncio.get_running_loop(), 0.0
    while True:
        await asyncio.sleep(settings.reload_seconds)
        if loop.time() < not_before:
            continue
        try:
            folder = layout.current_version(Path(settings.index))
            if folder.name == current.live.version:
                current.live = await loop.run_in_executor(None, refresh, current.live, folder)
            else:
                new = await loop.run_in_executor(None, load, settings, current.live)
                current.live = new
                _log.info("index %s in use, model %s", new.version, new.index.manifest.model_sha256[:12])
        except Exception as error:  # whatever it is, the service goes on, and so does this task
            not_before = loop.time() + _RETRY_SECONDS
            said = " ".join(str(error).split())[:300]
            _log.error(
                "index not reloaded, %s stays: %s: %s",
                current.live.version,
                type(error).__name__,
                said,
            )
