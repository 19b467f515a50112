"""Imports the Grocery Store photos where they are available: official splits, exponential tail."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sicot_jax.catalog.importing.run import import_catalog
from sicot_jax.catalog.importing.settings import ImportSettings
from sicot_jax.catalog.sources.imported import open_imported

pytestmark = pytest.mark.real_data

DATA = Path(os.environ.get("SICOT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def folder():
    folder = DATA / "grocery_store"
    if not folder.exists():
        pytest.skip(
            f"no Grocery photos in {folder}; "
            "set SICOT_SHARED_DATA to the folder that holds grocery_store/"
        )
    return folder


def test_official_splits_and_the_tail(folder, tmp_path):
    settings = ImportSettings(tail_cut=50, word_epochs=1, word_width=16)
    imported = import_catalog(folder, tmp_path, settings=settings, dataset="grocery_store")
    assert imported.report.read == 5_421
    assert imported.report.classes == 81
    assert not imported.report.dropped
    photos = imported.report.photos
    assert (photos["validation"], photos["test"]) == (296, 2_485)
    assert photos["train"] + imported.report.tail_cut == 2_640
    counts = sorted(open_imported(tmp_path).classes.counts["train"].tolist())
    assert counts[0] == 1
    assert 40 <= counts[-1] <= 50
