"""A small imported catalogue for the benchmark scripts."""

import csv

import numpy as np
import pytest


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A catalogue of two products with eight photos each."""
    from PIL import Image

    from sicot_jax.catalog.importing.run import import_catalog

    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "sku", "title"))
        for index in range(16):
            Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(
                folder / f"{index}.jpg"
            )
            writer.writerow((f"{index}.jpg", f"sku-{index % 2}", "red shirt"))
    import_catalog(folder / "manifest.csv", folder / "catalogue", workers=1)
    return folder / "catalogue"
