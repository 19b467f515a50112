"""`sicot index nightly`: a night in one command that may be given again: import what changed, build
beside, check, switch.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from sicot_jax.catalog.importing.fingerprint import source_sha256
from sicot_jax.catalog.importing.run import import_catalog
from sicot_jax.catalog.sources.imported import import_source, newest_version, read_description
from sicot_jax.common.files import file_sha256, write_json
from sicot_jax.errors import InputError
from sicot_jax.index.backends.open import publish
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.binary_codes import PCA
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.indexing.build import BITS, build
from sicot_jax.training import run as runs


@dataclasses.dataclass(frozen=True)
class Night:
    """What was done: seconds of each step, and counts before and after. `switched`: the index has a
    new version. `published`: what a database got, "" without one.
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
        return "\n".join(
            line
            for line in (self._switch(), self.published and f"database: {self.published}")
            if line
        )

    def _switch(self) -> str:
        if not self.switched:
            return f"nothing changed: {self.version} stays in use"
        products, photos = (
            {k: f"{v:,}" for k, v in counts.items()} for counts in (self.products, self.photos)
        )
        return (
            f"{self.version} in use: {products['now']} products ({products['new']} new, {products['gone']} gone), "
            f"{photos['now']} photos (before: {photos['before']})"
        )


def nightly(
    manifest: Path,
    catalog: Path,
    workdir: Path,
    index: Path,
    *,
    database: str = "",
    report: Path | None = None,
) -> Night:
    """The catalogue's next version from `manifest` where it or a photo changed, and the index's
    next version from that and the run, where either is another than the version in use was built
    from; then `database`, a URL, gets what it has not.

    InputError at the first step that fails; the version in use stays, and the same command goes on
    where it can.
    """
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    made_from = _made_from(index)
    there = import_source(catalog)
    changed = there is None or there["source_sha256"] != source_sha256(manifest)
    if changed:
        import_catalog(manifest, catalog)
    seconds["import"] = time.perf_counter() - start
    start = time.perf_counter()
    run = runs.read_run(workdir)
    if run.config.data.source != "imported":
        raise InputError(
            f"{workdir}: trained on {run.config.data.source} data, wanted a run on an imported catalogue"
        )
    data_hash = read_description(newest_version(catalog))["data_hash"]
    before = _skus(index)
    trained = file_sha256(workdir / "results.json") if (workdir / "results.json").exists() else ""
    switched = made_from is None or (made_from.data, made_from.trained) != (data_hash, trained)
    if switched:
        codes, bits = (made_from.codes, made_from.bits) if made_from else (PCA, BITS)
        build(workdir, index, path=str(catalog), codes=codes, bits=bits)
    seconds["build"] = time.perf_counter() - start
    start = time.perf_counter()
    published = publish(index, database) if database else ""
    seconds["publish"] = time.perf_counter() - start
    was, now = before or (set(), 0), _skus(index)
    assert now is not None
    night = Night(
        imported=changed,
        switched=switched,
        version=layout.current_version(index).name,
        products={
            "before": len(was[0]),
            "now": len(now[0]),
            "new": len(now[0] - was[0]),
            "gone": len(was[0] - now[0]),
        },
        photos={"before": was[1], "now": now[1]},
        published=published,
        seconds={name: round(value, 1) for name, value in seconds.items()},
        when=runs.now(),
    )
    if report is not None:
        stored: dict[str, Any] = {"format": layout.FORMAT, **dataclasses.asdict(night)}
        report.parent.mkdir(parents=True, exist_ok=True)
        write_json(report, stored)
    return night


def _made_from(index: Path) -> layout.IndexManifest | None:
    """The manifest of the version in use; None where there is none, or this version of the software
    cannot read it: it is built again. InputError where it is split, before anything is done.
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


def _skus(index: Path) -> tuple[set[str], int] | None:
    """SKUs and number of photos that are offered; None where there is no index yet."""
    if not (index / layout.CURRENT).exists():
        return None
    cards = ProductStore(layout.current_version(index) / layout.PRODUCTS)
    try:
        skus = {
            row[0]
            for row in cards.connection.execute("SELECT sku FROM products WHERE NOT withdrawn")
        }
        return skus, cards.counts()["photos"]
    finally:
        cards.close()
