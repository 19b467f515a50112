"""Imports a manifest, a folder of photos or a named data set into a catalogue on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.util
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import sicot_jax
from sicot_jax.catalog.importing.settings import CatalogImportError, ImportSettings
from sicot_jax.catalog.sources.imported import data_set_folders, read_description, version_folders
from sicot_jax.catalog.sources.integrity import write_catalog_checksums
from sicot_jax.catalog.sources.tables import (
    CLASSES_FILE,
    SPLITS_FILE,
    read_class_table,
    read_split_table,
)
from sicot_jax.common.files import file_lock

if TYPE_CHECKING:
    from sicot_jax.catalog.importing.builder import CatalogBuilder, ImportJob
    from sicot_jax.catalog.importing.report import ImportReport
    from sicot_jax.catalog.importing.settings import TitleSource

DATA_SETS = ("fashion_products", "generated", "grocery_store", "imaterialist", "webvision1k")

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_LOCK_FILE = ".import.lock"


@dataclasses.dataclass(frozen=True)
class ImportResult:
    """A finished import.

    Attributes:
      folder: version folder of the catalogue.
      report: counts and names.
    """

    folder: Path
    report: ImportReport


def import_catalog(
    source: Path,
    out: Path,
    *,
    settings: ImportSettings | None = None,
    dataset: str | None = None,
    name: str | None = None,
    workers: int | None = None,
    title_source: TitleSource | None = None,
) -> ImportResult:
    """Imports a source into `out/<name>/<version>`; a further import makes the next version.

    The next version keeps the class ids and, except where the source names a split, the split of
    every photo. Whatever stops an import, `out` holds nothing of it.

    Args:
      source: a manifest, a folder with one folder per SKU, or with `dataset` the folder with the
        owner's files.
      out: folder of the catalogue; made if missing.
      settings: how photos, words and splits are made.
      dataset: one of DATA_SETS.
      name: lower-case letters, digits, underscores; by default `dataset`, else the one in `out`,
        else after the source.
      workers: processes that decode photos; by default one per CPU core. The result does not depend
        on it.
      title_source: gives training photos without a title one.

    Returns:
      The new version folder and the report.

    Raises:
      CatalogImportError: wrong arguments, too many bad rows, or `out` cannot be written.
      ManifestError: the source cannot be read.
      TableError: the manifest cannot be read.
    """
    source, out = Path(source).absolute(), Path(out).absolute()
    workers = _cpu_count() if workers is None else workers
    if workers < 1:
        raise CatalogImportError(f"workers={workers}, wanted at least 1")
    if os.fsencode(out) != str(out).encode(errors="replace"):
        raise CatalogImportError(
            f"--out {str(out)!a}: the path is not UTF-8, which the photos' files need; "
            "give another --out, or rename its folder"
        )
    if not source.is_file() and not source.is_dir():
        raise CatalogImportError(
            f"{source} not found as a file or folder; wanted a manifest, or a folder with photos"
        )
    # Not at the top: the command line reads DATA_SETS, also where TFDS is not installed.
    from sicot_jax.catalog.importing.builder import ImportJob, ManifestBuilder

    builder_class = ManifestBuilder if dataset is None else load_builder(dataset)
    job = ImportJob(
        source, out, settings or ImportSettings(), workers, name, title_source=title_source
    )
    try:
        with _locked(out):
            return _build_next_version(builder_class, job, dataset)
    except BrokenProcessPool:
        raise CatalogImportError(
            "a decoding process died, wanted it to go on; out of memory? try --workers 1"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CatalogImportError(
                f"no space left in {out}; nothing was kept of it; free space or give another --out"
            ) from None
        raise CatalogImportError(
            f"{error.filename or out}: {error.strerror or error}; check --out and source"
        ) from error


def _build_next_version(
    builder_class: type[CatalogBuilder], job: ImportJob, dataset: str | None
) -> ImportResult:
    out = job.data_dir
    present = [folder.name for folder in data_set_folders(out)]
    name = job.name or dataset or (present[0] if present else _default_name(job.source))
    if not _NAME.fullmatch(name):
        raise CatalogImportError(
            f"name {name!r}, wanted lower-case letters, digits and underscores; give another --name"
        )
    if present and name not in present:
        raise CatalogImportError(
            f"{out} holds the catalogue {present[0]!r}, not {name!r}; "
            "choose another --out or --name"
        )
    for leftover in (out / name).glob("incomplete.*"):
        shutil.rmtree(leftover)
    job = dataclasses.replace(job, name=name)
    versions = version_folders(out / name)
    if versions:
        read_description(versions[-1])  # refuses a newer format
        major, minor, patch = map(int, versions[-1].name.split("."))
        job = dataclasses.replace(
            job,
            version=f"{major}.{minor}.{patch + 1}",
            previous=read_class_table(versions[-1] / CLASSES_FILE),
            previous_splits=read_split_table(versions[-1] / SPLITS_FILE),
        )
    builder = builder_class(job)
    _write(builder, out)
    assert builder.report is not None
    return ImportResult(out / name / job.version, builder.report)


def _write(builder: CatalogBuilder, out: Path) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()  # ours counts photos
    try:
        # TFDS announces downloads and makes folders for them; there are none.
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as downloads:
            builder.download_and_prepare(download_dir=downloads, file_format="array_record")
        write_catalog_checksums(Path(builder.data_path))
    finally:
        # An empty data set folder of a stopped import would be left behind.
        with contextlib.suppress(OSError):
            (out / builder.name).rmdir()


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default_name(source: Path) -> str:
    stem = source.name if source.is_dir() else Path(source.name.removesuffix(".gz")).stem
    cleaned = re.sub(r"[^a-z0-9]+", "_", stem.lower()).strip("_")
    return cleaned if _NAME.fullmatch(cleaned) else "catalogue"


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Locks `out` for one import; the system frees the lock of a process that dies."""
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    path = out / _LOCK_FILE
    refusal = CatalogImportError(
        f"another import is writing to {out}; wait for it or give another --out"
    )
    with file_lock(path, refusal):
        try:
            yield
        finally:
            # The lock file stays next to the data sets: removing it while a second import opens it
            # would give two locks.
            if created and not any(entry.name != _LOCK_FILE for entry in out.iterdir()):
                path.unlink()
                with contextlib.suppress(OSError):
                    for folder in created:
                        folder.rmdir()


def load_builder(dataset: str) -> type[CatalogBuilder]:
    """Returns the builder class of a data set, from `data/` of a checkout or the installed package.

    Args:
      dataset: one of DATA_SETS.

    Returns:
      The class `Builder` of its module.

    Raises:
      CatalogImportError: no such data set.
    """
    if dataset not in DATA_SETS:
        raise CatalogImportError(f"data set {dataset!r}, wanted one of {', '.join(DATA_SETS)}")
    package = Path(sicot_jax.__file__).parent
    relative = Path("data", dataset, f"{dataset}_dataset_builder.py")
    for root in (package.parent, package):
        if (root / relative).is_file():
            return _load_module(
                f"sicot_jax.data.{dataset}.{dataset}_dataset_builder", root / relative
            ).Builder
    raise CatalogImportError(
        f"no {relative} in {package.parent} or {package}; install sicot_jax again"
    )


def _load_module(name: str, path: Path) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
