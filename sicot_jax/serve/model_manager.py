"""Keeps the model and index in use, and replaces them while requests run."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from pathlib import Path

import threadpoolctl

from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError
from sicot_jax.index.backends.base import ProductIndex
from sicot_jax.index.backends.open import open_index
from sicot_jax.index.storage import layout
from sicot_jax.search.answer import Searcher
from sicot_jax.search.category import read_fusion
from sicot_jax.search.ranker import Ranker, read_ranker
from sicot_jax.search.rejection import read_calibration
from sicot_jax.serve.batcher import Batcher
from sicot_jax.serve.engines import SelectedEngine, select_engine
from sicot_jax.serve.settings import ServiceSettings

_log = logging.getLogger("sicot")
_RETRY_SECONDS = 60.0
_FileStamp = tuple[int, int] | None  # modification time in nanoseconds and size of a file


@dataclasses.dataclass(frozen=True)
class ServingModel:
    """An index version with everything that answers queries from it.

    It is never closed by hand: a request, or a thread that works for one, may hold it for longer
    than anyone knows. Files and threads end with the last reference.

    Attributes:
      version: name of the index version.
      searcher: answers queries.
      engine: computes embeddings and logits.
      batcher: groups photos for the engine.
      ranker_stamp: the ranker's file as it was read; None without one.
    """

    version: str
    searcher: Searcher
    engine: SelectedEngine
    batcher: Batcher
    ranker_stamp: _FileStamp

    @property
    def index(self) -> ProductIndex:
        """The product index."""
        return self.searcher.index

    @property
    def model_id(self) -> str:
        """First 12 hexadecimal digits of the model's sha256."""
        return self.index.manifest.model_sha256[:12]


def load_serving_model(
    settings: ServiceSettings, previous: ServingModel | None = None
) -> ServingModel:
    """Loads the index version in use and its model.

    Args:
      settings: settings of the service.
      previous: its engine is kept where the model is the same.

    Returns:
      The loaded version, all batch sizes compiled.

    Raises:
      InputError: the index or its model cannot be read.
    """

    def load_version(folder: Path) -> ServingModel:
        index = open_index(folder, settings.database)
        calibration = read_calibration(folder / layout.REJECTION)
        fusion = read_fusion(folder / layout.CATEGORY_FUSION)
        ranker, stamp = _read_usable_ranker(folder, index)
        searcher = Searcher(index, calibration, fusion, ranker)
        if (
            previous is not None
            and previous.index.manifest.model_sha256 == index.manifest.model_sha256
        ):
            return dataclasses.replace(
                previous, version=folder.name, searcher=searcher, ranker_stamp=stamp
            )
        _limit_blas_threads()
        engine = select_engine(
            folder,
            settings.engine,
            largest=settings.max_batch,
            threads=settings.threads,
            require_gpu=settings.require_gpu,
        )
        batcher = Batcher(engine.run, max_batch=engine.batch_size)
        return ServingModel(folder.name, searcher, engine, batcher, stamp)

    return layout.open_current(Path(settings.index), load_version)


def _file_stamp(folder: Path) -> _FileStamp:
    path = folder / layout.RANKER
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None


def _read_usable_ranker(folder: Path, index: ProductIndex) -> tuple[Ranker | None, _FileStamp]:
    """Returns no ranker, and logs why, where it cannot be used: order is then by similarity."""
    stamp = _file_stamp(folder)
    try:
        ranker = read_ranker(folder / layout.RANKER)
        if ranker is not None and ranker.recognizer != index.manifest.model_sha256:
            raise InputError(
                f"{folder / layout.RANKER}: of another model; give `sicot index rank` again"
            )
        return ranker, stamp
    except InputError as error:
        _log.error("similar products are not ranked: %s", error)
        return None, stamp


def refresh_serving_model(model: ServingModel, folder: Path) -> ServingModel:
    """Reads what has changed in the same index version.

    Args:
      model: the version in use.
      folder: its folder.

    Returns:
      `model`, or a copy with the new ranker.
    """
    model.index.refresh()
    if _file_stamp(folder) == model.ranker_stamp:
        return model
    ranker, stamp = _read_usable_ranker(folder, model.index)
    searcher = dataclasses.replace(model.searcher, ranker=ranker)
    return dataclasses.replace(model, searcher=searcher, ranker_stamp=stamp)


def _limit_blas_threads() -> None:
    # numpy's matrix products of a query are small. OpenBLAS's threads spin for some milliseconds
    # after each, on the cores that the engine needs: photos took twice as long.
    threadpoolctl.threadpool_limits(1, user_api="blas")


class ModelManager:
    """Holds the `ServingModel` in use and follows changes of the index.

    Attributes:
      current: what answers requests now; a request keeps the one it began with.
    """

    def __init__(self, settings: ServiceSettings, current: ServingModel):
        self.settings, self.current = settings, current

    async def watch(self) -> None:
        """Follows changes of the index until cancelled.

        Where an update fails the old model stays, the error is logged, and the next try is a minute
        later.
        """
        loop, not_before = asyncio.get_running_loop(), 0.0
        while True:
            await asyncio.sleep(self.settings.reload_seconds)
            if loop.time() < not_before:
                continue
            try:
                await self._update()
            except Exception as error:  # whatever it is, the service and this task go on
                not_before = loop.time() + _RETRY_SECONDS
                _log.error(
                    "index not reloaded, %s stays: %s: %s",
                    self.current.version,
                    type(error).__name__,
                    one_line_error(error, 300),
                )

    async def _update(self) -> None:
        loop = asyncio.get_running_loop()
        folder = layout.current_version(Path(self.settings.index))
        if folder.name == self.current.version:
            self.current = await loop.run_in_executor(
                None, refresh_serving_model, self.current, folder
            )
            return
        self.current = await loop.run_in_executor(
            None, load_serving_model, self.settings, self.current
        )
        _log.info("index %s in use, model %s", self.current.version, self.current.model_id)
