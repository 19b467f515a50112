"""A photo's way through the service process over HTTP: category, box, product, similar ones
in the ranker's order.
"""

import json

import pytest
from helpers.made_photos import jpeg, photo, sku
from helpers.service_process import serving
from helpers.small_index import GOOD, PRODUCTS, build_small_index, record_visits

from sicot_jax.cli import main as cli
from sicot_jax.index.storage import layout
from sicot_jax.indexing import fit_ranker
from sicot_jax.search.ranker import read_ranker

pytest.importorskip("lightgbm", reason="the ranker needs the service's extra")


@pytest.mark.slow
def test_events_train_the_ranker_of_the_service(tmp_path, monkeypatch):
    """Events of the service become the order of its similar products."""
    monkeypatch.setattr(fit_ranker, "MIN_CLICKED_LISTS", 20)
    build_small_index(tmp_path / "index", box="image")
    events, photos = record_visits(tmp_path / "index", tmp_path)
    flags = ["--index", str(tmp_path / "index"), "--events", str(events), "--queries", str(photos)]
    assert cli.main(["index", "rank", *flags]) == 0
    ranker = read_ranker(layout.current_version(tmp_path / "index") / layout.RANKER)

    with serving(tmp_path / "index") as server:

        def answer(query=""):
            data = jpeg(photo(1, 99), "PNG")
            status, body = server.request(
                "POST", f"/v1/recognize{query}", data, {"Content-Type": "image/png"}
            )
            assert status == 200, body
            return json.loads(body)

        content = answer("?similar=3")
        assert content["products"][0]["sku"] == sku(1)
        assert content["known"] is True
        assert len(content["products"]) == 5
        assert content["categories"][0]["name"] == content["searched"] == "kind 1"
        assert {product["category"] for product in content["similar"]} == {"kind 1"}
        assert len(content["similar"]) == 3
        assert content["box"] == pytest.approx([0, 0, 1, 1], abs=0.02)
        assert content["box_given"] is False
        assert content["ranker"] == ranker.version[:12]
        every = "?similar=6&any_category=true"
        ranked, nearest = answer(every), answer(f"{every}&rerank=false")
        assert ranked["searched"] is None
        assert len(ranked["similar"]) == PRODUCTS
        assert nearest["ranker"] is None
        assert {product["sku"] for product in ranked["similar"][:2]} == set(map(sku, GOOD))
        assert {product["sku"] for product in nearest["similar"][:2]} != set(map(sku, GOOD))
        part = answer(f"{every}&box=0.1,0.1,0.9,0.9")
        assert part["box"] == [0.1, 0.1, 0.9, 0.9]
        assert part["box_given"] is True
