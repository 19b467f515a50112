"""A photo's whole way, over HTTP by the service's own process: category, box, product, similar ones
in the ranker's order.
"""

import json

import pytest
from helpers.index_maker import GOOD, PRODUCTS, jpeg, photo, sku, visit, write_index, write_model
from helpers.service_process import serving

from sicot_jax.cli import main as cli
from sicot_jax.index.storage import layout
from sicot_jax.indexing import fit_ranker as rank
from sicot_jax.search.ranker import read_ranker

pytest.importorskip("lightgbm", reason="the ranker needs the service's extra")


@pytest.mark.slow
def test_a_photo_s_whole_way(tmp_path, monkeypatch):
    """What the service is asked, shown and told becomes the order that it answers in."""
    monkeypatch.setattr(rank, "FEWEST", 20)
    write_model(tmp_path / "model", box="image")
    write_index(tmp_path / "index", tmp_path / "model")
    events, photos = visit(tmp_path / "index", tmp_path)
    asked = ["--index", str(tmp_path / "index"), "--events", str(events), "--queries", str(photos)]
    assert cli.main(["index", "rank", *asked]) == 0
    ranker = read_ranker(layout.current_version(tmp_path / "index") / layout.RANKER)

    with serving(tmp_path / "index") as server:

        def answer(query=""):
            data = jpeg(photo(1, 99), "PNG")
            status, body = server.request(
                "POST", f"/v1/recognize{query}", data, {"Content-Type": "image/png"}
            )
            assert status == 200, body
            return json.loads(body)

        found = answer("?similar=3")
        assert found["products"][0]["sku"] == sku(1)
        assert found["known"] is True
        assert len(found["products"]) == 5
        assert found["categories"][0]["name"] == found["searched"] == "kind 1"
        assert {product["category"] for product in found["similar"]} == {"kind 1"}
        assert len(found["similar"]) == 3
        assert found["box"] == pytest.approx([0, 0, 1, 1], abs=0.02)
        assert found["box_given"] is False
        assert found["ranker"] == ranker.version[:12]
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
