"""The ablation of the search on test photos."""

import dataclasses
import types

import numpy as np
import pytest
from helpers.made_photos import jpeg, photo, sku
from helpers.small_index import PRODUCTS

from sicot_jax.cli import main as cli
from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout
from sicot_jax.indexing import evaluate as evaluation
from sicot_jax.search.category import read_fusion, write_fusion


@pytest.fixture
def catalog(monkeypatch):
    """Three new photos of each product; those of product 0 are labelled as product 1."""
    records = [
        {
            "image": jpeg(photo(p, 90 + n)),
            "sku": sku(max(p, 1)),
            "category": f"kind {max(p, 1) % 2}",
        }
        for p in range(PRODUCTS)
        for n in range(3)
    ]
    catalog = types.SimpleNamespace(name="made", data_hash="0", splits={"test": records})
    monkeypatch.setattr(evaluation, "open_catalog", lambda config: catalog)
    return catalog


def cells(table):
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    return rows[0], {line[0]: line[1:] for line in rows[2:]}


def test_table_by_hand(index, catalog):
    """3 of 18 photos are labelled as another product, found when all categories are searched."""
    path = layout.current_version(index) / layout.CATEGORY_FUSION
    write_fusion(path, dataclasses.replace(read_fusion(path), confident_from=0.0))
    header, rows = cells(evaluation.evaluate_search([index, index], "somewhere"))
    assert header[0] == "made, 18 test photos, 2 seeds"
    assert len(header) == 7
    assert rows[evaluation.ALL_MODULES] == ["83.33", "100.00", "83.33", "83.33", "83.33", "83.33"]
    everywhere = rows["similar products of all categories"]
    assert everywhere[:3] == ["0", "0", "0"]
    assert everywhere[4].startswith("+16.67 [")
    assert everywhere[5].startswith("-33.33 [")  # half of the products are of either kind
    assert rows["no category"][5] == everywhere[5]
    assert set(rows["exact search instead of codes"]) == {"0"}


def test_index_without_categories(index, catalog):
    version = layout.current_version(index)
    (version / layout.CATEGORY_FUSION).unlink()
    _, rows = cells(evaluation.evaluate_search([index], "somewhere"))
    assert list(rows) == [evaluation.ALL_MODULES, "exact search instead of codes"]


def test_ranker_is_an_ablation(index, catalog, monkeypatch):
    """A ranker that reverses the order: without it, the nearest is first again."""

    class Reversed:
        def scores(self, similarity, products):
            return -similarity

    _, before = cells(evaluation.evaluate_search([index], "somewhere"))
    monkeypatch.setattr(evaluation, "read_ranker", lambda path: Reversed())
    _, rows = cells(evaluation.evaluate_search([index], "somewhere"))
    assert rows[evaluation.ALL_MODULES][2] == "0.00"
    assert before[evaluation.ALL_MODULES][2] == "83.33"
    assert rows["similar products nearest first"][2].startswith("+83.33 [")


def test_index_of_another_catalogue_is_refused(index, catalog):
    catalog.data_hash = "1"
    with pytest.raises(
        InputError, match="of another catalogue than made; give the one it was built from"
    ):
        evaluation.evaluate_search([index], "somewhere")


def test_command(index, catalog, capsys):
    cli.main(["evaluate", "search", "--index", str(index), "--catalog", "somewhere"])
    assert "made, 18 test photos, 1 seeds" in capsys.readouterr().out
    for arguments, missing in ((["search", "--catalog", "x"], "--index"), (["run"], "--workdir")):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["evaluate", *arguments])
        assert f"the following arguments are required: {missing}" in capsys.readouterr().err


def test_cell_shows_the_interval():
    assert evaluation._cell(np.zeros((2, 5))) == "0"
    assert evaluation._cell(np.ones((2, 5))) == "+100.00 [+100.00, +100.00]"
