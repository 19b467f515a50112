"""Imports all Fashion photos where they are available."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from sicot_jax.catalog.catalog import SPLITS
from sicot_jax.catalog.importing.run import import_catalog
from sicot_jax.catalog.importing.settings import ImportSettings
from sicot_jax.catalog.sources.imported import open_imported

pytestmark = pytest.mark.real_data

DATA = Path(os.environ.get("SICOT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = DATA / "fashion_products"
    if not (folder / "styles.csv").exists():
        pytest.skip(
            f"no Fashion photos in {folder}; "
            "set SICOT_SHARED_DATA to the folder that holds fashion_products/"
        )
    settings = ImportSettings(word_epochs=1, word_width=16)
    return import_catalog(
        folder, tmp_path_factory.mktemp("fashion"), settings=settings, dataset="fashion_products"
    )


def test_counts(imported):
    report = imported.report
    assert report.read == 37_551
    assert report.dropped["no brand in the title"]["count"] == 3_188
    assert report.classes == 672
    assert not report.small_classes
    assert report.kept + report.surplus_copies == 37_551 - sum(
        entry["count"] for entry in report.dropped.values()
    )
    assert not any(entry["bad"] for entry in report.dropped.values())
    assert len(report.conflicting) > 0


def test_no_photo_is_in_two_splits(imported):
    catalog = open_imported(imported.folder)
    seen: dict[str, str] = {}
    for split in SPLITS:
        records = catalog.splits[split]
        for i in range(len(records)):
            record = records[i]
            assert seen.setdefault(record["image_id"], split) == split
            assert record["class_id"] == records.labels[i]
    conflicting = {group["image_id"] for group in imported.report.conflicting}
    assert {seen[image_id] for image_id in conflicting} == {"train"}


def test_every_class_has_all_three_splits(imported):
    counts = open_imported(imported.folder).classes.counts
    for split in SPLITS:
        assert np.count_nonzero(counts[split]) >= 0.99 * 672
    assert counts["test"].max() == 20
    assert counts["train"].min() >= 1


def test_both_variants_train_on_real_photos(imported, tmp_path):
    """Two steps of the Fashion config for each variant: the table has the right counts."""
    import dataclasses

    from sicot_jax import config
    from sicot_jax.experiments import sweep
    from sicot_jax.report.runs import read_run_folder

    fashion = config.load_config(
        "fashion", [f"--config.data.path={imported.folder}", "--config.train.steps=2"]
    )
    fashion = dataclasses.replace(
        fashion,
        model=dataclasses.replace(fashion.model, width=8),
        eval=dataclasses.replace(fashion.eval, max_photos=256),
    )
    sweep.compare(fashion, tmp_path)
    for variant in ("baseline", "co_training"):
        finished = read_run_folder(tmp_path / variant)
        accuracy = finished.results["accuracy"]
        assert accuracy["overall"]["photos"] == 256
        assert accuracy["head"]["photos"] + accuracy["tail"]["photos"] == 256
        assert np.isfinite(finished.results["accuracy"]["overall"]["top1"])
    assert "head (more than 100 training photos)" in (tmp_path / "report" / "report.md").read_text()
