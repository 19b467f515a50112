"""`sicot index nightly`: import, build, switch; and the same again."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from helpers.made_photos import jpeg, photo

from sicot_jax import config as config_lib
from sicot_jax.catalog.importing.run import import_catalog
from sicot_jax.cli import main as cli
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import layout
from sicot_jax.indexing.verify import verify_version
from sicot_jax.training.loop import train


def shop(folder, products, photos=12):
    """A manifest with some photos of each product."""
    folder.mkdir(exist_ok=True)
    with (folder / "products.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "sku", "title", "category"))
        for product in products:
            for number in range(photos):
                name = f"{product}_{number}.jpg"
                (folder / name).write_bytes(jpeg(photo(product, number)))
                writer.writerow(
                    (name, f"sku-{product}", f"fine thing number {product}", f"kind {product % 2}")
                )
    return folder / "products.csv"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A shop, its catalogue, and a run on it."""
    folder = tmp_path_factory.mktemp("night")
    import_catalog(shop(folder / "shop", range(9)), folder / "catalog", workers=1)
    overrides = [
        "data.source=imported",
        f"data.path={folder / 'catalog'}",
        "train.steps=3",
        "loss.mixed=0",
    ]
    train(
        config_lib.load_config("tiny", [f"--config.{flag}" for flag in overrides]), folder / "run"
    )
    return folder


@pytest.fixture
def night(trained, tmp_path, capsys):
    """(shop folder, index folder, one night: exit code, what was printed, the report)."""
    folder = tmp_path / "night"
    shutil.copytree(trained, folder, symlinks=True)
    for name in ("products.csv",):
        assert (folder / "shop" / name).exists()

    def run(*more):
        capsys.readouterr()
        flags = {
            "manifest": "shop/products.csv",
            "catalog": "catalog",
            "workdir": "run",
            "index": "index",
        }
        command = [f"--{name}={folder / relative_path}" for name, relative_path in flags.items()]
        code = cli.main(
            ["index", "nightly", *command, *more, f"--report={folder / 'out' / 'night.json'}"]
        )
        report = folder / "out" / "night.json"
        return code, capsys.readouterr(), json.loads(report.read_text()) if report.exists() else {}

    return folder / "shop", folder / "index", run


@pytest.mark.slow
def test_nightly_builds_skips_and_builds_again(night):
    """The first run builds, the second skips, and after changes there is another version."""
    folder, index, run = night
    code, printed, report = run()
    assert code == 0
    assert report["switched"]
    assert report["products"] == {"before": 0, "now": 9, "new": 9, "deleted": 0}
    code, printed, report = run()
    assert code == 0
    assert "nothing changed: v000001 stays in use" in printed.out
    assert not report["switched"]
    shop(folder, [0, 1, 2, 3, 5, 6, 7, 8, 11])
    code, printed, report = run()
    assert code == 0
    assert report["imported"]
    assert report["version"] == "v000002"
    assert report["products"] == {"before": 9, "now": 9, "new": 1, "deleted": 1}
    version = layout.current_version(index)
    assert verify_version(version, checksums=True) == []
    opened = LocalIndex(version)
    assert opened.product("sku-4") is None
    assert opened.product("sku-11").title == "fine thing number 11"
    assert opened.active_products().deleted.tolist() == [4]
    assert opened.active_products().new_products.tolist() == [9]
    features = np.asarray(opened._snapshot.features, np.float32)
    owners = np.asarray(opened._snapshot.row_products)
    nearest = opened.nearest(features[owners == 9][:1], 1)[0].products[0]
    assert nearest.product_id == 9
    opened.close()


@pytest.mark.slow
def test_mass_changes_stop_before_the_switch(night):
    """A feed that was cut, one without titles, and one with other SKUs: the index stays.

    The whole feed again, and a change that is allowed, go on.
    """
    folder, index, run = night
    assert run()[0] == 0
    whole = (folder / "products.csv").read_text()
    header, *lines = whole.splitlines()
    feeds = {
        "6 of 9 products would be withdrawn, such as 'sku-3'": whole.splitlines()[:37],
        "9 of 9 products would lose the title": [
            re.sub("fine thing number .,", ",", line) for line in whole.splitlines()
        ],
        "9 of 9 products would be renamed": whole.replace("fine", "coarse").splitlines(),
        "9 of 9 products would be withdrawn": whole.replace("sku-", "0sku-").splitlines(),
        "of products that stay would go; at most 20 %": [header, *lines[::3]],  # photos
    }
    for said, feed in feeds.items():
        (folder / "products.csv").write_text("\n".join(feed) + "\n")
        for _ in range(2):  # also where the import is done already
            code, printed, _ = run()
            assert code == cli.INPUT_ERROR
            assert said in printed.err.replace("20%", "20 %")
            assert "give --max-change-share 1 once if this is right" in printed.err
            assert layout.current_version(index).name == "v000001"
    # What was refused is not the newest catalogue, which a training would take.
    versions = {path.parent.name for path in (folder.parent / "catalog").rglob("classes.csv")}
    assert versions == {"1.0.0"}
    (folder / "products.csv").write_text(whole)
    code, printed, report = run()
    assert code == 0
    assert report["products"]["now"] == 9
    (folder / "products.csv").write_text("\n".join(whole.splitlines()[:37]) + "\n")
    code, printed, report = run("--max-change-share=1")
    assert code == 0
    assert report["products"] == {"before": 9, "now": 3, "new": 0, "deleted": 6}


@pytest.mark.slow
def test_index_of_another_format_is_built_again(night):
    _, index, run = night
    assert run()[0] == 0
    stored = json.loads((path := layout.current_version(index) / layout.MANIFEST).read_text())
    path.write_text(json.dumps({**stored, "format": 1}))
    code, printed, report = run()
    assert code == 0
    assert report["version"] == "v000002"
    assert not report["imported"]
    assert "format 1, this version reads" in printed.err
    assert report["products"] == {"before": 9, "now": 9, "new": 0, "deleted": 0}


@pytest.mark.slow
def test_failed_run_leaves_the_index(night):
    """A shop whose photos are missing: one line, and the version in use stays."""
    folder, index, run = night
    assert run()[0] == 0
    for path in folder.glob("*.jpg"):
        path.unlink()
    (folder / "products.csv").touch()
    code, printed, _ = run()
    assert code == cli.INPUT_ERROR
    assert len(printed.err.strip().splitlines()[-1:]) == 1
    assert layout.current_version(index).name == "v000001"
    assert verify_version(layout.current_version(index)) == []


@pytest.mark.database
def test_nightly_publishes_to_a_database(night, database_server):
    """Also after a failed publish: the new version is in use, and the next run publishes it."""
    _folder, index, run = night
    flag = f"--database={database_server.url()}"
    code, printed, report = run("--database=postgresql://nobody@127.0.0.1:9/none")
    assert code == cli.INPUT_ERROR
    assert "start the database" in printed.err
    assert layout.current_version(index).name == "v000001"
    code, printed, report = run(flag)
    assert code == 0
    assert "v000001 stays in use\ndatabase: v000001, revision 1: 74 photos new" in printed.out
    assert not report["switched"]
    assert report["published"].startswith("v000001, revision 1")
    code, printed, report = run(flag)
    assert code == 0
    assert report["published"] == "v000001, revision 1: is there already"
