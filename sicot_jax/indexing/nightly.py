"""`sicot index nightly`: imports what changed, builds, checks and switches; safe to repeat."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sicot_jax.catalog.importing.photos import source_sha256
from sicot_jax.catalog.importing.run import import_catalog
from sicot_jax.catalog.sources.imported import (
    newest_version,
    read_description,
    read_import_source,
)
from sicot_jax.common.files import file_sha256, write_json
from sicot_jax.errors import InputError
from sicot_jax.index.backends.open import publish_index
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.binary_codes import PCA
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import import_faiss
from sicot_jax.indexing.build import DEFAULT_BITS, build_index
from sicot_jax.indexing.mass_changes import MAX_CHANGE_SHARE, check_source
from sicot_jax.training.provenance import utc_now
from sicot_jax.training.run import read_run


@dataclasses.dataclass(frozen=True)
class NightlyPaths:
    """Folders and files of a nightly run.

    Attributes:
      manifest: manifest of the products, or a folder with one folder per SKU.
      catalog: folder of the imported catalogue.
      workdir: run folder of the model.
      index: index folder.
    """

    manifest: Path
    catalog: Path
    workdir: Path
    index: Path


@dataclasses.dataclass(frozen=True)
class NightlyReport:
    """What a nightly run did.

    Attributes:
      imported: whether the catalogue has a new version.
      switched: whether the index has a new version.
      version: name of the version in use.
      products: products "before" and "now", "new" and "deleted" ones.
      photos: photos "before" and "now".
      published: what was copied to the database; "" without one.
      seconds: step -> seconds.
      when: end of the run, UTC, ISO 8601.
    """

    imported: bool
    switched: bool
    version: str
    products: dict[str, int]
    photos: dict[str, int]
    published: str
    seconds: dict[str, float]
    when: str

    def summary(self) -> str:
        """Returns the report as one or two lines."""
        lines = self._switch_line(), self.published and f"database: {self.published}"
        return "\n".join(line for line in lines if line)

    def _switch_line(self) -> str:
        if not self.switched:
            return f"nothing changed: {self.version} stays in use"
        products, photos = (
            {name: f"{count:,}" for name, count in counts.items()}
            for counts in (self.products, self.photos)
        )
        return (
            f"{self.version} in use: {products['now']} products ({products['new']} new, "
            f"{products['deleted']} deleted), {photos['now']} photos (before: {photos['before']})"
        )


def run_nightly(
    paths: NightlyPaths,
    *,
    database: str = "",
    report_file: Path | None = None,
    max_change_share: float = MAX_CHANGE_SHARE,
) -> NightlyReport:
    """Imports the manifest, builds the next version of the index and publishes it.

    Steps whose input did not change are skipped. After a failure the version in use stays, and the
    same command continues where it can.

    Args:
      paths: folders and files.
      database: URL to publish to; "" for none.
      report_file: JSON file for the report.
      max_change_share: share of the products that may be withdrawn, renamed, or lose title or
        category; beyond it the version in use stays.

    Returns:
      What was done.

    Raises:
      InputError: a step fails, or more products would change than allowed.
    """
    import_faiss()  # fails here without it, before anything is imported
    seconds: dict[str, float] = {}
    built_from = _read_built_from(paths.index)
    with _timed(seconds, "import"):
        source = read_import_source(paths.catalog)
        imported = source is None or source["source_sha256"] != source_sha256(paths.manifest)
        if imported:
            # Before the import: a refused source must not become the newest catalogue.
            check_source(paths.index, paths.manifest, max_change_share)
            import_catalog(paths.manifest, paths.catalog)
    with _timed(seconds, "build"):
        before = _active_skus(paths.index)
        switched = _build_if_changed(paths, built_from, max_change_share)
    with _timed(seconds, "publish"):
        published = publish_index(paths.index, database) if database else ""
    (skus_before, photos_before), (skus, photos) = before, _active_skus(paths.index)
    report = NightlyReport(
        imported=imported,
        switched=switched,
        version=layout.current_version(paths.index).name,
        products={
            "before": len(skus_before),
            "now": len(skus),
            "new": len(skus - skus_before),
            "deleted": len(skus_before - skus),
        },
        photos={"before": photos_before, "now": photos},
        published=published,
        seconds={name: round(value, 1) for name, value in seconds.items()},
        when=utc_now(),
    )
    if report_file is not None:
        stored: dict[str, Any] = {"format": layout.FORMAT, **dataclasses.asdict(report)}
        report_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(report_file, stored)
    return report


@contextlib.contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start


def _build_if_changed(
    paths: NightlyPaths, built_from: layout.IndexManifest | None, max_change_share: float
) -> bool:
    """Builds the next version where catalogue or run changed; returns whether they did."""
    run = read_run(paths.workdir)
    if run.config.data.source != "imported":
        raise InputError(
            f"{paths.workdir}: trained on {run.config.data.source} data, wanted a run on an "
            "imported catalogue"
        )
    data_hash = read_description(newest_version(paths.catalog))["data_hash"]
    results = paths.workdir / "results.json"
    results_sha256 = file_sha256(results) if results.exists() else ""
    if built_from and (built_from.data_hash, built_from.results_sha256) == (
        data_hash,
        results_sha256,
    ):
        return False
    kind, bits = (built_from.code_kind, built_from.bits) if built_from else (PCA, DEFAULT_BITS)
    build_index(
        paths.workdir,
        paths.index,
        catalog_path=str(paths.catalog),
        code_kind=kind,
        bits=bits,
        max_change_share=max_change_share,
    )
    return True


def _read_built_from(index: Path) -> layout.IndexManifest | None:
    """The manifest of the version in use; None where it has to be built in any case.

    InputError where it is sharded, before anything is done.
    """
    if not (index / layout.CURRENT).exists():
        return None
    folder = layout.current_version(index)
    try:
        manifest = layout.read_index_manifest(folder)
    except InputError as error:
        print(f"{error}; done now", file=sys.stderr)
        return None
    return layout.read_unsharded_manifest(folder) if manifest.num_shards else manifest


def _active_skus(index: Path) -> tuple[set[str], int]:
    """SKUs and the number of photos that are not deleted; none where there is no index yet."""
    if not (index / layout.CURRENT).exists():
        return set(), 0
    path = layout.current_version(index) / layout.PRODUCTS
    with contextlib.closing(ProductStore(path)) as store:
        lines = store.connection.execute("SELECT sku FROM products WHERE NOT deleted")
        return {line[0] for line in lines}, store.counts()["photos"]
